"""Child processes that don't outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

PR_SET_PDEATHSIG = 1


def dies_with(parent: int, by: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """What a new process does first (a `preexec_fn`), so that the kernel ends it when its parent ends, more exactly the thread that started it. Linux only."""
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork

    def tie() -> None:
        prctl(PR_SET_PDEATHSIG, by)
        if os.getppid() != parent:  # it ended before the system call
            os._exit(1)

    return tie
