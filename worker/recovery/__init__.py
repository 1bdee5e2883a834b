"""Every recovery that trains the whole model: one file each, one line here."""

from __future__ import annotations

from worker.recovery import full, lora, perp
from worker.recovery.base import Adapt

RECOVERIES: dict[str, Adapt] = {
    "full": full.adapt,
    "lora": lora.adapt,
    "perp": perp.adapt,
}
