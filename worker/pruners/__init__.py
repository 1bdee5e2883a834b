"""Every pruning method: one file each, one line here."""

from __future__ import annotations

from worker.pruners import cfsp, magnitude, wanda
from worker.pruners.base import Pruner

PRUNERS: dict[str, Pruner] = {
    "magnitude": magnitude.PRUNER,
    "wanda": wanda.PRUNER,
    "cfsp": cfsp.PRUNER,
}
