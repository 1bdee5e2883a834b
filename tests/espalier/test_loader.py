"""Checkpoints whose layers differ in width or heads: loaded by plain transformers after `import espalier.loader`, and never silently without it."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import espalier.loader
import espalier.vllm
from app.source import read_source
from tests.models import load_model, make_checkpoint, pruned_checkpoint, write_json
from worker.checkpoint import write_padded

MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3", "gemma2"]
WIDTHS = [20, 48, 31]
GROUPS = [4, 1, 3]  # KV groups of two heads: the last layer's 6 heads don't divide the hidden size, 32
TOKENS = torch.arange(3, 63).reshape(2, 30)


def per_layer(folder: Path, model_type: str, **options: Any) -> Path:
    source = read_source(make_checkpoint(folder / "source", model_type, **options))
    return pruned_checkpoint(source, folder / "per_layer", WIDTHS, "per_layer")


def per_layer_heads(folder: Path, model_type: str, **options: Any) -> Path:
    """A checkpoint of 3 layers that keeps each layer's first GROUPS and first WIDTHS of the dense one in `folder`/source."""
    source, out = make_checkpoint(folder / "source", model_type, heads=8, kv_heads=4, **options), folder / "per_layer"
    shutil.copytree(source, out)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["head_dim"] = config.get("head_dim", 4)
    weights = load_file(source / "model.safetensors")
    sizes = [
        {"num_attention_heads": 2 * groups, "num_key_value_heads": groups, "intermediate_size": width} for groups, width in zip(GROUPS, WIDTHS, strict=True)
    ]
    for index, size in enumerate(sizes):
        query, key = size["num_attention_heads"] * config["head_dim"], size["num_key_value_heads"] * config["head_dim"]
        for name, rows in (("self_attn.q", query), ("self_attn.k", key), ("self_attn.v", key), ("mlp.gate", WIDTHS[index]), ("mlp.up", WIDTHS[index])):
            for kind in ("weight", "bias"):
                tensor = f"model.layers.{index}.{name}_proj.{kind}"
                if tensor in weights:
                    weights[tensor] = weights[tensor][:rows].contiguous()
        for name, columns in (("self_attn.o", query), ("mlp.down", WIDTHS[index])):
            tensor = f"model.layers.{index}.{name}_proj.weight"
            weights[tensor] = weights[tensor][:, :columns].contiguous()
    differing = {index: {name: value for name, value in size.items() if value != config[name]} for index, size in enumerate(sizes)}
    per_layer_config = {str(index): size for index, size in differing.items() if size}
    write_json(out / "config.json", config | {"allow_global_per_layer_attribute_access": True, "per_layer_config": per_layer_config})
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


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


def dense_without_groups(folder: Path) -> Any:
    """The dense model with the outputs of the missing heads and channels multiplied by zero."""
    model = load_model(folder / "source")
    for layer, groups, width in zip(model.model.layers, GROUPS, WIDTHS, strict=True):
        heads = (torch.arange(layer.self_attn.o_proj.in_features) < 2 * groups * layer.self_attn.head_dim).float()
        channels = (torch.arange(48) < width).float()
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs, kept=heads: (inputs[0] * kept,))
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, inputs, kept=channels: (inputs[0] * kept,))
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


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [(model_type, attention) for model_type in MODEL_TYPES for attention in ("sdpa", "eager") if (model_type, attention) != ("gemma2", "sdpa")],
)
def test_layers_with_heads_of_their_own_compute_what_the_dense_model_does_without_the_groups(tmp_path: Path, model_type: str, attention: str) -> None:
    model = load_model(per_layer_heads(tmp_path, model_type))
    model.set_attn_implementation(attention)
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {attention}
    found, whole, expected = logits(model), logits(load_model(tmp_path / "source")), logits(dense_without_groups(tmp_path))
    scale = float(whole.abs().max())
    assert float((found - expected).abs().max()) <= 2e-6 * scale
    assert float((found - whole).abs().max()) > 0.05 * scale
    for layer, groups, width in zip(model.model.layers, GROUPS, WIDTHS, strict=True):
        size, part = layer.self_attn.head_dim, layer.self_attn
        assert [part.q_proj.out_features, part.k_proj.out_features, part.v_proj.out_features] == [2 * groups * size, groups * size, groups * size]
        assert (part.o_proj.in_features, part.num_key_value_groups, layer.mlp.down_proj.in_features) == (2 * groups * size, 2, width)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_layers_with_heads_of_their_own_generate_with_every_cache(tmp_path: Path, model_type: str) -> None:
    model = load_model(per_layer_heads(tmp_path, model_type))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    cache: Any = DynamicCache(config=model.config)
    text = model.generate(TOKENS[:1], past_key_values=cache, **options)
    assert text.shape == (1, 42)
    assert [layer.keys.shape[1] for layer in cache.layers] == GROUPS
    assert torch.equal(text, model.generate(TOKENS[:1], use_cache=False, **options))
    assert torch.equal(text, model.generate(TOKENS[:1], cache_implementation="static", disable_compile=True, **options))
    assert torch.equal(text, dense_without_groups(tmp_path).generate(TOKENS[:1], **options))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_layers_with_heads_of_their_own_are_saved_and_loaded_exactly(tmp_path: Path, model_type: str) -> None:
    folder = per_layer_heads(tmp_path, model_type)
    model = load_model(folder)
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    stated, saved = (json.loads((where / "config.json").read_text(encoding="utf-8")) for where in (folder, tmp_path / "saved"))
    assert stated["per_layer_config"] == saved["per_layer_config"]
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "saved" / "config.json").read_bytes() == (tmp_path / "twice" / "config.json").read_bytes()
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (tmp_path / "twice" / "model.safetensors").read_bytes()


