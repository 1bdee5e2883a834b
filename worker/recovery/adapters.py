"""Products of low rank that keep the zeros of a mask, as torch parametrizations of a linear's weight.

What a weight is in training, it becomes at the merge (`remove_parametrizations`), to the bit. In training the whole product is computed beside each weight; with
gradient checkpointing those of one block are alive at a time.

Notation: C_in inputs and C_out outputs of a linear, r rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class MaskLoRA(nn.Module):
    """W + s · (B A ⊙ M), with A (r, C_in) random and B (C_out, r) zero at the start (PERP's MaskLoRA; Zimmer et al., arXiv 2312.15230)."""

    mask: Tensor | None

    def __init__(self, weight: Tensor, mask: Tensor | None, rank: int, scale: float, *, transposed: bool) -> None:
        """`weight` and `mask` (True = keep; None: all) are (C_out, C_in), or (C_in, C_out) where `transposed`."""
        super().__init__()
        self.down, self.up = _matrices(weight, rank, transposed)
        self.register_buffer("mask", mask)
        self.scale, self.transposed = scale, transposed

    def forward(self, weight: Tensor) -> Tensor:
        product = _product(self.down, self.up, self.transposed)
        if self.mask is not None:
            product = torch.where(self.mask, product, 0.0)  # unlike a product with it, leaves no float mask for the backward pass
        return torch.add(weight, product, alpha=self.scale)


class ScaleLoRA(nn.Module):
    """W ⊙ B A, with B A = 1 at the start (PERP's ScaleLoRA; Zimmer et al., arXiv 2312.15230). What is zero stays zero.

    The authors start with 1 / √r in all entries; all r components then have the same gradients, and B A keeps rank 1. Here the first component is 1, and the
    others begin as LoRA's do.
    """

    def __init__(self, weight: Tensor, rank: int, *, transposed: bool) -> None:
        """`weight` is (C_out, C_in), or (C_in, C_out) where `transposed`."""
        super().__init__()
        self.down, self.up = _matrices(weight, rank, transposed)
        with torch.no_grad():
            self.down[0], self.up[:, 0] = 1.0, 1.0
        self.transposed = transposed

    def forward(self, weight: Tensor) -> Tensor:
        return weight * _product(self.down, self.up, self.transposed)


def _matrices(weight: Tensor, rank: int, transposed: bool) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, C_in), random as in LoRA, and B (C_out, r) of zeros."""
    outputs, inputs = reversed(weight.shape) if transposed else weight.shape
    down = nn.init.kaiming_uniform_(weight.new_empty(rank, inputs), a=math.sqrt(5))
    return nn.Parameter(down), nn.Parameter(weight.new_zeros(outputs, rank))


def _product(down: Tensor, up: Tensor, transposed: bool) -> Tensor:
    return down.T @ up.T if transposed else up @ down
