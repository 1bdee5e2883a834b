"""What a model costs and what it knows: parameters by every denominator, multiply-accumulates, perplexity by streamed blocks.

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

from app.architecture import ARCHITECTURES
from app.report import Parameters, Sparsities
from app.source import Source
from worker.blocks import BlockStream
from worker.calibration import HiddenStates, embed_into, forward

TOKENS_PER_HEAD = 256  # logits of about this many tokens are alive at once
WITH_HEAD = 1.5  # what a perplexity takes, in passes through the blocks alone; of SmolLM2-135M on two cores
LARGEST_EXPONENT = 709.0  # of which the exponential is a float


@dataclass(frozen=True)
class LinearZeros:
    """Zeros among a block's linear weights."""

    attention: int = 0
    mlp: int = 0

    @property
    def all(self) -> int:
        return self.attention + self.mlp


def count_parameters(source: Source, zeros: list[LinearZeros]) -> Parameters:
    """Counts from the headers alone; `zeros` has an entry a block. A tied head isn't stored, so it counts once; all experts count, their routers but in `all`."""
    architecture, config = ARCHITECTURES[source.model_type], source.config
    sizes = _sizes(source)
    attention = ffn = channels = 0
    for index in range(architecture.dimensions(config).layers):
        prefix, mlps = architecture.block_prefix(index), architecture.mlps(config, index)
        attention += sum(sizes[f"{prefix}{linear}.weight"] for linear in architecture.attention.linears)
        ffn += sum(sizes[f"{prefix}{linear}.weight"] for mlp in mlps for linear in mlp.linears)
        channels += sum(source.tensors[f"{prefix}{mlp.down}.weight"].shape[0 if architecture.transposed else 1] for mlp in mlps)
    everything = sum(sizes.values())
    return Parameters(
        all=everything,
        non_embedding=everything - sizes[architecture.embedding] - sizes.get(architecture.head, 0),
        decoder=attention + ffn,
        ffn=ffn,
        ffn_channels=channels,
        decoder_zeros=sum(block.all for block in zeros),
        ffn_zeros=sum(block.mlp for block in zeros),
    )


def _sizes(source: Source) -> dict[str, int]:
    return {name: math.prod(entry.shape) for name, entry in source.tensors.items()}


def sparsities(before: Parameters, after: Parameters) -> Sparsities:
    """Fraction of each denominator that was removed or, where all are still stored, that is zero."""

    def gone(dense: int, stored: int, zeros: int) -> float:
        return 1 - stored / dense if stored != dense else zeros / dense

    return Sparsities(
        ffn=gone(before.ffn, after.ffn, after.ffn_zeros),
        decoder=gone(before.decoder, after.decoder, after.decoder_zeros),
        non_embedding=gone(before.non_embedding, after.non_embedding, after.decoder_zeros),
        all=gone(before.all, after.all, after.decoder_zeros),
    )


def macs_per_token(source: Source) -> int:
    """Multiply-accumulates a token in the linear layers, the routers and the head, at an empty context; of a mixture's experts, those that a token is sent to."""
    architecture, config = ARCHITECTURES[source.model_type], source.config
    sizes = _sizes(source)
    total = sizes.get(architecture.head, sizes[architecture.embedding])
    total += sum(sizes.get(projection, 0) for projection in (architecture.project_in, architecture.project_out))
    for index in range(architecture.dimensions(config).layers):
        prefix, mlps, router = architecture.block_prefix(index), architecture.mlps(config, index), architecture.router(config, index)
        total += sum(sizes[f"{prefix}{linear}.weight"] for linear in architecture.attention.linears)
        ffn = sum(sizes[f"{prefix}{linear}.weight"] for mlp in mlps for linear in mlp.linears)
        total += ffn if router is None else sizes[f"{prefix}{router}.weight"] + ffn * architecture.experts_per_token(config) // len(mlps)
    return total


@dataclass(frozen=True)
class Embedded:
    """What all models that differ in their blocks alone begin with."""

    hidden: Tensor  # (B, T, D), the input of the first block
    arguments: list[dict[str, Any]]  # of each block besides the hidden states


def embed(stream: BlockStream, tokens: Tensor, work: Path) -> Embedded:
    """The first block's input of (B, T) token ids, in a mapped file in `work`."""
    hidden = HiddenStates(work, (*tokens.shape, int(stream.config.hidden_size)))
    embed_into(hidden, stream, tokens)
    return Embedded(hidden.open(0), stream.block_arguments(tokens.shape[1]))


def run_blocks(
    stream: BlockStream,
    tokens: Tensor,
    work: Path,
    done: Callable[[int], None] = lambda index: None,
    edit: Callable[[int, dict[str, Tensor]], dict[str, Tensor] | None] = lambda index, tensors: tensors,
    embedded: Embedded | None = None,
) -> Tensor:
    """Last hidden states (B, T, D) of (B, T) token ids, before the final norm. They lie in a mapped file in `work`.

    `edit` gives each block other tensors, or None for none: the block is left out. After a block whose outputs aren't finite no other is run.
    `embedded` is what the tokens begin with, where it was computed before; it must lie in another folder.
    """
    start = embedded or embed(stream, tokens, work)
    hidden = HiddenStates(work, (*tokens.shape, int(stream.config.hidden_size)))
    passed = 0
    for index in range(len(stream)):
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
    embedded: Embedded | None = None,
) -> float:
    """exp of the mean negative log-likelihood over (B, T) windows, each token given those before it in its window; NaN for a model that isn't finite.

    `edit` and `embedded` are as in `run_blocks`.
    """
    hidden = run_blocks(stream, windows, work, done, edit, embedded)
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
