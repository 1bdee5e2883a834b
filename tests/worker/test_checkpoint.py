"""Layouts of the result: shards, index, config, padding, masks and the model card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from app.recipe import Recipe
from app.report import LayerReport, LoadCheck, Measured, Parameters, Perplexity, Report, Sparsities, Speed, TextUsed
from app.source import read_source
from tests.models import layer_report, load_model, make_checkpoint, pruned_checkpoint
from worker.checkpoint import checkpoint_bytes, finish, masks_name, model_card, read_masks, shard_name, write_masks, write_padded, write_shard

MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3"]
WIDTHS = [20, 48, 31]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()}


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


# -------------------------------------------------------------------- shards


def test_shard_names_sort_in_their_order() -> None:
    assert shard_name(1, 31) == "model-00001-of-00031.safetensors"
    names = [shard_name(index, 100) for index in range(1, 101)]
    assert names == sorted(names)


def test_a_shard_is_written_whole(tmp_path: Path) -> None:
    wide = torch.randn(8, 6)
    tensors = {"b": wide.T, "a": wide[:, ::2].to(torch.bfloat16), "c": torch.tensor(3.0)}
    write_shard(tmp_path / "model.safetensors", tensors)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensor) and stored[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_shard_has_the_same_bytes_whatever_the_order_of_its_tensors(tmp_path: Path) -> None:
    tensors = {name: torch.full((3,), float(index)) for index, name in enumerate("abcd")}
    write_shard(tmp_path / "x", tensors)
    write_shard(tmp_path / "y", dict(reversed(tensors.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_shard_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, {"a": torch.ones(2)})
    before = path.read_bytes()
    shared = torch.ones(4)
    with pytest.raises(RuntimeError):
        write_shard(path, {"a": shared, "b": shared})
    assert path.read_bytes() == before


# ------------------------------------------------------------------- layouts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_uniform_is_an_ordinary_model(tmp_path: Path, model_type: str, tied: bool) -> None:
    source = read_source(make_checkpoint(tmp_path / "source", model_type, tied=tied))
    folder = pruned_checkpoint(source, tmp_path / "pruned", [24, 24, 24], "uniform")
    model = load_model(folder)
    assert model.config.intermediate_size == 24
    assert model.config.is_heterogeneous is False
    assert {layer.mlp.down_proj.in_features for layer in model.model.layers} == {24}
    stored = weights_of(folder)
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight, stored["model.layers.2.mlp.up_proj.weight"])
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def test_shards_and_index_follow_the_blocks(tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "source", "qwen2"))
    folder = pruned_checkpoint(source, tmp_path / "pruned", WIDTHS, "per_layer")
    index, stored = read_json(folder / "model.safetensors.index.json"), weights_of(folder)
    assert index["weight_map"].keys() == stored.keys() == source.tensors.keys()
    for name, file in index["weight_map"].items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 3
        assert file == shard_name(layer + 1, 4)
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert index["metadata"]["total_size"] == 4 * index["metadata"]["total_parameters"]
    assert checkpoint_bytes(folder) == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert read_source(folder).tensors.keys() == stored.keys()


def test_a_checkpoint_without_a_shard_is_not_finished(tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "source", "llama"))
    folder = pruned_checkpoint(source, tmp_path / "pruned", WIDTHS, "per_layer")
    (folder / shard_name(2, 4)).unlink()
    with pytest.raises(FileNotFoundError):
        finish(folder, source, [layer_report(source, layer, width) for layer, width in enumerate(WIDTHS)], "per_layer", "source")


def test_per_layer_config_is_as_transformers_writes_it(tmp_path: Path) -> None:
    widths = [20, 48, 31, 48, 7, 48, 48, 48, 48, 48, 48, 5]
    source = read_source(make_checkpoint(tmp_path / "source", "llama", layers=12))
    folder = pruned_checkpoint(source, tmp_path / "pruned", widths, "per_layer")
    written = read_json(folder / "config.json")
    config = AutoConfig.from_pretrained(folder)
    assert [config.per_layer_config[layer].intermediate_size for layer in range(12)] == widths
    config.save_pretrained(tmp_path / "again")
    again = read_json(tmp_path / "again" / "config.json")
    fields = ("intermediate_size", "per_layer_config", "allow_global_per_layer_attribute_access", "dtype", "architectures")
    assert {name: written[name] for name in fields} == {name: again[name] for name in fields}
    assert list(written["per_layer_config"]) == ["00", "02", "04", "11"]


def test_per_layer_of_one_width_is_uniform(tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "source", "llama"))
    config = read_json(pruned_checkpoint(source, tmp_path / "pruned", [24, 24, 24], "per_layer") / "config.json")
    assert config["intermediate_size"] == 24
    assert "per_layer_config" not in config


def test_uniform_refuses_different_widths(tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "source", "llama"))
    with pytest.raises(ValueError, match="one size"):
        pruned_checkpoint(source, tmp_path / "pruned", WIDTHS, "uniform")


def test_only_harmless_files_are_taken_over(tmp_path: Path) -> None:
    origin = make_checkpoint(tmp_path / "source", "llama")
    for name in ("modeling.py", "pytorch_model.bin", "training_args.bin", "optimizer.pt", ".env", "README.md", "LICENSE", "model.safetensors.index.json.bak"):
        (origin / name).write_text("x", encoding="utf-8")
    (origin / "merges.txt").mkdir()
    source = read_source(origin)
    folder = pruned_checkpoint(source, tmp_path / "pruned", WIDTHS, "per_layer")
    others = {file.name for file in folder.iterdir()} - {shard_name(index, 4) for index in range(1, 5)}
    assert others == {
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
    }
    before, after = AutoTokenizer.from_pretrained(origin), AutoTokenizer.from_pretrained(folder)
    talk = [{"role": "user", "content": "tade ba"}]
    assert before("A tree, pruned.").input_ids == after("A tree, pruned.").input_ids
    assert before.apply_chat_template(talk, tokenize=False) == after.apply_chat_template(talk, tokenize=False) == "tade ba\n"


@pytest.mark.parametrize(
    ("stated", "asked", "written"),
    [
        ({"dtype": "bfloat16"}, "source", {"dtype": "bfloat16"}),
        ({"torch_dtype": "bfloat16"}, "source", {"dtype": "bfloat16"}),
        ({"torch_dtype": "bfloat16"}, "float32", {"dtype": "float32"}),
        ({"dtype": "float32"}, "float16", {"dtype": "float16"}),
        ({}, "source", {}),
    ],
)
def test_the_config_states_the_dtype_once(tmp_path: Path, stated: dict[str, str], asked: str, written: dict[str, str]) -> None:
    origin = make_checkpoint(tmp_path / "source", "llama")
    config = read_json(origin / "config.json")
    del config["dtype"]
    (origin / "config.json").write_text(json.dumps(config | stated | {"_name_or_path": "/home/someone/model"}), encoding="utf-8")
    folder = pruned_checkpoint(read_source(origin), tmp_path / "pruned", [24, 24, 24], "uniform", dtype=asked)
    result = read_json(folder / "config.json")
    assert {name: result[name] for name in ("dtype", "torch_dtype") if name in result} == written
    assert "_name_or_path" not in result


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_padded_fills_up_with_zeros(tmp_path: Path, model_type: str) -> None:
    source = read_source(make_checkpoint(tmp_path / "source", model_type, dtype=torch.bfloat16))
    narrow = pruned_checkpoint(source, tmp_path / "narrow", [20, 40, 31], "per_layer")
    write_padded(narrow, tmp_path / "padded")
    compact, padded = weights_of(narrow), weights_of(tmp_path / "padded")
    assert compact.keys() == padded.keys()
    for name, tensor in padded.items():
        own = compact[name]
        assert tensor.dtype == own.dtype
        assert torch.equal(tensor[tuple(slice(extent) for extent in own.shape)], own)
        assert int(tensor.count_nonzero()) == int(own.count_nonzero())
    config = read_json(tmp_path / "padded" / "config.json")
    assert config["intermediate_size"] == 40
    assert not {"per_layer_config", "allow_global_per_layer_attribute_access"} & config.keys()
    load_model(tmp_path / "padded")
    assert {file.name for file in narrow.iterdir()} == {file.name for file in (tmp_path / "padded").iterdir()}


def test_padded_fills_up_mlp_biases(tmp_path: Path) -> None:
    origin = make_checkpoint(tmp_path / "source", "llama")
    config = read_json(origin / "config.json") | {"mlp_bias": True}
    (origin / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = load_file(origin / "model.safetensors")
    for layer in range(3):
        weights |= {f"model.layers.{layer}.mlp.{name}_proj.bias": torch.randn(width) for name, width in (("gate", 48), ("up", 48), ("down", 32))}
    write_shard(origin / "model.safetensors", weights)
    narrow = pruned_checkpoint(read_source(origin), tmp_path / "narrow", WIDTHS, "per_layer")
    write_padded(narrow, tmp_path / "padded")
    load_model(tmp_path / "padded")


def test_the_same_pruning_writes_the_same_bytes(tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "source", "llama"))
    folders = [pruned_checkpoint(source, tmp_path / name, WIDTHS, "per_layer") for name in ("once", "twice")]
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]


# --------------------------------------------------------------------- masks


def test_masks_come_back_from_an_eighth_of_the_bytes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 128), (3, 5), (1, 1), (7,), (0, 4)]
    masks = {f"model.layers.0.{index}.weight": torch.rand(shape, generator=generator) > 0.5 for index, shape in enumerate(shapes)}
    path = tmp_path / masks_name(1, 3)
    write_masks(path, masks)
    found = read_masks(path)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], mask) and found[name].dtype == torch.bool for name, mask in masks.items())
    assert {name: tensor.numel() for name, tensor in load_file(path).items()} == {f"{name}.mask": math.ceil(mask.numel() / 8) for name, mask in masks.items()}


def test_masks_are_no_weights(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    before = checkpoint_bytes(folder)
    write_masks(folder / masks_name(1, 4), {"model.layers.0.mlp.up_proj.weight": weights["model.layers.0.mlp.up_proj.weight"] > 0})
    assert checkpoint_bytes(folder) == before == (folder / "model.safetensors").stat().st_size
    model = load_model(folder)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weights["model.layers.0.mlp.up_proj.weight"])


# ---------------------------------------------------------------- model card


def make_report(recipe: dict[str, Any], layouts: list[Literal["uniform", "per_layer", "padded"]], *, evaluated: bool = True) -> Report:
    def parameters(ffn: int, zeros: int) -> Parameters:
        return Parameters(
            all=1_000_000 + ffn, non_embedding=400_000 + ffn, decoder=390_000 + ffn, ffn=ffn, ffn_channels=ffn // 100, decoder_zeros=zeros, ffn_zeros=zeros
        )

    def measured(ffn: int, value: float) -> Measured:
        text = TextUsed(source="wiki", sha256="ab" * 32, tokens=5000, used_tokens=4096, bos_added=False)
        return Measured(
            parameters=parameters(ffn, 0),
            checkpoint_bytes=4 * ffn,
            macs_per_token=390_000 + ffn,
            perplexity=Perplexity(value=value, text=text, windows=8, sequence_length=512, dtype="float32"),
            speed=Speed(device="cpu", threads=2, prefill_tokens=512, prefill_tokens_per_second=1234.56, decode_tokens=64, decode_tokens_per_second=45.67),
            peak_memory_bytes=876_543_210,
        )

    return Report(
        recipe=Recipe.model_validate(recipe),
        model_type="llama",
        model_fingerprint="cd" * 32,
        before=measured(300_000, 32.6) if evaluated else None,
        after=measured(210_000, 47.63) if evaluated else None,
        parameters_before=parameters(300_000, 0),
        parameters_after=parameters(210_000, 11),
        sparsity=Sparsities(ffn=0.3, decoder=0.1304, non_embedding=0.1286, all=0.0692),
        layers=[
            LayerReport(
                index=index,
                dropped=False,
                ffn_channels=width,
                ffn_channels_before=1000,
                kv_groups=2,
                kv_groups_before=2,
                experts=None,
                experts_before=None,
                weights=9,
                zeros=0,
                importance=0.1,
            )
            for index, width in enumerate((600, 800, 700))
        ],
        calibration=TextUsed(source="c4", sha256="ef" * 32, tokens=90_000, used_tokens=16_384, bos_added=True),
        loads_with=[LoadCheck(layout=layout, loader="transformers 5.23.0", max_logit_difference=1.25e-5, checked="logits") for layout in layouts],
        seconds={"prune": 1.5},
        resumed_at_block=None,
        peak_memory_bytes=876_543_210,
        notes=["Widths were rounded."],
        versions={"espalier": "0.1.0", "torch": "2.13.0"},
    )


def front_matter(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    value: dict[str, Any] = yaml.safe_load(head)
    return value


def code_block(card: str, language: str) -> str:
    return card.split(f"```{language}\n")[1].split("```")[0]


def test_the_card_says_what_was_lost_and_gained() -> None:
    recipe = {"model": "owner/name", "method": "cfsp", "sparsity": 0.3, "output": {"layout": "per_layer", "padded": True}}
    card = model_card(make_report(recipe, ["per_layer", "padded"]))
    assert front_matter(card) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/name",
        "tags": ["espalier", "pruned", "cfsp"],
    }
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for line in card.splitlines() if line.startswith("|") for cells in [line.split("|")]}
    assert rows["Parameters, all (tied ones once)"] == ["1,300,000", "1,210,000"]
    assert rows["Parameters but embedding and head"] == ["700,000", "610,000"]
    assert rows["Weights of the decoder's linears"] == ["690,000", "600,000"]
    assert rows["Weights of the FFNs"] == ["300,000", "210,000"]
    assert rows["FFN channels, all layers"] == ["3,000", "2,100"]
    assert rows["Bytes of the weight files"] == ["1,200,000", "840,000"]
    assert rows["Perplexity (8 windows of 512 tokens of `wiki`, float32)"] == ["32.6", "47.63"]
    assert rows["Prefill, tokens/s (512 tokens, cpu, 2 threads)"] == ["1,234.6", "1,234.6"]
    assert rows["Decode, tokens/s (64 tokens, cpu, 2 threads)"] == ["45.7", "45.7"]
    assert rows["padded"] == ["transformers 5.23.0", "1.25e-05"]
    assert "30.00% of the FFN weights, 13.04% of the decoder's linear weights, 12.86% of the parameters but embeddings, 6.92% of all parameters" in card
    assert "`c4`, sha256 `" + "ef" * 32 + "`, 16,384 of 90,000 tokens, with a begin-of-sequence token" in card
    assert "0: 600 channels and 2 KV groups; 1: 800 channels and 2 KV groups; 2: 700 channels and 2 KV groups" in card
    assert "- Widths were rounded." in card


def test_the_recipe_in_the_card_is_the_job_again() -> None:
    recipe = {"model": "owner/name", "method": {"name": "wanda", "variant": True}, "sparsity": "2:4", "calibration": {"seed": 7}}
    report = make_report(recipe, ["uniform"])
    card = model_card(report)
    assert Recipe.model_validate_json(code_block(card, "json")) == report.recipe
    assert "python -m worker.pipeline recipe.json" in code_block(card, "sh")


def test_the_card_tells_how_each_layout_loads() -> None:
    recipe = {"method": "cfsp", "sparsity": 0.3, "output": {"layout": "per_layer", "padded": True}}
    report = make_report(recipe, ["per_layer", "padded"])
    compact, padded = model_card(report), model_card(report, padded=True)
    assert "import espalier.loader" in code_block(compact, "python")
    assert "Never pass `ignore_mismatched_sizes=True`" in compact
    assert "import espalier.loader" not in padded
    assert "zero channels" in padded
    assert "base_model" not in front_matter(compact)
    for card in (compact, padded):
        compile(code_block(card, "python"), "card", "exec")


def test_the_card_promises_no_speed_from_zeros() -> None:
    card = model_card(make_report({"method": "magnitude", "sparsity": 0.5}, ["uniform"]))
    assert "they save neither time nor memory" in card
    assert "Set to zero: 30.00%" in card
    assert "import espalier.loader" not in card


def test_the_card_of_a_job_without_evaluation_has_the_counts() -> None:
    card = model_card(make_report({"method": "cfsp", "sparsity": 0.3, "evaluation": None}, ["uniform"], evaluated=False))
    assert "| Weights of the FFNs | 300,000 | 210,000 |" in card
    assert "Perplexity" not in card
    assert "Evaluation text" not in card