def test_heads_that_differ_need_a_stated_head_dim(tmp_path: Path) -> None:
    folder = per_layer_heads(tmp_path, "qwen2")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["head_dim"]
    write_json(folder / "config.json", config)
    with pytest.raises(ValueError, match="head_dim"):
        load_model(folder)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers for it
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_lora_trains_merges_and_saves(tmp_path: Path, model_type: str) -> None:
    torch.manual_seed(0)
    base = load_model(per_layer_heads(tmp_path, model_type))
    before = logits(base)
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")).train()
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert len(adapted) == 3 * 7
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(TOKENS, labels=TOKENS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(str(tmp_path / "adapter"))
    tuned = logits(model)
    scale = float(tuned.abs().max())
    assert float((tuned - before).abs().max()) > 0.05 * scale
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load_model(tmp_path / "per_layer"), tmp_path / "adapter")), tuned)
    merged: Any = model.merge_and_unload()
    assert float((logits(merged) - tuned).abs().max()) <= 1e-5 * scale
    merged.save_pretrained(tmp_path / "merged")
    again = load_model(tmp_path / "merged")
    assert widths_of(again) == WIDTHS
    assert torch.equal(logits(again), logits(merged))


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
    assert found["plain"] == [{"error": "RuntimeError"}] * len(MODEL_TYPES)
    assert [one["widths"] for one in found["loaded"]] == [WIDTHS] * len(MODEL_TYPES)
    # What the model card warns of: wrong weights in a model that runs.
    for ignoring, loaded in zip(found["ignoring"], found["loaded"], strict=True):
        assert ignoring["widths"] == [48, 48, 48]
        assert abs(ignoring["logit"] - loaded["logit"]) > 1e-3


# ------------------------------------------------------------------------ vLLM


def test_the_vllm_plugin_is_installed_and_harmless_without_vllm() -> None:
    (plugin,) = entry_points(group="vllm.general_plugins", name="espalier")
    register = plugin.load()
    assert register is espalier.vllm.register
    with pytest.raises(ModuleNotFoundError):
        __import__("vllm")
    register()


class LlamaStandIn:
    """The constructor of vLLM's LlamaDecoderLayer, from its source, and nothing else of it."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None, attn_layer_type: Any = None) -> None:
        config = config or vllm_config.model_config.hf_config
        self.sizes = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)


class MistralStandIn(LlamaStandIn):
    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, config=config, attn_layer_type=object)


class QwenStandIn:
    """The constructor of vLLM's Qwen2DecoderLayer, Qwen3DecoderLayer and Gemma2DecoderLayer."""

    def __init__(self, config: Any, cache_config: Any = None, quant_config: Any = None, prefix: str = "") -> None:
        self.sizes = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)


def test_the_vllm_plugin_gives_each_layer_its_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against stand-ins: this shows which config a constructor gets, not that vLLM runs the model."""
    for family, name, stand_in in (("llama", "LlamaDecoderLayer", LlamaStandIn), ("qwen3", "Qwen3DecoderLayer", QwenStandIn)):
        module = ModuleType(family)
        monkeypatch.setattr(stand_in, "__init__", stand_in.__init__)  # puts the constructor back after the test
        setattr(module, name, stand_in)
        monkeypatch.setitem(sys.modules, f"vllm.model_executor.models.{family}", module)
    espalier.vllm.register()
    wrapped = LlamaStandIn.__init__
    espalier.vllm.register()
    assert LlamaStandIn.__init__ is wrapped
    config, dense = (AutoConfig.from_pretrained(folder) for folder in (per_layer_heads(tmp_path, "llama"), tmp_path / "source"))

    def sizes(config: Any, index: int) -> list[tuple[int, int, int]]:
        whole, prefix = SimpleNamespace(model_config=SimpleNamespace(hf_config=config)), f"model.layers.{index}"
        layers: list[Any] = [LlamaStandIn(vllm_config=whole, prefix=prefix), MistralStandIn(whole, prefix), QwenStandIn(config, None, None, prefix=prefix)]
        return [layer.sizes for layer in layers]

    for index, (groups, width) in enumerate(zip(GROUPS, WIDTHS, strict=True)):
        assert sizes(config, index) == [(2 * groups, groups, width)] * 3
        assert sizes(dense, index) == [(8, 4, 48)] * 3
