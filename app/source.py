"""What a checkpoint folder must be before anything is computed: checks on config.json, the safetensors headers and the tokenizer, without torch.

The API runs them at submission where it can see the folder, and the engine runs them again before it loads anything.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.exceptions import RecipeError
from app.recipe import MODEL_TYPES, Pattern, Recipe

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


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
    fingerprint: str  # sha256 over config.json and every weight file's header and size

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in {entry.file for entry in self.tensors.values()})


def read_source(folder: Path) -> Source:
    """Check a checkpoint folder and read its headers, no weights. Raises RecipeError with a stable code."""
    if not folder.is_dir():
        raise _refuse("model_not_found", f"There is no checkpoint folder '{folder.name}'.", "Give a hub id, or a folder below an allowed root.")
    config = _read_config(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise _refuse("tokenizer_missing", f"'{folder.name}' has no tokenizer ({', '.join(TOKENIZER_FILES)}).", "Save the tokenizer into the same folder.")
    files = _weight_files(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        header, entries = _read_header(file)
        digest.update(file.name.encode() + header + file.stat().st_size.to_bytes(8, "big"))
        tensors.update(entries)
    return Source(folder, config, tensors, digest.hexdigest())


def check_recipe(recipe: Recipe, source: Source) -> None:
    """Refuse a recipe that can never run on this checkpoint."""
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


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _refuse("config_missing", f"'{folder.name}' has no config.json.", "Give the folder that save_pretrained wrote.") from None
    except ValueError as error:
        raise _refuse("config_invalid", f"config.json of '{folder.name}' is not JSON: {error}.", "Save the model again.") from None
    if not isinstance(config, dict):
        raise _refuse("config_invalid", f"config.json of '{folder.name}' is not a JSON object.", "Save the model again.")
    if "auto_map" in config:
        raise _refuse(
            "auto_map", f"'{folder.name}' wants to run its own code (auto_map in config.json).", "Only models that transformers itself knows are accepted."
        )
    if config.get("quantization_config"):
        raise _refuse("quantized_model", f"'{folder.name}' is quantized.", "Prune the unquantized model and quantize the result.")
    if config.get("model_type") not in MODEL_TYPES:
        raise _refuse("unsupported_model_type", f"The model type '{config.get('model_type')}' is not supported.", f"Supported are {', '.join(MODEL_TYPES)}.")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise _refuse("config_invalid", f"config.json of '{folder.name}' has no valid {name}.", "Save the model again.")
    if config.get("per_layer_config"):
        raise _refuse("already_per_layer", f"'{folder.name}' has layers of different widths.", "Prune the dense model, or the uniform or padded result.")
    return config


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise _refuse("index_invalid", f"model.safetensors.index.json of '{folder.name}' can't be read: {error}.", "Save the model again.") from None
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise _refuse("index_invalid", "model.safetensors.index.json names a file outside its folder.", "Save the model again.")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise _refuse("weights_missing", f"'{folder.name}' lacks the weight files {', '.join(missing[:5])}.", "Complete the download.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt") for file in folder.glob(pattern)]
    if pickles:
        raise _refuse(
            "pickle_weights", f"'{folder.name}' has only pickled weights ({pickles[0]}), which can run code when loaded.", "Convert them to safetensors."
        )
    raise _refuse("weights_missing", f"'{folder.name}' has no safetensors weights.", "Save the model with save_pretrained.")


def _read_header(file: Path) -> tuple[bytes, dict[str, TensorEntry]]:
    """The raw header and its tensors; every offset is checked against shape, dtype and file size."""
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
        spans = {name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in described.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise broken("its header can't be read") from None
    entries: dict[str, TensorEntry] = {}
    expected = 0
    for name, (dtype, shape, begin, end) in sorted(spans.items(), key=lambda item: item[1][2]):
        count = ITEM_BYTES.get(dtype, 0)
        for extent in shape:
            count *= extent
        if dtype not in ITEM_BYTES or begin != expected or end - begin != count:
            raise broken(f"the tensor {name} does not fill its bytes")
        entries[name] = TensorEntry(file, dtype, shape, 8 + length + begin, 8 + length + end)
        expected = end
    if 8 + length + expected != size:
        raise broken(f"it has {size} bytes and should have {8 + length + expected}")
    return header, entries
