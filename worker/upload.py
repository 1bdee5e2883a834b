"""Store what the engine wrote, under the attempt's own prefix.

    python -m worker.upload OUT_DIR PREFIX MANIFEST.json

A process of its own, so that a cancel or a lost lease ends an upload as quickly as a computation. MANIFEST.json gets a list of `path`, `role`, `bytes`, `sha256`.
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

from app.exceptions import UnavailableError
from app.settings import get_settings
from app.storage import open_store

FOLDERS = ("checkpoint", "padded")


def main(out: Path, prefix: str, manifest: Path) -> int:
    _say(event="phase", phase="upload")
    store = open_store(get_settings())
    files = [(out / "report.json", "report"), *((path, role) for role in FOLDERS for path in sorted((out / role).glob("*")))]
    stored: list[dict[str, Any]] = []
    try:
        for path, role in files:
            name = path.relative_to(out).as_posix()
            size, digest = store.put_file(prefix + name, path)
            stored.append({"path": name, "role": role, "bytes": size, "sha256": digest})
        manifest.write_text(json.dumps(stored), encoding="utf-8")
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


def _say(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
