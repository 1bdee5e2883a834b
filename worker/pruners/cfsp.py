"""CFSP (Wang et al. 2024, arXiv 2409.13199): coarse importance allots FFN width to blocks, fine importance chooses channels, from one forward pass.

Departures from the authors' released code: coarse importance is a mean over tokens, so that the allocation does not depend on how much text was read;
widths meet the target exactly; a width never rounds to zero; the cosine is clamped before arccos; only one walk is made.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from app.recipe import CFSP
from worker.calibration import Distance, InputNorms
from worker.pruners.base import ChannelPruner, Weights

TOKENS_OF_THE_PAPER = 128 * 1024  # the released code sums importance over these and divides by 1e4, which sets the sigmoid's slope


# ------------------------------------------------------------- coarse: blocks


def angular(before: Tensor, after: Tensor) -> Tensor:
    """arccos(cos(before, after)) / π: (…, D), (…, D) -> (…)."""
    return cosine_similarity(before, after, dim=-1).clamp(-1, 1).arccos() / math.pi


def cosine(before: Tensor, after: Tensor) -> Tensor:
    """1 - cos(before, after)."""
    return 1 - cosine_similarity(before, after, dim=-1)


def mse(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).square().mean(dim=-1)


def mae(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).abs().mean(dim=-1)


def uniform(before: Tensor, after: Tensor) -> Tensor:
    """The same for every block."""
    return before.new_ones(before.shape[:-1])


DISTANCES: dict[str, Distance] = {"angular": angular, "cosine": cosine, "mse": mse, "mae": mae, "uniform": uniform}


def allocate(importance: list[float], fraction: float, config: CFSP) -> list[float]:
    """Each block's share of the width that stays; the shares' mean is 1 - fraction, none exceeds `max_layer_width`.

    z_l = sigmoid(a · (I_l - mean I) · 131072 / 1e4), share_l = z_l / mean z · (1 - fraction). Where the largest share would exceed the bound, all are
    drawn towards their mean until it doesn't, as in the released code.
    """
    coarse = torch.tensor(importance, dtype=torch.float64)
    z = torch.sigmoid(config.allocation_strength * (coarse - coarse.mean()) * TOKENS_OF_THE_PAPER / 1e4)
    keep = 1 - fraction
    shares = z / z.mean() * keep
    bound = max(config.max_layer_width, keep)  # a mean above the bound can't be met: equal widths are the nearest
    excess = float(shares.max()) - keep
    if float(shares.max()) > bound and excess > 0:
        shares = keep + (shares - keep) * ((bound - keep) / excess)
    return [float(share) for share in shares]


# ------------------------------------------------------------ fine: channels


def fine_importance(down: Tensor, up: Tensor, gate: Tensor, input_norm: Tensor, mode: Literal["combined", "paper", "code"]) -> Tensor:
    """Importance of each FFN channel: (D, I), (I, D), (I, D), (I,) -> (I,).

    `paper`, after Eq. 8: Σ_j |Wd_ji|·n_i / Σ_k |Wd_jk|·n_k, the channel's part in each output of `down`; the terms of `up` and `gate`, each divided by
    its own channel's sum, are 1 for every channel and left out. `code`, the released default: the first term is divided by its own channel's sum too, so
    what is left of three equal terms times n_i is n_i. `combined`, ours: all three terms with Euclidean norms, which leave none of them constant, times n_i.
    """
    if mode == "code":
        return input_norm
    part = down.abs() * input_norm  # (D, I)
    tiny = torch.finfo(part.dtype).tiny
    if mode == "paper":
        return (part / part.sum(dim=1, keepdim=True).clamp_min(tiny)).sum(dim=0)
    of_down = (part / part.norm(dim=1, keepdim=True).clamp_min(tiny)).sum(dim=0)
    of_up, of_gate = (weight.abs().sum(dim=1) / weight.norm(dim=1).clamp_min(tiny) for weight in (up, gate))
    importance: Tensor = (of_down + of_up + of_gate) * input_norm
    return importance


def _score(weights: Weights, norms: InputNorms, config: CFSP) -> Tensor:
    return fine_importance(weights["mlp.down_proj"], weights["mlp.up_proj"], weights["mlp.gate_proj"], norms["mlp.down_proj"], config.mode)


PRUNER = ChannelPruner(score=_score, distance=lambda config: DISTANCES[config.coarse], allocate=allocate)
