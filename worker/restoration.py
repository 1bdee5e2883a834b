"""Makes up for removed inputs of a linear by fitting what is left of its weight anew, from the Gram matrix of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def refit(weight: Tensor, gram: Tensor, keep: Tensor, ridge: float) -> Tensor:
    """(D, C) weight, (C, C) Gram matrix, (C,) kept -> (D, kept)."""
    kept, removed = keep.nonzero().squeeze(1), (~keep).nonzero().squeeze(1)
    inner = gram[kept][:, kept]
    inner.diagonal().add_(ridge * gram.diagonal().mean())
    factor = torch.linalg.cholesky(inner)
    return weight[:, kept] + torch.cholesky_solve(gram[kept][:, removed] @ weight[:, removed].T, factor).T
