"""Removes parts of the model: chooses from the survey what stays, and writes the blocks without the rest, as they are or restored.

Notation: M FFNs of a block, I FFN channels, G KV groups, H heads, hd head size, C inputs of a linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from app.exceptions import RecipeError
from app.recipe import FLAP, Coarse, Given, LeastSquares, Owl, Structured, ZScore
from worker.allocation import coarse_shares, owl_shares, standardised, units_kept_by_rank
from worker.calibration import forward, measuring
from worker.checkpoint import WRITTEN_AS, written_type
from worker.masks import keep_largest
from worker.pruners.flap import compensation
from worker.restoration import refit
from worker.structured import Keep, channel_cost, group_cost, integer_widths, kept_columns, slice_block
from worker.survey import Surveyed
from worker.walk import Pruning, facts, hidden_states, next_input, read_block, stored, write_block, write_outer

WALK = "prune"
EXPERT_ALIGNMENT = 8  # transformers multiplies experts in groups, which wants rows of whole 16 bytes: 8 channels in 16 bit


@dataclass(frozen=True)
class Choice:
    """What stays of the model."""

    keeps: list[Keep | None]  # of every block; None: the block is dropped

    @property
    def kept(self) -> list[int]:
        return [index for index, keep in enumerate(self.keeps) if keep is not None]


# ---------------------------------------------------------------------- choice


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
    return Choice([_keep_best(run, block.scores, channels, groups) for block, (channels, groups) in zip(surveyed, counts, strict=True)])


def _keep_experts(run: Pruning, saliency: Tensor, fraction: float) -> Keep:
    count, at_least = len(saliency), run.stream.architecture.experts_per_token(run.stream.source.config)
    if not count:  # a dense block among mixtures
        return Keep()
    stays = count - round(count * fraction)
    if stays < at_least:
        raise _unreachable(f"Of {count} experts a layer, {stays} would stay, but a token goes to {at_least}.", "Ask for a lower sparsity.", "/sparsity")
    return Keep(experts=keep_largest(saliency, stays))


def _keep_best(run: Pruning, scores: dict[str, Tensor], channels: int, groups: int) -> Keep:
    keep = Keep()
    if "channels" in scores:
        keep = Keep(channels=tuple(keep_largest(of_mlp, channels) for of_mlp in scores["channels"]))
    if "columns" in scores:
        by_group = _by_group(run, scores["columns"]).mean(dim=1)
        keep = Keep(channels=keep.channels, groups=keep_largest(by_group, groups))
    return keep


def _by_group(run: Pruning, columns: Tensor) -> Tensor:
    """(H·hd,) -> (G, H·hd / G)"""
    return columns.view(run.stream.architecture.dimensions(run.stream.source.config).kv_heads, -1)


def _counts(run: Pruning, surveyed: list[Surveyed], fraction: float) -> list[tuple[int, int]]:
    """How many channels (of each FFN) and KV groups stay in each block."""
    method, allocation = run.recipe.method, run.recipe.allots
    assert isinstance(method, Structured)
    if isinstance(allocation, ZScore):
        ranked = ranked_counts(run, surveyed, 1 - fraction)
        groups = _possible_groups(run, [groups for _, groups in ranked])
        if method.units == "attention":
            return [(0, count) for count in groups]
        # Whole widths, and what the bounds on numbers of groups took or gave, change the ranked counts a little.
        exchanged = sum(before - after for (_, before), after in zip(ranked, groups, strict=True))
        costs = run.stream.architecture, run.stream.source.config
        total = sum(channels for channels, _ in ranked) + exchanged * group_cost(*costs) / channel_cost(*costs, 0)
        width = surveyed[0].scores["channels"].shape[1]
        channels = integer_widths([max(channels, 1) for channels, _ in ranked], round(total), width, method.multiple_of)
        return list(zip(channels, groups, strict=True))
    return _shared_counts(run, surveyed, _shares(run, surveyed, fraction), 1 - fraction)


def _shares(run: Pruning, surveyed: list[Surveyed], fraction: float) -> list[float]:
    match run.recipe.allots:
        case Coarse() as allocation:
            return coarse_shares([block.importance or 0.0 for block in surveyed], fraction, allocation)
        case Owl() as allocation:
            return owl_shares([block.outliers or 0.0 for block in surveyed], fraction, allocation)
        case Given(sparsities=sparsities):
            return [1 - sparsity for sparsity in sparsities]
        case _:
            return [1 - fraction] * len(surveyed)


def _shared_counts(run: Pruning, surveyed: list[Surveyed], shares: list[float], keep: float) -> list[tuple[int, int]]:
    """Channels and groups by shares: the groups first, since they are coarse; then as many channels as meet the total."""
    architecture, config, method = run.stream.architecture, run.stream.source.config, run.recipe.method
    assert isinstance(method, Structured)
    blocks, kv_heads = len(surveyed), architecture.dimensions(config).kv_heads
    alike = len(set(shares)) == 1 and run.recipe.output.layout == "uniform"
    groups = [kv_heads] * blocks
    if method.units != "ffn":
        one = [max(1, round(kv_heads * keep))] * blocks
        groups = _possible_groups(run, one if alike else integer_widths(shares, round(keep * kv_heads * blocks), kv_heads))
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


def _possible_groups(run: Pruning, groups: list[int]) -> list[int]:
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
    assert isinstance(method, Structured)
    most = int(width * allocation.max_layer_share) if isinstance(allocation, Coarse) else width
    if most < method.multiple_of or (method.units == "ffn" and round(width * keep) > most):
        raise _unreachable(
            f"Of {width} channels a layer, {round(width * keep)} would stay, but the recipe allows multiples of {method.multiple_of} up to {most}.",
            "Raise sparsity or allocation.max_layer_share, or lower multiple_of.",
            "/method",
        )
    return most


def ranked_counts(run: Pruning, surveyed: list[Surveyed], keep: float) -> list[tuple[float, int]]:
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


# --------------------------------------------------------------------- writing


def slice_blocks(run: Pruning, surveyed: list[Surveyed], choice: Choice) -> list[dict[str, Any]]:
    """Write every block that stays, without what its keep leaves out; the blocks' facts. Needs weights alone."""
    found: list[dict[str, Any]] = []
    places = {index: place for place, index in enumerate(choice.kept)}
    for index in range(len(choice.keeps)):
        tensors = read_block(run, index)
        sliced = edit_block(run, surveyed, choice, index, tensors)
        if sliced is not None:
            write_block(run, places[index], len(places), _renumbered(run, sliced, index, places[index]))
        found.append(facts(run, index, tensors, sliced, surveyed[index].importance))
    write_outer(run, len(places))
    return found


