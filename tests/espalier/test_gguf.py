"""GGUF files, read back with the gguf package and, where it knows the architecture, with transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from typer.testing import CliRunner

import espalier.cli
from espalier.commands import files
from espalier.commands.common import FAILED
from espalier.gguf import LLAMA3_SPLIT, GgufError, export, llama3_divisors
from tests.espalier.test_loader import GROUPS, WIDTHS, per_layer_heads
from tests.models import load_model, make_checkpoint, make_tokenizer, write_json

TOKENS = torch.arange(3, 33)[None]
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def metadata(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def tensors(file: Path) -> dict[str, tuple[str, Tensor]]:
    """Type and value by name."""
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        raw = torch.frombuffer(bytearray(tensor.data.tobytes()), dtype=kinds[tensor.tensor_type.name])
        found[tensor.name] = tensor.tensor_type.name, raw.reshape(tuple(int(extent) for extent in reversed(tensor.shape)))
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor."""
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, _, kind = name.rpartition(".")
    if module in outer:
        return f"{outer[module]}.{kind}"
    index, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{BLOCK[part]}.{kind}"


def in_transformers_order(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k put back: the pair (2i, 2i + 1) of a head was (i, i + h/2)."""
    restored = tensor.clone()
    for start in range(0, len(tensor), head_dim):
        for pair in range(head_dim // 2):
            restored[start + pair] = tensor[start + 2 * pair]
            restored[start + head_dim // 2 + pair] = tensor[start + 2 * pair + 1]
    return restored


def assert_same_weights(file: Path, folder: Path, head_dim: int) -> None:
    """Every tensor of the file is the folder's, widened at most, and every one of the folder is there."""
    found, source = tensors(file), weights(folder)
    assert found.keys() == {gguf_name(name) for name in source}
    for name, weight in source.items():
        kind, value = found[gguf_name(name)]
        assert kind == "F32" if weight.ndim == 1 else kind == {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[weight.dtype]
        if "q_proj" in name or "k_proj" in name:
            value = in_transformers_order(value, head_dim)
        assert torch.equal(value, weight.to(value.dtype)), name


def change(folder: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads((folder / name).read_text(encoding="utf-8"))
    edit(value)
    write_json(folder / name, value)


# --------------------------------------------------------------------- layouts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_uniform_checkpoint_becomes_a_llama_that_transformers_reads_back(tmp_path: Path, model_type: str, tied: bool) -> None:
    folder, file = make_checkpoint(tmp_path / "model", model_type, tied=tied), tmp_path / "model.gguf"
    exported = export(folder, file)
    assert exported == ("llama", "gpt-2", 3 + 9 * 3 - tied, file.stat().st_size)
    assert_same_weights(file, folder, head_dim=8)
    assert {name: value for name, value in metadata(file).items() if not name.startswith(("GGUF", "tokenizer"))} == {
        "general.architecture": "llama",
        "general.name": "model",
        "general.file_type": gguf.LlamaFileType.ALL_F32,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.attention.value_length": 8,
        "llama.block_count": 3,
        "llama.context_length": 2048,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 48,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 320,
    }
    with torch.no_grad():
        expected = load_model(folder)(TOKENS).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)(TOKENS).logits
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_layers_of_different_sizes_become_a_deci_with_arrays(tmp_path: Path, model_type: str) -> None:
    folder, file = per_layer_heads(tmp_path, model_type), tmp_path / "model.gguf"
    assert export(folder, file).architecture == "deci"
    assert_same_weights(file, folder, head_dim=4)
    found = metadata(file)
    assert found["deci.attention.head_count"] == [2 * groups for groups in GROUPS]
    assert found["deci.attention.head_count_kv"] == GROUPS
    assert found["deci.feed_forward_length"] == WIDTHS
    assert (found["deci.attention.key_length"], found["deci.attention.value_length"], found["deci.rope.dimension_count"]) == (4, 4, 4)
    assert not any(name.startswith("llama.") for name in found)


def test_biases_are_kept_and_ordered_as_their_weights(tmp_path: Path) -> None:
    folder, file = make_checkpoint(tmp_path / "model", "llama"), tmp_path / "model.gguf"
    change(folder, "config.json", lambda config: config.update(attention_bias=True, mlp_bias=True))
    stored = load_file(folder / "model.safetensors")
    biases = {name.replace(".weight", ".bias"): torch.randn(len(weight)) for name, weight in stored.items() if "_proj" in name}
    save_file(stored | biases, folder / "model.safetensors", {"format": "pt"})
    export(folder, file)
    assert_same_weights(file, folder, head_dim=8)
    assert sum(name.endswith(".bias") for name in tensors(file)) == 3 * 7


def test_shards_make_the_same_file_as_one(tmp_path: Path) -> None:
    for name, size in (("one", None), ("many", 20000)):
        make_checkpoint(tmp_path / name / "model", "llama", max_shard_size=size)
        export(tmp_path / name / "model", tmp_path / f"{name}.gguf")
    assert len(list((tmp_path / "many" / "model").glob("*.safetensors"))) > 2
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "many.gguf").read_bytes()


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_matrices_keep_their_type_unless_told_otherwise(tmp_path: Path, source: torch.dtype) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", dtype=source)
    export(folder, tmp_path / "model.gguf")
    assert_same_weights(tmp_path / "model.gguf", folder, head_dim=8)
    down = weights(folder)["model.layers.1.mlp.down_proj.weight"]
    file_types = {"F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16, "BF16": gguf.LlamaFileType.MOSTLY_BF16}
    for asked, dtype in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        export(folder, tmp_path / "cast.gguf", asked)  # type: ignore[arg-type]
        found = tensors(tmp_path / "cast.gguf")
        assert found["blk.1.ffn_down.weight"][0] == asked
        assert torch.equal(found["blk.1.ffn_down.weight"][1], down.to(dtype))
        assert {kind for name, (kind, _) in found.items() if "norm" in name} == {"F32"}
        assert metadata(tmp_path / "cast.gguf")["general.file_type"] == file_types[asked]


def test_what_is_too_large_for_f16_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.2.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(GgufError, match=r"model\.layers\.2\.mlp\.up_proj\.weight .* 65504.* BF16"):
        export(folder, tmp_path / "model.gguf", "F16")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    export(folder, tmp_path / "model.gguf", "BF16")


# ------------------------------------------------------------------------ RoPE


def test_llama3_divisors_are_those_of_transformers() -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=1024, rope_parameters=LLAMA3_ROPE)
    scaled, attention = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / LLAMA3_ROPE["rope_theta"] ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)  # type: ignore[operator]
    expected = plain / scaled.double()
    assert attention == 1.0
    assert {1.0, 8.0} < set(expected.float().round(decimals=4).tolist())
    assert torch.allclose(torch.from_numpy(llama3_divisors(LLAMA3_ROPE, 64)).double(), expected, rtol=1e-6)


