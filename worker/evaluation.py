"""What a model costs and what it knows: parameters by every denominator, multiply-accumulates, perplexity by streamed blocks.

Notation: B windows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from app.recipe import Fraction, MethodFacts
from app.report import Parameters, Sparsities
from app.source import Source
from worker.architecture import ARCHITECTURES
from worker.blocks import BlockStream
from worker.calibration import HiddenStates, embed_into, forward

TOKENS_PER_HEAD = 256  # logits of about this many tokens are alive at once


@dataclass(frozen=True)
class LinearZeros:
    """Zeros among a block's linear weights."""

    attention: int = 0
    mlp: int = 0

    @property
    def all(self) -> int:
        return self.attention + self.mlp


def count_parameters(source: Source, zeros: list[LinearZeros]) -> Parameters:
    """Counts from the headers alone; `zeros` has an entry a block. A tied head isn't stored, so it counts once."""
    architecture = ARCHITECTURES[source.model_type]
    sizes = {name: math.prod(entry.shape) for name, entry in source.tensors.items()}
    blocks = int(source.config["num_hidden_layers"])

    def weights(linears: tuple[str, ...]) -> int:
        return sum(sizes[f"{architecture.block_prefix(index)}{linear}.weight"] for index in range(blocks) for linear in linears)

    everything = sum(sizes.values())
    return Parameters(
        all=everything,
        non_embedding=everything - sizes[architecture.embedding] - sizes.get(architecture.head, 0),
        decoder=weights(architecture.linears),
        ffn=weights(architecture.mlp),
        ffn_channels=sum(source.tensors[f"{architecture.block_prefix(index)}{architecture.down}.weight"].shape[1] for index in range(blocks)),
        decoder_zeros=sum(block.all for block in zeros),
        ffn_zeros=sum(block.mlp for block in zeros),
    )


def sparsities(before: Parameters, after: Parameters) -> Sparsities:
    """Fraction of each denominator that was removed or, where all are still stored, that is zero."""

    def gone(dense: int, stored: int, zeros: int) -> float:
        return 1 - stored / dense if stored < dense else zeros / dense

    return Sparsities(
        ffn=gone(before.ffn, after.ffn, after.ffn_zeros),
        decoder=gone(before.decoder, after.decoder, after.decoder_zeros),
        non_embedding=gone(before.non_embedding, after.non_embedding, after.decoder_zeros),
        all=gone(before.all, after.all, after.decoder_zeros),
    )


def method_fraction(sparsity: Fraction, facts: MethodFacts, dense: Parameters) -> float:
    """The fraction of what the method prunes that removes the asked fraction of the asked denominator; 1 or more can't be reached."""
    removable = dense.ffn if facts.structured else dense.decoder
    denominators = {"ffn": removable, "decoder": dense.decoder, "non_embedding": dense.non_embedding, "all": dense.all, "method": removable}
    return sparsity.fraction * denominators[sparsity.of] / removable


def macs_per_token(source: Source) -> int:
    """Multiply-accumulates a token in the linear layers and the head, at an empty context."""
    architecture = ARCHITECTURES[source.model_type]
    sizes = {name: math.prod(entry.shape) for name, entry in source.tensors.items()}
    linears = sum(
        sizes[f"{architecture.block_prefix(index)}{linear}.weight"]
        for index in range(int(source.config["num_hidden_layers"]))
        for linear in architecture.linears
    )
    return linears + sizes.get(architecture.head, sizes[architecture.embedding])


def run_blocks(stream: BlockStream, tokens: Tensor, work: Path, done: Callable[[int], None] = lambda index: None) -> Tensor:
    """Last hidden states (B, T, D) of (B, T) token ids, before the final norm. They lie in a mapped file in `work`."""
    hidden = HiddenStates(work, (*tokens.shape, int(stream.config.hidden_size)))
    embed_into(hidden, stream, tokens)
    arguments = stream.block_arguments(tokens.shape[1])
    for index in range(len(stream)):
        block = stream.materialise(index, stream.block_tensors(index))
        forward(block, arguments[index], hidden.open(index), hidden.open(index + 1))
        stream.drop(index)
        done(index)
    return hidden.open(len(stream))


@torch.no_grad()
def perplexity(stream: BlockStream, windows: Tensor, work: Path, done: Callable[[int], None] = lambda index: None) -> float:
    """exp of the mean negative log-likelihood over (B, T) windows, each token given those before it in its window."""
    hidden = run_blocks(stream, windows, work, done)
    total = 0.0
    for states, window in zip(hidden, windows, strict=True):  # (T, D), (T,)
        for part, targets in zip(states[:-1].split(TOKENS_PER_HEAD), window[1:].split(TOKENS_PER_HEAD), strict=True):
            total += float(cross_entropy(stream.logits(part), targets.to(stream.device), reduction="sum"))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


@torch.no_grad()
def logits(stream: BlockStream, tokens: Tensor, work: Path) -> Tensor:
    """(B, T) token ids -> (B, T, V) logits on the CPU."""
    return torch.stack([stream.logits(states).cpu() for states in run_blocks(stream, tokens, work)])
