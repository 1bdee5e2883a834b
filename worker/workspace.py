"""The directory in which a job is worked on. It outlives an attempt, so that the next one goes on where it stopped, and never has two users at once."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from app.jobs.lease import Lease
from worker.locks import take

NAME = re.compile(r"(job_[0-9a-f]+)(\.\d+)?")
LEAST_FREE = 0.1  # of the disk, below which nothing is kept that no job works on


@dataclass(frozen=True)
class Workspace:
    folder: Path
    lock: int  # file descriptor; a child that inherits it keeps the directory taken for as long as it lives

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def state(self) -> Path:
        return self.folder / "work"


@contextmanager
def workspace(root: Path, lease: Lease) -> Iterator[Workspace]:
    """The job's directory, or a fresh one while an earlier attempt's process still has it."""
    for name in (lease.job_id, f"{lease.job_id}.{lease.token}"):
        lock = take(root / name)
        if lock is not None:
            try:
                yield Workspace(root / name, lock)
            finally:
                os.close(lock)
            return
    raise OSError(f"another process has the fresh directory {name}")


def sweep(root: Path, seconds_over: Callable[[Sequence[str]], dict[str, float]], keep_seconds: float) -> None:
    """Remove the directories of jobs that have been over for so long and, while the disk is short, of the others that are over; never one that a process has.

    seconds_over: tells of some job ids for how long each has been over, and leaves out those that go on.
    """
    found = [(match[1], path) for path in sorted(root.glob("job_*")) if (match := NAME.fullmatch(path.name))]
    over = seconds_over([job_id for job_id, _ in found]) if found else {}
    for folder, seconds in sorted(((path, over[job_id]) for job_id, path in found if job_id in over), key=itemgetter(1), reverse=True):
        if seconds < keep_seconds and not _short(root):
            return
        lock = take(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _short(root: Path) -> bool:
    disk = shutil.disk_usage(root)
    return disk.free < LEAST_FREE * disk.total
