"""Models that were fetched, below `<home>/models`: each one at one version, whole and verified, or not there.

An entry is a folder with

    lock         held shared by the jobs that use the model, and alone by a process that fetches or removes it; its time is that of the last use
    files.json   the model's files: sizes before the transfer, sha256s after it
    part/        the model while it is transferred; a later process goes on with it
    model/       the model, renamed when all of it was verified

Every use verifies all hashes again: the job is about to read all these bytes anyway, and a damaged file would spoil its result in silence.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from app.exceptions import RecipeError
from app.source import read_source
from worker.locks import take
from worker.state import sha256_of

HASHES_AT_ONCE = 4
USELESS_AFTER = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # else, as when a server went away, a later process goes on with the part
ROOM_PAUSE = 1.0  # seconds between two looks for room, while running jobs hold all of it


@dataclass(frozen=True)
class RemoteFile:
    bytes: int
    sha256: str | None = None  # where it is known before the transfer


@dataclass(frozen=True)
class RemoteModel:
    """A model that lies elsewhere, at one version: a commit, or a hash of what its files are."""

    name: str
    version: str
    files: dict[str, RemoteFile]
    transfer: Callable[[Path], None]  # brings all files into a folder; some may be there from a transfer that was killed

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files.values())


def find(models: Path, name: str, version: str) -> Path | None:
    """The folder of a model that is there, whole and undamaged."""
    entry = _entry(models, name, version)
    if not entry.is_dir():
        return None
    lock = take(entry, shared=True)
    if lock is None:
        return None
    try:
        return _verified(entry)
    finally:
        os.close(lock)


def fill(models: Path, limit: int, model: RemoteModel, tell: Callable[[str], None]) -> Path:
    """The folder of a model, fetched unless it is there; two processes that want the same fetch it once.

    limit: bytes of all models; 0: as many as the disk holds. Models that no job uses make room, the least recently used first; where jobs use all of them, this
    waits. Raises RecipeError for a model that can't be pruned or is larger than the limit, OSError (ENOSPC) where the disk is too small.
    """
    found = find(models, model.name, model.version)
    if found is not None:
        return found
    entry = _entry(models, model.name, model.version)
    lock = take(entry)
    if lock is None:
        tell(f"Waits for another job that fetches or uses '{model.name}'.")
        lock = take(entry, wait=True)
    assert lock is not None
    try:
        found = _verified(entry)
        if found is None:
            _make_room(models, limit, entry, model, tell)
            tell(f"Fetches '{model.name}', {model.bytes / 1e9:.2f} GB.")
            found = _transfer(entry, model)
        return found
    except RecipeError:
        _empty(entry)
        raise
    except OSError as error:
        if error.errno in USELESS_AFTER:
            _empty(entry)
        raise
    finally:
        os.close(lock)


def hold(folder: Path) -> int | None:
    """A descriptor that keeps a model from being removed for as long as it is open; None where it is gone already."""
    lock = take(folder.parent.parent, shared=True)
    if lock is not None and not folder.is_dir():
        os.close(lock)
        return None
    return lock


def _entry(models: Path, name: str, version: str) -> Path:
    return models / hashlib.sha256(f"{name}@{version}".encode()).hexdigest()[:32]


# --------------------------------------------------------------- one entry


def _transfer(entry: Path, model: RemoteModel) -> Path:
    """Bring the model, verify it and give it its name."""
    part = entry / "part" / _folder_name(model)
    part.mkdir(parents=True, exist_ok=True)
    model.transfer(part)
    hashes = _hashes(part, {name: file.bytes for name, file in model.files.items()})
    wrong = [name for name, file in model.files.items() if hashes.get(name) is None or file.sha256 not in (None, hashes[name])]
    if wrong or hashes.keys() != model.files.keys():
        raise OSError(errno.EIO, f"'{model.name}' did not arrive whole: {', '.join(wrong[:5])}")
    read_source(part)
    _write_files(entry, {name: RemoteFile(file.bytes, hashes[name]) for name, file in model.files.items()})
    part.parent.rename(entry / "model")
    return entry / "model" / part.name


def _folder_name(model: RemoteModel) -> str:
    return model.name.rstrip("/").rpartition("/")[2]  # users know it by this name, and errors quote it


def _verified(entry: Path) -> Path | None:
    """The model's folder, if all of it is there as it was fetched; this counts as a use."""
    files, folder = _read_files(entry), next((entry / "model").glob("*"), None)
    if folder is None or not files:
        return None
    if _hashes(folder, {name: file.bytes for name, file in files.items()}) != {name: file.sha256 for name, file in files.items()}:
        return None
    os.utime(entry / "lock")
    return folder


