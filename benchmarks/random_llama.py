"""Checkpoints of large shapes: random ones, written shard by shard, and ones that are all header."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from app.architecture import ARCHITECTURES
from worker.checkpoint import INDEX, shard_name, write_shard


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; the defaults are the 7B model's."""

    layers: int = 32
    hidden: int = 4096
    ffn: int = 11008
    heads: int = 32
    kv_heads: int = 32
    vocab: int = 32000

    @property
    def bytes(self) -> int:
        """Of the weight files, in bfloat16."""
        attention = 2 * self.hidden**2 * (1 + self.kv_heads / self.heads)
        return round(2 * (self.layers * (attention + 3 * self.hidden * self.ffn) + 2 * self.vocab * self.hidden))


def write_random_llama(folder: Path, shape: Shape) -> None:
    """A checkpoint in bfloat16 with an untied head and a tokenizer of single bytes; one shard is in memory at a time."""
    config, generator = _write_beside(folder, shape), torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    for place, shapes in enumerate(_shapes(config), start=1):
        file = shard_name(place, shape.layers + 1)
        write_shard(folder / file, {name: _random(size, generator) for name, size in shapes})
        files |= {name: file for name, _ in shapes}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}), encoding="utf-8")


def write_hollow_llama(folder: Path, shape: Shape) -> None:
    """The same checkpoint with all weights 0, as a hole in one file, which takes no space on the disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, size in itertools.chain(*_shapes(_write_beside(folder, shape))):
        begin, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [begin, end]}
    described = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(described).to_bytes(8, "little") + described)
        stream.truncate(8 + len(described) + end)


def _write_beside(folder: Path, shape: Shape) -> dict[str, Any]:
    """What lies beside the weights; gives config.json."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _write_tokenizer(folder)
    return config


def _shapes(config: dict[str, Any]) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Names and shapes of each block's tensors, and last of those outside."""
    llama = ARCHITECTURES["llama"]
    blocks = [[(llama.block_prefix(index) + name, size) for name, size in llama.block_shapes(config, index)] for index in range(config["num_hidden_layers"])]
    return [*blocks, list(llama.outer_shapes(config))]


def _random(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ones for a norm, else normal values of Llama's spread."""
    return torch.ones(size, dtype=torch.bfloat16) if len(size) == 1 else torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}', encoding="utf-8")
