"""Prunes a checkpoint block by block: reads a block, measures, decides, writes it as its own shard, drops it.

Two walks, one for each shape of method (see worker/pruners/base.py). Both record every finished block, so a killed job resumes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.exceptions import RecipeError
from app.recipe import CFSP
from app.report import LayerReport
from worker.blocks import BlockStream
from worker.calibration import HiddenStates, embed_into, forward, measuring
from worker.checkpoint import masks_name, shard_name, write_masks, write_shard
from worker.evaluation import LinearZeros
from worker.masks import keep_largest
from worker.pruners.base import ChannelPruner, MaskPruner, Target, Weights
from worker.state import WalkState, sha256_of
from worker.structured import integer_widths, slice_channels

SHARDS = "checkpoint"  # folder below the work directory where finished shards gather


@dataclass(frozen=True)
class Pruning:
    """One pruning run: what to prune, with which tokens, where to keep its state."""

    stream: BlockStream
    config: Any  # the method's own config
    target: Target
    tokens: Tensor | None  # (B, T); None where the method needs no calibration
    layout: str
    dtype: torch.dtype | None  # of the stored result; None keeps the source's
    state: WalkState
    block_done: Callable[[int], None]

    @property
    def folder(self) -> Path:
        return self.state.work / SHARDS


@dataclass(frozen=True)
class Pruned:
    folder: Path
    layers: list[LayerReport]
    zeros_before: list[LinearZeros]
    zeros_after: list[LinearZeros]

    @property
    def widths(self) -> list[int]:
        return [layer.ffn_channels for layer in self.layers]


def prune(run: Pruning, pruner: MaskPruner | ChannelPruner) -> Pruned:
    """Prune every block and write all shards; goes on where the state says."""
    run.folder.mkdir(exist_ok=True)
    if isinstance(pruner, MaskPruner):
        _mask_blocks(run, pruner)
    else:
        _score_blocks(run, pruner)
        _slice_blocks(run, pruner)
    write_shard(run.folder / shard_name(_shards(run), _shards(run)), _stored(run, run.stream.outer_tensors()))
    facts = [block["facts"] for block in run.state.blocks]
    return Pruned(
        folder=run.folder,
        layers=[LayerReport(**fact["layer"]) for fact in facts],
        zeros_before=[LinearZeros(**fact["zeros_before"]) for fact in facts],
        zeros_after=[LinearZeros(**fact["zeros_after"]) for fact in facts],
    )


# ------------------------------------------------------- masks, block by block


def _mask_blocks(run: Pruning, pruner: MaskPruner) -> None:
    """Each block is measured on the outputs of the pruned blocks before it, pruned, and run again for the next."""
    stream, architecture = run.stream, run.stream.architecture
    hidden, arguments = _hidden_states(run) if pruner.calibrates else (None, [])
    for index in range(len(run.state.blocks), len(stream)):
        tensors = _read_block(run, index)
        prefix = architecture.block_prefix(index)
        norms: dict[str, Tensor] = {}
        if hidden is not None:
            block = stream.materialise(index, tensors)
            first_of_each_input = tuple(shared[0] for shared in architecture.inputs)
            with measuring(block, first_of_each_input, stop=architecture.down) as measured:
                forward(block, arguments[index], hidden.open(index), None)
                of_input = measured()
            norms = {name: of_input[shared[0]] for shared in architecture.inputs for name in shared}
        weights: Weights = {name: tensors[f"{prefix}{name}.weight"].to(stream.device, torch.float32) for name in architecture.linears}
        masks = pruner.masks(weights, norms, run.config, run.target)
        pruned = tensors | {f"{prefix}{name}.weight": tensors[f"{prefix}{name}.weight"] * mask for name, mask in masks.items()}
        if hidden is not None and index + 1 < len(stream):
            forward(stream.materialise(index, pruned), arguments[index], hidden.open(index), hidden.open(index + 1))
        stream.drop(index)
        shard, packed = _write_block(run, index, pruned), run.folder / masks_name(index + 1, _shards(run))
        write_masks(packed, {f"{prefix}{linear}.weight": mask for linear, mask in masks.items()})
        files = {f"{SHARDS}/{file.name}": sha256_of(file) for file in (shard, packed)}
        run.state.finish_block(files, _facts(run, index, tensors, pruned, importance=None), _next_input(hidden, index))
        run.block_done(index)


# ------------------------------------------- channels, after one dense walk


def _score_blocks(run: Pruning, pruner: ChannelPruner) -> None:
    """Walk the dense model once; of each block only its channel scores and its coarse importance are kept."""
    stream, architecture = run.stream, run.stream.architecture
    hidden, arguments = _hidden_states(run)
    distance = pruner.distance(run.config)
    for index in range(len(run.state.blocks), len(stream)):
        tensors = _read_block(run, index)
        prefix = architecture.block_prefix(index)
        block = stream.materialise(index, tensors)
        with measuring(block, (architecture.down,)) as measured:
            importance = forward(block, arguments[index], hidden.open(index), hidden.open(index + 1), distance)
            norms = measured()
        weights: Weights = {name: tensors[f"{prefix}{name}.weight"].to(stream.device, torch.float32) for name in architecture.mlp}
        scores = pruner.score(weights, norms, run.config)
        stream.drop(index)
        path = f"scores.{index}.safetensors"
        save_file({"scores": scores.cpu()}, run.state.work / path)
        run.state.finish_block({path: sha256_of(run.state.work / path)}, {"importance": importance}, _next_input(hidden, index))
        run.block_done(index)


def _slice_blocks(run: Pruning, pruner: ChannelPruner) -> None:
    """Allot widths, keep the best channels of each block and write it. Needs weights alone."""
    stream, architecture = run.stream, run.stream.architecture
    importance = [float(block["facts"]["importance"]) for block in run.state.blocks]
    widths = channel_widths(importance, int(stream.config.intermediate_size), run.target.fraction, run.layout, run.config, pruner)
    for index, width in enumerate(widths):
        tensors = stream.block_tensors(index)
        scores = load_file(run.state.work / f"scores.{index}.safetensors")["scores"]
        keep = keep_largest(scores, width).to(stream.device)
        pruned = slice_channels(tensors, architecture.block_prefix(index), architecture, keep)
        _write_block(run, index, pruned)
        run.state.blocks[index]["facts"].update(_facts(run, index, tensors, pruned, importance[index]))


def channel_widths(importance: list[float], width: int, fraction: float, layout: str, config: CFSP, pruner: ChannelPruner) -> list[int]:
    """Channels that each block keeps: all the same in the uniform layout, else by coarse importance with the exact total."""
    top, keep = int(width * config.max_layer_width), width * (1 - fraction)
    if top < config.multiple_of or round(keep) > top:
        raise RecipeError(
            f"Of {width} channels a layer, {round(keep)} would stay, but the method's parameters allow multiples of {config.multiple_of} up to {top}.",
            code="target_unreachable",
            hint="Raise sparsity or max_layer_width, or lower multiple_of.",
            pointer="/method",
        )
    layers = len(importance)
    if layout == "uniform":
        return integer_widths([1.0], round(keep), top, config.multiple_of) * layers
    return integer_widths(pruner.allocate(importance, fraction, config), round(keep * layers), top, config.multiple_of)


# ------------------------------------------------------------------ both walks


def _shards(run: Pruning) -> int:
    return len(run.stream) + 1


def _hidden_states(run: Pruning) -> tuple[HiddenStates, list[dict[str, Any]]]:
    """The calibration set as the input of the block that comes next, and each block's other arguments."""
    assert run.tokens is not None
    hidden = HiddenStates(run.state.work, (*run.tokens.shape, int(run.stream.config.hidden_size)))
    if not run.state.blocks:
        embed_into(hidden, run.stream, run.tokens)
    return hidden, run.stream.block_arguments(run.tokens.shape[1])


