"""Zeroes weights block by block: each block is measured on the outputs of the pruned blocks before it, pruned, and run again for the next."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from app.recipe import Swaps
from worker.calibration import Statistic, forward, measuring
from worker.checkpoint import masks_name, write_masks
from worker.choosing import allotted_shares
from worker.pruners.base import Masked, MaskPruner, Target
from worker.survey import Surveyed, walks
from worker.swaps import refine
from worker.walk import Pruning, facts, hidden_states, next_inputs, read_block, write_block, write_outer

WALK = "prune"


def mask_blocks(run: Pruning, pruner: MaskPruner, target: Target, surveyed: list[Surveyed]) -> list[dict[str, Any]]:
    """Prune every block and write its shard and its masks; the blocks' facts."""
    stream, architecture, config = run.stream, run.stream.architecture, run.stream.source.config
    swaps = run.recipe.restoration if isinstance(run.recipe.restoration, Swaps) else None
    wanted: frozenset[Statistic] = pruner.statistics | {"gram"} if swaps else pruner.statistics
    shares = [] if target.pattern else allotted_shares(run, surveyed, target.fraction)
    targets = [Target(1 - share) for share in shares] or [target] * len(stream)
    hidden, arguments = hidden_states(run, WALK) if wanted else (None, [])
    done = len(stream) * (walks(run, pruner) - 1)
    for index in range(len(run.state.blocks(WALK)), len(stream)):
        tensors = read_block(run, index)
        prefix, shared = architecture.block_prefix(index), architecture.inputs(config, index)
        inputs = {}
        if hidden is not None:
            block = stream.materialise(index, tensors)
            stop = None if architecture.router(config, index) else shared[-1][0]
            with measuring(block, [linears[0] for linears in shared], wanted, stop) as inputs:
                forward(block, arguments[index], hidden.open(index), None)
            stream.drop(index)
        pruned = tensors
        masks: dict[str, Tensor] = {}
        damping: list[float] = []
        for linears in shared:
            statistics = inputs.get(linears[0])
            dense = {linear: stream.weight(tensors, index, linear) for linear in linears}
            masked = pruner.prune(dense, statistics, run.recipe.method, targets[index])
            if swaps is not None and statistics is not None:
                group = target.pattern[1] if target.pattern else None
                masked = Masked({linear: refine(dense[linear], mask, statistics.gram, swaps.rounds, group) for linear, mask in masked.masks.items()})
            masks |= masked.masks
            changed = {linear: masked.weights.get(linear, weight) * masked.masks[linear] for linear, weight in dense.items()}
            pruned = stream.with_weights(pruned, index, changed)
            damping += [] if masked.raised_damping is None else [masked.raised_damping]
        if hidden is not None and index + 1 < len(stream):
            forward(stream.materialise(index, pruned), arguments[index], hidden.open(index), hidden.open(index + 1))
            stream.drop(index)
        shard, packed = write_block(run, index, len(stream), pruned), run.folder / masks_name(index + 1, len(stream) + 1)
        write_masks(packed, {f"{prefix}{linear}.weight": _as_stored(mask, architecture.transposed) for linear, mask in masks.items()})
        importance = surveyed[index].importance if surveyed else None
        record: dict[str, Any] = facts(run, index, tensors, pruned, importance) | {"raised_damping": max(damping, default=None)}
        run.state.finish_block(WALK, [shard, packed], record, next_inputs(run, index, hidden))
        run.block_done(done + index + 1, len(stream) * walks(run, pruner))
    write_outer(run, len(stream))
    return [block["facts"] for block in run.state.blocks(WALK)]


def _as_stored(mask: Tensor, transposed: bool) -> Tensor:
    return mask.T.contiguous() if transposed else mask
