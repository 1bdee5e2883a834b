"""Walks the blocks with calibration tokens; owns every forward hook and every running statistic.

Notation: B sequences, T tokens, D hidden size, C inputs of a linear.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from app.footprint import PASSING_BYTES
from worker.blocks import BlockStream, batches

Statistic = Literal["norm", "variance", "fluctuation", "gram", "halves"]
Distance = Callable[[Tensor, Tensor], Tensor]  # (…, D), (…, D) -> (…): how far a block moves a token


class HiddenStates:
    """The calibration set between two blocks, (B, T, D) float32, in a memory-mapped file.

    Two files serve in turns, where no other number is given: a block reads one and writes the other. Memory is thus the page cache's business, and a walk that was
    killed goes on from the file that its last finished block left.
    """

    def __init__(self, work: Path, shape: tuple[int, int, int], name: str = "hidden", files: int = 2) -> None:
        """Raises OSError (ENOSPC) here, and not while a block computes, where the disk is too small."""
        self.work = work
        self.shape = shape
        self.name = name
        self.files = files
        for block in range(files):
            with self.path(block).open("ab") as stream:
                os.posix_fallocate(stream.fileno(), 0, math.prod(shape) * 4)

    def path(self, block: int) -> Path:
        """The file that holds the input of `block`."""
        return self.work / f"{self.name}.{block % self.files}.bin"

    def open(self, block: int) -> Tensor:
        """The input of `block`, for reading or for writing."""
        return torch.from_file(str(self.path(block)), shared=True, size=math.prod(self.shape), dtype=torch.float32).view(self.shape)


class StatesOnDevice:
    """The same on a GPU, for passes that nothing goes on from."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device, rooms: int = 2) -> None:
        self._rooms = torch.empty(rooms, *shape, device=device)

    def open(self, block: int) -> Tensor:
        """The input of `block`, for reading or for writing."""
        return self._rooms[block % len(self._rooms)]


def passing_states(work: Path, shape: tuple[int, int, int], device: torch.device, name: str = "hidden", rooms: int = 2) -> HiddenStates | StatesOnDevice:
    """Room for the hidden states of a pass that nothing goes on from: on a GPU where they are few, or else in mapped files in `work`."""
    if device.type == "cuda" and 4 * math.prod(shape) <= PASSING_BYTES:
        return StatesOnDevice(shape, device, rooms)
    return HiddenStates(work, shape, name, rooms)


def embed_into(hidden: HiddenStates | StatesOnDevice, stream: BlockStream, tokens: Tensor) -> None:
    """Write the embeddings of (B, T) token ids as the input of block 0."""
    target, start = hidden.open(0), 0
    for embedded in stream.embed(tokens):
        target[start : start + len(embedded)] = embedded
        start += len(embedded)


class InputStatistics:
    """Running statistics of the inputs of one linear, over all tokens that reach it; only those in `wanted` are kept.

    Batches are summed in float32 and added up in float64. A linear that no token reached, as an expert may be, is judged by its weights alone: all inputs
    count as independent and of size 1.
    """

    def __init__(self, width: int, device: torch.device, wanted: frozenset[Statistic]) -> None:
        self.tokens = 0
        self._wanted = wanted
        self._squares, self._sums, self._deviations = torch.zeros(3, width, dtype=torch.float64, device=device).unbind()
        self._pivot = torch.zeros(width, device=device)
        self._grams = torch.zeros(2 if "halves" in wanted else int("gram" in wanted), width, width, device=device)
        self._tokens_of_grams = [0] * len(self._grams)
        self._sequences = 0
        self._mean_as_released, self._fluctuation = torch.zeros(2, width, device=device).unbind()

    def update(self, batch: Tensor) -> None:
        """Take in (B, T, C) or (T, C) inputs."""
        rows = batch.flatten(0, -2)  # (B*T, C)
        if not len(rows):
            return
        if "norm" in self._wanted:
            self._squares += torch.linalg.vector_norm(rows, dim=0).square()
        if "variance" in self._wanted:
            if not self.tokens:
                self._pivot = rows.mean(dim=0)  # deviations from it are summed without cancellation
            self._sums += rows.sum(dim=0)
            self._deviations += (rows - self._pivot).square().sum(dim=0)
        for number, part in enumerate(rows.tensor_split(len(self._grams)) if len(self._grams) else ()):
            self._grams[number].addmm_(part.T, part)
            self._tokens_of_grams[number] += len(part)
        if "fluctuation" in self._wanted:
            for sequence in batch if batch.dim() == 3 else batch[None]:
                self._fluctuate(sequence)
        self.tokens += len(rows)

    def _fluctuate(self, sequence: Tensor) -> None:
        """FLAP's running update by one sequence (T, C) as released: both deviations are from the new mean, since the old one is an alias of it."""
        seen, self._sequences = self._sequences, self._sequences + 1
        self._mean_as_released += (sequence.mean(dim=0) - self._mean_as_released) / self._sequences
        if seen:
            self._fluctuation *= (seen - 1) / seen
            self._fluctuation += (sequence - self._mean_as_released).square().sum(dim=0) / self._sequences

    @property
    def norm(self) -> Tensor:
        """Root mean square, (C,)."""
        return (self._squares / self.tokens).sqrt().float() if self.tokens else torch.ones_like(self._pivot)

    @property
    def mean(self) -> Tensor:
        """(C,); measured with `variance`."""
        return (self._sums / max(1, self.tokens)).float()

    @property
    def variance(self) -> Tensor:
        """Sample variance, (C,)."""
        if self.tokens < 2:
            return torch.ones_like(self._pivot)
        offset = self._sums / self.tokens - self._pivot
        spread: Tensor = self._deviations - self.tokens * offset.square()
        variance: Tensor = spread / (self.tokens - 1)
        return variance.clamp_min(0).float()

    @property
    def fluctuation(self) -> Tensor:
        """What FLAP's released code takes for the variance, (C,)."""
        return self._fluctuation if self._sequences > 1 else torch.ones_like(self._pivot)

    @property
    def gram(self) -> Tensor:
        """Mean of x xᵀ, (C, C); measured with `gram` or `halves`."""
        assert len(self._grams)
        return self._grams.sum(dim=0).div_(self.tokens) if self.tokens else torch.eye(len(self._pivot), device=self._pivot.device)

    @property
    def halves(self) -> tuple[Tensor, list[int]]:
        """Sums of x xᵀ over two halves of the tokens, of each batch the first and the last, (2, C, C), and how many tokens each has; measured with `halves`."""
        assert len(self._grams) == 2
        return self._grams, self._tokens_of_grams


