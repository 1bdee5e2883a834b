"""Of a stored checkpoint what `app.source` reads, as a folder: configurations, and weight files that are empty behind their headers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from app.checkpoints import repository, service
from app.checkpoints.repository import StoredFile
from app.checkpoints.service import MOST_BYTES
from app.database import Database
from app.source import CHECKPOINT_ID, Source, read_source
from app.storage import Store

LIKELY_BYTES = 2**17  # that most headers fit into, so that one request brings them


@contextmanager
def source_of(model: str, tenant_id: str, database: Database, store: Store) -> Iterator[Source | None]:
    """The uploaded checkpoint that a job's `model` names, while it is used; None where it names something else. Raises RecipeError."""
    if not CHECKPOINT_ID.fullmatch(model):
        yield None
        return
    with database.reading() as session:
        files = repository.list_files(session, service.get_ready(session, tenant_id, model))
    with skeleton(store, model, files) as folder:
        yield read_source(folder)


@contextmanager
def skeleton(store: Store, name: str, files: Sequence[StoredFile]) -> Iterator[Path]:
    """A folder with every file that lies in no folder, in its full size on paper; name: of the folder, which errors quote."""
    with TemporaryDirectory() as parent:
        folder = Path(parent, name)
        folder.mkdir()
        for file in files:
            if "/" not in file.path:
                write_beginning(folder / file.path, _beginning(store, file), file.bytes)
        yield folder


def write_beginning(path: Path, beginning: bytes, size: int) -> None:
    """A file of some size that takes no more disk than its beginning."""
    with path.open("wb") as stream:
        stream.write(beginning)
        stream.truncate(size)


def header_end(beginning: bytes) -> int:
    """Bytes of a safetensors file up to its data, told by its first eight."""
    return 8 + int.from_bytes(beginning[:8], "little")


def _beginning(store: Store, file: StoredFile) -> bytes:
    if file.path in MOST_BYTES:
        return b"".join(chunk for number, key in enumerate(file.keys) for chunk in store.get_range(key, 0, file.size(number)))
    if not file.path.endswith(".safetensors"):
        return b""
    beginning = b"".join(store.get_range(file.keys[0], 0, min(LIKELY_BYTES, file.size(0))))
    end = header_end(beginning)
    return beginning if end <= len(beginning) else beginning + b"".join(store.get_range(file.keys[0], len(beginning), end))
