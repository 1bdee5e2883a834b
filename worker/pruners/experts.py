"""Expert pruning (REAP, Lasby et al. 2025, arXiv 2510.13999): whole experts of a mixture go, with their rows of the router.

An expert's saliency is the mean, over the tokens that the router sends it, of router weight times the norm of the expert's output (the paper's Eq. 9).
"""

from __future__ import annotations

from torch import Tensor

from app.recipe import Experts
from worker.pruners.base import DenseBlock, StructuredPruner, Unit


def _score(block: DenseBlock, config: Experts) -> dict[Unit, Tensor]:
    return {"experts": block.routed}


PRUNER = StructuredPruner(score=_score, units=lambda config: ("experts",))
