"""A checkpoint folder as one GGUF file for llama.cpp: every weight as it is, none approximated.

Layers of one size become llama.cpp's architecture `llama`; where `per_layer_config` gives them widths or heads of their own, `deci`, which computes the same from
arrays of sizes. Names, shapes and the order of q's and k's rows are those of llama.cpp's convert_hf_to_gguf.py (2026). Departures: what llama.cpp would compute
otherwise than transformers is refused instead of passed over, and a pre-tokenizer is known by what tokenizer.json says of it, not by a hash of known vocabularies.

Shapes: D hidden, H heads, K KV heads, h head size, I MLP channels, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Stored
from gguf.utility import LocalTensor, SafetensorsLocal
from numpy.typing import NDArray

from espalier.errors import ClientError

# How matrices are stored; `source`: as in the checkpoint. Norms and biases become F32, as llama.cpp needs them, which loses nothing.
Dtype = Literal["source", "F32", "F16", "BF16"]

STORED = {"F32": Stored.F32, "F16": Stored.F16, "BF16": Stored.BF16}
ITEM_BYTES = {Stored.F32: 4, Stored.F16: 2, Stored.BF16: 2}
FILE_TYPES = {Stored.F32: gguf.LlamaFileType.ALL_F32, Stored.F16: gguf.LlamaFileType.MOSTLY_F16, Stored.BF16: gguf.LlamaFileType.MOSTLY_BF16}
SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")

GPT2_STEP = ("ByteLevel", False, True)
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's name of a pre-tokenizer, by its steps and by whether a word that is a token is taken without merging.
PRE_TOKENIZERS: dict[tuple[tuple[Any, ...], bool], str] = {
    ((GPT2_STEP,), False): "gpt-2",
    ((("Digits", True), GPT2_STEP), False): "smollm",
    ((("Split", LLAMA3_SPLIT, "Isolated", False), ("ByteLevel", False, False)), True): "llama-bpe",
}


class GgufError(ClientError):
    """The checkpoint can't become a GGUF file that computes the same; says what, where and what to do."""


class Exported(NamedTuple):
    architecture: str  # llama.cpp's name
    pre_tokenizer: str  # llama.cpp's name
    tensors: int
    bytes: int


class Entry(NamedTuple):
    """A tensor of the GGUF file; `read` fetches it when it is written, so that one at a time is in memory."""

    name: str
    shape: tuple[int, ...]
    stored: Stored
    read: Callable[[], NDArray[Any]]


def export(folder: Path, out: Path, dtype: Dtype = "source") -> Exported:
    """Write the llama or mistral checkpoint in `folder` to the file `out`, whole or not at all. Raises GgufError where that can't be exact."""
    config = _read_config(folder)
    layers = _layer_sizes(config)
    architecture = gguf.MODEL_ARCH.LLAMA if all(sizes == layers[0] for sizes in layers) else gguf.MODEL_ARCH.DECI
    names = gguf.get_tensor_name_map(architecture, len(layers))
    entries = [*_rope_entry(config), *_weight_entries(folder, config, layers, names, dtype)]
    part = out.with_name(f".{out.name}.part")
    writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(folder.resolve().name)
    _add_sizes(writer, config, layers)
    _add_rope(writer, config)
    _add_file_type(writer, entries)
    pre_tokenizer = _add_tokenizer(writer, folder, config)
    try:
        _write(writer, entries)
        writer.close()
        part.rename(out)
    finally:
        writer.close()
        part.unlink(missing_ok=True)
    return Exported(gguf.MODEL_ARCH_NAMES[architecture], pre_tokenizer, len(entries), out.stat().st_size)


def _write(writer: gguf.GGUFWriter, entries: list[Entry]) -> None:
    for entry in entries:
        nbytes = math.prod(entry.shape) * ITEM_BYTES[entry.stored]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), nbytes, raw_dtype=entry.stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(entry.read())


