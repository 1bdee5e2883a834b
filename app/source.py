"""What a checkpoint folder must be before anything is computed: checks on config.json, the safetensors headers and the tokenizer, without torch.

The API runs them at submission where it can see the folder, and the engine runs them again before it loads anything.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.exceptions import RecipeError
from app.recipe import BUNDLED_TEXTS, MODEL_TYPES, Pattern, Recipe

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
MAX_NAME_BYTES = 255  # of a file name, on every common file system
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
ITEM_BYTES = FLOAT_BYTES | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `file` (bytes from `begin` to `end`), its dtype by safetensors' name and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Source:
    """A checkpoint folder that passed the checks."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in {entry.file for entry in self.tensors.values()})


def find_local(model: str, roots: Sequence[Path]) -> Path | None:
    """The folder that `model` names: an absolute path below one of the roots (it need not exist), or a folder there by its relative path.

    None: no folder, so perhaps a hub id. Raises RecipeError where the path leads, by `..` or by a symlink, outside the roots.
    """
    return _find_below(model, roots, code="model_outside_roots", what="model", pointer="/model")


def find_text(source: str, roots: Sequence[Path], pointer: str) -> Path | None:
    """The file that a text's `source` names, below one of the roots; None for a bundled text. Raises RecipeError, at `pointer`."""
    if source in BUNDLED_TEXTS:
        return None
    file = _find_below(source, roots, code="text_outside_roots", what="text", pointer=pointer)
    if file is None or (not file.is_file() and any(root.is_dir() for root in roots)):
        raise RecipeError(
            f"There is no text '{source[:100]}'.",
            code="text_not_found",
            hint=f"Give {' or '.join(BUNDLED_TEXTS)}, or a .txt or .jsonl file below an allowed root.",
            pointer=pointer,
        )
    return file


def _find_below(name: str, roots: Sequence[Path], *, code: str, what: str, pointer: str) -> Path | None:
    path = Path(name)
    outside = RecipeError(
        f"The {what} '{name[:100]}' lies outside the allowed roots.",
        code=code,
        hint="Name it by its path below a root that the operator allows, without '..' or links that lead out.",
        pointer=pointer,
    )
    if ".." in path.parts or not name.isprintable() or any(len(part.encode()) > MAX_NAME_BYTES for part in path.parts):
        raise outside
    for root in roots:
        try:
            found, base = (root / path).resolve(), root.resolve()  # an absolute path stays what it is
            exists = found.exists()
        except (OSError, RuntimeError):  # a loop of links, or a folder that may not be read
            raise outside from None
        inside = found != base and found.is_relative_to(base)
        if inside and (exists or path.is_absolute()):
            return found
        if exists and not path.is_absolute():
            raise outside
    if path.is_absolute():
        raise outside
    return None


def read_source(folder: Path) -> Source:
    """Check a checkpoint folder and read its headers, no weights. Raises RecipeError with a stable code."""
    if not folder.is_dir():
        raise _refuse("model_not_found", f"There is no checkpoint folder '{folder.name}'.", "Give a hub id, or a folder below an allowed root.")
    config = _read_config(folder)
    _check_tokenizer(folder)
    tensors: dict[str, TensorEntry] = {}
    for file in _weight_files(folder):
        tensors.update(read_header(file))
    _check_tensors(folder, config, tensors)
    return Source(folder, config, tensors)


def check_recipe(recipe: Recipe, source: Source) -> None:
    """Refuse a recipe that can never run on this checkpoint."""
    if source.config.get("per_layer_config"):
        raise _refuse("already_per_layer", f"'{source.folder.name}' has layers of different widths.", "Prune the dense model, or the uniform or padded result.")
    widths = {"hidden_size": source.config["hidden_size"], "intermediate_size": source.config["intermediate_size"]}
    if isinstance(recipe.sparsity, Pattern):
        for name, width in widths.items():
            if width % recipe.sparsity.m:
                raise RecipeError(
                    f"The pattern {recipe.sparsity} needs widths divisible by {recipe.sparsity.m}, but {name} is {width}.",
                    code="pattern_does_not_fit",
                    hint="Choose another group length, or a fraction.",
                    pointer="/sparsity",
                )


def _refuse(code: str, message: str, hint: str) -> RecipeError:
    return RecipeError(message, code=code, hint=hint, pointer="/model")