def _next_input(hidden: HiddenStates | None, index: int) -> tuple[str, str] | None:
    return None if hidden is None else (hidden.path(index + 1).name, hidden.sha256(index + 1))


def _read_block(run: Pruning, index: int) -> dict[str, Tensor]:
    tensors = run.stream.block_tensors(index)
    for name, tensor in tensors.items():
        if not all(bound.isfinite() for bound in tensor.aminmax()):
            raise RecipeError(
                f"The weight {name} holds NaN or infinity.", code="weights_not_finite", hint="The checkpoint is damaged; save or download it again."
            )
    return tensors


def _stored(run: Pruning, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors if run.dtype is None else {name: tensor.to(run.dtype) for name, tensor in tensors.items()}


def _write_block(run: Pruning, index: int, tensors: dict[str, Tensor]) -> Path:
    shard = run.folder / shard_name(index + 1, _shards(run))
    write_shard(shard, _stored(run, tensors))
    return shard


def _facts(run: Pruning, index: int, before: dict[str, Tensor], after: dict[str, Tensor], importance: float | None) -> dict[str, Any]:
    architecture = run.stream.architecture
    prefix = architecture.block_prefix(index)
    stored = _stored(run, after)

    def weights(tensors: dict[str, Tensor], linears: tuple[str, ...]) -> list[Tensor]:
        return [tensors[f"{prefix}{linear}.weight"] for linear in linears]

    def zeros(tensors: dict[str, Tensor]) -> dict[str, int]:
        attention = tuple(linear for linear in architecture.linears if linear not in architecture.mlp)
        return {part: sum(_zeros(weight) for weight in weights(tensors, linears)) for part, linears in (("mlp", architecture.mlp), ("attention", attention))}

    zeros_after = zeros(stored)
    layer = LayerReport(
        index=index,
        ffn_channels=after[f"{prefix}{architecture.down}.weight"].shape[1],
        ffn_channels_before=before[f"{prefix}{architecture.down}.weight"].shape[1],
        weights=sum(weight.numel() for weight in weights(after, architecture.linears)),
        zeros=sum(zeros_after.values()),
        importance=importance,
    )
    return {"layer": layer.model_dump(), "zeros_before": zeros(before), "zeros_after": zeros_after}


def _zeros(weight: Tensor) -> int:
    return weight.numel() - int(weight.count_nonzero())