class _NothingMoreToMeasure(Exception):  # noqa: N818  it is no error
    """Ends a forward pass whose output nobody needs."""


@contextmanager
def measuring(block: nn.Module, linears: Iterable[str], wanted: frozenset[Statistic], stop: str | None = None) -> Iterator[dict[str, InputStatistics]]:
    """Measure the inputs of `linears` while forward passes run; with `stop`, a pass ends before that linear computes."""
    statistics: dict[str, InputStatistics] = {}

    def measure(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            statistics[name].update(args[0])
            if name == stop:
                raise _NothingMoreToMeasure

        return hook

    handles = []
    for name in linears:
        module = block.get_submodule(name)
        weight: Tensor = module.get_parameter("weight")
        width = weight.shape[1 if isinstance(module, nn.Linear) else 0]  # Conv1D stores (in, out)
        statistics[name] = InputStatistics(width, weight.device, wanted)
        handles.append(module.register_forward_pre_hook(measure(name)))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


class Drift:
    """How far a pruned model is from the dense one at a block's FFN, against what the FFN knows: the mean of (h - h') xᵀ over tokens, (D, C).

    h and h' (D) are what the FFN's output is added to in the dense and in the pruned model, x (C) the inputs of the FFN's last linear `down` in the pruned model.
    """

    def __init__(self, down: str, room: Tensor) -> None:
        """`room` (B, T, D), on the CPU, takes the dense model's hidden states."""
        self.down = down
        self._dense = room.flatten(0, 1)
        self._sum = torch.empty(0)

    @contextmanager
    def measuring_dense(self, block: nn.Module) -> Iterator[None]:
        """While this block of the dense model runs over all its inputs."""
        start = 0

        def take(before: Tensor, inputs: Tensor) -> None:
            nonlocal start
            self._dense[start : start + len(before)] = before
            start += len(before)

        with _before_ffn(block, self.down, take):
            yield

    @contextmanager
    def measuring_pruned(self, block: nn.Module) -> Iterator[None]:
        """While it runs over all inputs that it has in the pruned model; what was measured so before is forgotten."""
        start = 0
        self._sum = torch.zeros(0)

        def take(before: Tensor, inputs: Tensor) -> None:
            nonlocal start
            moved = self._dense[start : start + len(before)].to(before.device) - before
            start += len(before)
            self._sum = moved.T @ inputs if not len(self._sum) else self._sum.addmm_(moved.T, inputs)

        with _before_ffn(block, self.down, take):
            yield

    @property
    def mean(self) -> Tensor:
        return self._sum / len(self._dense)


@contextmanager
def _before_ffn(block: nn.Module, down: str, take: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Tell `take` of each batch what the FFN's output is added to, (B·T, D), and the inputs of its last linear `down`, (B·T, C)."""
    seen: list[Tensor] = []

    def at_down(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[:] = args[0].flatten(0, -2), output.flatten(0, -2)

    def at_end(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs, added = seen
        take(output.flatten(0, -2) - added, inputs)

    handles = [block.get_submodule(down).register_forward_hook(at_down), block.register_forward_hook(at_end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def forward(block: nn.Module, arguments: dict[str, Any], source: Tensor, target: Tensor | None, distance: Distance | None = None) -> float:
    """Run a block over (B, T, D) inputs, writing outputs to `target` where one is given; returns the mean distance of output from input.

    Inputs and outputs may lie on another device than the block.
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
