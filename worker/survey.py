"""One walk of a model before anything of it is removed: of each block only scores, means and what the allocation asks are kept.

Notation: M FFNs of a block, I FFN channels, H heads, hd head size, C inputs of a linear, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from app.recipe import FLAP, Coarse, Owl, Scored, ZScore
from worker.allocation import DISTANCES, outlier_ratio
from worker.blocks import RoutedExperts
from worker.calibration import Distance, InputStatistics, Statistic, forward, measuring
from worker.pruners import flap
from worker.pruners.base import DenseBlock, MaskPruner, Pruner, StructuredPruner
from worker.walk import Pruning, hidden_states, next_inputs, read_block

WALK = "survey"
MEAN = "mean."  # before the name of the linear whose mean input it is


@dataclass(frozen=True)
class Surveyed:
    """What is known of one block of the dense model."""

    scores: dict[str, Tensor]  # by unit: channels (M, I), columns (H·hd,), block (), experts (E,)
    means: dict[str, Tensor]  # (C,) mean inputs of linears that lose some, where the method compensates
    importance: float | None
    outliers: float | None


def is_needed(run: Pruning, pruner: Pruner) -> bool:
    """Whether the pruning depends on anything that only a walk of the dense model tells."""
    return isinstance(pruner, StructuredPruner) or isinstance(run.recipe.allots, Coarse | Owl | ZScore)


def survey(
    run: Pruning,
    pruner: Pruner,
    done: Callable[[int], None],
    walk: str = WALK,
    edit: Callable[[int, dict[str, Tensor]], dict[str, Tensor]] = lambda index, tensors: tensors,
) -> list[Surveyed]:
    """Walk the dense model once, or what `edit` makes of its blocks, or read what an earlier attempt left of the walk."""
    stream, architecture, config = run.stream, run.stream.architecture, run.stream.source.config
    allocation, method = run.recipe.allots, run.recipe.method
    scorer, scored = (pruner, method) if isinstance(pruner, StructuredPruner) else _scorer_for_masks(allocation)
    wanted = scorer.statistics(scored) if scorer else frozenset[Statistic]()
    distance = _distance(scorer, scored, allocation)
    hidden, arguments = hidden_states(run, walk)
    for index in range(len(run.state.blocks(walk)), len(stream)):
        tensors = edit(index, read_block(run, index))
        mlps, shared = architecture.mlps(config, index), architecture.inputs(config, index)
        measured = scored_inputs(run, scorer, index, scored) if scorer else []
        last = index + 1 == len(stream)
        target = None if last else hidden.open(index + 1)
        block = stream.materialise(index, tensors)
        first_of_each_input = [linears[0] for linears in shared] if isinstance(allocation, Owl) else []
        statistics: frozenset[Statistic] = wanted | {"norm"} if first_of_each_input else wanted
        # With nothing to measure behind the last block's last linear, its output isn't needed.
        stop = mlps[-1].down if last and distance is None and len(mlps) == 1 and mlps[-1].down in measured else None
        routed = RoutedSizes(block)
        with measuring(block, {*measured, *first_of_each_input}, statistics, stop) as inputs:
            moved = forward(block, arguments[index], hidden.open(index), target, distance)
        stream.drop(index)
        outliers = None
        if isinstance(allocation, Owl):
            weights = {linear: (stream.weight(tensors, index, linear), inputs[linears[0]].norm) for linears in shared for linear in linears}
            outliers = outlier_ratio([weight.abs() * norm for weight, norm in weights.values()], allocation.threshold)
        scores: dict[str, Tensor] = {}
        if scorer is not None:
            dense = dense_block(run, index, tensors, inputs, moved, routed.mean())
            scores |= {str(unit): score for unit, score in scorer.score(dense, scored).items()}
        if isinstance(method, FLAP) and method.compensate:
            scores |= {MEAN + linear: inputs[linear].mean for linear in measured}
        file = _file(run, walk, index)
        save_file({name: score.cpu().contiguous() for name, score in scores.items()}, file)
        record = {"importance": None if distance is None else moved, "outliers": outliers}
        run.state.finish_block(walk, [file], record, next_inputs(run, index, hidden))
        done(index)
    return [_read(run, walk, index) for index in range(len(stream))]


def walks(run: Pruning, pruner: Pruner) -> int:
    """Walks of the calibration set that a run makes: the survey, and one that prunes block by block."""
    method = run.recipe.method
    in_turn = isinstance(pruner, MaskPruner) or run.recipe.restoration is not None or (isinstance(method, Scored) and method.inputs == "pruned")
    return is_needed(run, pruner) + in_turn


def scored_inputs(run: Pruning, scorer: StructuredPruner, index: int, scored: Any = None) -> list[str]:
    """The linears of a block whose inputs a method scores; `scored` is its config, where it isn't the recipe's method."""
    architecture, units = run.stream.architecture, scorer.units(scored or run.recipe.method)
    downs = [mlp.down for mlp in architecture.mlps(run.stream.source.config, index)] if "channels" in units else []
    return downs + [architecture.attention.output] * ("columns" in units)


def dense_block(
    run: Pruning, index: int, tensors: dict[str, Tensor], inputs: dict[str, InputStatistics], moved: float = 0.0, routed: Tensor | None = None
) -> DenseBlock:
    """What a method scores of a block: the weights around the inputs that were measured."""
    architecture = run.stream.architecture
    mlps = architecture.mlps(run.stream.source.config, index)
    looked_at = {*inputs, *(linear for mlp in mlps if mlp.down in inputs for linear in mlp.outer)}
    weights = {name: run.stream.weight(tensors, index, name) for name in looked_at}
    return DenseBlock(weights, inputs, mlps, architecture.attention, moved, torch.zeros(0) if routed is None else routed)


def _scorer_for_masks(allocation: object) -> tuple[StructuredPruner | None, object]:
    """What stands for a layer's importance where zeros among weights are to be allotted by a ranking of channels and KV groups."""
    return (flap.PRUNER, FLAP(compensate=False)) if isinstance(allocation, ZScore) else (None, None)


