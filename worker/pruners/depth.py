"""Depth pruning: whole decoder blocks go, those that change the hidden states least.

Block influence is ShortGPT's (Men et al. 2024, arXiv 2403.03853), by default with the angular distance of Gromov et al. (arXiv 2403.17887) in place of
1 - cosine; both are means over tokens. Blocks need not be neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from app.recipe import Depth
from worker.allocation import DISTANCES
from worker.calibration import Distance
from worker.pruners.base import DenseBlock, StructuredPruner, Unit


def _score(block: DenseBlock, config: Depth) -> dict[Unit, Tensor]:
    return {"block": torch.tensor(block.moved)}


def _distance(config: Depth) -> Distance:
    return DISTANCES[config.distance]


PRUNER = StructuredPruner(score=_score, units=lambda config: ("block",), distance=_distance)
