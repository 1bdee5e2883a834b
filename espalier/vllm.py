"""A vLLM plugin: its own Llama, Mistral, Qwen2, Qwen3 and Gemma2 build each layer at the sizes that the checkpoint's `per_layer_config` states.

vLLM finds `register` by the entry point group `vllm.general_plugins` and calls it in each of its processes before it loads a model; nothing is to be imported.
**It was not run with vLLM.** It was written after vLLM's source of 2026: LlamaDecoderLayer (Mistral's derives from it) takes `vllm_config`, `prefix` and perhaps
`config`; the others take `config` and `prefix`; all read their sizes from that config alone. Tensor parallelism must divide every layer's heads and width.
"""

from __future__ import annotations

import functools
import inspect
from importlib import import_module
from typing import Any

LAYERS = {
    "vllm.model_executor.models.gemma2": "Gemma2DecoderLayer",
    "vllm.model_executor.models.llama": "LlamaDecoderLayer",
    "vllm.model_executor.models.qwen2": "Qwen2DecoderLayer",
    "vllm.model_executor.models.qwen3": "Qwen3DecoderLayer",
}


def register() -> None:
    """Wrap the constructors of vLLM's decoder layers, once; nothing happens where vLLM, or one of them, is missing."""
    for module, name in LAYERS.items():
        try:
            layer = getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
        if not hasattr(layer.__init__, "builds_per_layer"):
            layer.__init__ = _per_layer(layer.__init__)


def _per_layer(construct: Any) -> Any:
    signature = inspect.signature(construct)

    @functools.wraps(construct)
    def init(*args: Any, **kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs)
        config = given.arguments.get("config") or given.arguments["vllm_config"].model_config.hf_config
        if getattr(config, "is_heterogeneous", False):
            layer = int(given.arguments["prefix"].rpartition(".")[2])  # "model.layers.3"
            given.arguments["config"] = config.per_layer_config[layer]
        construct(*given.args, **given.kwargs)

    init.builds_per_layer = True  # type: ignore[attr-defined]
    return init