def test_rope_scaling_is_written(tmp_path: Path) -> None:
    folder, file = make_checkpoint(tmp_path / "model", "llama"), tmp_path / "model.gguf"
    change(folder, "config.json", lambda config: config.update(rope_parameters=LLAMA3_ROPE))
    export(folder, file)
    kind, found = tensors(file)["rope_freqs.weight"]
    assert kind == "F32"
    assert np.array_equal(found.numpy(), llama3_divisors(LLAMA3_ROPE, 8))
    assert metadata(file)["llama.rope.freq_base"] == 500000.0

    def as_before_transformers_5(config: dict[str, Any]) -> None:
        del config["rope_parameters"]
        config.update(rope_theta=20000.0, rope_scaling={"type": "linear", "factor": 4.0})

    change(folder, "config.json", as_before_transformers_5)
    export(folder, file)
    written = metadata(file)
    assert (written["llama.rope.freq_base"], written["llama.rope.scaling.type"], written["llama.rope.scaling.factor"]) == (20000.0, "linear", 4.0)
    assert "rope_freqs.weight" not in tensors(file)


# ------------------------------------------------------------------- tokenizer


def test_the_tokenizer_is_in_the_file(tmp_path: Path) -> None:
    folder, file = make_checkpoint(tmp_path / "model", "llama", vocab=330), tmp_path / "model.gguf"
    make_tokenizer(folder, 320)

    def with_added_tokens(tokenizer: dict[str, Any]) -> None:
        for token_id, content, special in ((320, "<word>", False), (321, "<end>", True)):
            tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": token_id, "content": content, "special": special})

    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(tokenizer["model"]["vocab"]) == 320
    change(folder, "tokenizer.json", with_added_tokens)
    export(folder, file)
    found = metadata(file)
    plain: Any = AutoTokenizer.from_pretrained(folder)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 330
    assert {token: token_id for token_id, token in enumerate(tokens) if types[token_id] != gguf.TokenType.UNUSED} == plain.get_vocab()
    assert [token_id for token_id, kind in enumerate(types) if kind == gguf.TokenType.CONTROL] == [0, 1, 2, 321]
    assert [token_id for token_id, kind in enumerate(types) if kind == gguf.TokenType.USER_DEFINED] == [320]
    assert [tokens[token_id] for token_id, kind in enumerate(types) if kind == gguf.TokenType.UNUSED] == [f"[PAD{token_id}]" for token_id in range(322, 330)]
    assert found["tokenizer.ggml.merges"] == [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)
    assert found["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert "tokenizer.ggml.padding_token_id" not in found


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        ([BYTES], False, "gpt-2"),
        ([DIGITS, BYTES | {"use_regex": True}], False, "smollm"),
        ([SPLIT, BYTES | {"use_regex": False}], True, "llama-bpe"),
    ],
)
def test_pre_tokenizers_are_known_by_what_they_do(tmp_path: Path, steps: list[dict[str, Any]], ignore_merges: bool, name: str) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")

    def edit(tokenizer: dict[str, Any]) -> None:
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        tokenizer["model"]["ignore_merges"] = ignore_merges
        tokenizer["post_processor"] = {"type": "Sequence", "processors": [BYTES, tokenizer["post_processor"]]}

    change(folder, "tokenizer.json", edit)
    assert export(folder, tmp_path / "model.gguf").pre_tokenizer == name
    assert metadata(tmp_path / "model.gguf")["tokenizer.ggml.pre"] == name
    assert metadata(tmp_path / "model.gguf")["tokenizer.ggml.add_bos_token"] is True
    change(folder, "tokenizer.json", lambda tokenizer: tokenizer["model"].update(ignore_merges=not ignore_merges))
    with pytest.raises(GgufError, match="which has no name"):
        export(folder, tmp_path / "model.gguf")


