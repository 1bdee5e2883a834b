"""`import espalier.loader` lets plain `from_pretrained` load checkpoints whose layers differ in FFN width or in number of heads.

Such a checkpoint states its sizes in transformers' own `per_layer_config`, which transformers 5 reads into the config but does not build models from: it gives
every decoder layer the global sizes, and `from_pretrained` fails on the shapes. This import wraps the decoder layers' constructors, so that a layer whose config
has a `per_layer_config` gets its own `intermediate_size`, `num_attention_heads` and `num_key_value_heads`. The global values are the largest layer's; `head_dim`,
one for all layers, must be stated where heads differ. Other models are built as ever. Importing it twice changes nothing.

LlamaConfig and Gemma2Config refuse a global `num_attention_heads` that doesn't divide `hidden_size`, even with `head_dim` set; a layer's own may be any number.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

LAYERS: tuple[type[nn.Module], ...] = (Gemma2DecoderLayer, LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
HEADS = {"num_attention_heads", "num_key_value_heads"}
SIZES = HEADS | {"intermediate_size"}


def install() -> None:
    """Wrap the decoder layers' constructors; done once by the import."""
    for layer in LAYERS:
        if not hasattr(layer.__init__, "builds_per_layer"):
            layer.__init__ = _per_layer(layer.__init__)  # type: ignore[method-assign]


def _per_layer(construct: Any) -> Any:
    @functools.wraps(construct)
    def init(self: nn.Module, config: PretrainedConfig, layer_idx: int) -> None:
        differing = SIZES & (config.per_layer_attributes or set())
        if not differing:
            construct(self, config, layer_idx)
            return
        if HEADS & differing and getattr(config, "head_dim", None) is None:
            raise ValueError("config.json must state head_dim where layers differ in heads: it can't be told from hidden_size")
        construct(self, config.per_layer_config[layer_idx], layer_idx)
        # The layer's config is a copy, and a layer reads settings that change later, such as the implementation of attention: those are the model's.
        for module in self.modules():
            if hasattr(module, "config"):
                module.config = config  # type: ignore[assignment]

    init.builds_per_layer = True  # type: ignore[attr-defined]
    return init


install()
