"""Chooses from the survey of the dense model what stays: how much of each block, and which parts.

Notation: I FFN channels, G KV groups, H heads, hd head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from app.exceptions import RecipeError
from app.recipe import Coarse, Given, Owl, Scored, Uniform, ZScore
from worker.allocation import coarse_shares, owl_shares, standardised, units_kept_by_rank
from worker.checkpoint import WRITTEN_AS
from worker.masks import keep_largest
from worker.structured import Keep, channel_cost, group_cost, integer_widths
from worker.survey import Surveyed
from worker.walk import Pruning

EXPERT_ALIGNMENT = 8  # transformers multiplies experts in groups, which wants rows of whole 16 bytes: 8 channels in 16 bit


@dataclass(frozen=True)
class Choice:
    """What stays of the model."""

    keeps: list[Keep | None]  # of every block; None: the block is dropped

    @property
    def kept(self) -> list[int]:
        return [index for index, keep in enumerate(self.keeps) if keep is not None]


# ---------------------------------------------------------------------- shares


def allotted_shares(run: Pruning, surveyed: list[Surveyed], fraction: float) -> list[float]:
    """The share of each block that stays, by the recipe's allocation."""
    match run.recipe.allots:
        case Coarse() as allocation:
            return coarse_shares([block.importance or 0.0 for block in surveyed], fraction, allocation)
        case Owl() as allocation:
            return owl_shares([block.outliers or 0.0 for block in surveyed], fraction, allocation)
        case ZScore():
            return _ranked_shares(run, surveyed, fraction)
        case Given(sparsities=sparsities):
            return [1 - sparsity for sparsity in sparsities]
        case Uniform():
            return [1 - fraction] * len(run.stream)


def _ranked_shares(run: Pruning, surveyed: list[Surveyed], fraction: float) -> list[float]:
    """The share of each block's weights that would stay if whole channels and KV groups were removed by rank."""
    architecture, config = run.stream.architecture, run.stream.source.config
    group = group_cost(architecture, config)
    shares = []
    for index, (channels, groups) in enumerate(_ranked_counts(run, surveyed, 1 - fraction)):
        channel = channel_cost(architecture, config, index)
        whole = surveyed[index].scores["channels"].shape[1] * channel + architecture.dimensions(config).kv_heads * group
        shares.append((channels * channel + groups * group) / whole)
    return [min(1.0, share * (1 - fraction) / mean(shares)) for share in shares]


# ------------------------------------------------------------- parts that stay


def choose(run: Pruning, surveyed: list[Surveyed], fraction: float) -> Choice:
    """What stays when `fraction` of the method's denominator is removed. Raises RecipeError where the method's bounds don't allow it."""
    units = set(surveyed[0].scores)
    blocks = len(run.stream)
    if "block" in units:
        influence = torch.stack([block.scores["block"] for block in surveyed])
        keep = keep_largest(influence, min(max(blocks - round(blocks * fraction), 1), blocks))
        return Choice([Keep() if stays else None for stays in keep.tolist()])
    if "experts" in units:
        return Choice([_keep_experts(run, block.scores["experts"], fraction) for block in surveyed])
    counts = _counts(run, surveyed, fraction)
    return Choice([_keep_counts(run, block.scores, channels, groups) for block, (channels, groups) in zip(surveyed, counts, strict=True)])


def _keep_experts(run: Pruning, saliency: Tensor, fraction: float) -> Keep:
    count, at_least = len(saliency), run.stream.architecture.experts_per_token(run.stream.source.config)
    if not count:  # a dense block among mixtures
        return Keep()
    stays = count - round(count * fraction)
    if stays < at_least:
        raise _unreachable(f"Of {count} experts a layer, {stays} would stay, but a token goes to {at_least}.", "Ask for a lower sparsity.", "/sparsity")
    return Keep(experts=keep_largest(saliency, stays))


def _keep_counts(run: Pruning, scores: dict[str, Tensor], channels: int, groups: int) -> Keep:
    """The best channels of each FFN and the best KV groups, so many of each."""
    of_mlps = tuple(keep_largest(of_mlp, channels) for of_mlp in scores["channels"]) if "channels" in scores else None
    return Keep(channels=of_mlps, groups=keep_largest(_by_group(run, scores["columns"]).mean(dim=1), groups) if "columns" in scores else None)


def keep_best(run: Pruning, scores: Mapping[Any, Tensor], sizes: Keep) -> Keep:
    """As many parts of a block as `sizes` keeps, chosen by other scores."""
    channels = int(sizes.channels[0].sum()) if sizes.channels is not None else 0
    groups = int(sizes.groups.sum()) if sizes.groups is not None else 0
    return _keep_counts(run, {unit: score.cpu() for unit, score in scores.items()}, channels, groups)


def _by_group(run: Pruning, columns: Tensor) -> Tensor:
    """(H·hd,) -> (G, H·hd / G)"""
    return columns.view(run.stream.architecture.dimensions(run.stream.source.config).kv_heads, -1)


