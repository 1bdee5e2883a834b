"""How the layers share a model's sparsity: every allocation, as free functions that any method can use.

Notation: L layers, D hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from app.recipe import Coarse, Owl
from worker.calibration import Distance

TOKENS_OF_CFSP = 128 * 1024  # the released code sums importance over these and divides by 1e4, which sets the sigmoid's slope


# --------------------------------------------- how far a layer moves a token


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


DISTANCES: dict[str, Distance] = {"angular": angular, "cosine": cosine, "mse": mse, "mae": mae}


# ---------------------------------------------------- shares of what may stay


def coarse_shares(importance: list[float], fraction: float, config: Coarse) -> list[float]:
    """CFSP (Wang et al., arXiv 2409.13199): each layer's share that stays, by its coarse importance; the mean is 1 - fraction.

    z_l = sigmoid(strength · (I_l - mean I) · 131072 / 1e4), share_l = z_l / mean z · (1 - fraction), with I_l a mean over tokens: the released code's sum
    makes the allocation depend on the amount of text. Where the largest share would exceed `max_layer_share`, all are drawn towards their mean until it
    doesn't, as in the released code.
    """
    coarse = torch.tensor(importance, dtype=torch.float64)
    z = torch.sigmoid(config.strength * (coarse - coarse.mean()) * TOKENS_OF_CFSP / 1e4)
    keep = 1 - fraction
    shares = z / z.mean() * keep
    bound = max(config.max_layer_share, keep)  # a mean above the bound can't be met: equal shares are the nearest
    excess = float(shares.max()) - keep
    if float(shares.max()) > bound and excess > 0:
        shares = keep + (shares - keep) * ((bound - keep) / excess)
    return shares.tolist()


def outlier_ratio(scores: list[Tensor], threshold: float) -> float:
    """Share of a layer's scores, of any shapes, that exceed their common mean `threshold` times (OWL's LOD)."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > threshold * mean).sum()) for score in scores) / count


def owl_shares(outliers: list[float], fraction: float, config: Owl) -> list[float]:
    """OWL (Yin et al., arXiv 2310.05175, §3.2): each layer's share that stays, by its outlier ratio; the mean is 1 - fraction.

    The ratios are scaled to a range of 2 · bound around the mean, as released; the bound is narrowed where a share would leave [0, 1].
    """
    ratios = torch.tensor(outliers, dtype=torch.float64)
    bound = min(config.bound, fraction / 2, (1 - fraction) / 2)
    scaled = (ratios - ratios.min()) / (ratios.max() - ratios.min()).clamp_min(1e-12) * 2 * bound
    return (scaled - scaled.mean() + 1 - fraction).tolist()


# ---------------------------------------------------- one ranking of all units


def standardised(scores: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over all entries; zeros where they are all the same."""
    spread = scores.std() if scores.numel() > 1 else scores.new_zeros(())
    return (scores - scores.mean()) / spread if float(spread) > 0 else torch.zeros_like(scores)


def units_kept_by_rank(scores: list[Tensor], costs: list[int], budget: float) -> list[int]:
    """How many units of each set stay when all sets are ranked together: the best unit of every set, then the best of all while their cost fits `budget`.

    scores: one vector a set, of any lengths, comparable across sets; costs: of one unit of each set. What is left when the next unit is too dear goes to
    the next ones that are not. After FLAP's AL-AM (An et al., arXiv 2312.11983), which cuts where the cumulative cost is nearest to the budget and may
    empty a set.
    """
    sets = torch.cat([torch.full((len(score),), number) for number, score in enumerate(scores)])
    cost = torch.tensor(costs, dtype=torch.float64)[sets]
    ranked = torch.cat([score.double() for score in scores])
    starts = torch.tensor([0, *(len(score) for score in scores)]).cumsum(0)[:-1]
    best = torch.tensor([int(score.argmax()) for score in scores]) + starts
    ranked[best] = torch.inf
    order = ranked.argsort(descending=True, stable=True)
    dear = cost[order]
    fits = dear.cumsum(0) <= budget
    fits[: len(scores)] = True
    cheap = ~fits & (dear <= budget - dear[fits].sum())
    fits |= cheap & ((dear * cheap).cumsum(0) <= budget - dear[fits].sum())
    return torch.bincount(sets[order[fits]], minlength=len(scores)).tolist()
