"""What a sink is given to bring elsewhere, and how it says that it could not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from app.storage import Store


class SinkFailed(Exception):  # noqa: N818  one of two ends that a try may have
    """A try failed: a stable code, what was wrong and what to do. `final`: another try would not help."""

    def __init__(self, code: str, message: str, hint: str, *, final: bool) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.final = final


@dataclass(frozen=True)
class ResultFile:
    """A file of the result, as the job's manifest has it."""

    path: str
    role: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Result:
    """What a job brought forth."""

    job_id: str
    model: str
    method: str
    finished_ms: int  # since the epoch
    prefix: str  # of its files in the object store
    url: str  # where they lie, for whoever may read there
    files: Sequence[ResultFile]
    recipe: dict[str, Any]
    report: dict[str, Any]


def read(store: Store, result: Result, file: ResultFile) -> Iterator[bytes]:
    """The bytes of a file; SinkFailed in place of the last ones where they are not what the manifest says."""
    digest, held = sha256(), b""
    try:
        for chunk in store.get_range(result.prefix + file.path, 0, file.bytes):
            if held:
                yield held
            digest.update(chunk)
            held = chunk
    except FileNotFoundError as error:
        hint = "Submit the job's recipe again to have the files again."
        raise SinkFailed("artifacts_expired", "The files of the result were deleted.", hint, final=True) from error
    if digest.hexdigest() != file.sha256:
        message = f"'{file.path}' is not in the store as the worker wrote it."
        raise SinkFailed("artifact_damaged", message, "Tell the operator, and submit the job's recipe again.", final=True)
    yield held


def fetch(store: Store, result: Result, file: ResultFile, path: Path) -> None:
    """Copy a file of the result to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as target:
        for chunk in read(store, result, file):
            target.write(chunk)
