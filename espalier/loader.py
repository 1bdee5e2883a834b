"""`import espalier.loader` lets plain `from_pretrained` load checkpoints whose layers have FFNs of different widths.

Such a checkpoint states its widths in transformers' own `per_layer_config`, which transformers 5 reads into the config but does not build models from:
it gives every decoder layer the global width, and `from_pretrained` fails on the shapes. This import wraps the decoder layers' constructors, so that a layer
whose config has a `per_layer_config` gets an MLP of its own width. Other models are built as ever. Importing it twice changes nothing.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3MLP

LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    LlamaDecoderLayer: LlamaMLP,
    MistralDecoderLayer: MistralMLP,
    Qwen2DecoderLayer: Qwen2MLP,
    Qwen3DecoderLayer: Qwen3MLP,
}


def install() -> None:
    """Wrap the decoder layers' constructors; done once by the import."""
    for layer, mlp in LAYERS.items():
        if not hasattr(layer.__init__, "builds_per_layer"):
            layer.__init__ = _per_layer(layer.__init__, mlp)  # type: ignore[method-assign]


def _per_layer(construct: Any, mlp: type[nn.Module]) -> Any:
    @functools.wraps(construct)
    def init(self: nn.Module, config: PretrainedConfig, layer_idx: int) -> None:
        construct(self, config, layer_idx)
        if "intermediate_size" in (config.per_layer_attributes or ()):
            # Only the MLP gets the layer's config, which is a copy: attention reads settings that change later, such as its implementation, from the model's.
            self.mlp = mlp(config.per_layer_config[layer_idx])

    init.builds_per_layer = True  # type: ignore[attr-defined]
    return init


install()