# -------------------------------------------------------------------- config


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json, if llama.cpp computes what it says."""
    config = _read_json(folder / "config.json")
    model_type = config.get("model_type")
    if model_type not in ("llama", "mistral"):
        raise GgufError(f"'{folder.name}' is a {model_type} model; only llama and mistral are exported. llama.cpp's convert_hf_to_gguf.py knows more types.")
    if config.get("quantization_config"):
        raise GgufError(f"'{folder.name}' is quantized. Export the unquantized model and quantize the GGUF file with llama-quantize.")
    needed = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", *SIZES)
    missing = [name for name in needed if config.get(name) is None]
    if missing:
        raise GgufError(f"config.json of '{folder.name}' doesn't say {', '.join(missing)}. Save the model again with save_pretrained.")
    if config["hidden_act"] != "silu":
        raise GgufError(f"'{folder.name}' has the activation {config['hidden_act']}; llama.cpp computes silu for this architecture.")
    window = config.get("sliding_window", 4096) if model_type == "mistral" else None  # absent: MistralConfig's default
    if window is not None and window < config["max_position_embeddings"]:
        raise GgufError(
            f"'{folder.name}' attends to the last {window} positions of up to {config['max_position_embeddings']}; llama.cpp would attend to all of them. "
            f"Set max_position_embeddings to {window} in config.json: up to there both are the same."
        )
    return config


def _layer_sizes(config: dict[str, Any]) -> list[dict[str, int]]:
    """SIZES by layer: the global ones, and what `per_layer_config` says otherwise."""
    layers = [{name: config[name] for name in SIZES} for _ in range(config["num_hidden_layers"])]
    for index, sizes in (config.get("per_layer_config") or {}).items():
        unknown = sizes.keys() - set(SIZES)
        if unknown:
            raise GgufError(f"config.json gives layer {int(index)} its own {', '.join(sorted(unknown))}; only {', '.join(SIZES)} may differ in a GGUF file.")
        layers[int(index)] |= sizes
    return layers


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any], layers: list[dict[str, int]]) -> None:
    differ = any(sizes != layers[0] for sizes in layers)
    heads, kv_heads, width = ([sizes[name] for sizes in layers] if differ else layers[0][name] for name in SIZES)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_feed_forward_length(width)
    writer.add_block_count(len(layers))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))


# ---------------------------------------------------------------------- RoPE


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE's parameters, as transformers 5 or as earlier versions state them, with type and base."""
    stated = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)} | (config.get("rope_scaling") or {})
    return {"rope_theta": 10000.0} | stated | {"rope_type": stated.get("rope_type") or stated.get("type") or "default"}


