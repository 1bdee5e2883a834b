"""Products of low rank beside a linear's weight: peft's, and our own that keep the zeros of a mask, as torch parametrizations.

With a parametrization, what a weight is in training, it becomes at the merge (`remove_parametrizations`), to the bit. In training the whole product is computed beside each weight; with
gradient checkpointing those of one block are alive at a time.

Notation: C_in inputs and C_out outputs of a linear, r rank.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations


class MaskLoRA(nn.Module):
    """W + s · (B A ⊙ M), with A (r, C_in) random and B (C_out, r) zero at the start (PERP's MaskLoRA; Zimmer et al., arXiv 2312.15230).

    Dropout leaves out entries of the product (Wan et al., ICML 2013): LoRA's own leaves out inputs of A, which a weight does not see.
    """

    mask: Tensor | None

    def __init__(self, weight: Tensor, mask: Tensor | None, rank: int, scale: float, *, transposed: bool, dropout: float = 0.0) -> None:
        """`weight` and `mask` (True = keep; None: all) are (C_out, C_in), or (C_in, C_out) where `transposed`."""
        super().__init__()
        self.down, self.up = _matrices(weight, rank, transposed)
        self.register_buffer("mask", mask)
        self.scale, self.transposed, self.dropout = scale, transposed, dropout

    def forward(self, weight: Tensor) -> Tensor:
        product = _product(self.down, self.up, self.transposed)
        if self.mask is not None:
            product = torch.where(self.mask, product, 0.0)  # unlike a product with it, leaves no float mask for the backward pass
        if self.dropout:
            product = dropout(product, self.dropout, self.training)
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


def attach(model: Any, adapters: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Put adapters on the weights of the linears of these names; gives what merges them."""
    layers = [model.get_submodule(name) for name in adapters]
    for layer, adapter in zip(layers, adapters.values(), strict=True):
        register_parametrization(layer, "weight", adapter)

    def merge() -> None:
        for layer in layers:
            remove_parametrizations(layer, "weight")

    return merge


def add_lora(model: Any, rank_of: Mapping[str, int], scale: float, *, transposed: bool, dropout: float = 0.0) -> Any:
    """peft's tuner of the linears of these names: y = (W + scale · B A) x. `transposed`: weights are (C_in, C_out)."""
    from peft import LoraConfig, LoraModel  # takes a second, and most jobs train nothing

    ranks = {re.escape(name): rank for name, rank in rank_of.items()}
    config = LoraConfig(
        lora_dropout=dropout,
        target_modules=[f"0.{name}" for name in rank_of],
        rank_pattern=ranks,
        alpha_pattern={name: scale * rank for name, rank in ranks.items()},
        fan_in_fan_out=transposed,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # it finds out by itself that a head is not stored as the blocks' linears are
        return LoraModel(nn.ModuleList([model]), config, "default")  # by itself, a mixture would tell peft that its experts are fused


def _matrices(weight: Tensor, rank: int, transposed: bool) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, C_in), random as in LoRA, and B (C_out, r) of zeros."""
    outputs, inputs = reversed(weight.shape) if transposed else weight.shape
    down = nn.init.kaiming_uniform_(weight.new_empty(rank, inputs), a=math.sqrt(5))
    return nn.Parameter(down), nn.Parameter(weight.new_zeros(outputs, rank))


def _product(down: Tensor, up: Tensor, transposed: bool) -> Tensor:
    return down.T @ up.T if transposed else up @ down
