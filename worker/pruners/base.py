"""The two shapes of a pruning method. Scores and masks are free functions, tensors in, tensors out; hooks and files are the walk's.

Notation: C_in inputs and C_out outputs of a linear, D hidden size, I FFN channels, M FFNs of a block (experts), H heads, hd head size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from app.architecture import Attention, Mlp
from worker.calibration import Distance, InputStatistics, Statistic

Weights = dict[str, Tensor]  # float32 weights of linears, (C_out, C_in), by the linear's name in the block
Unit = Literal["channels", "columns", "block", "experts"]


# -------------------------------------------------------- zeros among the weights


@dataclass(frozen=True)
class Target:
    """How much a method removes of what it prunes: a fraction, or `n` of every `m` inputs kept."""

    fraction: float
    pattern: tuple[int, int] | None = None


@dataclass(frozen=True)
class Masked:
    """What a mask pruner made of some linears."""

    masks: dict[str, Tensor]  # (C_out, C_in) bool, by the linear's name
    weights: Weights = field(default_factory=dict)  # new values, where the method changes weights that stay; zero where the mask is False
    raised_damping: float | None = None  # share of the mean diagonal that had to be added to the Hessian, where it is more than was asked


@dataclass(frozen=True)
class MaskPruner:
    """Zeroes weights of one block at a time; the next block sees the pruned outputs.

    prune: the weights of all linears that share an input, that input's statistics (None where `statistics` is empty), the method's config, the target.
    """

    prune: Callable[[Weights, InputStatistics | None, Any, Target], Masked]
    statistics: frozenset[Statistic]


# ------------------------------------------------------------- parts of the model


@dataclass(frozen=True)
class DenseBlock:
    """What a structured pruner sees of a block of the dense model, after the calibration set has run through it."""

    weights: Weights
    inputs: dict[str, InputStatistics]  # of every `down`, and of the attention's output where columns are scored
    mlps: tuple[Mlp, ...]
    attention: Attention
    moved: float  # mean distance between the block's input and output; 0 where the method names none
    routed: Tensor  # (E,) mean size of each expert's output times its share; empty without experts

    def outer(self, mlp: Mlp) -> tuple[Tensor, ...]:
        """The (I, D) weights before an FFN's channels: gate and up, or the only one."""
        return self.weights[mlp.outer[0]].chunk(mlp.parts) if mlp.parts > 1 else tuple(self.weights[name] for name in mlp.outer)


@dataclass(frozen=True)
class StructuredPruner:
    """Removes parts of the model after one walk of the dense model. The larger a score, the more important.

    score: a dense block and the method's config -> scores by unit: `channels` (M, I); `columns` (H·hd,), inputs of the attention's output, which the walk
    joins into KV groups; `block` (); `experts` (E,).
    """

    score: Callable[[DenseBlock, Any], dict[Unit, Tensor]]
    units: Callable[[Any], tuple[Unit, ...]]
    statistics: Callable[[Any], frozenset[Statistic]] = lambda config: frozenset()
    distance: Callable[[Any], Distance] | None = None


Pruner = MaskPruner | StructuredPruner


def units_of(config: Any) -> tuple[Unit, ...]:
    """The units that a config with a field `units` asks for."""
    asked: dict[str, tuple[Unit, ...]] = {"ffn": ("channels",), "attention": ("columns",), "both": ("channels", "columns")}
    return asked[config.units]
