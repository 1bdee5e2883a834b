"""Peak anonymous memory of this process: what it allocated, mapped file pages apart."""

from __future__ import annotations

import ctypes
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

SAMPLE_SECONDS = 0.02
MAPPED_BYTES = 4 << 20  # an allocation from this size on is its own mapping; at 1 MB the page faults of small activations cost a quarter of a forward
M_MMAP_THRESHOLD = -3  # of malloc.h
CONTROL_GROUPS = Path("/sys/fs/cgroup")
# Where the two versions of control groups state a limit and what counts towards it.
LIMITS = (("memory.max", "memory.current", "memory.stat"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"))


def map_large_allocations() -> None:
    """Let large tensors be mappings of their own, which go back to the system when freed.

    glibc raises its threshold to the largest mapping freed so far, up to 32 MB. Tensors below it then share the heap with what stays, and leave holes: memory grew
    by about 10 MB with every block that was masked.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent outside glibc, where nothing needs doing
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


def return_freed_memory() -> None:
    """Give freed memory back to the system: glibc otherwise keeps freed activations in its heap, where they pile up to several times what is alive."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent outside glibc, where nothing needs doing
    if malloc_trim is not None:
        malloc_trim(0)


def anonymous_bytes(pid: int | None = None) -> int:
    """Memory of a process, of this one by default, that no file backs; where the kernel doesn't tell it apart, all resident memory. 0 once it has ended."""
    sizes = _status_bytes(pid)
    if "RssAnon" in sizes:
        return sizes["RssAnon"] + sizes["RssShmem"]
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def available_bytes() -> int:
    """Memory that can still be taken: what the system has left, and what the container's limit leaves. Cached files count as free."""
    rooms = [int(psutil.virtual_memory().available)]
    for limit, used, details in LIMITS:
        with suppress(OSError, ValueError):  # there are no control groups of this version, or "max" is the limit: none
            counts = dict(line.split() for line in (CONTROL_GROUPS / details).read_text(encoding="ascii").splitlines())
            cached = int(counts.get("active_file", 0)) + int(counts.get("inactive_file", 0))
            rooms.append(_number(CONTROL_GROUPS / limit) - _number(CONTROL_GROUPS / used) + cached)
    return max(0, min(rooms))


def total_bytes() -> int:
    """Memory of the system, or what the container may have of it."""
    rooms = [int(psutil.virtual_memory().total)]
    for limit, _, _ in LIMITS:
        with suppress(OSError, ValueError):  # as above
            rooms.append(_number(CONTROL_GROUPS / limit))
    return min(rooms)


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def peak_resident_bytes() -> int:
    """Highest resident memory of this process since it started, mapped files included; 0 where the kernel doesn't tell."""
    return _status_bytes(None).get("VmHWM", 0)


def _status_bytes(pid: int | None) -> dict[str, int]:
    """The sizes in /proc/PID/status."""
    try:
        lines = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


class PeakMemory:
    """Samples anonymous memory in a thread while it is entered; `bytes` is the highest value seen."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="peak-memory")

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __enter__(self) -> Self:
        self.bytes = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())
