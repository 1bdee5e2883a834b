"""What comes out of a job: a checkpoint folder of one shard a decoder block and a last one for the rest, in three layouts.

`uniform` is an ordinary model of its `model_type`; `per_layer` states each layer's width in transformers' `per_layer_config`; `padded` is a `per_layer` checkpoint
filled up with zero channels, so that it is ordinary again. No function here holds more than one shard.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from app.architecture import ARCHITECTURES, Architecture, Config, Dimensions
from app.recipe import METHODS
from app.report import LayerReport, Measured, Parameters, Report, TextUsed
from app.source import Source, TensorEntry, read_header

INDEX = "model.safetensors.index.json"
SHARDS = "model-*.safetensors"
MASK_SUFFIX = ".mask"
# What a checkpoint takes over from its source besides the weights: data that no loader runs.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
)


# -------------------------------------------------------------------- shards


def shard_name(index: int, count: int) -> str:
    """The file of shard `index` (from 1) of `count`; block i is shard i + 1, and the last shard holds embedding, final norm and head."""
    return f"model-{index:05}-of-{count:05}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors whole or not at all, so that a file under its name is complete whenever this process dies.

    Nothing is forced to the disk: what a power cut loses, the hashes in the walk's state find.
    """
    _write_safetensors(path, tensors, {"format": "pt"})


