"""Retraining of everything that was not pruned: the baseline that a recovery of few parameters is compared with."""

from __future__ import annotations

from app.recovery import Full
from worker.recovery.base import Adapted, Student, keep_zeros


def adapt(student: Student, config: Full) -> Adapted:
    """Every parameter takes gradients, embeddings too; an embedding that is also the head stays one matrix. Masks are those of the pruning, not W ≠ 0: a weight
    that was kept and is zero may change."""
    parameters = dict(student.model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    frozen = 0
    for name, mask in student.masks.items():
        keep_zeros(parameters[name], mask)
        frozen += mask.numel() - int(mask.count_nonzero())
    return Adapted(parameters, merge=lambda: None, frozen=frozen)
