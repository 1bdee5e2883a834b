"""FLAP (An et al. 2023, arXiv 2312.11983): what fluctuates least goes, since its mean can be put into a bias.

Departures from the authors' released code: whole KV groups instead of single heads, so that grouped-query models stay valid, and costs are true parameter
counts; the fluctuation is the sample variance (`mode="code"` has the released one); a layer keeps at least one unit. The ranking across layers is
worker/allocation.py's `units_kept_by_rank`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.recipe import FLAP
from worker.calibration import InputStatistics, Statistic
from worker.pruners.base import DenseBlock, StructuredPruner, Unit, units_of


def score(weight: Tensor, inputs: InputStatistics, config: FLAP) -> Tensor:
    """Score of each input of a linear (C_out, C_in) -> (C_in,).

    WIFV = fluctuation · Σ_o W_oc² (the paper's Eq. 5), IFV = fluctuation, WIFN = mean_o |W_oc| · ‖x_c‖, the score of Wanda-sp.
    """
    if config.metric == "wifn":
        return weight.abs().mean(dim=0) * inputs.norm
    fluctuation = inputs.fluctuation if config.mode == "code" else inputs.variance
    return fluctuation if config.metric == "ifv" else fluctuation * weight.square().sum(dim=0)


def compensation(weight: Tensor, kept_weight: Tensor, mean: Tensor, keep: Tensor) -> Tensor:
    """The bias that gives back what removed inputs gave on average: dense (C_out, C_in), kept (C_out, kept), mean input (C_in,), keep (C_in,) -> (C_out,).

    With unchanged weights it is W[:, removed] · mean[removed], as published; weights that were fitted anew are taken into account.
    """
    return weight @ mean - kept_weight @ mean[keep]


def _score(block: DenseBlock, config: FLAP) -> dict[Unit, Tensor]:
    scores: dict[Unit, Tensor] = {}
    if config.units != "attention":
        scores["channels"] = torch.stack([score(block.weights[mlp.down], block.inputs[mlp.down], config) for mlp in block.mlps])
    if config.units != "ffn":
        output = block.attention.output
        scores["columns"] = score(block.weights[output], block.inputs[output], config).square()  # squared as released, before it is standardised
    return scores


def _statistics(config: FLAP) -> frozenset[Statistic]:
    wanted: set[Statistic] = {"norm"} if config.metric == "wifn" else {"fluctuation" if config.mode == "code" else "variance"}
    return frozenset(wanted | {"variance"} if config.compensate else wanted)


PRUNER = StructuredPruner(score=_score, units=units_of, statistics=_statistics)