def _counts(run: Pruning, surveyed: list[Surveyed], fraction: float) -> list[tuple[int, int]]:
    """How many channels (of each FFN) and KV groups stay in each block."""
    method, allocation = run.recipe.method, run.recipe.allots
    assert isinstance(method, Scored)
    if isinstance(allocation, ZScore):
        ranked = _ranked_counts(run, surveyed, 1 - fraction)
        groups = possible_groups(run, [groups for _, groups in ranked])
        if method.units == "attention":
            return [(0, count) for count in groups]
        # Whole widths, and what the bounds on numbers of groups took or gave, change the ranked counts a little.
        exchanged = sum(before - after for (_, before), after in zip(ranked, groups, strict=True))
        costs = run.stream.architecture, run.stream.source.config
        total = sum(channels for channels, _ in ranked) + exchanged * group_cost(*costs) / channel_cost(*costs, 0)
        width = surveyed[0].scores["channels"].shape[1]
        channels = integer_widths([max(channels, 1) for channels, _ in ranked], round(total), width, method.multiple_of)
        return list(zip(channels, groups, strict=True))
    return _shared_counts(run, surveyed, allotted_shares(run, surveyed, fraction), 1 - fraction)


def _shared_counts(run: Pruning, surveyed: list[Surveyed], shares: list[float], keep: float) -> list[tuple[int, int]]:
    """Channels and groups by shares: the groups first, since they are coarse; then as many channels as meet the total."""
    architecture, config, method = run.stream.architecture, run.stream.source.config, run.recipe.method
    assert isinstance(method, Scored)
    blocks, kv_heads = len(surveyed), architecture.dimensions(config).kv_heads
    alike = len(set(shares)) == 1 and run.recipe.output.layout == "uniform"
    groups = [kv_heads] * blocks
    if method.units != "ffn":
        one = [max(1, round(kv_heads * keep))] * blocks
        groups = possible_groups(run, one if alike else integer_widths(shares, round(keep * kv_heads * blocks), kv_heads))
    if method.units == "attention":
        return [(0, count) for count in groups]
    widths = [block.scores["channels"].shape[1] for block in surveyed]
    costs = [channel_cost(architecture, config, index) for index in range(blocks)]
    multiple = math.lcm(method.multiple_of, EXPERT_ALIGNMENT if architecture.experts else 1)
    most = _widest(run, widths[0], keep)
    of_groups = group_cost(architecture, config)
    if alike or len(set(widths)) > 1:  # layers of different kinds, dense and mixtures, can't exchange channels
        channels = []
        for width, cost, share, count in zip(widths, costs, shares, groups, strict=True):
            whole = width * cost + (kv_heads * of_groups if method.units == "both" else 0)
            left = whole * share - (count * of_groups if method.units == "both" else 0)
            channels += integer_widths([1.0], round(left / cost), min(most, width), multiple)
        return list(zip(channels, groups, strict=True))
    total = keep * widths[0] * blocks
    if method.units == "both":
        total += (keep * kv_heads * blocks - sum(groups)) * of_groups / costs[0]
    return list(zip(integer_widths(shares, round(total), most, multiple), groups, strict=True))


def possible_groups(run: Pruning, groups: list[int]) -> list[int]:
    """Numbers of KV groups of which transformers accepts the largest, which config.json states; a Llama with others is written as another type."""
    architecture, size = run.stream.architecture, run.stream.architecture.dimensions(run.stream.source.config)
    if not architecture.heads_divide_hidden or run.stream.source.model_type in WRITTEN_AS:
        return groups
    possible = [count for count in range(1, size.kv_heads + 1) if size.hidden % (count * size.queries_per_group) == 0]
    most = min(possible, key=lambda count: (abs(count - max(groups)), -count))
    return [min(count, most) if count < max(groups) else most for count in groups]


def _widest(run: Pruning, width: int, keep: float) -> int:
    """The most channels that a layer may have."""
    method, allocation = run.recipe.method, run.recipe.allots
    assert isinstance(method, Scored)
    most = int(width * allocation.max_layer_share) if isinstance(allocation, Coarse) else width
    if most < method.multiple_of or (method.units == "ffn" and round(width * keep) > most):
        raise _unreachable(
            f"Of {width} channels a layer, {round(width * keep)} would stay, but the recipe allows multiples of {method.multiple_of} up to {most}.",
            "Raise sparsity or allocation.max_layer_share, or lower multiple_of.",
            "/method",
        )
    return most


def _ranked_counts(run: Pruning, surveyed: list[Surveyed], keep: float) -> list[tuple[float, int]]:
    """Channels (of each FFN, on average) and KV groups that stay in each block when all are ranked together and `keep` of their weights stay."""
    architecture, config = run.stream.architecture, run.stream.source.config
    scores: list[Tensor] = []
    costs: list[int] = []
    for index, block in enumerate(surveyed):
        if "channels" in block.scores:
            scores.append(standardised(block.scores["channels"]).flatten())
            costs.append(channel_cost(architecture, config, index) // len(block.scores["channels"]))
        if "columns" in block.scores:
            scores.append(_by_group(run, standardised(block.scores["columns"])).mean(dim=1))
            costs.append(group_cost(architecture, config))
    budget = keep * sum(len(score) * cost for score, cost in zip(scores, costs, strict=True))
    kept = iter(units_kept_by_rank(scores, costs, budget))
    return [
        (next(kept) / len(block.scores["channels"]) if "channels" in block.scores else 0.0, next(kept) if "columns" in block.scores else 0)
        for block in surveyed
    ]


def _unreachable(message: str, hint: str, pointer: str) -> RecipeError:
    return RecipeError(message, code="target_unreachable", hint=hint, pointer=pointer)