def _add_rope(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise GgufError(
            f"config.json asks for RoPE of the type {rope['rope_type']}, or of a part of a head; exported are default, linear and llama3, whole heads."
        )
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope_entry(config: dict[str, Any]) -> Iterator[Entry]:
    rope = _rope(config)
    if rope["rope_type"] == "llama3":
        divisors = llama3_divisors(rope, _head_dim(config))
        yield Entry("rope_freqs.weight", divisors.shape, Stored.F32, lambda: divisors)


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> NDArray[np.float32]:
    """What each of RoPE's frequencies is divided by, (h/2), as in transformers' `_compute_llama3_parameters` (Llama 3.1).

    Waves longer than the original context over `low_freq_factor` are stretched by `factor`, those shorter than it over `high_freq_factor` are not, and the
    frequencies between are interpolated.
    """
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)  # (h/2), positions
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((rope["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - kept) / rope["factor"] + kept), np.float32)


# ------------------------------------------------------------------- weights


def _weight_entries(folder: Path, config: dict[str, Any], layers: list[dict[str, int]], names: gguf.TensorNameMap, dtype: Dtype) -> Iterator[Entry]:
    """The checkpoint's tensors in the order of the computation; refuses a folder that holds others than config.json promises."""
    found = _read_headers(folder)
    promised = list(_promised(config, layers))
    extra = found.keys() - {name for name, _, _ in promised} - ({"lm_head.weight"} if config.get("tie_word_embeddings") else set())
    if extra:
        raise GgufError(f"'{folder.name}' holds tensors that config.json doesn't speak of: {_some(extra)}. llama.cpp has no place for them.")
    missing = {name for name, _, _ in promised} - found.keys()
    if missing:
        raise GgufError(f"'{folder.name}' lacks the tensors {_some(missing)}. Complete the download, or save the model again.")
    for name, shape, heads in promised:
        tensor = found[name]
        if tensor.shape != shape:
            raise GgufError(f"{name} of '{folder.name}' has the shape {tensor.shape}; config.json says {shape}. Save the model again.")
        if tensor.dtype not in STORED:
            raise GgufError(f"{name} of '{folder.name}' is stored as {tensor.dtype}; exported are {', '.join(STORED)}. Save the model in one of these.")
        stored = Stored.F32 if len(shape) == 1 else STORED[tensor.dtype if dtype == "source" else dtype]
        yield Entry(str(names.get_name(name, try_suffixes=(".weight", ".bias"))), shape, stored, partial(_read, name, tensor, heads, stored))


def _promised(config: dict[str, Any], layers: list[dict[str, int]]) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Name, shape, and for q and k the number of heads, of every tensor that config.json promises."""
    hidden, head_dim = config["hidden_size"], _head_dim(config)
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden), None
    for index, sizes in enumerate(layers):
        heads, kv_heads, width = (sizes[name] for name in SIZES)
        block = f"model.layers.{index}"
        yield f"{block}.input_layernorm.weight", (hidden,), None
        for name, outputs, inputs, permuted, bias in (
            ("self_attn.q_proj", heads * head_dim, hidden, heads, "attention_bias"),
            ("self_attn.k_proj", kv_heads * head_dim, hidden, kv_heads, "attention_bias"),
            ("self_attn.v_proj", kv_heads * head_dim, hidden, None, "attention_bias"),
            ("self_attn.o_proj", hidden, heads * head_dim, None, "attention_bias"),
            ("mlp.gate_proj", width, hidden, None, "mlp_bias"),
            ("mlp.up_proj", width, hidden, None, "mlp_bias"),
            ("mlp.down_proj", hidden, width, None, "mlp_bias"),
        ):
            yield f"{block}.{name}.weight", (outputs, inputs), permuted
            if config.get(bias) and config["model_type"] == "llama":  # Mistral has no biases, whatever its config says
                yield f"{block}.{name}.bias", (outputs,), permuted
        yield f"{block}.post_attention_layernorm.weight", (hidden,), None
    yield "model.norm.weight", (hidden,), None
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (config["vocab_size"], hidden), None


def _read_headers(folder: Path) -> dict[str, LocalTensor]:
    """The tensors of the files that transformers would read."""
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        weight_map = _read_json(folder / "model.safetensors.index.json")["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    try:
        tensors = {name: tensor for file in files for name, tensor in SafetensorsLocal(file).tensors.items()}
        ends = [(tensor.data_range.offset + tensor.data_range.size, tensor.data_range.filename) for tensor in tensors.values()]
        cut = {file.name for end, file in ends if end > file.stat().st_size}
    except (OSError, ValueError, KeyError) as error:
        raise GgufError(f"The weights of '{folder.name}' can't be read: {error}. Complete the download.") from error
    if cut:
        raise GgufError(f"The weight files {_some(cut)} of '{folder.name}' are cut short. Complete the download.")
    return tensors


def _read(name: str, tensor: LocalTensor, heads: int | None, stored: Stored) -> NDArray[Any]:
    """A tensor as it is stored in the GGUF file; a cast rounds to the nearest and refuses what is too large."""
    source = STORED[tensor.dtype]
    weight = tensor.mmap_bytes().view("<u4" if source is Stored.F32 else "<u2").reshape(tensor.shape)
    if heads is not None:
        weight = interleave_rope(weight, heads)
    if source is stored:
        return weight
    wide = gguf.dequantize(weight.view(np.uint8), source).reshape(tensor.shape)
    with np.errstate(over="ignore"):
        cast = gguf.quantize(wide, stored)
    if stored is Stored.F16 and not np.isfinite(cast[np.isfinite(wide)]).all():
        raise GgufError(f"{name} has values beyond F16's largest, {np.finfo(np.float16).max}. Export as BF16 or F32.")
    return cast


def interleave_rope(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of q or k, (heads·h, …), from transformers' order, in which RoPE turns row i of a head with row i + h/2, to llama.cpp's: 2i with 2i + 1."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _add_file_type(writer: gguf.GGUFWriter, entries: list[Entry]) -> None:
    """The type that most weights are stored as."""
    weights = Counter[Stored]()
    for entry in entries:
        weights[entry.stored] += math.prod(entry.shape)
    writer.add_file_type(FILE_TYPES[weights.most_common(1)[0][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


# ----------------------------------------------------------------- tokenizer


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> str:
    """Tokens, types, merges, special ids and chat template of a byte-level BPE. Returns llama.cpp's name of its pre-tokenizer."""
    tokenizer, settings = _read_json(folder / "tokenizer.json"), _read_json(folder / "tokenizer_config.json")
    pre_tokenizer = _name_pre_tokenizer(folder, tokenizer)
    tokens, types = _tokens(folder, tokenizer, config["vocab_size"])
    special = {kind: _special_token(settings, kind) for kind in ("bos", "eos", "unk", "pad")}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]])
    for kind, token in special.items():
        token_id = tokens.index(token) if token in tokens else config.get(f"{kind}_token_id")
        if isinstance(token_id, int):
            getattr(writer, f"add_{kind}_token_id")(token_id)
    before, after = _added_around(tokenizer.get("post_processor"))
    if not (before in ([], [special["bos"]]) and after in ([], [special["eos"]])):
        raise GgufError(f"The tokenizer of '{folder.name}' puts {before} before a text and {after} after it; llama.cpp can put BOS before and EOS after.")
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if chat:
        writer.add_chat_template(chat)
    return pre_tokenizer


