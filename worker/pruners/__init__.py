"""Every pruning method: one file each, one line here."""

from __future__ import annotations

from worker.pruners import bonsai, cfsp, depth, experts, flap, magnitude, sparsegpt, wanda
from worker.pruners.base import Pruner

PRUNERS: dict[str, Pruner] = {
    "magnitude": magnitude.PRUNER,
    "wanda": wanda.PRUNER,
    "sparsegpt": sparsegpt.PRUNER,
    "cfsp": cfsp.PRUNER,
    "flap": flap.PRUNER,
    "bonsai": bonsai.PRUNER,
    "depth": depth.PRUNER,
    "experts": experts.PRUNER,
}
