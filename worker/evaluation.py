"""What a model knows: logits and perplexity by streamed blocks.

Notation: B windows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


@dataclass(frozen=True)
class Begun:
    """What models that differ only from some block on begin with."""

    block: int  # the first that may differ
    hidden: Tensor  # (B, T, D), its input
    arguments: list[dict[str, Any]]  # of each block of the model, besides the hidden states


def embed(stream: BlockStream, tokens: Tensor, work: Path) -> Begun:
    """What all models begin with: the first block's input of (B, T) token ids, on the GPU or in a mapped file in `work`."""
    hidden = passing_states(work, (*tokens.shape, int(stream.config.hidden_size)), stream.device, rooms=1)
    embed_into(hidden, stream, tokens)
    return Begun(0, hidden.open(0), stream.block_arguments(tokens.shape[1]))


@torch.no_grad()
def run_up_to(
    block: int, stream: BlockStream, tokens: Tensor, begun: Begun, edit: Callable[[int, dict[str, Tensor]], dict[str, Tensor] | None], work: Path, scratch: Path
) -> Begun:
    """What models begin with that are alike before `block`. Its input lies on the GPU or in a mapped file in `work`; the other arguments are as in `run_blocks`."""
    hidden = run_blocks(stream, tokens, scratch, edit=edit, begun=begun, end=block)
    kept = passing_states(work, (*hidden.shape,), stream.device, rooms=1).open(0)
    return Begun(block, kept.copy_(hidden), begun.arguments)


def run_blocks(
    stream: BlockStream,
    tokens: Tensor,
    work: Path,
    done: Callable[[int], None] = lambda index: None,
    edit: Callable[[int, dict[str, Tensor]], dict[str, Tensor] | None] = lambda index, tensors: tensors,
    begun: Begun | None = None,
    end: int | None = None,
) -> Tensor:
    """Last hidden states (B, T, D) of (B, T) token ids, before the final norm, or the input of block `end`. They lie on the GPU or in a mapped file in `work`.

    `edit` gives each block other tensors, or None for none: the block is left out. After a block whose outputs aren't finite no other is run.
    `begun` is what the tokens begin with, where it was computed before; it must lie in another folder.
    """
    start = begun or embed(stream, tokens, work)
    hidden = passing_states(work, (*tokens.shape, int(stream.config.hidden_size)), stream.device)
    passed = 0
    for index in range(start.block, len(stream) if end is None else end):
        tensors = edit(index, stream.block_tensors(index))
        if tensors is not None:
            output = hidden.open(passed + 1)
            forward(stream.materialise(index, tensors), start.arguments[index], hidden.open(passed) if passed else start.hidden, output)
            stream.drop(index)
            passed += 1
            if not _is_finite(output):
                break
        done(index)
    return hidden.open(passed) if passed else start.hidden


def _is_finite(tensor: Tensor) -> bool:
    return all(bound.isfinite() for bound in tensor.aminmax())


@torch.no_grad()
def perplexity(
    stream: BlockStream,
    windows: Tensor,
    work: Path,
    done: Callable[[int], None] = lambda index: None,
    edit: Callable[[int, dict[str, Tensor]], dict[str, Tensor] | None] = lambda index, tensors: tensors,
    begun: Begun | None = None,
) -> float:
    """exp of the mean negative log-likelihood over (B, T) windows, each token given those before it in its window; NaN for a model that isn't finite.

    `edit` and `begun` are as in `run_blocks`.
    """
    hidden = run_blocks(stream, windows, work, done, edit, begun)
    if not _is_finite(hidden):
        return math.nan
    total = 0.0
    for states, window in zip(hidden, windows, strict=True):  # (T, D), (T,)
        for part, targets in zip(states[:-1].split(TOKENS_PER_HEAD), window[1:].split(TOKENS_PER_HEAD), strict=True):
            total += float(cross_entropy(stream.logits(part), targets.to(stream.device), reduction="sum"))
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < LARGEST_EXPONENT else math.inf


@torch.no_grad()
def logits(
    stream: BlockStream,
    tokens: Tensor,
    work: Path,
    edit: Callable[[int, dict[str, Tensor]], dict[str, Tensor] | None] = lambda index, tensors: tensors,
) -> Tensor:
    """(B, T) token ids -> (B, T, V) logits on the CPU; `edit` is as in `run_blocks`."""
    return torch.stack([stream.logits(states).cpu() for states in run_blocks(stream, tokens, work, edit=edit)])
