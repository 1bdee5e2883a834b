"""What every walk over the blocks shares: the run, reading and writing blocks, the facts told about each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.counting import LinearZeros
from app.exceptions import RecipeError
from app.recipe import Recipe
from app.report import LayerReport
from worker.blocks import BlockStream
from worker.calibration import HiddenStates, embed_into
from worker.checkpoint import shard_name, write_shard
from worker.state import WalkState

Edit = Callable[[int, dict[str, Tensor]], dict[str, Tensor] | None]  # a block's number and tensors -> what is left of them; None: the block is dropped

SHARDS = "checkpoint"  # folder below the work directory where finished shards gather


@dataclass(frozen=True)
class RoundStep:
    """How far a pruning in rounds is; costs are in tokens that pass the blocks of the dense model."""

    number: int  # of the round, from 1
    rounds: int
    done: int  # of this round's sub-models
    total: int
    cost_done: float
    cost_left: float
    pace: float | None  # seconds a cost, from the sub-models so far; None before the first


@dataclass(frozen=True)
class Pruning:
    """One pruning run: what to prune, with which tokens, where to keep its state."""

    stream: BlockStream
    recipe: Recipe
    tokens: Tensor | None  # (B, T); None where nothing is measured
    state: WalkState
    block_done: Callable[[int, int], None]  # blocks finished so far, of how many in all walks
    perplexity: Callable[[Edit], float] | None = None  # of the model with edited blocks, where a budget bounds it
    round_step: Callable[[RoundStep], None] = lambda step: None

    @property
    def folder(self) -> Path:
        return self.state.work / SHARDS


@dataclass(frozen=True)
class Pruned:
    """What a run left: shards in `folder`, and the facts of every block of the dense model."""

    folder: Path
    layers: list[LayerReport]
    zeros_before: list[LinearZeros]
    zeros_after: list[LinearZeros]
    switches: list[str]  # of config.json, under which biases were added
    notes: list[str]

    @property
    def kept(self) -> list[LayerReport]:
        return [layer for layer in self.layers if not layer.dropped]


def hidden_states(run: Pruning, walk: str) -> tuple[HiddenStates, list[dict[str, Any]]]:
    """The calibration set as the input of the block that comes next in a walk, and each block's other arguments."""
    assert run.tokens is not None
    hidden = HiddenStates(run.state.work, (*run.tokens.shape, int(run.stream.config.hidden_size)))
    if not run.state.blocks(walk):
        embed_into(hidden, run.stream, run.tokens)
    return hidden, run.stream.block_arguments(run.tokens.shape[1])


def next_inputs(run: Pruning, index: int, *streams: HiddenStates | None) -> list[Path]:
    """The files that the block after `index` reads."""
    return [hidden.path(index + 1) for hidden in streams if hidden is not None and index + 1 < len(run.stream)]


def read_block(run: Pruning, index: int) -> dict[str, Tensor]:
    tensors = run.stream.block_tensors(index)
    for name, tensor in tensors.items():
        if not all(bound.isfinite() for bound in tensor.aminmax()):
            raise RecipeError(
                f"The weight {name} holds NaN or infinity.", code="weights_not_finite", hint="The checkpoint is damaged; save or download it again."
            )
    return tensors


def stored(run: Pruning, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the dtype that the recipe wants them stored in."""
    dtype = run.recipe.output.dtype
    return tensors if dtype == "source" else {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}


def write_block(run: Pruning, place: int, blocks: int, tensors: dict[str, Tensor]) -> Path:
    """Write a block as the shard of its `place` among the `blocks` that stay."""
    shard = run.folder / shard_name(place + 1, blocks + 1)
    write_shard(shard, stored(run, tensors))
    return shard


def write_outer(run: Pruning, blocks: int) -> None:
    """Write what lies outside the blocks as the last shard."""
    write_shard(run.folder / shard_name(blocks + 1, blocks + 1), stored(run, run.stream.outer_tensors()))


def facts(run: Pruning, index: int, before: dict[str, Tensor], after: dict[str, Tensor] | None, importance: float | None) -> dict[str, Any]:
    """What the report tells of a block; `after` is None for one that was dropped, else the tensors that stay under the names of block `index`."""
    architecture, config = run.stream.architecture, run.stream.source.config
    prefix, size = architecture.block_prefix(index), architecture.dimensions(config)
    mlps, router = architecture.mlps(config, index), architecture.router(config, index)

    def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {linear: f"{prefix}{linear}.weight" for linear in architecture.linears(config, index)}
        return {linear: tensors[name] for linear, name in names.items() if name in tensors}

    def inputs(tensors: dict[str, Tensor], linear: str) -> int:
        return tensors[f"{prefix}{linear}.weight"].shape[0 if architecture.transposed else 1]

    def experts(tensors: dict[str, Tensor]) -> int | None:
        return None if router is None else tensors[f"{prefix}{router}.weight"].shape[0]

    def groups(tensors: dict[str, Tensor]) -> int:
        return inputs(tensors, architecture.attention.output) // size.head_dim // size.queries_per_group

    zeros_before = count_zeros(run.stream, index, before)
    zeros_after = LinearZeros() if after is None else count_zeros(run.stream, index, stored(run, after))
    layer = LayerReport(
        index=index,
        dropped=after is None,
        ffn_channels=0 if after is None else inputs(after, mlps[0].down),
        ffn_channels_before=inputs(before, mlps[0].down),
        kv_groups=0 if after is None else groups(after),
        kv_groups_before=groups(before),
        experts=None if after is None else experts(after),
        experts_before=experts(before),
        weights=0 if after is None else sum(weight.numel() for weight in weights(after).values()),
        zeros=zeros_after.all,
        importance=importance,
    )
    return {"layer": layer.model_dump(), "zeros_before": asdict(zeros_before), "zeros_after": asdict(zeros_after)}


def count_zeros(stream: BlockStream, index: int, tensors: dict[str, Tensor]) -> LinearZeros:
    """Among the linear weights of a block's tensors, which may lack experts."""
    architecture, config, prefix = stream.architecture, stream.source.config, stream.architecture.block_prefix(index)
    stored_as = {linear: f"{prefix}{linear}.weight" for linear in architecture.linears(config, index)}
    counts = {linear: tensors[name].numel() - int(tensors[name].count_nonzero()) for linear, name in stored_as.items() if name in tensors}
    mlp = sum(counts.get(linear, 0) for mlp in architecture.mlps(config, index) for linear in mlp.linears)
    return LinearZeros(attention=sum(counts.values()) - mlp, mlp=mlp)
