"""Counts from config.json and the safetensors headers alone: parameters by every denominator, multiply-accumulates, what a recipe's fraction asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from app.architecture import ARCHITECTURES
from app.exceptions import RecipeError
from app.recipe import Fraction, Pattern, Recipe
from app.report import Parameters, Sparsities
from app.source import Source


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


def fraction_of(recipe: Recipe, dense: Parameters) -> float:
    """What a recipe's fraction or pattern removes, as a fraction of the method's own denominator. Raises RecipeError for more than there is."""
    if isinstance(recipe.sparsity, Pattern):
        return 1 - recipe.sparsity.n / recipe.sparsity.m
    assert isinstance(recipe.sparsity, Fraction)
    asked, of = recipe.sparsity.fraction, recipe.sparsity.of
    attention = dense.decoder - dense.ffn
    # Zeros among all linears and whole blocks take the same share of FFNs as of the rest.
    ffn = {"ffn": dense.ffn, "experts": dense.ffn, "attention": 0}.get(recipe.denominator, dense.decoder)
    removable = {"ffn": dense.ffn, "experts": dense.ffn, "attention": attention, "decoder": dense.decoder}.get(recipe.denominator, dense.non_embedding)
    if of == "method":
        return asked
    whole = {"ffn": dense.ffn * removable / ffn if ffn else math.inf, "decoder": dense.decoder, "non_embedding": dense.non_embedding, "all": dense.all}[of]
    if recipe.denominator == "blocks" and of == "decoder":
        whole = dense.non_embedding
    fraction = asked * whole / removable
    if fraction >= 1:
        hint = f"At most {asked / fraction:.1%} of '{of}' can go; ask for less." if fraction < math.inf else f"{recipe.method.name} doesn't touch it here."
        raise RecipeError(
            f"Removing {asked:.0%} of '{of}' needs more than all that {recipe.method.name} removes from in this model.",
            code="target_unreachable",
            hint=hint,
            pointer="/sparsity",
        )
    return fraction
