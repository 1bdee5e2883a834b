"""Restoration: what a linear's removed inputs did is taken over by the kept ones, by ridge regression on calibration tokens.

The reconstruction step of OSSCAR (Meng et al. 2024, arXiv 2403.12983) and, for single weights, of SparseGPT (arXiv 2301.00774), with another penalty: only
the removed part is regressed, so that a strong ridge leaves the kept weights as they were instead of drawing them to zero.

Notation: I inputs of a linear (FFN channels, or the outputs of the attention heads), D outputs, K kept and P removed inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 3.0
MOST_RIDGE = 1e6  # of the mean diagonal; a matrix that needs more is no Gram matrix


def refit(weight: Tensor, gram: Tensor, keep: Tensor, tokens: int, ridge: float = RIDGE, more: Tensor | None = None) -> Tensor:
    """The kept columns of a linear's weight, changed so that they make up for the removed ones: (D, I), (I, I), (I,) bool -> (D, K), float32.

    W' = W_K + (W_P G_PK + C_K) (G_KK + λI)⁻¹ minimises E‖W x + e - W' x_K‖² + λ‖W' - W_K‖², where e is what should come out besides, nothing unless `more`
    is given. `gram` is the mean of x xᵀ over `tokens` tokens, `more` that of e xᵀ, C of (D, I); both are left as they are.

    λ = ridge · K / tokens · the mean diagonal of G. A coefficient's variance falls with the number of tokens and its size with that of the inputs that
    share the work, so the best λ is K (1 - R²) / (R² · tokens), where R² is how much of the removed part the kept ones can explain; R² of a quarter to a
    half, as seen in SmolLM2-135M, makes `ridge` 3 to 1. Few tokens, as for a rare expert, thus leave the weights nearly as they were, and none
    at all exactly. Where G_KK + λI isn't positive definite in float32, as with duplicate inputs and a ridge of 0, λ is raised tenfold at a time.

    Raises ValueError for a Gram matrix that isn't finite or isn't positive semidefinite.
    """
    kept, removed = keep.nonzero().squeeze(1), (~keep).nonzero().squeeze(1)
    of_kept = weight.index_select(1, kept)
    mean = gram.diagonal().mean()
    if not mean.isfinite():
        raise ValueError("the Gram matrix of a linear's inputs is not finite")
    if mean == 0 or not len(kept) or not len(removed):
        return of_kept
    rows = gram.index_select(0, kept)  # (K, I)
    lost = rows.index_select(1, removed) @ weight.index_select(1, removed).T  # (K, D)
    if more is not None:
        lost += more.index_select(1, kept).T
    share = ridge * len(kept) / max(tokens, 1)
    factor = _cholesky(rows.index_select(1, kept), share, mean)
    return of_kept + torch.cholesky_solve(lost, factor).T


def _cholesky(matrix: Tensor, share: float, mean: Tensor) -> Tensor:
    """Lower Cholesky factor of `matrix` + share · mean · I, the share raised as far as needed. `matrix` (K, K) is spoiled."""
    factor: Tensor
    diagonal = matrix.diagonal().clone()
    while True:
        matrix.diagonal().copy_(diagonal + share * mean)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return factor
        if share >= MOST_RIDGE:
            raise ValueError("the Gram matrix of a linear's inputs is not positive semidefinite")
        share = max(10 * share, torch.finfo(matrix.dtype).eps)