def _name_pre_tokenizer(folder: Path, tokenizer: dict[str, Any]) -> str:
    model = tokenizer["model"]
    byte_level = model["type"] == "BPE" and not model.get("byte_fallback") and (tokenizer.get("decoder") or {}).get("type") == "ByteLevel"
    if not byte_level or tokenizer.get("normalizer") or model.get("dropout"):
        raise GgufError(
            f"The tokenizer of '{folder.name}' is no byte-level BPE without a normalizer. Convert it with llama.cpp's convert_hf_to_gguf.py, "
            "which knows SentencePiece and others: the padded or uniform result of a job is an ordinary checkpoint."
        )
    steps = _pre_tokenizer_steps(tokenizer.get("pre_tokenizer"))
    name = PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        raise GgufError(
            f"The pre-tokenizer of '{folder.name}' is {steps}, which has no name in llama.cpp known here. Known are {', '.join(PRE_TOKENIZERS.values())}. "
            "llama.cpp's convert_hf_to_gguf.py knows more."
        )
    return name


def _pre_tokenizer_steps(stated: dict[str, Any] | None) -> tuple[Any, ...]:
    """The steps of tokenizer.json's pre-tokenizer, each its type and what it does; offsets don't count."""
    if stated is None:
        return ()
    if stated["type"] == "Sequence":
        return tuple(step for part in stated["pretokenizers"] for step in _pre_tokenizer_steps(part))
    if stated["type"] == "ByteLevel":
        return (("ByteLevel", stated["add_prefix_space"], stated.get("use_regex", True)),)
    if stated["type"] == "Digits":
        return (("Digits", stated["individual_digits"]),)
    if stated["type"] == "Split":
        return (("Split", stated["pattern"].get("Regex"), stated["behavior"], stated["invert"]),)
    return ((stated["type"],),)


def _tokens(folder: Path, tokenizer: dict[str, Any], vocab: int) -> tuple[list[str], list[int]]:
    """Token and type by id, (V); embeddings after the last token are named and marked as unused."""
    ids: dict[str, int] = dict(tokenizer["model"]["vocab"])
    types: dict[int, int] = dict.fromkeys(ids.values(), gguf.TokenType.NORMAL)
    for added in tokenizer.get("added_tokens") or ():
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise GgufError(f"The token {added['content']!r} of '{folder.name}' takes the spaces around it, or whole words only; llama.cpp can't do that.")
        ids[added["content"]] = added["id"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if sorted(types) != list(range(len(types))):
        raise GgufError(f"The ids of the tokenizer of '{folder.name}' have gaps, and the tokenizers library would number them anew. Save the tokenizer again.")
    if len(types) > vocab:
        raise GgufError(f"The tokenizer of '{folder.name}' has {len(types)} tokens, and the model only {vocab} embeddings. Resize the embedding.")
    tokens = sorted(ids, key=lambda token: ids[token])
    unused = range(len(tokens), vocab)
    return tokens + [f"[PAD{index}]" for index in unused], [types[ids[token]] for token in tokens] + [gguf.TokenType.UNUSED for _ in unused]


def _special_token(settings: dict[str, Any], kind: str) -> str | None:
    token = settings.get(f"{kind}_token")
    return token["content"] if isinstance(token, dict) else token


def _added_around(processor: dict[str, Any] | None) -> tuple[list[str], list[str]]:
    """The tokens that tokenizer.json's post-processor puts before and after a text."""
    if processor is None or processor["type"] == "ByteLevel":  # the latter changes offsets only
        return [], []
    if processor["type"] == "Sequence":
        parts = [_added_around(part) for part in processor["processors"]]
        return [token for before, _ in reversed(parts) for token in before], [token for _, after in parts for token in after]
    if processor["type"] != "TemplateProcessing":
        raise GgufError(f"The tokenizer's post-processor is {processor['type']}, which llama.cpp can't do. Known are ByteLevel and TemplateProcessing.")
    around: tuple[list[str], list[str]] = ([], [])
    side = 0
    for piece in processor["single"]:
        if "Sequence" in piece:
            side = 1
        else:
            around[side].extend(processor["special_tokens"][piece["SpecialToken"]["id"]]["tokens"])
    return around


# --------------------------------------------------------------------- files


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise GgufError(f"{file.name} of '{file.parent.name}' can't be read: {why}. Give the folder of a whole checkpoint.") from None
    if not isinstance(value, dict):
        raise GgufError(f"{file.name} of '{file.parent.name}' is not a JSON object. Download or save the model again.")
    return value


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
