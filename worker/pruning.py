"""Prunes a checkpoint block by block: reads a block, measures, decides, writes it as its own shard, drops it.

A survey of the dense model comes first where the method or the allocation needs one. Then zeros are set block by block (masking), or parts are removed
(slicing). Every finished block of a walk is recorded, so a killed job resumes.
"""

from __future__ import annotations

from app.report import LayerReport
from worker import budget, survey
from worker.choosing import choose
from worker.evaluation import LinearZeros
from worker.masking import mask_blocks
from worker.pruners.base import MaskPruner, Pruner, Target
from worker.slicing import compensated, slice_blocks, slice_in_turn
from worker.survey import walks
from worker.walk import Pruned, Pruning


def prune(run: Pruning, pruner: Pruner, target: Target | None) -> Pruned:
    """Prune every block and write all shards; goes on where the state says. Without a target, the recipe's budget sets how much goes."""
    run.folder.mkdir(exist_ok=True)
    surveyed = survey.survey(run, pruner) if survey.is_needed(run, pruner) else []
    notes: list[str] = []
    switches: list[str] = []
    if isinstance(pruner, MaskPruner):
        assert target is not None
        found = mask_blocks(run, pruner, target, surveyed)
    else:
        choice = choose(run, surveyed, target.fraction) if target else budget.solve(run, surveyed)
        switches, notes = compensated(run, choice)
        if walks(run, pruner) == 1:
            found = slice_blocks(run, surveyed, choice)
        else:
            found = slice_in_turn(run, pruner, surveyed, choice, lambda index: run.block_done(len(run.stream) + index + 1, len(run.stream) * 2))
    damping = max((block["raised_damping"] for block in found if block.get("raised_damping")), default=None)
    if damping is not None:
        notes.append(f"A layer's Hessian needed a damping of {damping:g}, more than asked: with more calibration tokens it would not.")
    return Pruned(
        folder=run.folder,
        layers=[LayerReport(**block["layer"]) for block in found],
        zeros_before=[LinearZeros(**block["zeros_before"]) for block in found],
        zeros_after=[LinearZeros(**block["zeros_after"]) for block in found],
        switches=switches,
        notes=notes,
    )