def _hashes(folder: Path, sizes: dict[str, int]) -> dict[str, str | None]:
    """sha256 of every file in a folder, None for one that has not the size that it should have."""

    def digest(path: Path) -> str | None:
        return sha256_of(path) if path.stat().st_size == sizes.get(path.name) else None

    paths = list(folder.iterdir())
    with ThreadPoolExecutor(HASHES_AT_ONCE) as pool:
        return dict(zip((path.name for path in paths), pool.map(digest, paths), strict=True))


def _read_files(entry: Path) -> dict[str, RemoteFile]:
    try:
        return {name: RemoteFile(**file) for name, file in json.loads((entry / "files.json").read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write_files(entry: Path, files: dict[str, RemoteFile]) -> None:
    unfinished = entry / "files.tmp"
    unfinished.write_text(json.dumps({name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in files.items()}), encoding="utf-8")
    unfinished.replace(entry / "files.json")


def _empty(entry: Path) -> None:
    """Remove all but the lock; the sizes go last, since the room counts as taken by them."""
    for name in ("part", "model"):
        shutil.rmtree(entry / name, ignore_errors=True)
    for name in ("files.tmp", "files.json"):
        (entry / name).unlink(missing_ok=True)


# -------------------------------------------------------------------- room


def _make_room(models: Path, limit: int, entry: Path, model: RemoteModel, tell: Callable[[str], None]) -> None:
    """Reserve the bytes of a model, by the sizes in its files.json."""
    if limit and model.bytes > limit:
        raise RecipeError(
            f"'{model.name}' takes {model.bytes / 1e9:.2f} GB, and the worker's model cache holds {limit / 1e9:.2f} GB.",
            code="model_too_large",
            hint="Prune a smaller model, or let the operator raise ESPALIER_MODEL_CACHE_BYTES.",
            pointer="/model",
        )
    shutil.rmtree(entry / "model", ignore_errors=True)  # what is left of a damaged one
    waits = False
    while True:
        with _alone(models):
            _write_files(entry, model.files)
            if _evict_until(lambda: _excess(models, limit, entry) <= 0, models, entry):
                return
            if not limit or _excess(models, 0, entry) > 0:
                raise OSError(errno.ENOSPC, f"'{model.name}' takes {model.bytes / 1e9:.2f} GB")
            _empty(entry)  # so that two that wait don't hold each other's room
        if not waits:
            tell(f"Waits for room in the model cache: running jobs use all {limit / 1e9:.2f} GB.")
            waits = True
        time.sleep(ROOM_PAUSE)


@contextmanager
def _alone(models: Path) -> Iterator[None]:
    """Room is given out by one process at a time."""
    lock = take(models, wait=True)
    assert lock is not None
    try:
        yield
    finally:
        os.close(lock)


def _excess(models: Path, limit: int, entry: Path) -> int:
    """Bytes by which the entries, as large as they will be, exceed the limit, or without one the disk."""
    entries = [path for path in models.iterdir() if path.is_dir()]
    reserved = {path: sum(file.bytes for file in _read_files(path).values()) for path in entries}
    missing = sum(reserved[path] - _stored(path / "part") for path in entries if path == entry or (path / "part").is_dir())
    beyond_disk = missing - shutil.disk_usage(models).free
    return max(beyond_disk, sum(reserved.values()) - limit) if limit else beyond_disk


def _stored(folder: Path) -> int:
    """Bytes on the disk, while others may rename and remove."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += (Path(place) / name).stat().st_blocks * 512
    return total


def _evict_until(enough: Callable[[], bool], models: Path, keep: Path) -> bool:
    """Remove entries that nobody holds, the least recently used first."""

    def used_at(entry: Path) -> float:
        return (entry / "lock").stat().st_mtime if (entry / "lock").exists() else 0.0

    for entry in sorted((path for path in models.iterdir() if path.is_dir() and path != keep), key=used_at):
        if enough():
            return True
        lock = take(entry)
        if lock is not None:
            _empty(entry)
            shutil.rmtree(entry, ignore_errors=True)
            os.close(lock)
    return enough()
