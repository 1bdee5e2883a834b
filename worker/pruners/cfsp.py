"""CFSP (Wang et al. 2024, arXiv 2409.13199): coarse importance allots FFN width to blocks, fine importance chooses channels, from one forward pass.

Departures from the authors' released code: widths meet the target exactly; a width never rounds to zero; only one walk is made; KV groups of attention can be
chosen too, by the same scores. The coarse half is worker/allocation.py's `coarse_shares`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from app.recipe import CFSP
from worker.pruners.base import DenseBlock, StructuredPruner, Unit, units_of


def fine_importance(behind: Tensor, before: tuple[Tensor, ...], input_norm: Tensor, mode: Literal["combined", "paper", "code"]) -> Tensor:
    """Importance of each FFN channel or attention column: the (D, I) weights behind it, any number of (I, D) weights before it, (I,) norms -> (I,).

    `paper`, after Eq. 8: Σ_j |Wd_ji|·n_i / Σ_k |Wd_jk|·n_k, the channel's part in each output of `down`; the terms of `up` and `gate`, each divided by
    its own channel's sum, are 1 for every channel and left out. `code`, the released default: the first term is divided by its own channel's sum too, so
    what is left of three equal terms times n_i is n_i. `combined`, ours: all three terms with Euclidean norms, which leave none of them constant, times n_i.
    """
    if mode == "code":
        return input_norm
    part = behind.abs() * input_norm  # (D, I)
    tiny = torch.finfo(part.dtype).tiny
    if mode == "paper":
        return (part / part.sum(dim=1, keepdim=True).clamp_min(tiny)).sum(dim=0)
    importance = (part / part.norm(dim=1, keepdim=True).clamp_min(tiny)).sum(dim=0)
    for weight in before:
        importance = importance + weight.abs().sum(dim=1) / weight.norm(dim=1).clamp_min(tiny)
    weighted: Tensor = importance * input_norm
    return weighted


def _score(block: DenseBlock, config: CFSP) -> dict[Unit, Tensor]:
    scores: dict[Unit, Tensor] = {}
    if config.units != "attention":
        per_mlp = [fine_importance(block.weights[mlp.down], block.outer(mlp), block.inputs[mlp.down].norm, config.mode) for mlp in block.mlps]
        scores["channels"] = torch.stack(per_mlp)
    if config.units != "ffn":
        output = block.attention.output
        scores["columns"] = fine_importance(block.weights[output], (), block.inputs[output].norm, config.mode)
    return scores


PRUNER = StructuredPruner(score=_score, units=units_of, statistics=lambda config: frozenset({"norm"}))
