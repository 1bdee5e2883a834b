"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774): weights go column by column, and the columns to the right make up for each loss.

Departures from the authors' code: exactly the asked number goes, ties or not; damping is relative to the mean over living inputs and is raised where it is
too small; the factor of the inverse comes from one Cholesky factorisation instead of two and an inverse; a block's errors are found one column at a time,
but its weights change once, by one matrix product.

Notation: R rows (outputs) and C columns (inputs) of a linear's weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from app.recipe import SparseGPT
from worker.calibration import InputStatistics
from worker.masks import keep_largest, keep_n_of_m
from worker.pruners.base import Masked, MaskPruner, Target, Weights

MOST_DAMPING = 1.0  # of the mean diagonal; above it the method would be little more than magnitude pruning
INNER = 32  # columns whose errors are found between two matrix products; the fastest of 8 to 64 for 192 to 1536 rows


@dataclass(frozen=True)
class Factor:
    """What every linear with the same input shares."""

    upper: Tensor  # U, (C, C) upper triangular with UᵀU = (G + λI)⁻¹
    dead: Tensor  # (C,) bool: inputs that are always zero
    damping: float  # λ as a fraction of the mean diagonal, as it was used


def factorise(gram: Tensor, damping: float = 0.01) -> Factor:
    """Factor the inverse of the damped Gram matrix, the mean over tokens of x xᵀ: (C, C) float32, left as it is.

    The paper's H is twice this; the factor changes nothing. λ = damping × the mean diagonal of the living inputs. Where the matrix isn't positive definite
    in float32 even so, as with far fewer tokens than inputs, damping is raised tenfold at a time.

    Raises ValueError for a matrix that isn't finite, and where even a damping of 1 is too small.
    """
    if not gram.isfinite().all():
        raise ValueError("the Gram matrix of a linear's inputs is not finite")
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp_min(1)
    # G + λI = V Vᵀ with V = U⁻¹: the Cholesky factorisation from the last column to the first.
    damped = gram.flip(0, 1)
    undamped = torch.where(dead, 1, diagonal).flip(0)
    while True:
        damped.diagonal().copy_(undamped + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        if damping >= MOST_DAMPING:
            raise ValueError(f"the Gram matrix of a linear's inputs is not positive definite, even with a damping of {damping:g}")
        damping = min(max(10 * damping, torch.finfo(gram.dtype).eps), MOST_DAMPING)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    return Factor(inverse.flip(0, 1), dead, damping)


def prune(weight: Tensor, factor: Factor, target: Target, block_size: int = 128) -> tuple[Tensor, Tensor]:
    """Prune (R, C) float32 weights: the new weights, exactly 0 where they are pruned, and the (R, C) mask of those that stay.

    A weight's score is w² / U_cc², the loss that removing it costs once all columns to its left are settled (the paper's Eq. 3). A fraction is compared
    within R × `block_size` weights, and exactly round(R · C · fraction) go; N:M within m inputs of a row, chosen when their columns are reached.
    Columns of dead inputs become 0, whatever the mask says.

    Raises ValueError where C can't be cut into groups of m.
    """
    rows, columns = weight.shape
    upper = factor.upper
    ahead = weight.masked_fill(factor.dead, 0).T.contiguous()  # (C, R): a column of the weight is a row here
    keep = torch.empty_like(ahead, dtype=torch.bool)
    scale = upper.diagonal().reciprocal()[:, None]  # (C, 1)
    group = INNER
    if target.pattern is not None:
        group = target.pattern[1]
        block_size = max(block_size - block_size % group, group)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        if target.pattern is None:
            removed = round(rows * end * target.fraction) - round(rows * start * target.fraction)
            score = (ahead[start:end] * scale[start:end]).abs()
            keep[start:end] = keep_largest(score, score.numel() - removed)
        errors = torch.empty_like(ahead[start:end])
        for first in range(start, end, group):
            last = min(first + group, end)
            current = torch.addmm(ahead[first:last], upper[start:first, first:last].T, errors[: first - start], alpha=-1)
            if target.pattern is not None:
                keep[first:last] = keep_n_of_m((current * scale[first:last]).T.abs(), *target.pattern).T
            _find_errors(current, upper[first:last, first:last], ~keep[first:last] * scale[first:last], errors[first - start : last - start])
        ahead[start:].addmm_(upper[start:end, start:].T, errors, alpha=-1)
    mask = keep.T.contiguous()
    return ahead.T * mask, mask  # faster than masked_fill, whose branches a random mask defeats


def _find_errors(current: Tensor, upper: Tensor, removal: Tensor, errors: Tensor) -> None:
    """Write the errors (w - ŵ) / U_cc of a few columns, given `removal`, which is 1 / U_cc where a weight goes and 0 where it stays.

    (K, R), (K, K), (K, R) -> (K, R). The error of a column includes what the columns to its left have done to it.
    """
    for column, (values, share, error) in enumerate(zip(current, removal, errors, strict=True)):
        if column:
            torch.addmv(values, errors[:column].T, upper[:column, column], alpha=-1, out=error)
            torch.mul(error, share, out=error)
        else:
            torch.mul(values, share, out=error)


def _prune(weights: Weights, statistics: InputStatistics | None, config: SparseGPT, target: Target) -> Masked:
    assert statistics is not None
    factor = factorise(statistics.gram, config.damping)
    raised = factor.damping if factor.damping > config.damping else None
    pruned = {name: prune(weight, factor, target, config.block_size) for name, weight in weights.items()}
    return Masked({name: mask for name, (_, mask) in pruned.items()}, {name: weight for name, (weight, _) in pruned.items()}, raised)


PRUNER = MaskPruner(prune=_prune, statistics=frozenset({"gram"}))
