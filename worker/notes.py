"""What a report tells in sentences besides its figures."""

from __future__ import annotations

from app.recipe import Recipe
from app.report import LoadCheck, Measured, Parameters, Recovered, Round
from worker.pruners.base import Target
from worker.walk import Pruned


def of_pruning(recipe: Recipe, target: Target | None, pruned: Pruned, before: Parameters, after: Parameters) -> list[str]:
    notes = list(pruned.notes)
    if not recipe.facts.structured:
        notes.append("The zeros are stored: they save neither time nor memory in transformers or vLLM. A structured method does.")
    if recipe.denominator == "ffn" and recipe.facts.structured and target is not None:
        removed = 1 - after.ffn / before.ffn
        if abs(removed - target.fraction) > 0.5 / min(layer.ffn_channels_before for layer in pruned.layers):
            notes.append(f"{removed:.2%} of the FFN channels were removed instead of {target.fraction:.2%}, because widths are whole and bounded.")
    elif recipe.facts.structured and target is not None:
        of_all = recipe.denominator == "non_embedding"
        removed = 1 - (after.non_embedding / before.non_embedding if of_all else after.decoder / before.decoder)
        what = "parameters without embedding and head" if of_all else "decoder's linear weights"
        notes.append(f"{removed:.2%} of the {what} were removed; {recipe.facts.prunes} are whole, so the target is met as nearly as they allow.")
    return notes


def of_recovery(recipe: Recipe, recovered: Recovered | None) -> list[str]:
    config, notes = recipe.recovery, []
    if config is None or recovered is None:
        return []
    if recovered.steps < config.total_steps:
        notes.append(f"Training ended after {recovered.steps} of {config.total_steps} steps, since the held-out loss fell no more.")
    if recovered.held_out_loss_before is not None and recovered.held_out_loss_before == recovered.held_out_loss_after:
        notes.append("No step of the training lowered the held-out loss, so the pruned model stayed as it was; try a lower learning rate.")
    if recovered.held_out_loss_merged is not None:
        notes.append(f"Merging under the masks took the held-out loss from {recovered.held_out_loss_after:.4f} to {recovered.held_out_loss_merged:.4f}.")
    if recipe.trains_head:
        notes.append("The head was trained and is stored apart from the embedding, whether it was tied to it or not.")
    return notes


def of_rounds(rounds: list[Round] | None) -> list[str]:
    told = []
    for number, each in enumerate(rounds or [], 1):
        before, after = each.recovery.held_out_loss_before, each.recovery.held_out_loss_after
        trained = "" if before is None or after is None else f", and training took the held-out loss from {before:.4f} to {after:.4f}"
        told.append(f"After round {number}, {each.sparsity:.2%} of the decoder's linear weights are zero{trained}.")
    return told


def of_memory(recipe: Recipe, before: Measured | None, after: Measured | None, checks: list[LoadCheck]) -> list[str]:
    """What was left out because a model didn't fit in memory."""
    notes = []
    if recipe.evaluation is not None and recipe.evaluation.speed and not (before and before.speed and after and after.speed):
        notes.append("Speed was not measured where the model, in float32, would not have fitted in the worker's memory.")
    if checks[0].blocks is not None:
        notes.append(
            "The result, in float32, would not have fitted in the worker's memory: names and shapes of all its weights were checked by transformers, and the "
            f"logits of a model of its blocks {', '.join(map(str, checks[0].blocks))} were compared."
        )
    return notes
