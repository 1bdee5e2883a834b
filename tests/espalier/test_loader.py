"""Checkpoints whose layers differ in width: loaded by plain transformers after `import espalier.loader`, and never silently without it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import espalier.loader
from app.source import read_source
from tests.models import load_model, make_checkpoint, pruned_checkpoint
from worker.checkpoint import write_padded

MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3"]
WIDTHS = [20, 48, 31]
TOKENS = torch.arange(3, 63).reshape(2, 30)


def per_layer(folder: Path, model_type: str, **options: Any) -> Path:
    source = read_source(make_checkpoint(folder / "source", model_type, **options))
    return pruned_checkpoint(source, folder / "per_layer", WIDTHS, "per_layer")


def widths_of(model: Any) -> list[int]:
    return [layer.mlp.down_proj.in_features for layer in model.model.layers]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def dense_without_channels(folder: Path) -> Any:
    """The dense model with the missing channels' outputs multiplied by zero, which is what removing them means."""
    model = load_model(folder / "source")
    for layer, width in zip(model.model.layers, WIDTHS, strict=True):
        kept = (torch.arange(48) < width).float()
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, inputs, kept=kept: (inputs[0] * kept,))
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_it_computes_what_the_dense_model_does_without_the_channels(tmp_path: Path, model_type: str, tied: bool) -> None:
    folder = per_layer(tmp_path, model_type, tied=tied)
    write_padded(folder, tmp_path / "padded")
    model, padded = load_model(folder), load_model(tmp_path / "padded")
    assert widths_of(model) == WIDTHS
    assert widths_of(padded) == [48, 48, 48]
    found, whole = logits(model), logits(load_model(tmp_path / "source"))
    scale = float(whole.abs().max())
    assert float((found - logits(padded)).abs().max()) <= 1e-6 * scale
    assert float((found - logits(dense_without_channels(tmp_path))).abs().max()) <= 1e-6 * scale
    assert float((found - whole).abs().max()) > 0.05 * scale
    assert model.num_parameters() == sum(tensor.numel() for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_it_generates_as_its_padded_copy_does(tmp_path: Path, model_type: str) -> None:
    folder = per_layer(tmp_path, model_type)
    write_padded(folder, tmp_path / "padded")
    model = load_model(folder)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    text = model.generate(TOKENS[:1], **options)
    assert text.shape == (1, 42)
    assert torch.equal(text, load_model(tmp_path / "padded").generate(TOKENS[:1], **options))
    assert torch.equal(text, model.generate(TOKENS[:1], use_cache=False, **options))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_save_pretrained_and_from_pretrained_return_the_same_model(tmp_path: Path, model_type: str) -> None:
    model = load_model(per_layer(tmp_path, model_type, dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert widths_of(again) == WIDTHS
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "saved" / "config.json").read_bytes() == (tmp_path / "twice" / "config.json").read_bytes()
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (tmp_path / "twice" / "model.safetensors").read_bytes()


def test_settings_that_change_later_reach_attention(tmp_path: Path) -> None:
    model = load_model(per_layer(tmp_path, "llama"))
    before = logits(model)
    model.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}
    assert model(TOKENS, output_attentions=True).attentions[2].shape == (2, 4, 30, 30)
    assert torch.allclose(logits(model), before, atol=1e-4)


def test_gradients_flow_at_every_width(tmp_path: Path) -> None:
    model = load_model(per_layer(tmp_path, "qwen3")).train()
    model.activation_checkpointing_enable()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert [tuple(layer.mlp.gate_proj.weight.grad.shape) for layer in model.model.layers] == [(width, 32) for width in WIDTHS]


def test_models_are_built_from_a_config_alone(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(per_layer(tmp_path, "mistral"))
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config)
    assert widths_of(skeleton) == WIDTHS
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    built: Any = AutoModelForCausalLM.from_config(config)
    assert widths_of(built) == WIDTHS
    assert bool(logits(built).isfinite().all())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_ordinary_models_stay_as_they_are(tmp_path: Path, model_type: str) -> None:
    model = load_model(make_checkpoint(tmp_path / "dense", model_type))
    assert widths_of(model) == [48, 48, 48]
    model.save_pretrained(tmp_path / "saved")
    assert "per_layer_config" not in json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert torch.equal(logits(load_model(tmp_path / "saved")), logits(model))


def test_other_per_layer_settings_build_no_mlp(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "mistral")
    config = AutoConfig.from_pretrained(folder)
    config.allow_global_per_layer_attribute_access = True
    config.per_layer_config = {1: {"sliding_window": 7}}
    assert widths_of(AutoModelForCausalLM.from_config(config)) == [48, 48, 48]


def test_importing_twice_wraps_once() -> None:
    wrapped = LlamaDecoderLayer.__init__
    espalier.loader.install()
    assert LlamaDecoderLayer.__init__ is wrapped


WITHOUT_LOADER = """
import json, sys, warnings
import torch
from transformers import AutoModelForCausalLM

def attempt(folder, **options):
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:
        return {"error": type(error).__name__}
    return {"widths": [layer.mlp.down_proj.in_features for layer in model.model.layers], "logit": float(model(torch.arange(3, 33)[None]).logits[0, -1, 0])}

folders = sys.argv[1:]
found = {"plain": [attempt(folder) for folder in folders], "ignoring": [attempt(folder, ignore_mismatched_sizes=True) for folder in folders]}
assert "espalier.loader" not in sys.modules
import espalier.loader
warnings.simplefilter("error")
found["loaded"] = [attempt(folder) for folder in folders]
print(json.dumps(found))
"""


def test_without_the_import_loading_fails_unless_told_to_ignore_shapes(tmp_path: Path) -> None:
    folders = [per_layer(tmp_path / model_type, model_type) for model_type in MODEL_TYPES]
    ended = subprocess.run([sys.executable, "-c", WITHOUT_LOADER, *map(str, folders)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["plain"] == [{"error": "RuntimeError"}] * 4
    assert [one["widths"] for one in found["loaded"]] == [WIDTHS] * 4
    # What the model card warns of: wrong weights in a model that runs.
    for ignoring, loaded in zip(found["ignoring"], found["loaded"], strict=True):
        assert ignoring["widths"] == [48, 48, 48]
        assert abs(ignoring["logit"] - loaded["logit"]) > 1e-3
