"""Locks of folders: a file `lock` in each, held by flock, so that the lock of a process that was killed is free at once."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def take(folder: Path, *, shared: bool = False, wait: bool = False) -> int | None:
    """A descriptor that holds the folder's lock, for as long as it or one inherited from it is open; None while another process holds it.

    `shared`: beside others that hold it so. `wait`: until it is free. The folder is made where it is missing.
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    path = folder / "lock"
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # the folder was removed between the two calls
            continue
        try:
            fcntl.flock(lock, how)
        except BlockingIOError:
            os.close(lock)
            return None
        except OSError:
            os.close(lock)
            raise
        if path.exists() and path.stat().st_ino == os.fstat(lock).st_ino:
            return lock
        os.close(lock)  # the folder was removed between the two calls
