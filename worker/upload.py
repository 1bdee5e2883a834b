"""Store what the engine wrote, under the attempt's own prefix.

    python -m worker.upload OUT_DIR PREFIX MANIFEST.json

A process of its own, so that a cancel or a lost lease ends an upload as quickly as a computation. MANIFEST.json gets a list of `path`, `role`, `bytes`, `sha256`.
Run again with the same prefix, it sends only what is not stored yet. A store that is away is waited for, see `store_patience_seconds`.
"""

from __future__ import annotations

import errno
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.exceptions import UnavailableError
from app.settings import get_settings
from app.storage import Store, is_key, open_store

FOLDERS = ("checkpoint", "padded")
FILES_AT_ONCE = 2
TELL_SECONDS = 1.0  # between two events of progress


@dataclass(frozen=True)
class File:
    path: Path
    name: str  # below the attempt's prefix
    role: str


def main(out: Path, prefix: str, manifest: Path) -> int:
    _say(event="phase", phase="upload")
    settings = get_settings()
    store = open_store(settings, patience_seconds=settings.store_patience_seconds)
    try:
        manifest.write_text(json.dumps(upload(store, find_files(out), prefix)), encoding="utf-8")
    except (OSError, UnavailableError) as error:
        full = error.errno == errno.ENOSPC if isinstance(error, OSError) else error.code == "store_full"
        if not full:
            raise
        _say(
            event="error",
            code="disk_full",
            message="There is no space left to store the result.",
            hint="Free space in the object store, then submit the job again.",
        )
        return 2
    return 0


def find_files(out: Path) -> list[File]:
    """The report, then what the folders of the result hold. A name that the store can't take is no file of the engine's: it is told and left out."""
    files = [File(out / "report.json", "report.json", "report")]
    for role in FOLDERS:
        for path in sorted(path for path in (out / role).rglob("*") if not path.is_dir()):
            name = path.relative_to(out).as_posix()
            if is_key(name):
                files.append(File(path, name, role))
            else:
                _say(event="log", message=f"{name[:200]!r} is not stored: a name has letters, digits, '_', '.' and '-', and begins with none of the last two.")
    return files


def upload(store: Store, files: list[File], prefix: str) -> list[dict[str, Any]]:
    """Store the files, some at once; their manifest in the same order."""
    progress = Progress(sum(file.path.stat().st_size for file in files))

    def put(file: File) -> dict[str, Any]:
        size, digest = store.put_file(prefix + file.name, file.path, create=True, on_bytes=progress.add)
        return {"path": file.name, "role": file.role, "bytes": size, "sha256": digest}

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        return list(pool.map(put, files))


class Progress:
    """Adds up the bytes of all files and tells of them from time to time."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._began = self._told = time.monotonic()
        self._adding = threading.Lock()

    def add(self, count: int) -> None:
        with self._adding:
            self._done += count
            now = time.monotonic()
            if now - self._told < TELL_SECONDS and self._done < self._total:
                return
            self._told = now
            left = (now - self._began) * (self._total - self._done) / self._done
            _say(event="progress", phase="upload", done=self._done, total=self._total, eta_seconds=round(left, 1))


def _say(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
