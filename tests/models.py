"""Tiny checkpoints and texts, made where a test needs them: real folders with real tokenizers, random weights, the same for the same arguments."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from app.architecture import ARCHITECTURES
from app.report import LayerReport
from app.source import Source
from worker.checkpoint import finish, shard_name, write_shard

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "opt": "OPTForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
SYLLABLES = ("ba", "de", "fi", "go", "lu", "ma", "ne", "pi", "ro", "su", "ta", "ve")
SENTENCES = (
    "A tree on a wall is pruned in winter and bears fruit in summer.",
    "The gardener ties the young branches to the wires and removes the others.",
    "What is left grows in the shape that was planned, and it is less than there was before.",
    "bade figo luma nepi rosu tave bago dema fine lupi maro nesu pita rove suba tade",
)


def make_checkpoint(
    folder: Path,
    model_type: str,
    *,
    tied: bool = False,
    layers: int = 3,
    hidden: int = 32,
    ffn: int = 48,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 320,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str | None = None,
    **more: Any,
) -> Path:
    """A checkpoint as `save_pretrained` writes it; `more` goes into config.json. Weights are spread so widely that removing any of them shows in the logits."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": [CLASSES[model_type]],
        "model_type": model_type,
        **_sizes(model_type, layers=layers, hidden=hidden, ffn=ffn, heads=heads, kv_heads=kv_heads),
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
        **more,
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    make_tokenizer(folder, vocab)
    weights = {name: weight.to(dtype) for name, weight in random_weights(config, seed).items()}
    save_torch_state_dict(weights, folder, max_shard_size=max_shard_size or "1GB")
    return folder


def _sizes(model_type: str, *, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """What config.json of a family says of sizes and functions."""
    if model_type == "gpt2":
        return {"n_layer": layers, "n_embd": hidden, "n_inner": ffn, "n_head": heads, "n_positions": 2048, "layer_norm_epsilon": 1e-5}
    common = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 2048}
    if model_type == "opt":
        return common | {"ffn_dim": ffn, "word_embed_proj_dim": hidden}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if model_type == "gpt_neox":
        return common | {"intermediate_size": ffn, "rope_parameters": rope | {"partial_rotary_factor": 0.5}}
    own: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": False},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3": {"head_dim": 2 * hidden // heads, "attention_bias": False},
        "qwen3_moe": {"head_dim": 2 * hidden // heads, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": ffn, "norm_topk_prob": True},
        "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 8},
        "gemma3_text": {
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "sliding_window_pattern": 2,
            "rope_parameters": {"sliding_attention": rope, "full_attention": rope | {"rope_theta": 1e6}},
        },
        "phi3": {"original_max_position_embeddings": 2048},
    }
    activation = {"hidden_activation": "gelu_pytorch_tanh"} if model_type.startswith("gemma") else {"hidden_act": "silu"}
    head_dim = {} if model_type == "phi3" else {"head_dim": hidden // heads}
    gated = {"intermediate_size": ffn, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5, "rope_parameters": rope}
    return common | gated | head_dim | activation | own.get(model_type, {})


def random_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Every stored tensor by config.json: matrices, norms around the value that changes nothing, embeddings."""
    architecture, generator = ARCHITECTURES[config["model_type"]], torch.Generator().manual_seed(seed)
    neutral = 0.0 if config["model_type"].startswith("gemma") else 1.0  # Gemma's norms add 1 to the stored weight

    def normal(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(*shape, generator=generator)
        if name == architecture.embedding:
            return noise
        return noise * 0.1 + neutral if len(shape) == 1 and name.endswith("weight") else noise * 0.25

    outer = dict(architecture.outer_shapes(config))
    shapes = {architecture.embedding: outer.pop(architecture.embedding)}
    for layer in range(architecture.dimensions(config).layers):
        shapes |= {architecture.block_prefix(layer) + name: shape for name, shape in architecture.block_shapes(config, layer)}
    return {name: normal(name, shape) for name, shape in (shapes | outer).items()}


def make_tokenizer(folder: Path, vocab: int = 320) -> None:
    """A byte-level BPE of at most `vocab` tokens: any text round-trips; a text starts with `<s>`; `<|endoftext|>` is there since transformers adds it for Qwen."""
    if vocab < 259:
        raise ValueError(f"a byte-level tokenizer needs 256 bytes and 3 special tokens, not a vocabulary of {vocab}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<s>", "</s>", "<|endoftext|>"], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "TokenizersBackend", "bos_token": "<s>", "eos_token": "</s>"})
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}\n{% endfor %}", encoding="utf-8")


def make_text(folder: Path, words: int, seed: int = 0) -> Path:
    """A text of `words` pseudo-random words of two syllables in sentences, three or four tokens a word."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    lexicon = [first + second for first in SYLLABLES for second in SYLLABLES]
    weights = [1 / rank for rank in range(1, len(lexicon) + 1)]
    chosen = draw.choices(lexicon, weights, k=words)
    sentences = [" ".join(chosen[start : start + 12]) + "." for start in range(0, words, 12)]
    path = folder / f"text-{seed}.txt"
    path.write_text("\n".join(sentences) + "\n", encoding="utf-8")
    return path


def make_wikitext(folder: Path, words: int) -> Path:
    """The folder, with two such texts under the names that benchmarks ask for."""
    for name, seed in (("valid", 0), ("test", 1)):
        make_text(folder, words, seed).rename(folder / f"wiki.{name}.raw")
    return folder


def pruned_checkpoint(source: Source, folder: Path, widths: list[int], layout: Literal["uniform", "per_layer"], *, dtype: str = "source") -> Path:
    """The checkpoint with the first channels of each layer's FFN kept, written as the engine writes it."""
    folder.mkdir(parents=True)
    weights = {name: tensor for file in {entry.file for entry in source.tensors.values()} for name, tensor in load_file(file).items()}
    count = len(widths) + 1
    for layer, width in enumerate(widths):
        prefix = f"model.layers.{layer}."
        block = {name: weights.pop(name) for name in list(weights) if name.startswith(prefix)}
        write_shard(folder / shard_name(layer + 1, count), {name: _first_channels(name, tensor, width) for name, tensor in block.items()})
    write_shard(folder / shard_name(count, count), weights)
    finish(folder, source, [layer_report(source, layer, width) for layer, width in enumerate(widths)], layout, dtype)
    return folder


def layer_report(source: Source, layer: int, width: int) -> LayerReport:
    architecture = ARCHITECTURES[source.model_type]
    before, groups = architecture.ffn_width(source.config, layer), architecture.dimensions(source.config).kv_heads
    return LayerReport(
        index=layer,
        dropped=False,
        ffn_channels=width,
        ffn_channels_before=before,
        kv_groups=groups,
        kv_groups_before=groups,
        experts=None,
        experts_before=None,
        weights=0,
        zeros=0,
        importance=None,
    )


def _first_channels(name: str, tensor: Tensor, width: int) -> Tensor:
    if "gate_proj" in name or "up_proj" in name:
        return tensor[:width]
    return tensor[:, :width] if name.endswith("down_proj.weight") else tensor


def load_model(folder: Path) -> Any:
    """The model by plain `from_pretrained`, with every weight of the folder and no other."""
    transformers: Any = importlib.import_module("transformers")  # takes seconds, and not every test of a folder loads it
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
