"""Checkpoint folders that can't be pruned are refused with a stable code before anything is computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.architecture import ARCHITECTURES
from app.exceptions import RecipeError
from app.recipe import Recipe
from app.source import check_recipe, read_header, read_source
from tests.models import make_checkpoint, write_json

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("whole"), "llama", layers=2)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("sharded"), "llama", layers=2, max_shard_size=40_000)


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write_json(path, value)


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a safetensors header and leave the data as it is."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + raw[8 + length :])


def refusal(folder: Path) -> RecipeError:
    with pytest.raises(RecipeError) as refused:
        read_source(folder)
    assert refused.value.pointer == "/model"
    assert refused.value.hint
    assert str(folder.parent) not in refused.value.message
    return refused.value


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_whole_folders_pass(tmp_path: Path, model_type: str, tied: bool) -> None:
    source = read_source(make_checkpoint(tmp_path, model_type, tied=tied))
    assert source.model_type == model_type
    assert source.weight_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert (ARCHITECTURES[model_type].head in source.tensors) is not tied


def test_entries_locate_the_stored_bytes(sharded: Path) -> None:
    source = read_source(sharded)
    assert len({entry.file for entry in source.tensors.values()}) > 2
    for name, entry in source.tensors.items():
        stored = load_file(entry.file)[name]
        assert entry.shape == tuple(stored.shape)
        assert entry.file.read_bytes()[entry.begin : entry.end] == stored.numpy().tobytes()


def set_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(values))


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def remove(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def config_is_a_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (remove("config.json"), "config_missing"),
    "config is a folder": (config_is_a_folder, "config_missing"),
    "config is no JSON": (text("config.json", "{"), "config_invalid"),
    "config is no object": (text("config.json", "[1]"), "config_invalid"),
    "config nested too deep": (text("config.json", "[" * 200_000), "config_invalid"),
    "config is not UTF-8": (lambda folder: (folder / "config.json").write_bytes(b'{"model_type": "\xff"}'), "config_invalid"),
    "own code": (set_config(auto_map={"AutoModelForCausalLM": "modeling.Mine"}), "auto_map"),
    "own tokenizer code": (
        lambda folder: edit_json(folder / "tokenizer_config.json", lambda settings: settings.update(auto_map={"AutoTokenizer": ["mine.Mine", None]})),
        "auto_map",
    ),
    "tokenizer config broken": (text("tokenizer_config.json", "{"), "tokenizer_invalid"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer_missing"),
    "quantized": (set_config(quantization_config={"quant_method": "gptq"}), "quantized_model"),
    "unknown type": (set_config(model_type="mamba"), "unsupported_model_type"),
    "type of a wrong type": (set_config(model_type=["llama"]), "unsupported_model_type"),
    "no width": (lambda folder: edit_json(folder / "config.json", lambda config: config.pop("intermediate_size")), "config_invalid"),
    "width as a string": (set_config(hidden_size="32"), "config_invalid"),
    "width true": (set_config(hidden_size=True), "config_invalid"),
    "no layers": (set_config(num_hidden_layers=0), "config_invalid"),
    "head_dim as a string": (set_config(head_dim="8"), "config_invalid"),
    "negative KV heads": (set_config(num_key_value_heads=-1), "config_invalid"),
    "KV heads that share no heads evenly": (set_config(num_key_value_heads=3), "config_invalid"),
    "layers of their own as a list": (set_config(per_layer_config=[{"intermediate_size": 48}]), "config_invalid"),
    "a layer of its own without a number": (set_config(per_layer_config={"first": {"intermediate_size": 48}}), "config_invalid"),
    "a width of a layer's own as a string": (set_config(per_layer_config={"0": {"intermediate_size": "48"}}), "config_invalid"),
    "another width of a layer's own": (set_config(per_layer_config={"0": {"intermediate_size": 40}}), "weights_do_not_fit"),
    "other heads of a layer's own": (set_config(per_layer_config={"1": {"num_attention_heads": 2, "num_key_value_heads": 1}}), "weights_do_not_fit"),
    "biases that are not there": (set_config(attention_bias=True), "weights_incomplete"),
    "no weights": (remove("model.safetensors"), "weights_missing"),
    "pickles only": (only_pickles, "pickle_weights"),
    "a layer too few": (set_config(num_hidden_layers=3), "weights_incomplete"),
    "a great many layers too few": (set_config(num_hidden_layers=10**12), "weights_incomplete"),
    "another FFN width": (set_config(intermediate_size=64), "weights_do_not_fit"),
    "another vocabulary": (set_config(vocab_size=321), "weights_do_not_fit"),
    "another number of KV heads": (set_config(num_key_value_heads=4), "weights_do_not_fit"),
    "other heads": (set_config(head_dim=16), "weights_do_not_fit"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_unfit_folders_are_refused(whole: Path, tmp_path: Path, case: str) -> None:
    change, code = FOLDERS[case]
    folder = copy(whole, tmp_path)
    change(folder)
    assert refusal(folder).code == code


# What to change in the header for a tensor that its family must have, with the code and words of the refusal. The bytes stay.
DAMAGES: dict[str, tuple[Callable[[dict[str, Any], str], object], str, str]] = {
    "missing": (lambda header, name: header.update({f"old.{name}": header.pop(name)}), "weights_incomplete", "lacks the tensor {}."),
    "of another shape": (lambda header, name: header[name].update(shape=[*header[name]["shape"], 1]), "weights_do_not_fit", "{} of 'model' is"),
    "of another type": (lambda header, name: header[name].update(dtype="I32"), "unsupported_dtype", "{} of 'model' is stored as I32"),
}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_tensor_of_every_family_is_checked(model_type: str, damage: str, tmp_path: Path) -> None:
    change, code, words = DAMAGES[damage]
    folder = make_checkpoint(tmp_path / "model", model_type, layers=2)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for name in read_header(weights):
        edit_header(weights, lambda header, name=name: change(header, name))  # type: ignore[misc]
        refused = refusal(folder)
        assert (refused.code, words.format(name) in refused.message) == (code, True), refused.message
        weights.write_bytes(whole)


FAMILIES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "an expert too few": ("mixtral", set_config(num_local_experts=5), "weights_do_not_fit"),
    "a great many experts too few": ("mixtral", set_config(num_local_experts=10**12), "weights_do_not_fit"),
    "experts of another width": ("qwen3_moe", set_config(moe_intermediate_size=40), "weights_do_not_fit"),
    "a number of experts as a string": ("qwen3_moe", set_config(num_experts="5"), "config_invalid"),
    "another block dense": ("qwen3_moe", set_config(mlp_only_layers=[0]), "weights_incomplete"),
    "dense blocks as a number": ("qwen3_moe", set_config(mlp_only_layers=0), "config_invalid"),
    "no steps": ("qwen3_moe", set_config(decoder_sparse_step=0), "config_invalid"),
    "a head size left out": ("gemma2", lambda folder: edit_json(folder / "config.json", lambda config: config.pop("head_dim")), "weights_do_not_fit"),
    "more KV heads in one matrix": ("phi3", set_config(num_key_value_heads=4), "weights_do_not_fit"),
    "no projection": ("opt", set_config(word_embed_proj_dim=16), "weights_do_not_fit"),
    "norms without weights": ("opt", set_config(layer_norm_elementwise_affine=False), "unsupported_config"),
    "more positions": ("opt", set_config(max_position_embeddings=4096), "weights_do_not_fit"),
    "attention to another text": ("gpt2", set_config(add_cross_attention=True), "unsupported_config"),
    "width left open": ("gpt2", set_config(n_inner=None), "weights_do_not_fit"),
    "heads under another name": ("gpt2", set_config(n_head=None, num_attention_heads=4), "config_invalid"),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_what_only_a_family_has_is_checked(case: str, tmp_path: Path) -> None:
    model_type, change, code = FAMILIES[case]
    folder = make_checkpoint(tmp_path / "model", model_type)
    change(folder)
    assert refusal(folder).code == code


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing").code == "model_not_found"


def test_a_folder_of_weights_alone_needs_no_head_when_tied(whole: Path, tmp_path: Path) -> None:
    folder = copy(make_checkpoint(tmp_path / "tied", "llama", tied=True), tmp_path)
    set_config(tie_word_embeddings=False)(folder)
    assert refusal(folder).code == "weights_incomplete"


def first(header: dict[str, Any]) -> dict[str, Any]:
    """The description of the tensor that lies first."""
    described: dict[str, dict[str, Any]] = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return min(described.values(), key=lambda entry: entry["data_offsets"])


def set_entry(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: first(header).update(values)


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown dtype": set_entry(dtype="F33"),
    "dtype of a wrong type": set_entry(dtype=["F32"]),
    "smaller dtype": set_entry(dtype="F16"),
    "shape of strings": set_entry(shape=["320", "32"]),
    "shape is a number": set_entry(shape=10240),
    "shape with a fraction": set_entry(shape=[320.0, 32]),
    "negative shape": set_entry(shape=[-320, -32]),
    "smaller shape": set_entry(shape=[320, 31]),
    "shape that overflows": set_entry(shape=[2**63, 2**63]),
    "no shape": lambda header: first(header).pop("shape"),
    "offsets null": set_entry(data_offsets=[None, None]),
    "offsets as strings": set_entry(data_offsets=["0", "40960"]),
    "three offsets": set_entry(data_offsets=[0, 1, 2]),
    "offsets backwards": set_entry(data_offsets=[40960, 0]),
    "offsets negative": set_entry(data_offsets=[-40960, 0]),
    "offsets overlap": lambda header: first(header).update(data_offsets=[4, first(header)["data_offsets"][1] + 4]),
    "offsets past the end": set_entry(data_offsets=[0, 10**9], shape=[10**9 // 4]),
    "entry is a number": lambda header: header.update({"model.norm.weight": 1}),
    "entry is null": lambda header: header.update({"model.norm.weight": None}),
    "a tensor left out": lambda header: header.pop("model.norm.weight"),
    "nothing left": lambda header: header.clear(),
}


@pytest.mark.parametrize("case", HEADERS)
def test_bad_headers_are_refused(whole: Path, tmp_path: Path, case: str) -> None:
    folder = copy(whole, tmp_path)
    edit_header(folder / "model.safetensors", HEADERS[case])
    assert refusal(folder).code == "checkpoint_truncated"


@pytest.mark.parametrize(
    "header", [b"", b"{", b"null", b"[]", b"3", b'"text"', b"[" * 100_000, b"\xff\xfe", b'{"a": {"dtype": NaN, "shape": [], "data_offsets": [0, 4]}}']
)
def test_headers_that_are_no_description_are_refused(whole: Path, tmp_path: Path, header: bytes) -> None:
    folder = copy(whole, tmp_path)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    assert refusal(folder).code == "checkpoint_truncated"


def test_truncation_at_any_byte_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    for length in (0, 7, 8, 9, header - 1, header, header + 1, len(raw) // 2, len(raw) - 1):
        weights.write_bytes(raw[:length])
        assert refusal(folder).code == "checkpoint_truncated", length
    weights.write_bytes(raw + b"\0")
    assert refusal(folder).code == "checkpoint_truncated"


def test_a_header_longer_than_the_file_is_not_read(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    (folder / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    assert "longer than the file" in refusal(folder).message


def test_empty_tensors_take_no_bytes(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "a": {"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]},
            "c": {"dtype": "I8", "shape": [], "data_offsets": [4, 5]},
        }
    ).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 5)
    assert {name: entry.end - entry.begin for name, entry in read_header(path).items()} == {"a": 0, "b": 4, "c": 1}


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", dtype=torch.int8)
    assert refusal(folder).code == "unsupported_dtype"


def name_file(name: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["weight_map"].update({"model.norm.weight": name})


INDEXES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "outside the folder": (name_file("../x.safetensors"), "index_invalid"),
    "an absolute path": (name_file("/tmp/x.safetensors"), "index_invalid"),
    "the folder above": (name_file(".."), "index_invalid"),
    "a pickle": (name_file("pytorch_model.bin"), "index_invalid"),
    "a number": (name_file(3), "index_invalid"),
    "a list": (name_file(["model.safetensors"]), "index_invalid"),
    "an empty name": (name_file(""), "index_invalid"),
    "a very long name": (name_file("x" * 5000 + ".safetensors"), "index_invalid"),
    "a null byte": (name_file("x\0.safetensors"), "index_invalid"),
    "an absent file": (name_file("model-00099-of-00099.safetensors"), "weights_missing"),
    "no map": (lambda index: index.pop("weight_map"), "index_invalid"),
    "a map that is a list": (lambda index: index.update(weight_map=[]), "index_invalid"),
    "an empty map": (lambda index: index.update(weight_map={}), "index_invalid"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_bad_indexes_are_refused(sharded: Path, tmp_path: Path, case: str) -> None:
    change, code = INDEXES[case]
    folder = copy(sharded, tmp_path)
    edit_json(folder / INDEX, change)
    assert refusal(folder).code == code


def test_an_index_that_is_no_json_is_refused(sharded: Path, tmp_path: Path) -> None:
    folder = copy(sharded, tmp_path)
    (folder / INDEX).write_text("{", encoding="utf-8")
    assert refusal(folder).code == "index_invalid"


def test_a_missing_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = copy(sharded, tmp_path)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    refused = refusal(folder)
    assert refused.code == "weights_missing"
    assert shard.name in refused.message


def test_the_single_file_wins_over_an_index_as_in_transformers(whole: Path, sharded: Path, tmp_path: Path) -> None:
    folder = copy(sharded, tmp_path)
    shutil.copyfile(whole / "model.safetensors", folder / "model.safetensors")
    assert {entry.file.name for entry in read_source(folder).tensors.values()} == {"model.safetensors"}


def test_a_pattern_must_fit_the_widths(tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path, "llama", ffn=42))
    check_recipe(Recipe.model_validate({"method": "wanda", "sparsity": "1:2"}), source)
    check_recipe(Recipe.model_validate({"method": "wanda", "sparsity": 0.5}), source)
    with pytest.raises(RecipeError) as refused:
        check_recipe(Recipe.model_validate({"method": "wanda", "sparsity": "2:4"}), source)
    assert (refused.value.code, refused.value.pointer) == ("pattern_does_not_fit", "/sparsity")
    assert "intermediate_size is 42" in refused.value.message


def test_a_pattern_must_fit_every_kind_of_block(tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path, "qwen3_moe", mlp_only_layers=[2], moe_intermediate_size=20))
    check_recipe(Recipe.model_validate({"method": "wanda", "sparsity": "2:4"}), source)
    with pytest.raises(RecipeError, match="moe_intermediate_size is 20"):
        check_recipe(Recipe.model_validate({"method": "wanda", "sparsity": "4:8"}), source)


def test_a_per_layer_checkpoint_is_read_and_not_pruned_again(whole: Path, tmp_path: Path) -> None:
    folder = copy(whole, tmp_path)
    set_config(intermediate_size=99, per_layer_config={"0": {"intermediate_size": 48}, "1": {"intermediate_size": 48}})(folder)
    source = read_source(folder)
    with pytest.raises(RecipeError) as refused:
        check_recipe(Recipe.model_validate({"method": "cfsp", "sparsity": 0.5}), source)
    assert refused.value.code == "already_per_layer"
