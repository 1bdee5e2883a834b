"""Restoration: what a linear's removed inputs did is taken over by the kept ones, by ridge regression on calibration tokens.

The reconstruction step of OSSCAR (Meng et al. 2024, arXiv 2403.12983) and, for single weights, of SparseGPT (arXiv 2301.00774), with another penalty: only
the removed part is regressed, so that a strong ridge leaves the kept weights as they were instead of drawing them to zero.

Notation: I inputs of a linear (FFN channels, or the outputs of the attention heads), D outputs, K kept and P removed inputs, R that may be removed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

RIDGES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # among which the best is looked for
RIDGE = 3.0  # where there is too little text to look
SKETCH = 64  # sums of outputs on which it is looked for, where there are more outputs
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
    mean = _mean_square(gram)
    if mean == 0 or not len(kept) or not len(removed):
        return of_kept
    rows = gram.index_select(0, kept)  # (K, I)
    lost = rows.index_select(1, removed) @ weight.index_select(1, removed).T  # (K, D)
    if more is not None:
        lost += more.index_select(1, kept).T
    share = ridge * len(kept) / max(tokens, 1)
    factor = _cholesky(rows.index_select(1, kept), share, mean)
    return of_kept + torch.cholesky_solve(lost, factor).T


def choose_inputs(weight: Tensor, gram: Tensor, may_go: Tensor, count: int, tokens: int) -> Tensor:
    """The `count` inputs that can make up best for all others, of those that may go, one after the other: (D, I), (I, I), (I,) bool -> (I,) bool.

    Optimal Brain Surgeon (Hassibi & Stork 1992) by whole columns: the next to go is the one with the smallest ‖W_j‖² / [H⁻¹]_jj, which is what a fit of all others
    adds to ‖W x - W' x‖² with G damped to H = G + λI, λ as in `refit` for a ridge of 1 and all inputs. Then W becomes W - W_j H⁻¹_j: / [H⁻¹]_jj, the weights
    fitted without j, and H⁻¹ the inverse without j. The damping also keeps inputs of large weights that few of the tokens happened to use.

    `gram` is the mean of x xᵀ over `tokens` tokens; both tensors are left as they are.
    """
    mean, places = _mean_square(gram), may_go.nonzero().squeeze(1)  # (R,)
    stays = torch.ones_like(places, dtype=torch.bool)
    if mean:
        inverse = torch.cholesky_inverse(_cholesky(gram.clone(), len(gram) / max(tokens, 1), mean))[places][:, places]  # (R, R), as the others only follow
        weight = weight[:, places]
        for _ in range(len(gram) - count):
            gone = (weight.square().sum(dim=0) / inverse.diagonal()).masked_fill_(~stays, torch.inf).argmin()
            stays[gone] = False
            scale = inverse[gone, gone].rsqrt()
            row = inverse[gone] * scale
            weight.addr_(weight[:, gone] * scale, row, alpha=-1)
            inverse.addr_(row, row, alpha=-1)
    else:
        stays[len(places) - (len(gram) - count) :] = False
    keep = torch.ones_like(may_go)
    keep[places] = stays
    return keep


def best_ridge(weight: Tensor, halves: Tensor, tokens: Sequence[int], keep: Tensor) -> float:
    """The ridge with which `refit` errs least on text that it has not seen: (D, I), (2, I, I) sums of x xᵀ over two halves of the text, tokens of each, (I,) bool.

    A fit on each half is judged by the other. How much the kept inputs can explain differs between linears, and neighbouring tokens tell less than so many
    independent ones would, so that neither a fixed ridge nor a formula that counts tokens is as good. Outputs are summed at random, since what differs
    between ridges shows in some sums as well as in all outputs. The search starts in the middle of `RIDGES` and goes on to the better neighbour while there is one.
    """
    kept, removed = keep.nonzero().squeeze(1), (~keep).nonzero().squeeze(1)
    means = [_mean_square(half) for half in halves]
    if not all(tokens) or not all(means) or not len(kept) or not len(removed):
        return RIDGE
    outputs = weight.index_select(1, removed)  # (D, P)
    if len(outputs) > SKETCH:
        signs = torch.randint(0, 2, (SKETCH, len(outputs)), generator=torch.Generator().manual_seed(0)) * 2 - 1
        outputs = signs.to(outputs) @ outputs  # (S, P)
    inputs = [half.index_select(0, kept).index_select(1, kept) for half in halves]  # (K, K) each
    lost = [half.index_select(0, kept).index_select(1, removed) @ outputs.T for half in halves]  # (K, S)

    @functools.cache
    def error(place: int) -> float:
        """But for what is the same with all ridges."""
        total = 0.0
        for fit, other in ((0, 1), (1, 0)):
            factor = _cholesky(inputs[fit].clone(), RIDGES[place] * len(kept) / tokens[fit], means[fit])
            change = torch.cholesky_solve(lost[fit], factor)  # (K, S)
            total += float((change * (inputs[other] @ change - 2 * lost[other])).sum())
        return total

    found = len(RIDGES) // 2
    while (better := min(range(max(found - 1, 0), min(found + 2, len(RIDGES))), key=error)) != found:
        found = better
    return RIDGES[found]


def _mean_square(gram: Tensor) -> Tensor:
    """The mean of a Gram matrix's diagonal, ()."""
    mean = gram.diagonal().mean()
    if not mean.isfinite():
        raise ValueError("the Gram matrix of a linear's inputs is not finite")
    return mean


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