def _read_json(folder: Path, name: str, code: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error  # without the path on this machine
        raise _refuse(code, f"{name} of '{folder.name}' can't be read: {why}.", "Download or save the model again.") from None
    if not isinstance(value, dict):
        raise _refuse(code, f"{name} of '{folder.name}' is not a JSON object.", "Download or save the model again.")
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise _refuse("config_missing", f"'{folder.name}' has no config.json.", "Give the folder that save_pretrained wrote.")
    config = _read_json(folder, "config.json", "config_invalid")
    _refuse_own_code(folder, "config.json", config)
    if config.get("quantization_config"):
        raise _refuse("quantized_model", f"'{folder.name}' is quantized.", "Prune the unquantized model and quantize the result.")
    if config.get("model_type") not in MODEL_TYPES:
        raise _refuse(
            "unsupported_model_type", f"The model type {str(config.get('model_type'))[:50]!r} is not supported.", f"Supported are {', '.join(MODEL_TYPES)}."
        )
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if type(config.get(name)) is not int or config[name] < 1:
            raise _refuse("config_invalid", f"config.json of '{folder.name}' has no valid {name}.", "Save the model again.")
    for name in ("head_dim", "num_key_value_heads"):
        if config.get(name) is not None and (type(config[name]) is not int or config[name] < 1):
            raise _refuse("config_invalid", f"config.json of '{folder.name}' has no valid {name}.", "Save the model again.")
    return config


def _refuse_own_code(folder: Path, name: str, settings: dict[str, Any]) -> None:
    if "auto_map" in settings:
        raise _refuse(
            "auto_map", f"'{folder.name}' wants to run its own code (auto_map in {name}).", "Only models that transformers itself knows are accepted."
        )


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise _refuse("tokenizer_missing", f"'{folder.name}' has no tokenizer ({', '.join(TOKENIZER_FILES)}).", "Save the tokenizer into the same folder.")
    if (folder / "tokenizer_config.json").is_file():
        _refuse_own_code(folder, "tokenizer_config.json", _read_json(folder, "tokenizer_config.json", "tokenizer_invalid"))


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read, in its order of preference."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder, INDEX, "index_invalid").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _refuse("index_invalid", f"{INDEX} of '{folder.name}' has no weight_map.", "Download or save the model again.")
        for name in weight_map.values():
            if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,199}\.safetensors", name):
                raise _refuse(
                    "index_invalid", f"{INDEX} of '{folder.name}' names {str(name)[:100]!r}, which is no safetensors file beside it.", "Save the model again."
                )
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise _refuse("weights_missing", f"'{folder.name}' lacks the weight files {', '.join(missing[:5])}.", "Complete the download.")
        return [folder / name for name in names]
    pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt") for file in folder.glob(pattern)]
    if pickles:
        raise _refuse(
            "pickle_weights", f"'{folder.name}' has only pickled weights ({pickles[0]}), which can run code when loaded.", "Convert them to safetensors."
        )
    raise _refuse("weights_missing", f"'{folder.name}' has no safetensors weights.", "Save the model with save_pretrained.")


def _check_tensors(folder: Path, config: dict[str, Any], tensors: dict[str, TensorEntry]) -> None:
    """Every weight that the config promises is there, as floats and in its shape."""
    for name, expected in _promised_shapes(config):
        entry = tensors.get(name)
        if entry is None:
            raise _refuse("weights_incomplete", f"'{folder.name}' lacks the tensor {name}.", "Complete the download, or save the model again.")
        if entry.dtype not in FLOAT_BYTES:
            raise _refuse("unsupported_dtype", f"{name} of '{folder.name}' is stored as {entry.dtype}.", f"Stored types may be {', '.join(FLOAT_BYTES)}.")
        if len(entry.shape) != len(expected) or any(wanted not in (None, got) for wanted, got in zip(expected, entry.shape, strict=True)):
            wanted = " by ".join("any" if extent is None else str(extent) for extent in expected)
            found = " by ".join(map(str, entry.shape))
            raise _refuse("weights_do_not_fit", f"{name} of '{folder.name}' is {found}, and config.json says {wanted}.", "Save the model again.")


def _promised_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int | None, ...]]]:
    """Names and shapes by config.json; None for an extent that it leaves open, as a `per_layer` checkpoint's FFN or an unstated head_dim."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    ffn = None if config.get("per_layer_config") else config["intermediate_size"]
    head_dim, key_heads = config.get("head_dim"), config.get("num_key_value_heads")
    query = head_dim and heads * head_dim
    key = head_dim and key_heads and key_heads * head_dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings", False):
        yield "lm_head.weight", (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        block = f"model.layers.{index}"
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
        yield f"{block}.self_attn.q_proj.weight", (query, hidden)
        yield f"{block}.self_attn.k_proj.weight", (key, hidden)
        yield f"{block}.self_attn.v_proj.weight", (key, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, query)
        yield f"{block}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{block}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, ffn)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors that a weight file's header names; every offset is checked against shape, dtype and file size."""
    size = file.stat().st_size

    def broken(why: str) -> RecipeError:
        return _refuse("checkpoint_truncated", f"{file.name} is not a whole safetensors file: {why}.", "Download or save it again.")

    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise broken("its header is longer than the file")
        header = stream.read(length)
    try:
        described = json.loads(header)
        described.pop("__metadata__", None)
        spans = [(*_span(entry["data_offsets"]), name, entry["dtype"], _whole_numbers(entry["shape"])) for name, entry in described.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise broken("its header can't be read") from None
    entries: dict[str, TensorEntry] = {}
    expected = 0
    for begin, end, name, dtype, shape in sorted(spans, key=lambda span: span[:2]):
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise broken(f"the tensor {name[:100]} is of the unknown type {str(dtype)[:20]}")
        if begin != expected or end - begin != ITEM_BYTES[dtype] * math.prod(shape):
            raise broken(f"the tensor {name[:100]} does not fill its bytes")
        entries[name] = TensorEntry(file, dtype, shape, 8 + length + begin, 8 + length + end)
        expected = end
    if 8 + length + expected != size:
        raise broken(f"it has {size} bytes and should have {8 + length + expected}")
    return entries


def _span(value: Any) -> tuple[int, int]:
    begin, end = _whole_numbers(value)
    return begin, end


def _whole_numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(number) is not int or number < 0 for number in value):
        raise ValueError(f"{value} is no list of whole numbers")
    return tuple(value)