def _distance(scorer: StructuredPruner | None, scored: object, allocation: object) -> Distance | None:
    if scorer is not None and scorer.distance is not None:
        return scorer.distance(scored)
    return DISTANCES[allocation.distance] if isinstance(allocation, Coarse) else None


def _file(run: Pruning, walk: str, index: int) -> Path:
    return run.state.work / f"{walk}.{index}.safetensors"


def _read(run: Pruning, walk: str, index: int) -> Surveyed:
    tensors, record = load_file(_file(run, walk, index)), run.state.blocks(walk)[index]["facts"]
    means = {name.removeprefix(MEAN): tensor for name, tensor in tensors.items() if name.startswith(MEAN)}
    return Surveyed({name: tensor for name, tensor in tensors.items() if not name.startswith(MEAN)}, means, record["importance"], record["outliers"])


class RoutedSizes:
    """Running mean of ‖share · output‖ of each expert over the tokens that the router sent it; in a block without experts it has none."""

    def __init__(self, block: nn.Module) -> None:
        self._mixtures = [module for module in block.modules() if isinstance(module, RoutedExperts)]
        self._sums = torch.zeros(sum(len(mixture) for mixture in self._mixtures), 2, dtype=torch.float64)  # of sizes, and tokens
        for mixture in self._mixtures:
            mixture.notice = self._add

    def _add(self, number: int, weighted: Tensor) -> None:
        self._sums[number] += torch.tensor([float(weighted.norm(dim=-1).sum(dtype=torch.float64)), len(weighted)])

    def mean(self) -> Tensor:
        """(E,); 0 for an expert that got no token."""
        return (self._sums[:, 0] / self._sums[:, 1].clamp_min(1)).float()
