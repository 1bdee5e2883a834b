"""What a model knows: logits and perplexity by streamed blocks.

Notation: B windows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from worker.blocks import BlockStream
from worker.calibration import embed_into, forward, passing_states

TOKENS_PER_HEAD = 256  # logits of about this many tokens are alive at once
LARGEST_EXPONENT = 709.0  # of which the exponential is a float


Edit = Callable[[int, dict[str, Tensor]], dict[str, Tensor] | None]  # what a model has in the place of a block's tensors; None: the block is left out


@dataclass(frozen=True)
class Begun:
    """What models that differ only from some block on begin with."""

    block: int  # the first that may differ
    hidden: Tensor  # (B, T, D), its input
    arguments: list[dict[str, Any]]  # of each block of the model, besides the hidden states


@dataclass(frozen=True)
class Variant:
    """A model that is made of the stored one's blocks on their way."""

    edit: Edit
    begun: Begun


def embed(stream: BlockStream, tokens: Tensor, work: Path) -> Begun:
    """What all models begin with: the first block's input of (B, T) token ids, on the GPU or in a mapped file in `work`."""
    hidden = passing_states(work, (*tokens.shape, int(stream.config.hidden_size)), stream.device, rooms=1)
    embed_into(hidden, stream, tokens)
    return Begun(0, hidden.open(0), stream.block_arguments(tokens.shape[1]))


@torch.no_grad()
def run_up_to(block: int, stream: BlockStream, start: Variant, work: Path, scratch: Path) -> Begun:
    """What variants begin with that are `start` before `block`. Its input lies on the GPU or in a mapped file in `work`; `start` begins in yet another folder."""
    hidden = run_variants(stream, scratch, [start], end=block)[0]
    kept = passing_states(work, (*hidden.shape,), stream.device, rooms=1).open(0)
    return Begun(block, kept.copy_(hidden), start.begun.arguments)


def run_blocks(
    stream: BlockStream, tokens: Tensor, work: Path, done: Callable[[int], None] = lambda index: None, edit: Edit = lambda index, tensors: tensors
) -> Tensor:
    """Last hidden states (B, T, D) of (B, T) token ids, before the final norm. They lie on the GPU or in a mapped file in `work`."""
    return run_variants(stream, work, [Variant(edit, embed(stream, tokens, work))], lambda index, _: done(index))[0]


@torch.no_grad()
def run_variants(
    stream: BlockStream,
    work: Path,
    variants: Sequence[Variant],
    done: Callable[[int, Sequence[Tensor]], None] = lambda index, hidden: None,
    end: int | None = None,
) -> list[Tensor]:
    """Last hidden states of each variant, (B, T, D), or its input of block `end`. A block is read once for all of them; `done` is told it, and what they are then.

    After a block whose outputs aren't finite no other is run.
    """
    rooms = [passing_states(work, (*variant.begun.hidden.shape,), stream.device, f"hidden{number or ''}") for number, variant in enumerate(variants)]
    hidden, passed = [variant.begun.hidden for variant in variants], [0] * len(variants)
    running = set(range(len(variants)))
    for index in range(min(variant.begun.block for variant in variants), len(stream) if end is None else end):
        stored = stream.block_tensors(index)
        for number in sorted(running):
            begun = variants[number].begun
            tensors = variants[number].edit(index, stored) if index >= begun.block else None
            if tensors is None:
                continue
            passed[number] += 1
            source, hidden[number] = hidden[number], rooms[number].open(passed[number])
            forward(stream.materialise(index, tensors), begun.arguments[index], source, hidden[number])
            stream.drop(index)
            if not _is_finite(hidden[number]):
                running.remove(number)
        if not running:
            break
        done(index, hidden)
    return hidden


def _is_finite(tensor: Tensor) -> bool:
    return all(bound.isfinite() for bound in tensor.aminmax())


@torch.no_grad()
def perplexity(
    stream: BlockStream, windows: Tensor, work: Path, done: Callable[[int], None] = lambda index: None, edit: Edit = lambda index, tensors: tensors
) -> float:
    """exp of the mean negative log-likelihood over (B, T) windows, each token given those before it in its window; NaN for a model that isn't finite."""
    return perplexity_of(stream, windows, run_blocks(stream, windows, work, done, edit))


@torch.no_grad()
def perplexity_of(stream: BlockStream, windows: Tensor, hidden: Tensor, most: float = math.inf) -> float:
    """The same of (B, T) windows that have left the blocks as (B, T, D); inf, and no more is computed, once it is certain to be above `most`."""
    if not _is_finite(hidden):
        return math.nan
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    total, limit = 0.0, predicted * min(math.log(most), LARGEST_EXPONENT)
    for states, window in zip(hidden, windows, strict=True):  # (T, D), (T,)
        for part, targets in zip(states[:-1].split(TOKENS_PER_HEAD), window[1:].split(TOKENS_PER_HEAD), strict=True):
            total += float(cross_entropy(stream.logits(part), targets.to(stream.device), reduction="sum"))
            if total > limit:  # no other token can lower it
                return math.inf
    return math.exp(total / predicted)


@torch.no_grad()
def logits(
    stream: BlockStream,
    tokens: Tensor,
    work: Path,
    edit: Edit = lambda index, tensors: tensors,
) -> Tensor:
    """(B, T) token ids -> (B, T, V) logits on the CPU."""
    return torch.stack([stream.logits(states).cpu() for states in run_blocks(stream, tokens, work, edit=edit)])
