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

from app.source import Source
from worker.checkpoint import finish, shard_name, write_shard

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
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
) -> Path:
    """A checkpoint as `save_pretrained` writes it. Weights are spread so widely that removing any of them shows in the logits."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads * (2 if model_type == "qwen3" else 1),
        "hidden_act": "silu",
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "dtype": str(dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    make_tokenizer(folder, vocab)
    weights = {name: weight.to(dtype) for name, weight in random_weights(config, seed).items()}
    save_torch_state_dict(weights, folder, max_shard_size=max_shard_size or "1GB")
    return folder


def random_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, mean: float = 0.0, std: float = 0.25) -> Tensor:
        return torch.randn(*shape, generator=generator) * std + mean

    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    weights = {"model.embed_tokens.weight": normal(config["vocab_size"], hidden, std=1.0)}
    for layer in range(config["num_hidden_layers"]):
        block = {
            "self_attn.q_proj.weight": normal(query, hidden),
            "self_attn.k_proj.weight": normal(key, hidden),
            "self_attn.v_proj.weight": normal(key, hidden),
            "self_attn.o_proj.weight": normal(hidden, query),
            "mlp.gate_proj.weight": normal(ffn, hidden),
            "mlp.up_proj.weight": normal(ffn, hidden),
            "mlp.down_proj.weight": normal(hidden, ffn),
            "input_layernorm.weight": normal(hidden, mean=1.0, std=0.1),
            "post_attention_layernorm.weight": normal(hidden, mean=1.0, std=0.1),
        }
        if config["model_type"] == "qwen2":
            block |= {f"self_attn.{name}_proj.bias": normal(width) for name, width in (("q", query), ("k", key), ("v", key))}
        if config["model_type"] == "qwen3":
            block |= {f"self_attn.{name}_norm.weight": normal(head_dim, mean=1.0, std=0.1) for name in ("q", "k")}
        weights |= {f"model.layers.{layer}.{name}": weight for name, weight in block.items()}
    weights["model.norm.weight"] = normal(hidden, mean=1.0, std=0.1)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = normal(config["vocab_size"], hidden)
    return weights


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
    finish(folder, source, widths, layout, dtype)
    return folder


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