def write_lasting(path: Path, tensors: Mapping[str, Tensor], facts: str = "") -> None:
    """The same of a state that no hash is kept of: whole or not at all after a power cut too."""
    _write_safetensors(path, tensors, {"facts": facts}, lasting=True)


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], *, lasting: bool = False) -> None:
    # safetensors writes metadata in a random order, so a file with more than one entry would not be the same twice.
    assert len(metadata) == 1
    part = path.with_name(f".{path.name}.part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, metadata)
    if lasting:
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
    part.rename(path)


def replace_weights(source: Source, weights: Mapping[str, Tensor], *, tied: bool) -> None:
    """Write a checkpoint of ours again with other values: the same shards, names, shapes and dtypes.

    `weights` has all of its tensors by their names. Where the head is not `tied` any more it becomes a tensor of its own, of the embedding's dtype.
    """
    architecture, folder = ARCHITECTURES[source.model_type], source.folder
    shards = sorted(folder.glob(SHARDS))
    for shard in shards:
        with safe_open(shard, framework="pt") as stored:
            dtypes = {name: stored.get_tensor(name).dtype for name in stored.keys()}  # noqa: SIM118  it is no dict
        if architecture.embedding in dtypes and not tied:
            dtypes.setdefault(architecture.head, dtypes[architecture.embedding])
        write_shard(shard, {name: weights[name].to(dtype) for name, dtype in dtypes.items()})
    if not tied and architecture.tied(source.config):
        _write_json(folder / "config.json", source.config | {"tie_word_embeddings": False})
    _write_index(folder, shards)


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of the weight files; masks don't count."""
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


# ------------------------------------------------------------------- layouts


def finish(
    folder: Path, source: Source, layers: Sequence[LayerReport], layout: Literal["uniform", "per_layer"], dtype: str, switches: Sequence[str] = ()
) -> None:
    """Make a folder of shards a checkpoint: index, config, tokenizer.

    `layers` are the blocks that stay; `dtype` is as in the recipe's output; `switches` are those of config.json that biases were added under.
    """
    _write_index(folder, [folder / shard_name(place, len(layers) + 1) for place in range(1, len(layers) + 2)])
    _write_json(folder / "config.json", pruned_config(source, layers, layout, dtype, switches))
    _copy_files(source.folder, folder)


def pruned_config(
    source: Source, layers: Sequence[LayerReport], layout: Literal["uniform", "per_layer"], dtype: str, switches: Sequence[str] = ()
) -> dict[str, Any]:
    """config.json of what stays of a source."""
    architecture, config = ARCHITECTURES[source.model_type], _without_origin(source.config, dtype)
    dense = architecture.dimensions(config)
    sizes = [_sizes(architecture, source.config, layer) for layer in layers]
    if len(layers) < dense.layers:
        config = architecture.keep_blocks(config, [layer.index for layer in layers])
    config |= dict.fromkeys(switches, True)
    widest = {key: max(size[key] for size in sizes if key in size) for size in sizes for key in size}
    if layout == "uniform" and any(size[key] != widest[key] for size in sizes for key in size):
        raise ValueError(f"the uniform layout needs layers of one size, not {sizes}")
    config |= widest
    if widest.get(architecture.keys.heads) not in (None, dense.heads) or config.get(architecture.keys.head_dim):
        config |= {architecture.keys.head_dim: dense.head_dim} if architecture.keys.head_dim else {}
    own = {place: {key: value for key, value in size.items() if value != widest[key]} for place, size in enumerate(sizes)}
    config |= _per_layer({place: size for place, size in own.items() if size})
    heads = {layer.kv_groups * dense.queries_per_group for layer in layers}
    return config if written_type(source.model_type, dense, heads) == source.model_type else _as_mistral(config)


def _sizes(architecture: Architecture, config: Config, layer: LayerReport) -> dict[str, int]:
    """What config.json says of a layer's size."""
    keys, dense = architecture.keys, architecture.dimensions(config)
    sizes = {architecture.width_key(config, layer.index): layer.ffn_channels}
    if keys.kv_heads:
        sizes |= {keys.heads: layer.kv_groups * dense.queries_per_group, keys.kv_heads: layer.kv_groups}
    if layer.experts is not None and architecture.experts is not None:
        sizes[next((key for key in architecture.experts.count_keys if config.get(key)), architecture.experts.count_keys[0])] = layer.experts
    return sizes


def _per_layer(sizes: dict[int, dict[str, int]]) -> dict[str, Any]:
    """As transformers serialises it: layers of the global sizes are left out, and keys are filled up to sort as numbers."""
    if not sizes:
        return {}
    digits = len(str(max(sizes)))
    return {"allow_global_per_layer_attribute_access": True, "per_layer_config": {f"{layer:0{digits}}": size for layer, size in sizes.items()}}


WRITTEN_AS = {"llama": "mistral"}  # another type of the same computation, which takes any number of heads


def written_type(model_type: str, dense: Dimensions, heads: set[int]) -> str:
    """The result's `model_type`: LlamaConfig refuses to state a number of heads that doesn't divide the hidden size; MistralConfig takes any."""
    return WRITTEN_AS.get(model_type, model_type) if dense.hidden % max(heads, default=dense.heads) else model_type


def _as_mistral(llama: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in llama.items() if name not in ("attention_bias", "mlp_bias", "pretraining_tp")}
    return kept | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


def write_padded(per_layer_folder: Path, out: Path) -> None:
    """A copy of a `per_layer` checkpoint with every layer filled up to the largest by zeros: the same function, loadable anywhere."""
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((per_layer_folder / "config.json").read_text(encoding="utf-8"))
    largest = {name: value for name, value in config.items() if name not in PER_LAYER_FIELDS}
    architecture = ARCHITECTURES[config["model_type"]]
    shapes = {
        architecture.block_prefix(index) + name: shape
        for index in range(architecture.dimensions(config).layers)
        for name, shape in architecture.block_shapes(largest, index)
    }
    shards = sorted(per_layer_folder.glob(SHARDS))
    for shard in shards:
        with safe_open(shard, framework="pt") as stored:
            write_shard(out / shard.name, {name: _fill_up(stored.get_tensor(name), shapes.get(name)) for name in stored.keys()})  # noqa: SIM118  it is no dict
    _write_index(out, [out / shard.name for shard in shards])
    _write_json(out / "config.json", largest)
    _copy_files(per_layer_folder, out)


PER_LAYER_FIELDS = ("per_layer_config", "allow_global_per_layer_attribute_access")


def _without_origin(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The source's config without the path that it was loaded from, and with the dtype under its present name."""
    kept = {name: value for name, value in config.items() if name not in ("_name_or_path", "torch_dtype")}
    stated = config.get("dtype", config.get("torch_dtype")) if dtype == "source" else dtype
    return kept if stated is None else kept | {"dtype": stated}


def _fill_up(tensor: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """Zeros behind a tensor's entries, up to the shape."""
    if shape is None or tensor.shape == shape:
        return tensor
    missing = [wanted - given for wanted, given in zip(shape, tensor.shape, strict=True)]
    return pad(tensor, [extent for amount in reversed(missing) for extent in (0, amount)])


def _write_index(folder: Path, shards: list[Path]) -> None:
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        entries |= read_header(shard)
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(entry.shape) for entry in entries.values()),
            "total_size": sum(entry.end - entry.begin for entry in entries.values()),
        },
        "weight_map": {name: entries[name].file.name for name in sorted(entries)},
    }
    _write_json(folder / INDEX, index)


def _copy_files(source: Path, folder: Path) -> None:
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --------------------------------------------------------------------- masks


