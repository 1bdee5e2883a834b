"""Trains a pruned checkpoint as a whole: loads it in float32, makes some of its parameters ready, trains them, merges, and writes the shards again.

Notation: B sequences, T tokens, D hidden size, V vocabulary, K experts, I FFN channels of each.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from app.architecture import ARCHITECTURES
from app.counting import LinearZeros, count_parameters, fraction_of
from app.exceptions import EspalierError, RecipeError
from app.footprint import training_bytes
from app.recipe import Budget, Recipe, Scored
from app.recovery import Full, Perp, RecoveryConfig, Training
from app.report import BlockError
from app.source import Source, read_source
from worker.allocation import angular
from worker.blocks import BlockStream, split_experts
from worker.calibration import HiddenStates, embed_into, forward
from worker.checkpoint import read_masks, replace_weights
from worker.choosing import EXPERT_ALIGNMENT
from worker.memory import anonymous_bytes, available_bytes
from worker.recovery import RECOVERIES
from worker.recovery.base import Student
from worker.recovery.distillation import Teacher, outputs_of
from worker.recovery.text import TrainingText
from worker.training import Step, Trained, train
from worker.walk import Pruned, count_zeros

JUDGED_WINDOWS = 16  # for coarse importance, where the pruning measured none


@dataclass(frozen=True)
class Retrained:
    """What a recovery did, and what it left of the zeros."""

    trained: Trained
    parameters: int  # that were trained
    share: float  # of all parameters in training
    tokens: int
    pruned: Pruned  # with the zeros as they are now
    merged: float | None = None  # held-out loss after a merge that changes what the model computes
    blocks: list[BlockError] | None = None  # of a reconstruction


def retrain(
    config: RecoveryConfig,
    folder: Path,
    pruned: Pruned,
    dense: BlockStream,
    text: TrainingText,
    teacher: Teacher | None,
    work: Path,
    tell: Callable[[Step], None],
    memory_allowed: int | None = None,
) -> Retrained:
    """Recover the checkpoint in `folder`, whose shards are written again with their names, shapes and dtypes; a mask's zeros stay zero.

    `pruned` is what was told of it, `dense` the model before. State lies in `work`: a run that was killed goes on from there, on the same pruned shards.
    Raises RecipeError where the model does not fit in memory.
    """
    source = read_source(folder)
    masks = {weight: mask.to(dense.device) for file in sorted(folder.glob("masks-*.safetensors")) for weight, mask in read_masks(file).items()}
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        _require_memory(training_bytes(sum(math.prod(entry.shape) for entry in source.tensors.values()), 0), memory_allowed)
        model = load(source, dense.device, gradient_checkpointing=config.gradient_checkpointing)
        student = Student(model, source, masks, functools.partial(coarse_importance, pruned, dense, text.windows[:JUDGED_WINDOWS], work / "importance"))
        adapted = RECOVERIES[config.name](student, config)
        _require_memory(training_bytes(0, adapted.count), memory_allowed)
        trained = train(
            model,
            adapted.parameters,
            text.windows,
            text.held_out,
            config,
            functools.partial(training_loss, student, config, teacher),
            lambda windows: next_token_loss(_logits(model, windows), windows),
            work,
            tell,
        )
    share = adapted.count / sum(parameter.numel() for parameter in model.parameters())
    adapted.merge()
    merged = None if text.held_out is None or not adapted.jumps else _mean_loss(model, text.held_out.split(config.micro_batch))
    written = write_back(student, pruned)
    tokens = trained.steps * config.batch * config.sequence_length
    return Retrained(trained, adapted.count, share, tokens, replace(written, notes=[*written.notes, *adapted.notes]), merged)


# --------------------------------------------------------------------- the model


def load(source: Source, device: torch.device, *, gradient_checkpointing: bool) -> Any:
    """The model of a checkpoint folder as transformers builds it, in float32, with no parameter that takes gradients."""
    if source.config.get("per_layer_config"):
        importlib.import_module("espalier.loader")
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(source.folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    _split_all_experts(model, source)
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model.to(device).requires_grad_(False)


def _split_all_experts(model: Any, source: Source) -> None:
    """Give each expert linears by their stored names, whose weights are parts of transformers' fused matrices (K, 2I, D) and (K, D, I)."""
    architecture = ARCHITECTURES[source.model_type]
    for index in range(architecture.dimensions(source.config).layers):
        router = architecture.router(source.config, index)
        if router is None:
            continue
        block = model.get_submodule(architecture.block_prefix(index).removesuffix("."))
        outer, down = block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj
        for number, expert in enumerate(split_experts(block, architecture, router, len(down), model.config.hidden_act)):
            for name, weight in zip((expert.gate, expert.up, expert.down), (*outer[number].chunk(2), down[number]), strict=True):
                linear = expert.get_submodule(name)
                linear.out_features, linear.in_features = weight.shape
                linear.weight = nn.Parameter(weight)


