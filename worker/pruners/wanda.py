"""Wanda (Sun et al. 2023, arXiv 2306.11695): a weight's importance is its absolute value times the norm of its input, compared within its output row."""

from __future__ import annotations

from torch import Tensor

from app.recipe import Wanda
from worker.calibration import InputStatistics
from worker.masks import keep_by_row_share, keep_largest_per_row, keep_n_of_m
from worker.pruners.base import Masked, MaskPruner, Target, Weights


def score(weight: Tensor, input_norm: Tensor) -> Tensor:
    """S_ij = |W_ij| · ‖X_j‖ (the paper's Eq. 1): (C_out, C_in), (C_in,) -> (C_out, C_in).

    `input_norm` is the root mean square over tokens; the paper's norm differs by a factor common to a row, which changes no mask.
    """
    return weight.abs() * input_norm


def mask(weight: Tensor, input_norm: Tensor, target: Target, variant: bool = False) -> Tensor:
    """(C_out, C_in) mask of the weights that stay. Exactly round(C_in · fraction) go in every row, where the authors drop int(C_in · fraction)."""
    scores = score(weight, input_norm)
    if target.pattern is not None:
        return keep_n_of_m(scores, *target.pattern)
    if variant:
        return keep_by_row_share(scores, target.fraction)
    columns = weight.shape[1]
    return keep_largest_per_row(scores, columns - round(columns * target.fraction))


def _prune(weights: Weights, statistics: InputStatistics | None, config: Wanda, target: Target) -> Masked:
    assert statistics is not None
    return Masked({name: mask(weight, statistics.norm, target, config.variant) for name, weight in weights.items()})


PRUNER = MaskPruner(prune=_prune, statistics=frozenset({"norm"}))