def edit_block(run: Pruning, surveyed: list[Surveyed], choice: Choice, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """What a choice leaves of a block's tensors; None where it drops the block."""
    keep = choice.keeps[index]
    if keep is None:
        return None
    sliced = slice_block(tensors, run.stream.architecture, run.stream.source.config, index, keep)
    return _with_biases(run, choice, index, tensors, sliced, surveyed[index].means)


def restore_blocks(run: Pruning, surveyed: list[Surveyed], choice: Choice, done: Callable[[int], None]) -> list[dict[str, Any]]:
    """Walk the pruned model: fit what lies behind removed inputs to the dense block's outputs on the pruned stream, write, go on; the blocks' facts."""
    stream, architecture, config = run.stream, run.stream.architecture, run.stream.source.config
    restoration = run.recipe.restoration
    assert isinstance(restoration, LeastSquares)
    hidden, arguments = hidden_states(run, WALK)
    for index in range(len(run.state.blocks(WALK)), len(stream)):
        tensors, keep = read_block(run, index), choice.keeps[index]
        assert keep is not None
        removed = _removed_inputs(run, index, keep)
        block = stream.materialise(index, tensors)
        with measuring(block, removed, frozenset({"gram", "variance"})) as inputs:
            forward(block, arguments[index], hidden.open(index), None)
        fitted = {linear: refit(stream.weight(tensors, index, linear), inputs[linear].gram, kept, restoration.ridge) for linear, kept in removed.items()}
        sliced = stream.with_weights(slice_block(tensors, architecture, config, index, keep), index, fitted)
        sliced = _with_biases(run, choice, index, tensors, sliced, {linear: inputs[linear].mean for linear in removed})
        if index + 1 < len(stream):
            forward(stream.materialise(index, sliced), arguments[index], hidden.open(index), hidden.open(index + 1))
        stream.drop(index)
        shard = write_block(run, index, len(stream), sliced)
        record = facts(run, index, tensors, sliced, surveyed[index].importance)
        run.state.finish_block(WALK, [shard], record, next_input(run, hidden, index))
        done(index)
    write_outer(run, len(stream))
    return [block["facts"] for block in run.state.blocks(WALK)]


def _removed_inputs(run: Pruning, index: int, keep: Keep) -> dict[str, Tensor]:
    """(C,) masks of the linears whose inputs lost some."""
    architecture, config = run.stream.architecture, run.stream.source.config
    masks = {} if keep.channels is None else {mlp.down: mask for mlp, mask in zip(architecture.mlps(config, index), keep.channels, strict=True)}
    columns = kept_columns(keep, architecture, config)
    if columns is not None:
        masks[architecture.attention.output] = columns
    return {linear: mask.to(run.stream.device) for linear, mask in masks.items() if not mask.all()}


def _renumbered(run: Pruning, tensors: dict[str, Tensor], index: int, place: int) -> dict[str, Tensor]:
    old, new = run.stream.architecture.block_prefix(index), run.stream.architecture.block_prefix(place)
    return {new + name.removeprefix(old): tensor for name, tensor in tensors.items()}


# ---------------------------------------------------------------------- biases


def compensated(run: Pruning, choice: Choice) -> tuple[list[str], list[str]]:
    """The switches of config.json under which biases are added, and why biases are left out where they are."""
    if not isinstance(run.recipe.method, FLAP) or not run.recipe.method.compensate:
        return [], []
    architecture, config = run.stream.architecture, run.stream.source.config
    linears = sorted({linear for index, keep in enumerate(choice.keeps) if keep for linear in _removed_inputs(run, index, keep)})
    missing = [linear for linear in linears if not _has_place(run, choice, linear)]
    notes = [
        f"What the removed inputs of {', '.join(missing)} gave on average is not made up for: {run.stream.source.model_type} has no place for a bias there."
    ]
    slots = [architecture.slot(linear) for linear in linears if linear not in missing]
    return sorted({slot.switch for slot in slots if slot and slot.switch and not config.get(slot.switch)}), notes if missing else []


def _has_place(run: Pruning, choice: Choice, linear: str) -> bool:
    architecture, size = run.stream.architecture, run.stream.architecture.dimensions(run.stream.source.config)
    heads = {int(keep.groups.sum()) * size.queries_per_group for keep in choice.keeps if keep and keep.groups is not None}
    return architecture.slot(linear) is not None and written_type(run.stream.source.model_type, size, heads) == run.stream.source.model_type


def _with_biases(run: Pruning, choice: Choice, index: int, dense: dict[str, Tensor], sliced: dict[str, Tensor], means: dict[str, Tensor]) -> dict[str, Tensor]:
    """A block's tensors with biases that give back what the removed inputs gave on average, where there are means and places."""
    architecture, prefix, keep = run.stream.architecture, run.stream.architecture.block_prefix(index), choice.keeps[index]
    assert keep is not None
    result = dict(sliced)
    if not isinstance(run.recipe.method, FLAP) or not run.recipe.method.compensate:
        return result
    switches, _ = compensated(run, choice)
    for slot in architecture.biases:
        if slot.switch in switches:  # config.json gives biases to all of these or to none
            for linear in slot.linears:
                weight = result[f"{prefix}{linear}.weight"]
                result.setdefault(f"{prefix}{linear}.bias", weight.new_zeros(weight.shape[1 if architecture.transposed else 0]))
    for linear, kept in _removed_inputs(run, index, keep).items():
        name = f"{prefix}{linear}.bias"
        if name in result and _has_place(run, choice, linear):
            given_back = compensation(
                run.stream.weight(dense, index, linear), run.stream.weight(sliced, index, linear), means[linear].to(run.stream.device), kept
            )
            result[name] = (result[name].float() + given_back).to(result[name].dtype)
    return result


# ----------------------------------------------------------------------- sizes


def stored_size(run: Pruning, choice: Choice) -> tuple[int, int]:
    """Parameters and bytes of the weight files that a choice would leave, without computing any; the bytes are an upper bound, by less than 1 kB a shard."""
    source, architecture, config = run.stream.source, run.stream.architecture, run.stream.source.config
    switches, _ = compensated(run, choice)
    parameters = size = 0
    for index, keep in [(None, None), *enumerate(choice.keeps)]:
        if index is not None and keep is None:
            continue
        prefix = "" if index is None else architecture.block_prefix(index)
        inside = {
            name: entry for name, entry in source.tensors.items() if (name.startswith(prefix) if prefix else not name.startswith(f"{architecture.blocks}."))
        }
        tensors = {name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta") for name, entry in inside.items()}
        if index is not None and keep is not None:
            tensors = slice_block(tensors, architecture, config, index, keep)
            for linear in (linear for slot in architecture.biases if slot.switch in switches for linear in slot.linears):
                weight = tensors[f"{prefix}{linear}.weight"]
                tensors.setdefault(f"{prefix}{linear}.bias", weight[0] if architecture.transposed else weight[:, 0])
        tensors = stored(run, tensors)
        parameters += sum(tensor.numel() for tensor in tensors.values())
        size += sum(tensor.numel() * tensor.element_size() + len(name) + HEADER_BYTES for name, tensor in tensors.items()) + HEADER_BYTES
    return parameters, size


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
HEADER_BYTES = 120  # at most, of a tensor's entry in a shard's header besides its name
