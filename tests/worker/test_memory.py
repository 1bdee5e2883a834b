"""What the allocator keeps."""

from __future__ import annotations

import subprocess
import sys

# Large tensors come and go between small ones that stay; without the call glibc ends with all of the large ones' room, over 500 MB.
HOLES = """
import torch
from worker.memory import anonymous_bytes, map_large_allocations

map_large_allocations()
torch.zeros(24 << 20, dtype=torch.bool)  # freed at once: glibc would raise its threshold to it
before, stays = anonymous_bytes(), []
for number in range(50):
    large, larger = torch.zeros(10 << 20, dtype=torch.bool), torch.zeros((10 << 20) + 4096 * number, dtype=torch.bool)
    stays.append(torch.zeros(1000 + 13 * number))
    del large, larger
print(anonymous_bytes() - before)
"""


def test_freed_tensors_leave_no_holes_between_those_that_stay() -> None:
    ended = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 20e6
