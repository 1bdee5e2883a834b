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

from app.architecture import ARCHITECTURES, Architecture
from app.exceptions import RecipeError
from app.recipe import BUNDLED_TEXTS, Depth, Given, Pattern, Recipe, Structured
from app.recovery import Perp

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
CHECKPOINT_ID = re.compile(r"ckpt_[0-9a-f]{32}")  # of an uploaded checkpoint
MODEL_URL = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9_.-]*)+", re.ASCII)
MAX_NAME_BYTES = 255  # of a file name, on every common file system
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_DIMENSIONS = 16  # the product of more numbers could take long
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
ITEM_BYTES = FLOAT_BYTES | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `file` (bytes from `begin` to `end`) and its `name` there, its dtype by safetensors' name and its shape."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Source:
    """A checkpoint folder that passed the checks.

    `tensors` holds the model's weights and nothing else that the files hold, by the names that `save_pretrained` gives them.
    """

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


def find_stored(model: str, urls: Sequence[str]) -> str | None:
    """The URL `s3://bucket/prefix` of a checkpoint in a bucket, without a slash at its end; None for what is no such URL.

    Raises RecipeError for one that is not below an allowed one.
    """
    if not model.startswith("s3://"):
        return None
    url = model.rstrip("/")
    if not MODEL_URL.fullmatch(url) or not any(url.startswith(allowed.rstrip("/") + "/") for allowed in urls):
        raise _refuse(
            "model_outside_roots",
            f"The model '{model[:100]}' lies outside the buckets that are allowed.",
            "Name it as s3://bucket/prefix, below a URL that the operator allows (ESPALIER_MODEL_URLS).",
        )
    return url


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
    config = read_config(folder)
    _check_tokenizer(folder)
    stored: dict[str, TensorEntry] = {}
    for file in _weight_files(folder):
        stored.update(read_header(file))
    return Source(folder, config, _find_tensors(folder, config, stored))


def check_recipe(recipe: Recipe, source: Source) -> None:
    """Refuse a recipe that can never run on this checkpoint."""
    if source.config.get("per_layer_config"):
        raise _refuse("already_per_layer", f"'{source.folder.name}' has layers of different widths.", "Prune the dense model, or the uniform or padded result.")
    architecture = ARCHITECTURES[source.model_type]
    _check_method(recipe, source, architecture)
    if isinstance(recipe.sparsity, Pattern):
        for name, width in _input_widths(architecture, source.config).items():
            if width % recipe.sparsity.m:
                raise RecipeError(
                    f"The pattern {recipe.sparsity} needs widths divisible by {recipe.sparsity.m}, but {name} is {width}.",
                    code="pattern_does_not_fit",
                    hint="Choose another group length, or a fraction.",
                    pointer="/sparsity",
                )
    if architecture.positions is not None:
        longest = architecture.stated(source.config, architecture.positions.key)
        for part, asked in (("calibration", recipe.calibration), ("evaluation", recipe.evaluation), ("recovery", recipe.recovery)):
            if asked is not None and asked.sequence_length > longest:
                raise RecipeError(
                    f"The model has positions for {longest} tokens, and sequences of {asked.sequence_length} were asked for.",
                    code="sequence_too_long",
                    hint=f"Ask for at most {longest}.",
                    pointer=f"/{part}/sequence_length",
                )


def _check_method(recipe: Recipe, source: Source, architecture: Architecture) -> None:
    """Refuse a method, a layout or an allocation that this family or this model has no place for."""

    def refuse(code: str, message: str, hint: str, pointer: str) -> RecipeError:
        return RecipeError(message, code=code, hint=hint, pointer=pointer)

    method, model_type = recipe.method, source.model_type
    if model_type not in recipe.facts.model_types:
        raise refuse(
            "method_does_not_fit", f"{method.name} doesn't work on {model_type} models.", f"It works on {', '.join(recipe.facts.model_types)}.", "/method"
        )
    if recipe.output.layout == "per_layer" and not architecture.per_layer:
        raise refuse(
            "layout_not_loadable",
            f"Nothing loads {model_type} models whose layers differ in size.",
            "Leave output.layout out: all layers stay alike.",
            "/output",
        )
    if isinstance(method, Structured) and method.units != "ffn" and architecture.groups_fixed:
        raise refuse(
            "groups_fixed", f"No KV groups can be removed from {model_type} models: {architecture.groups_fixed}.", "Set units to 'ffn'.", "/method/units"
        )
    if isinstance(recipe.recovery, Perp) and set(recipe.recovery.train) == {"biases"} and not architecture.has_biases(source.config):
        raise refuse("no_biases", f"'{source.folder.name}' has no biases to train.", "Train its norms, or adapters too ('published').", "/recovery/train")
    layers = architecture.dimensions(source.config).layers
    if isinstance(recipe.allocation, Given) and len(recipe.allocation.sparsities) != layers:
        raise refuse(
            "allocation_does_not_fit", f"{len(recipe.allocation.sparsities)} sparsities are given for {layers} layers.", "Give one a layer.", "/allocation"
        )
    if isinstance(method, Depth) and source.config.get(architecture.place_key):
        raise refuse("blocks_fixed", f"With {architecture.place_key} a block's place changes what it computes.", "Choose another method.", "/method")


