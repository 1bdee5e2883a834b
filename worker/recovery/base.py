"""What every recovery that trains the whole model has in common: what it is given, what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from app.architecture import ARCHITECTURES, Architecture
from app.source import Source


@dataclass(frozen=True)
class Student:
    """A pruned model that is to be trained: whole, in float32, on its device, without any gradients."""

    model: Any  # transformers' PreTrainedModel; its parameters are named as they are stored
    source: Source  # the checkpoint that it was loaded from
    masks: dict[str, Tensor]  # True = keep, by the names of their weights and in the stored shape; empty where nothing is masked
    importance: Callable[[], list[float]]  # coarse importance of its blocks

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.source.model_type]

    def linears(self) -> list[list[str]]:
        """The linears of each block, by the names of their modules."""
        architecture, config = self.architecture, self.source.config
        return [
            [architecture.block_prefix(index) + name for name in architecture.linears(config, index)] for index in range(architecture.dimensions(config).layers)
        ]


@dataclass(frozen=True)
class Adapted:
    """A model made ready: these parameters take gradients and no others."""

    parameters: dict[str, nn.Parameter]
    merge: Callable[[], None]  # in the end: puts what was trained into the model's own parameters, in float32, so that it computes the same without additions
    frozen: int = 0  # weights among the parameters that a mask keeps at zero
    jumps: bool = False  # whether the merge changes what the model computes
    notes: tuple[str, ...] = ()  # what the config asks for and the model has not, in sentences

    @property
    def count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values()) - self.frozen


Adapt = Callable[[Student, Any], Adapted]  # the model is changed in place; the other argument is the recovery's config


def keep_zeros(parameter: nn.Parameter, mask: Tensor) -> None:
    """Let no gradient reach the weights where the mask is False: they are zero, and AdamW leaves them exactly there."""
    parameter.register_hook(lambda gradient: gradient * mask)


def own_head(model: Any) -> nn.Parameter:
    """The head's matrix (V, E); one that is tied to the embedding is copied first, so that the embedding stays what it is."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    weight: nn.Parameter = head.weight
    return weight
