"""Prunes a checkpoint block by block: reads a block, measures, decides, writes it as its own shard, drops it.

A survey of the dense model comes first where the method or the allocation needs one; or, with Bonsai, rounds of sub-models (perturbing). Then zeros are set
block by block (masking), or parts are removed (slicing). Every finished block of a walk is recorded, so a killed job resumes.
"""

from __future__ import annotations

from app.counting import LinearZeros
from app.recipe import Bonsai
from app.report import LayerReport
from worker import budget, survey
from worker.choosing import choose
from worker.masking import mask_blocks
from worker.perturbing import choose_in_rounds
from worker.pruners.base import MaskPruner, Pruner, Target
from worker.slicing import compensated, slice_blocks, slice_in_turn
from worker.survey import Surveyed, walks
from worker.walk import Pruned, Pruning


def prune(run: Pruning, pruner: Pruner, target: Target | None) -> Pruned:
    """Prune every block and write all shards; goes on where the state says. Without a target, the recipe's budget sets how much goes."""
    run.folder.mkdir(exist_ok=True)
    notes: list[str] = []
    switches: list[str] = []
    if isinstance(pruner, MaskPruner):
        assert target is not None
        found = mask_blocks(run, pruner, target, _survey(run, pruner) if survey.is_needed(run, pruner) else [])
    else:
        if isinstance(run.recipe.method, Bonsai):
            assert target is not None
            choice, notes = choose_in_rounds(run, pruner, run.recipe.method, target.fraction)
            surveyed = [Surveyed({}, {}, None, None)] * len(run.stream)
        else:
            surveyed = _survey(run, pruner)
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


def _survey(run: Pruning, pruner: Pruner) -> list[Surveyed]:
    return survey.survey(run, pruner, lambda index: run.block_done(index + 1, len(run.stream) * walks(run, pruner)))
