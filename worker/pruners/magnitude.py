"""Magnitude pruning (Han et al. 2015, arXiv 1506.02626): the weights of smallest absolute value go, at once or in rounds. Needs no calibration."""

from __future__ import annotations

from torch import Tensor

from app.recipe import Magnitude
from worker.calibration import InputStatistics
from worker.masks import keep_largest, keep_largest_per_row, keep_n_of_m
from worker.pruners.base import Masked, MaskPruner, Target, Weights


def mask(weight: Tensor, target: Target, compare: str = "matrix") -> Tensor:
    """(C_out, C_in) mask of the weights that stay.

    Exactly round(n · fraction) weights go; the code that came with Wanda drops one more, and all that tie with it.
    """
    score = weight.abs()
    if target.pattern is not None:
        return keep_n_of_m(score, *target.pattern)
    if compare == "row":
        columns = weight.shape[1]
        return keep_largest_per_row(score, columns - round(columns * target.fraction))
    return keep_largest(score, weight.numel() - round(weight.numel() * target.fraction))


def fractions_of_rounds(fraction: float, rounds: int) -> list[float]:
    """What has been removed after each round, if each removes the same share of what is left and `fraction` has gone in the end.

    The geometric schedule of iterative magnitude pruning (Frankle & Carbin, arXiv 1803.03635). A weight that has gone is zero, so it is among the smallest of the
    next round and stays away.
    """
    return [*(1 - (1 - fraction) ** (number / rounds) for number in range(1, rounds)), fraction]


def _prune(weights: Weights, statistics: InputStatistics | None, config: Magnitude, target: Target) -> Masked:
    return Masked({name: mask(weight, target, config.compare) for name, weight in weights.items()})


PRUNER = MaskPruner(prune=_prune, statistics=frozenset())
