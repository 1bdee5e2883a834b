"""Walks the blocks with calibration tokens; owns every forward hook and every running statistic.

Notation: B sequences, T tokens, D hidden size, C inputs of a linear.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worker.blocks import BlockStream, batches

InputNorms = dict[str, Tensor]  # root mean square over tokens of every input of a linear, (C,) float32, by the linear's name in the block
Distance = Callable[[Tensor, Tensor], Tensor]  # (…, D), (…, D) -> (…): how far a block moves a token


class HiddenStates:
    """The calibration set between two blocks, (B, T, D) float32, in a memory-mapped file.

    Two files serve in turns: a block reads one and writes the other. Memory is thus the page cache's business, and a walk that was
    killed goes on from the file that its last finished block left.
    """

    def __init__(self, work: Path, shape: tuple[int, int, int]) -> None:
        """Raises OSError (ENOSPC) here, and not while a block computes, where the disk is too small."""
        self.work = work
        self.shape = shape
        for block in (0, 1):
            with self.path(block).open("ab") as stream:
                os.posix_fallocate(stream.fileno(), 0, math.prod(shape) * 4)

    def path(self, block: int) -> Path:
        """The file that holds the input of `block`."""
        return self.work / f"hidden.{block % 2}.bin"

    def open(self, block: int) -> Tensor:
        """The input of `block`, for reading or for writing."""
        return torch.from_file(str(self.path(block)), shared=True, size=math.prod(self.shape), dtype=torch.float32).view(self.shape)

    def sha256(self, block: int) -> str:
        with self.path(block).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def embed_into(hidden: HiddenStates, stream: BlockStream, tokens: Tensor) -> None:
    """Write the embeddings of (B, T) token ids as the input of block 0."""
    target, start = hidden.open(0), 0
    for embedded in stream.embed(tokens):
        target[start : start + len(embedded)] = embedded
        start += len(embedded)


class _NothingMoreToMeasure(Exception):  # noqa: N818  it is no error
    """Ends a forward pass whose output nobody needs."""


@contextmanager
def measuring(block: nn.Module, linears: tuple[str, ...], stop: str | None = None) -> Iterator[Callable[[], InputNorms]]:
    """Measure the inputs of `linears` during forward passes; the yielded function gives their root mean squares.

    Sums are float32 within a batch and float64 across batches. With `stop`, the forward pass ends before that linear computes.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def measure(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)  # (B*T, C)
            squares = torch.linalg.vector_norm(rows, dim=0).square().double()
            sums[name] = sums[name] + squares if name in sums else squares
            counts[name] = counts.get(name, 0) + len(rows)
            if name == stop:
                raise _NothingMoreToMeasure

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(measure(name)) for name in linears]
    try:
        yield lambda: {name: (sums[name] / counts[name]).sqrt().float() for name in linears}
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def forward(block: nn.Module, arguments: dict[str, Any], source: Tensor, target: Tensor | None, distance: Distance | None = None) -> float:
    """Run a block over (B, T, D) inputs, writing outputs to `target` where one is given; returns the mean distance of output from input.

    Inputs and outputs lie on the CPU, whatever device the block is on.
    """
    device = next(block.parameters()).device
    total, start = 0.0, 0
    for stored in batches(source):
        rows = stored.to(device)
        try:
            output = block(rows, **arguments)
        except _NothingMoreToMeasure:
            continue
        if target is not None:
            target[start : start + len(rows)] = output
        if distance is not None:
            total += float(distance(rows, output).double().sum())
        start += len(rows)
    return total / (source.shape[0] * source.shape[1])