# -------------------------------------------------------------------- refusals


def set_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder, "config.json", lambda config: config.update(values))


def edit_tokenizer(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    return lambda folder: change(folder, "tokenizer.json", edit)


def edit_weights(edit: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        edit(stored)
        save_file(stored, folder / "model.safetensors", {"format": "pt"})

    return apply


def cut_short(folder: Path) -> None:
    stored = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(stored[:-8])


NO_BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "</s>"}}, {"Sequence": {"id": "A"}}],
    "special_tokens": {"</s>": {"tokens": ["</s>"]}},
}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (set_config(model_type="qwen2"), "a qwen2 model; only llama and mistral"),
        (set_config(quantization_config={"quant_method": "gptq"}), "quantized"),
        (set_config(rms_norm_eps=None), "doesn't say rms_norm_eps"),
        (set_config(hidden_act="gelu"), "activation gelu"),
        (set_config(model_type="mistral", sliding_window=512), "last 512 positions of up to 2048.*Set max_position_embeddings to 512"),
        (set_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}), "type yarn"),
        (set_config(per_layer_config={"01": {"skip": ["mlp"]}}), "layer 1 its own skip"),
        (set_config(attention_bias=True), "lacks the tensors model.layers.0.self_attn.k_proj.bias"),
        (
            edit_weights(lambda stored: stored.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(32)})),
            "doesn't speak of: model.layers.1.self_attn.q_proj.bias",
        ),
        (edit_weights(lambda stored: stored.update({"model.norm.weight": torch.zeros(31)})), r"model.norm.weight .* shape \(31,\); config.json says \(32,\)"),
        (edit_weights(lambda stored: stored.update({"model.norm.weight": torch.zeros(32).double()})), "stored as F64"),
        (cut_short, "model.safetensors of 'model' are cut short"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors.index.json of 'model' can't be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json of 'model' can't be read"),
        (edit_tokenizer(lambda tokenizer: tokenizer["model"].update(byte_fallback=True)), "no byte-level BPE"),
        (edit_tokenizer(lambda tokenizer: tokenizer.update(normalizer={"type": "NFC"})), "without a normalizer"),
        (edit_tokenizer(lambda tokenizer: tokenizer.update(pre_tokenizer={"type": "Whitespace"})), "Whitespace.*Known are gpt-2, smollm, llama-bpe"),
        (edit_tokenizer(lambda tokenizer: tokenizer["added_tokens"][2].update(lstrip=True)), r"'<\|endoftext\|>' of 'model' takes the spaces"),
        (edit_tokenizer(lambda tokenizer: tokenizer["added_tokens"][2].update(id=321, content="<late>")), "ids .* have gaps"),
        (edit_tokenizer(lambda tokenizer: tokenizer["added_tokens"][2].update(id=320, content="<more>")), "321 tokens, and the model only 320 embeddings"),
        (edit_tokenizer(lambda tokenizer: tokenizer.update(post_processor=NO_BOS)), r"puts \['</s>'\] before"),
        (edit_tokenizer(lambda tokenizer: tokenizer.update(post_processor={"type": "BertProcessing"})), "BertProcessing"),
    ],
)
def test_what_can_not_be_exact_is_refused(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    spoil(folder)
    with pytest.raises(GgufError, match=message):
        export(folder, tmp_path / "model.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


# --------------------------------------------------------------------- command


def test_the_command_writes_the_file_and_says_what_it_is(tmp_path: Path) -> None:
    folder, file = make_checkpoint(tmp_path / "model", "llama"), tmp_path / "model.gguf"
    ended = CliRunner().invoke(espalier.cli.app, ["gguf", str(folder), str(file), "--dtype", "bf16", "--json"])
    assert ended.exit_code == 0, ended.output
    assert json.loads(ended.output) == {"architecture": "llama", "pre_tokenizer": "gpt-2", "tensors": 30, "bytes": file.stat().st_size}
    assert tensors(file)["token_embd.weight"][0] == "BF16"
    ended = CliRunner().invoke(espalier.cli.app, ["gguf", str(folder), str(file)])
    assert "model.gguf: architecture llama, pre-tokenizer gpt-2, 30 tensors" in ended.output


def test_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["espalier", "gguf", str(tmp_path), str(tmp_path / "model.gguf")])
    with pytest.raises(SystemExit) as ended:
        espalier.cli.main()
    assert ended.value.code == FAILED
    assert "pip install 'espalier[gguf]'" in capsys.readouterr().err
