"""Writes the blocks without the parts that don't stay, as they are or restored.

Notation: C inputs of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from app.recipe import FLAP, LeastSquares, Scored
from worker.calibration import Drift, HiddenStates, InputStatistics, Statistic, forward, measuring
from worker.checkpoint import written_type
from worker.choosing import Choice, keep_best
from worker.masks import keep_largest
from worker.pruners.base import StructuredPruner, Weights
from worker.pruners.flap import compensation
from worker.restoration import best_ridge, choose_inputs, refit
from worker.structured import Keep, kept_columns, slice_block
from worker.survey import Surveyed, dense_block, scored_inputs
from worker.walk import Pruning, facts, hidden_states, next_inputs, read_block, stored, write_block, write_outer

WALK = "prune"
ALIGNMENT = 8  # channels; on a CPU, products of other widths take a fifth longer
REACH = 1.5  # how many channels may go, of each that does; beyond, squared errors give up some that only few tokens need, and these much


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
    sliced = slice_kept(run, index, tensors, keep)
    return _with_biases(run, choice, index, keep, tensors, sliced, surveyed[index].means)


def slice_kept(run: Pruning, index: int, tensors: dict[str, Tensor], keep: Keep) -> dict[str, Tensor]:
    """`slice_block`; but FFNs and attention of which nothing stays are left one unit whose outgoing weights are zero, which loads and computes the same."""
    architecture, config = run.stream.architecture, run.stream.source.config
    parts = list(zip([mlp.down for mlp in architecture.mlps(config, index)], keep.channels, strict=True)) if keep.channels is not None else []
    if keep.groups is not None:
        parts.append((architecture.attention.output, keep.groups))
    gone = [linear for linear, mask in parts if not mask.any()]
    if gone:
        channels = keep.channels and tuple(_one_at_least(mask) for mask in keep.channels)
        keep = Keep(channels, None if keep.groups is None else _one_at_least(keep.groups), keep.experts)
    sliced = slice_block(tensors, architecture, config, index, keep)
    names = [f"{architecture.block_prefix(index)}{linear}.weight" for linear in gone]
    return sliced | {name: torch.zeros_like(sliced[name]) for name in names}


def _one_at_least(mask: Tensor) -> Tensor:
    return mask if mask.any() else torch.arange(len(mask)) == 0


def slice_aligned(run: Pruning, index: int, tensors: dict[str, Tensor], keep: Keep) -> dict[str, Tensor]:
    """`slice_kept`, but an FFN keeps a few more channels, up to a multiple of ALIGNMENT, whose outgoing weights are zero: it computes the same, and sooner."""
    if keep.channels is None:
        return slice_kept(run, index, tensors, keep)
    architecture, padded = run.stream.architecture, tuple(_aligned(mask) for mask in keep.channels)
    sliced = slice_kept(run, index, tensors, replace(keep, channels=padded))
    for mlp, mask, more in zip(architecture.mlps(run.stream.source.config, index), keep.channels, padded, strict=True):
        weight = sliced[f"{architecture.block_prefix(index)}{mlp.down}.weight"]
        weight.index_fill_(0 if architecture.transposed else 1, (~mask[more]).nonzero().squeeze(1).to(weight.device), 0)
    return sliced


def _aligned(mask: Tensor) -> Tensor:
    more = (~mask).nonzero().squeeze(1)[: -int(mask.sum()) % ALIGNMENT]
    return mask.index_fill(0, more, True)


def slice_in_turn(run: Pruning, pruner: StructuredPruner, surveyed: list[Surveyed], choice: Choice, done: Callable[[int], None]) -> list[dict[str, Any]]:
    """Walk the pruned model: run each dense block on what the pruned blocks before it give, choose anew and fit anew where asked, write, go on; the blocks' facts.

    A refit aims at the dense block's outputs on the pruned model's own inputs; one that takes back drift walks the dense model in step.
    """
    stream, architecture, method = run.stream, run.stream.architecture, run.recipe.method
    restoration = run.recipe.restoration
    wanted: frozenset[Statistic] = frozenset()
    if isinstance(restoration, LeastSquares):
        wanted = frozenset({"variance", "gram" if restoration.ridge else "halves"})
    hidden, arguments = hidden_states(run, WALK)
    dense = _dense_beside(run, hidden)
    for index in range(len(run.state.blocks(WALK)), len(stream)):
        tensors, keep = read_block(run, index), choice.keeps[index]
        assert keep is not None
        drift = None if dense is None else _past_dense_block(run, index, tensors, arguments[index], dense)

        def measure(tensors: dict[str, Tensor], linears: list[str], index: int = index, drift: Drift | None = drift) -> dict[str, InputStatistics]:
            block = stream.materialise(index, tensors)
            with measuring(block, linears, wanted | pruner.statistics(method)) as inputs, drift.measuring_pruned(block) if drift else nullcontext():
                forward(block, arguments[index], hidden.open(index), None)
            stream.drop(index)
            return inputs

        inputs = measure(tensors, scored_inputs(run, pruner, index))
        scores: Mapping[Any, Tensor] = surveyed[index].scores
        if isinstance(method, Scored) and method.inputs == "pruned":
            scores = pruner.score(dense_block(run, index, tensors, inputs), method)
            keep = keep_best(run, scores, keep)
        if isinstance(method, Scored) and isinstance(restoration, LeastSquares) and restoration.reselect and keep.channels is not None:
            keep = replace(keep, channels=_reselected(run, index, tensors, keep.channels, inputs, scores["channels"]))
        removed = _removed_inputs(run, index, keep)
        fitted: Weights = {}
        if isinstance(restoration, LeastSquares):
            output, behind = architecture.attention.output, [linear for linear in removed if linear != architecture.attention.output]
            if output in removed:
                fitted = _fit(run, index, tensors, inputs, {output: removed[output]}, restoration, None)
            if behind and keep.groups is not None and not keep.groups.all():  # the FFN is fitted on what the pruned attention leaves it
                without_groups = slice_kept(run, index, tensors, Keep(groups=keep.groups))
                inputs |= measure(stream.with_weights(without_groups, index, fitted), behind)
            fitted |= _fit(run, index, tensors, inputs, {linear: removed[linear] for linear in behind}, restoration, drift)
        sliced = stream.with_weights(slice_kept(run, index, tensors, keep), index, fitted)
        means = {linear: inputs[linear].mean for linear in removed}
        sliced = _with_biases(run, choice, index, keep, tensors, sliced, means)
        if index + 1 < len(stream):
            forward(stream.materialise(index, sliced), arguments[index], hidden.open(index), hidden.open(index + 1))
            stream.drop(index)
        shard = write_block(run, index, len(stream), sliced)
        record = facts(run, index, tensors, sliced, surveyed[index].importance)
        run.state.finish_block(WALK, [shard], record, next_inputs(run, index, hidden, dense))
        done(index)
    write_outer(run, len(stream))
    return [block["facts"] for block in run.state.blocks(WALK)]


def _dense_beside(run: Pruning, hidden: HiddenStates) -> HiddenStates | None:
    """The calibration set as the input of the dense model's next block, where the pruned model is to be drawn back to it."""
    architecture, config, restoration = run.stream.architecture, run.stream.source.config, run.recipe.restoration
    if not isinstance(restoration, LeastSquares) or not restoration.drift or not all(architecture.adds_ffn(config, index) for index in range(len(run.stream))):
        return None
    dense = HiddenStates(run.state.work, hidden.shape, "dense")
    if not run.state.blocks(WALK):
        dense.open(0).copy_(hidden.open(0))
    return dense