def _input_widths(architecture: Architecture, config: dict[str, Any]) -> dict[str, int]:
    """The numbers of inputs that the linears of the blocks have, by where config.json states them."""
    size = architecture.dimensions(config)
    widths = {architecture.keys.hidden: size.hidden, "the width of all heads": size.heads * size.head_dim}
    return widths | {architecture.width_key(config, index): architecture.ffn_width(config, index) for index in range(size.layers)}


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


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, of which nothing else need be there. Raises RecipeError where it names what can't be pruned."""
    if not (folder / "config.json").is_file():
        raise _refuse("config_missing", f"'{folder.name}' has no config.json.", "Give the folder that save_pretrained wrote.")
    config = _read_json(folder, "config.json", "config_invalid")
    _refuse_own_code(folder, "config.json", config)
    if config.get("quantization_config"):
        raise _refuse("quantized_model", f"'{folder.name}' is quantized.", "Prune the unquantized model and quantize the result.")
    model_type = config.get("model_type")
    architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if architecture is None:
        raise _refuse("unsupported_model_type", f"The model type {str(model_type)[:50]!r} is not supported.", f"Supported are {', '.join(ARCHITECTURES)}.")
    _check_config(folder, config, architecture)
    return config


def _check_config(folder: Path, config: dict[str, Any], architecture: Architecture) -> None:
    """Everything that the shapes depend on is stated, and of the right type."""

    def check(holds: bool, name: str) -> None:
        if not holds:
            raise _refuse("config_invalid", f"config.json of '{folder.name}' has no valid {name}.", "Save the model again.")

    def is_size(value: Any) -> bool:
        return type(value) is int and value >= 1

    for name in architecture.size_keys:
        check(is_size(config.get(name)), name)
    for name in architecture.optional_size_keys:
        check(config.get(name) is None or is_size(config[name]), name)
    size = architecture.dimensions(config)
    check(size.heads % size.kv_heads == 0, architecture.keys.kv_heads)
    dense = config.get("mlp_only_layers")
    check(dense is None or (isinstance(dense, list) and all(type(index) is int for index in dense)), "mlp_only_layers")
    layers = config.get("per_layer_config")
    check(
        layers is None
        or (
            isinstance(layers, dict)
            and all(re.fullmatch(r"[0-9]{1,9}", layer) and isinstance(own, dict) and all(map(is_size, own.values())) for layer, own in layers.items())
        ),
        "per_layer_config",
    )
    for name, needed in architecture.needs.items():
        if config.get(name, needed) != needed:
            raise _refuse("unsupported_config", f"'{folder.name}' has {name} = {config[name]!r}.", f"Of this model type only {name} = {needed!r} is supported.")


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


def _find_tensors(folder: Path, config: dict[str, Any], stored: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Every weight that the config promises is there, as floats and in its shape; the rest is left out, as transformers does."""
    architecture = ARCHITECTURES[config["model_type"]]
    base = f"{architecture.blocks.split('.')[0]}."  # left out where the model was saved without its head
    found: dict[str, TensorEntry] = {}
    for name, expected in _promised_shapes(architecture, config):
        entry = stored.get(name) or stored.get(name.removeprefix(base))
        if entry is None and name == architecture.head and architecture.tied(config):
            continue
        if entry is None:
            raise _refuse("weights_incomplete", f"'{folder.name}' lacks the tensor {name}.", "Complete the download, or save the model again.")
        if entry.dtype not in FLOAT_BYTES:
            raise _refuse("unsupported_dtype", f"{name} of '{folder.name}' is stored as {entry.dtype}.", f"Stored types may be {', '.join(FLOAT_BYTES)}.")
        if entry.shape != expected:
            wanted, got = (" by ".join(map(str, shape)) for shape in (expected, entry.shape))
            raise _refuse("weights_do_not_fit", f"{name} of '{folder.name}' is {got}, and config.json says {wanted}.", "Save the model again.")
        found[name] = entry
    return found


def _promised_shapes(architecture: Architecture, config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes by config.json, the head's even where it is tied: transformers then uses it if it is there."""
    size = architecture.dimensions(config)
    yield from architecture.outer_shapes(config)
    if architecture.tied(config):
        yield architecture.head, (size.vocab, size.embedding)
    for index in range(size.layers):
        prefix = architecture.block_prefix(index)
        yield from ((prefix + name, shape) for name, shape in architecture.block_shapes(config, index))


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
        described = json.loads(header.decode(), object_pairs_hook=_each_once)  # from bytes it would take UTF-16, which safetensors does not
        described.pop("__metadata__", None)
        spans = [(*_span(entry["data_offsets"]), name, entry["dtype"], _whole_numbers(entry["shape"])) for name, entry in described.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise broken("its header can't be read") from None
    entries: dict[str, TensorEntry] = {}
    expected = 0
    for begin, end, name, dtype, shape in sorted(spans, key=lambda span: span[:2]):
        if not name.isprintable():
            raise broken("the name of a tensor holds characters that can't be shown")
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise broken(f"the tensor {name[:100]} is of the unknown type {str(dtype)[:20]}")
        if begin != expected or end - begin != ITEM_BYTES[dtype] * math.prod(shape):
            raise broken(f"the tensor {name[:100]} does not fill its bytes")
        entries[name] = TensorEntry(file, name, dtype, shape, 8 + length + begin, 8 + length + end)
        expected = end
    if 8 + length + expected != size:
        raise broken(f"it has {size} bytes and should have {8 + length + expected}")
    return entries


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers of a file must not see two different tensors."""
    described = dict(pairs)
    if len(described) < len(pairs):
        raise ValueError("a name is there twice")
    return described


def _span(value: Any) -> tuple[int, int]:
    begin, end = _whole_numbers(value)
    return begin, end


def _whole_numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DIMENSIONS or any(type(number) is not int or number < 0 for number in value):
        raise ValueError("no short list of whole numbers")
    return tuple(value)