def masks_name(index: int, count: int) -> str:
    """The file of one block's masks, numbered as its shard; no loader takes it for weights."""
    return f"masks-{index:05}-of-{count:05}.safetensors"


def write_masks(path: Path, masks: dict[str, Tensor]) -> None:
    """Write boolean masks (True = kept), eight weights a byte, lowest bit first."""
    packed = {name + MASK_SUFFIX: torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little")) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    _write_safetensors(path, packed, {"shapes": json.dumps(shapes, sort_keys=True)})


def read_masks(path: Path) -> dict[str, Tensor]:
    """The masks that `write_masks` wrote, by the names of their weights."""
    with safe_open(path, framework="np") as stored:
        shapes: dict[str, list[int]] = json.loads(stored.metadata()["shapes"])
        return {name: _unpack(stored.get_tensor(name + MASK_SUFFIX), shape) for name, shape in shapes.items()}


def _unpack(packed: np.ndarray[Any, np.dtype[np.uint8]], shape: list[int]) -> Tensor:
    bits = np.unpackbits(packed, count=math.prod(shape), bitorder="little")
    return torch.from_numpy(bits.astype(np.bool_)).reshape(shape)


# ---------------------------------------------------------------- model card


def model_card(report: Report, *, padded: bool = False) -> str:
    """README.md of a checkpoint, or of its padded copy: what it lost and gained, how to load it, and how to make it again."""
    method = report.recipe.method.name
    structured = METHODS[method][1].structured
    base = report.recipe.model or ""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"base_model: {json.dumps(base)}"] if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else []),
        f"tags: [espalier, pruned, {method}]",
        "---",
        "",
        f"# A {report.model_type} model pruned with {method}",
        "",
        _removed(report, structured),
        "",
        "## Before and after",
        "",
        *_comparison(report),
        "",
        *_recovery(report),
        "## How to load it",
        "",
        *_how_to_load(report, padded),
        "",
        "Tried in fresh processes before the job was called a success:",
        "",
        *_table(
            ("Layout", "Loaded by", "Largest difference of a logit from the pruning engine's"),
            [(check.layout, check.loader, f"{check.max_logit_difference:.3g}") for check in report.loads_with],
        ),
        "",
        "## How it was made",
        "",
        *_origin(report),
    ]
    return "\n".join(lines) + "\n"


def _removed(report: Report, structured: bool) -> str:
    gone = report.sparsity
    shares = f"{gone.ffn:.2%} of the FFN weights, {gone.decoder:.2%} of the decoder's linear weights, {gone.non_embedding:.2%} of the parameters but embeddings"
    if structured:
        return f"Removed: {shares}, {gone.all:.2%} of all parameters."
    return (
        f"Set to zero: {shares}, {gone.all:.2%} of all parameters. The zeros are stored and multiplied like other weights: "
        "they save neither time nor memory in transformers or vLLM. The masks lie in `masks-*.safetensors`, eight weights a byte."
    )


def _comparison(report: Report) -> list[str]:
    counts = {
        "Parameters, all (tied ones once)": "all",
        "Parameters but embedding and head": "non_embedding",
        "Weights of the decoder's linears": "decoder",
        "Weights of the FFNs": "ffn",
        "FFN channels, all layers": "ffn_channels",
        "Zeros among the decoder's linear weights": "decoder_zeros",
    }

    def count(parameters: Parameters, name: str) -> int:
        return int(getattr(parameters, name))

    rows = [(label, f"{count(report.parameters_before, name):,}", f"{count(report.parameters_after, name):,}") for label, name in counts.items()]
    if report.before is not None and report.after is not None:
        rows += _measured(report.before, report.after)
    return _table(("", "dense", "pruned"), rows)


def _measured(before: Measured, after: Measured) -> list[tuple[str, str, str]]:
    rows = [
        ("Bytes of the weight files", f"{before.checkpoint_bytes:,}", f"{after.checkpoint_bytes:,}"),
        ("Multiply-accumulates a token", f"{before.macs_per_token:,}", f"{after.macs_per_token:,}"),
    ]
    if before.perplexity and after.perplexity:
        how = f"{after.perplexity.windows} windows of {after.perplexity.sequence_length} tokens of `{after.perplexity.text.source}`, {after.perplexity.dtype}"
        rows.append((f"Perplexity ({how})", f"{before.perplexity.value:.4g}", f"{after.perplexity.value:.4g}"))
    if before.speed and after.speed:
        where = f"{after.speed.device}, {after.speed.threads} threads"
        prefill, decode = f"Prefill, tokens/s ({after.speed.prefill_tokens} tokens, {where})", f"Decode, tokens/s ({after.speed.decode_tokens} tokens, {where})"
        rows.append((prefill, f"{before.speed.prefill_tokens_per_second:,.1f}", f"{after.speed.prefill_tokens_per_second:,.1f}"))
        rows.append((decode, f"{before.speed.decode_tokens_per_second:,.1f}", f"{after.speed.decode_tokens_per_second:,.1f}"))
    if before.peak_memory_bytes and after.peak_memory_bytes:
        rows.append(("Peak memory, bytes (anonymous)", f"{before.peak_memory_bytes:,}", f"{after.peak_memory_bytes:,}"))
    return rows


