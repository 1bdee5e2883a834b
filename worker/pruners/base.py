"""The two shapes of a pruning method. Scores and masks are free functions, tensors in, tensors out; hooks and files are the pipeline's.

Notation: C_in inputs and C_out outputs of a linear, D hidden size, I FFN channels, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from worker.calibration import Distance, InputNorms

Weights = dict[str, Tensor]  # float32 weights of a block's linears, (C_out, C_in), by the linear's name


@dataclass(frozen=True)
class Target:
    """How much a method removes of what it prunes: a fraction, or `n` of every `m` inputs kept."""

    fraction: float
    pattern: tuple[int, int] | None = None


@dataclass(frozen=True)
class MaskPruner:
    """Zeroes weights of one block at a time; the next block sees the pruned outputs.

    masks: weights, input norms (empty where `calibrates` is False), the method's config and the target -> masks of the weights' shapes.
    """

    masks: Callable[[Weights, InputNorms, Any, Target], dict[str, Tensor]]
    calibrates: bool


@dataclass(frozen=True)
class ChannelPruner:
    """Removes FFN channels after one walk of the dense model.

    score: a block's weights and input norms, the config -> (I,) scores, the larger the more important.
    distance: the config -> how far a block moves a token; its mean is the block's coarse importance.
    allocate: coarse importance of all blocks, fraction to remove, the config -> each block's share of the width.
    """

    score: Callable[[Weights, InputNorms, Any], Tensor]
    distance: Callable[[Any], Distance]
    allocate: Callable[[list[float], float, Any], list[float]]


Pruner = MaskPruner | ChannelPruner