def require_room(recipe: Recipe, source: Source, allowed: int | None) -> None:
    """Refuse, before anything is pruned, a training that would not fit whatever the pruning leaves. Raises RecipeError.

    Of the tensors that will be there, only those count that surely will: a structured method may remove more than it is asked to, since units are whole, but at
    most twice as much, and as many channels of each layer as widths are multiples of; and only full retraining has gradients and moments of nearly everything.
    """
    config, method = recipe.recovery, recipe.method
    if config is None or (isinstance(config, Perp) and config.reconstructs) or isinstance(recipe.sparsity, Budget):
        return
    dense, fraction = count_parameters(source, []), fraction_of(recipe, count_parameters(source, []))
    width = ARCHITECTURES[source.model_type].ffn_width(source.config, 0)
    rounding = math.lcm(method.multiple_of, EXPERT_ALIGNMENT) / width if isinstance(method, Scored) else 0.0
    removed = round(min(1.0, 2 * fraction + rounding) * dense.non_embedding) if recipe.facts.structured else 0
    trained = dense.all - removed - (0 if recipe.facts.structured else round(fraction * dense.decoder)) if isinstance(config, Full) else 0
    _require_memory(training_bytes(dense.all - removed, trained), allowed)


def _require_memory(needed: int, allowed: int | None) -> None:
    """Refuse a training whose tensors won't fit; activations come on top of them. `allowed` bounds the host's memory, which a GPU spares."""
    if torch.cuda.is_available():
        rooms = [torch.cuda.mem_get_info()[0]]
    else:
        rooms = [available_bytes(), *([allowed - anonymous_bytes()] if allowed is not None else [])]
    if needed > min(rooms):
        raise RecipeError(
            f"Training needs {needed / 2**30:.1f} GiB more, and {max(0, min(rooms)) / 2**30:.1f} GiB are free.",
            code="training_does_not_fit",
            hint="Train fewer parameters, leave recovery out, or run the job on a larger machine.",
            pointer="/recovery",
        )


def coarse_importance(pruned: Pruned, dense: BlockStream, windows: Tensor, scratch: Path) -> list[float]:
    """How far each block that was kept moves a token, as the pruning measured it, or else in the dense model over (B, T) windows."""
    known = [layer.importance for layer in pruned.kept if layer.importance is not None]
    if len(known) == len(pruned.kept):
        return known
    scratch.mkdir(parents=True, exist_ok=True)
    hidden = HiddenStates(scratch, (*windows.shape, int(dense.config.hidden_size)))
    embed_into(hidden, dense, windows)
    arguments = dense.block_arguments(windows.shape[1])
    moved = []
    for index in range(len(dense)):
        block = dense.materialise(index, dense.block_tensors(index))
        moved.append(forward(block, arguments[index], hidden.open(index), hidden.open(index + 1), angular))
        dense.drop(index)
    return [moved[layer.index] for layer in pruned.kept]


# ---------------------------------------------------------------------- the loss


def next_token_loss(logits: Tensor, windows: Tensor) -> Tensor:
    """Mean negative log-likelihood of each token of (B, T) windows but the first, from (B, T, V) logits."""
    return cross_entropy(logits[:, :-1].float().flatten(0, 1), windows[:, 1:].flatten())


def _logits(model: Any, windows: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=windows, use_cache=False).logits
    return logits


@torch.no_grad()
def _mean_loss(model: Any, parts: Sequence[Tensor]) -> float:
    """Of windows of one length, (b, T) each, as the training measures it."""
    device = model.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        total = sum(float(next_token_loss(_logits(model, part.to(device)), part.to(device))) * len(part) for part in parts)
    return total / sum(map(len, parts))


def training_loss(student: Student, config: Training, teacher: Teacher | None, windows: Tensor, first: int) -> Tensor:
    blocks = student.model.get_submodule(student.architecture.blocks)
    with outputs_of(blocks) as outputs:
        logits = _logits(student.model, windows)
    loss = next_token_loss(logits, windows)
    if teacher is not None and config.distillation is not None:
        loss = loss + teacher.loss(logits, outputs, first, config.distillation)
    return loss


# -------------------------------------------------------------------- the result


def write_back(student: Student, pruned: Pruned) -> Pruned:
    """Write a trained model over the shards that it was loaded from, and count its zeros. Raises EspalierError where one that a mask demands is gone."""
    head, embedding = student.model.get_output_embeddings().weight, student.model.get_input_embeddings().weight
    weights = {name: parameter.detach() for name, parameter in student.model.named_parameters()}
    weights[student.architecture.head] = head.detach()  # which transformers may call otherwise than it is stored
    require_zeros(weights, student.masks)
    replace_weights(student.source, weights, tied=head is embedding)
    return recounted(student.source.folder, pruned)


def require_zeros(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Raise EspalierError where a weight is not zero and its mask demands it."""
    lost = [name for name, mask in masks.items() if bool(weights[name][~mask].count_nonzero())]
    if lost:
        raise EspalierError(f"Training filled zeros of {', '.join(lost)}.", code="zeros_lost", hint="This is a fault of Espalier; please report it.")


def recounted(folder: Path, pruned: Pruned) -> Pruned:
    """What was told of a pruned checkpoint, with the zeros that the one in `folder` has."""
    stream = BlockStream(read_source(folder), "cpu")
    counted = [count_zeros(stream, index, stream.block_tensors(index)) for index in range(len(stream))]
    zeros = dict(zip((layer.index for layer in pruned.kept), counted, strict=True))
    layers = [layer if layer.dropped else layer.model_copy(update={"zeros": zeros[layer.index].all}) for layer in pruned.layers]
    return replace(pruned, layers=layers, zeros_after=[zeros.get(layer.index, LinearZeros()) for layer in layers])