def _recovery(report: Report) -> list[str]:
    """What training brought back."""
    recovered = report.recovery
    if report.recipe.recovery is None or recovered is None:
        return []
    told = (
        f"After pruning, {recovered.trained_parameters:,} parameters ({recovered.trained_share:.3%} of those in training) were trained with "
        f"`{report.recipe.recovery.name}` for {recovered.steps:,} steps on {recovered.tokens:,} tokens."
    )
    if recovered.held_out_loss_before is not None:
        told += f" The loss on held-out text went from {recovered.held_out_loss_before:.4f} to {recovered.held_out_loss_after:.4f}."
    if report.pruned is not None and report.pruned.perplexity is not None:
        told += f" Before it, the pruned model's perplexity was {report.pruned.perplexity.value:.4g}."
    return ["## Recovery", "", told, ""]


def _how_to_load(report: Report, padded: bool) -> list[str]:
    per_layer = (
        report.recipe.output.layout == "per_layer"
        and not padded
        and len({(layer.ffn_channels, layer.kv_groups) for layer in report.layers if not layer.dropped}) > 1
    )
    code = [
        "```python",
        *(["import espalier.loader  # pip install espalier; builds each layer at its own width"] if per_layer else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        "```",
    ]
    if per_layer:
        code += [
            "",
            "Layers have different sizes (`per_layer_config` in config.json). Without the import `from_pretrained` stops with an error.",
            "**Never pass `ignore_mismatched_sizes=True`: it replaces the weights of most layers by random ones and says so only in the log.**",
        ]
    if report.model_type in ("llama", "mistral"):
        code += ["", 'For llama.cpp: `pip install "espalier[gguf]"`, then `espalier gguf THIS_FOLDER model.gguf`.']
    if padded:
        code += ["", "This is the per-layer checkpoint with its layers filled up to the widest by zero channels: the same function at the widest layer's cost."]
    return code


def _layer_sizes(layers: list[LayerReport]) -> str:
    """What stays of each layer, e.g. "1229 channels and 2 KV groups"."""

    def size(layer: LayerReport) -> str:
        parts = [f"{layer.ffn_channels} channels", f"{layer.kv_groups} KV groups"]
        return "dropped" if layer.dropped else " and ".join(parts if layer.experts is None else [*parts, f"{layer.experts} experts"])

    if len({size(layer) for layer in layers}) == 1:
        return f"{len(layers)} × {size(layers[0])}"
    return "; ".join(f"{layer.index}: {size(layer)}" for layer in layers)


def _origin(report: Report) -> list[str]:
    recipe = report.recipe.model_dump(mode="json")
    evaluation = report.after and report.after.perplexity
    return [
        "The recipe, which is also the body of `POST /v1/jobs` of an Espalier service:",
        "",
        "```json",
        json.dumps(recipe, indent=2, ensure_ascii=False),
        "```",
        "",
        "Saved as `recipe.json`, it makes the same checkpoint again, bit for bit on the same kind of machine:",
        "",
        "```sh",
        "python -m worker.pipeline recipe.json SOURCE_FOLDER OUT_FOLDER",
        "```",
        "",
        f"- Source model: {report.model_type}, fingerprint `{report.model_fingerprint}`",
        *([f"- Calibration text: {_provenance(report.calibration)}"] if report.calibration else []),
        *([f"- Text of the recovery: {_provenance(report.recovery.text)}"] if report.recovery else []),
        *([f"- Evaluation text: {_provenance(evaluation.text)}"] if evaluation else []),
        f"- What stays by layer: {_layer_sizes(report.layers)}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in report.versions.items())}",
        *[f"- {note}" for note in report.notes],
    ]


def _provenance(text: TextUsed) -> str:
    start = "with" if text.bos_added else "without"
    return f"`{text.source}`, sha256 `{text.sha256}`, {text.used_tokens:,} of {text.tokens:,} tokens, {start} a begin-of-sequence token"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]