def _past_dense_block(run: Pruning, index: int, tensors: dict[str, Tensor], arguments: dict[str, Any], dense: HiddenStates) -> Drift:
    """Walk the dense model past a block."""
    drift = Drift(run.stream.architecture.mlp.down, HiddenStates(run.state.work, dense.shape, "before_ffn", files=1).open(index))
    block = run.stream.materialise(index, tensors)
    with drift.measuring_dense(block):
        forward(block, arguments, dense.open(index), dense.open(index + 1))
    run.stream.drop(index)
    return drift


def _fit(
    run: Pruning,
    index: int,
    tensors: dict[str, Tensor],
    inputs: dict[str, InputStatistics],
    removed: dict[str, Tensor],
    config: LeastSquares,
    drift: Drift | None,
) -> Weights:
    """New weights (C_out, kept) for linears whose inputs lost some."""
    more = {} if drift is None else {drift.down: config.drift * drift.mean}
    fitted: Weights = {}
    for linear, kept in removed.items():
        weight, measured = run.stream.weight(tensors, index, linear), inputs[linear]
        ridge = config.ridge or best_ridge(weight, *measured.halves, kept)
        fitted[linear] = refit(weight, measured.gram, kept, measured.tokens, ridge, more.get(linear))
    return fitted


def _reselected(
    run: Pruning, index: int, tensors: dict[str, Tensor], channels: tuple[Tensor, ...], inputs: dict[str, InputStatistics], scores: Tensor
) -> tuple[Tensor, ...]:
    """As many FFN channels: of those with the lowest (M, I) scores, half as many again as go, those stay that can make up best for the others."""

    def choose(down: str, mask: Tensor, score: Tensor) -> Tensor:
        measured, count, width = inputs[down], int(mask.sum()), len(mask)
        if not measured.tokens or not 0 < count < width:
            return mask
        may_go = ~keep_largest(score, width - round(REACH * (width - count))).to(run.stream.device)
        return choose_inputs(run.stream.weight(tensors, index, down), measured.gram, may_go, count, measured.tokens).cpu()

    mlps = run.stream.architecture.mlps(run.stream.source.config, index)
    return tuple(choose(mlp.down, mask, score) for mlp, mask, score in zip(mlps, channels, scores, strict=True))


def _removed_inputs(run: Pruning, index: int, keep: Keep) -> dict[str, Tensor]:
    """(C,) masks of the linears whose inputs lost some, but not all."""
    architecture, config = run.stream.architecture, run.stream.source.config
    masks = {} if keep.channels is None else {mlp.down: mask for mlp, mask in zip(architecture.mlps(config, index), keep.channels, strict=True)}
    columns = kept_columns(keep, architecture, config)
    if columns is not None:
        masks[architecture.attention.output] = columns
    return {linear: mask.to(run.stream.device) for linear, mask in masks.items() if mask.any() and not mask.all()}


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


def _with_biases(
    run: Pruning, choice: Choice, index: int, keep: Keep, dense: dict[str, Tensor], sliced: dict[str, Tensor], means: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A block's tensors with biases that give back what the removed inputs gave on average, where there are means and places."""
    architecture, prefix = run.stream.architecture, run.stream.architecture.block_prefix(index)
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
