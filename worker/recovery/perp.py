"""PERP: a small part of the parameters is trained and every zero kept (Zimmer et al., arXiv 2312.15230).

Biases and norms are trained themselves; linears by adapters that keep the zeros of the pruning's masks (not of W ≠ 0, as the authors' code has it, so that a weight
that was kept and is zero may change); the head by plain LoRA, since it has no zeros. Where an adapter is dense in training (`lora_prune`, the head) it is peft's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from app.architecture import ARCHITECTURES
from app.recovery import Perp
from app.source import Source
from worker.recovery.adapters import MaskLoRA, ScaleLoRA, add_lora, attach
from worker.recovery.base import Adapted, Student, own_head

PUBLISHED_SHARE = 0.0035  # of all parameters: the most that the paper's first version trains
SCALE = 2.0  # of a product, where the recipe gives no alpha


@dataclass(frozen=True)
class Modules:
    """What there is to train, by the names of the modules."""

    linears: list[str]
    norms: list[str]

    @property
    def biased(self) -> list[str]:
        return [*self.linears, *self.norms]


def modules_of_block(source: Source, index: int) -> Modules:
    """By their names in the block."""
    architecture = ARCHITECTURES[source.model_type]
    return Modules(list(architecture.linears(source.config, index)), [*architecture.norms, *architecture.head_norms])


def modules_of_model(source: Source) -> Modules:
    """By their full names; the head is not among them."""
    architecture = ARCHITECTURES[source.model_type]
    found = Modules([], [])
    for index in range(architecture.dimensions(source.config).layers):
        block, prefix = modules_of_block(source, index), architecture.block_prefix(index)
        found.linears.extend(prefix + name for name in block.linears)
        found.norms.extend(prefix + name for name in block.norms)
    final_norm = architecture.final_norm.removesuffix(".weight")
    return Modules(found.linears, [*found.norms, *([final_norm] if architecture.final_norm in source.tensors else [])])


def choose_rank(source: Source, config: Perp) -> int:
    """The rank that the config states, or the largest that trains no more than the published share of the model's parameters."""
    if config.rank is not None:
        return config.rank
    architecture, modules = ARCHITECTURES[source.model_type], modules_of_model(source)
    sizes = {name: entry.shape for name, entry in source.tensors.items()}
    vectors = {f"{name}.bias" for name in modules.biased if "biases" in config.train} | {
        f"{name}.{kind}" for name in modules.norms for kind in ("weight", "bias") if "norms" in config.train
    }
    cost = sum(sum(sizes[f"{name}.weight"]) for name in modules.linears) if "adapters" in config.train else 0
    everything = sum(torch.Size(shape).numel() for shape in sizes.values())
    if "head" in config.train and not config.reconstructs:
        head = sizes[architecture.embedding]
        cost += sum(head)
        everything += 0 if architecture.head in sizes else torch.Size(head).numel()
    return fitting_rank(everything, sum(sizes[name][0] for name in vectors if name in sizes), cost) if cost else 1


def fitting_rank(everything: int, vectors: int, cost: int) -> int:
    """The largest rank r, but at least 1, for which vectors + r · cost are at most the published share of everything + r · cost."""
    return max(1, int((PUBLISHED_SHARE * everything - vectors) / ((1 - PUBLISHED_SHARE) * cost)))


def adapt(student: Student, config: Perp) -> Adapted:
    head = []
    if "head" in config.train:
        weight = own_head(student.model)
        head = [name.removesuffix(".weight") for name, parameter in student.model.named_parameters() if parameter is weight]
    rank = choose_rank(student.source, config)
    return make_ready(student.model, modules_of_model(student.source), student.masks, config, rank, transposed=student.architecture.transposed, head=head)


def make_ready(model: Any, modules: Modules, masks: Mapping[str, Tensor], config: Perp, rank: int, *, transposed: bool, head: Sequence[str] = ()) -> Adapted:
    """Let what the config names take gradients, in a model or a block without any; it may have none of that.

    `modules`, the `masks` (True = keep, in the stored shape) and `head` go by the names that they have in `model`.
    """
    named = dict(model.named_parameters())
    biases = [named[f"{name}.bias"] for name in modules.biased if "biases" in config.train and f"{name}.bias" in named]
    norms = [named[f"{name}.{kind}"] for name in modules.norms for kind in ("weight", "bias") if "norms" in config.train and f"{name}.{kind}" in named]
    scale = SCALE if config.alpha is None else config.alpha / rank
    linears = modules.linears if "adapters" in config.train else []
    dense = [*head, *(linears if config.adapter == "lora_prune" else [])]
    merges = []
    if dense:  # first, since peft lets nothing else take gradients
        merges.append(_add_lora(model, dense, masks, rank, scale, transposed=transposed))
    if linears and config.adapter != "lora_prune":
        merges.append(_add_masked(model, linears, masks, config, rank, scale, transposed=transposed))
    for parameter in (*biases, *norms):
        parameter.requires_grad_(True)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def merge() -> None:
        for part in merges:
            part()

    jumps = bool(linears and masks) and config.adapter == "lora_prune"
    notes = ("The model has no biases, so none were trained.",) if "biases" in config.train and not biases else ()
    return Adapted(parameters, merge, jumps=jumps, notes=notes)


def _add_masked(
    model: Any, linears: Sequence[str], masks: Mapping[str, Tensor], config: Perp, rank: int, scale: float, *, transposed: bool
) -> Callable[[], None]:
    """Adapters that keep zeros while they train; gives what merges them."""

    def adapter_of(name: str) -> nn.Module:
        weight = model.get_submodule(name).weight
        if config.adapter == "scale_lora":
            return ScaleLoRA(weight, rank, transposed=transposed)
        return MaskLoRA(weight, masks.get(f"{name}.weight"), rank, scale, transposed=transposed)

    return attach(model, {name: adapter_of(name) for name in linears})


def _add_lora(model: Any, linears: Sequence[str], masks: Mapping[str, Tensor], rank: int, scale: float, *, transposed: bool) -> Callable[[], None]:
    """peft's adapters; gives what adds them to the weights in the end, under the masks."""
    tuner = add_lora(model, dict.fromkeys(linears, rank), scale, transposed=transposed)
    layers = {name: model.get_submodule(name) for name in linears}

    @torch.no_grad()
    def merge() -> None:
        for name, layer in layers.items():
            change, mask = layer.get_delta_weight("default"), masks.get(f"{name}.weight")
            layer.get_base_layer().weight.add_(change if mask is None else change * mask)
        tuner.unload()

    return merge
