"""Every family, streamed: the same logits as plain transformers, every stored tensor, and blocks that may be smaller than the checkpoint's."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig

from app.architecture import ARCHITECTURES
from app.exceptions import RecipeError
from app.recipe import Recipe
from app.source import check_recipe, read_source
from tests.models import load_model, make_checkpoint, write_json
from worker import blocks
from worker.blocks import BlockStream
from worker.evaluation import logits

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 2.0, 4.0, 8.0]}
WINDOW = {"sliding_window": 8}
FROM_BLOCK_1 = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{model_type: (model_type, {}) for model_type in ARCHITECTURES},
    **{f"{model_type}, tied": (model_type, {"tied": True}) for model_type in ARCHITECTURES},
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3, "tied": True}),
    "llama, one KV head": ("llama", {"kv_heads": 1}),
    "llama, no GQA, sizes left out": ("llama", {"num_key_value_heads": None, "head_dim": None}),
    "mistral, window": ("mistral", WINDOW),
    "mixtral, window": ("mixtral", WINDOW | {"num_local_experts": 3, "num_experts_per_tok": 1}),
    "qwen2, window": ("qwen2", FROM_BLOCK_1),
    "qwen3, window and biases": ("qwen3", FROM_BLOCK_1 | {"attention_bias": True}),
    "qwen3_moe, a dense block": ("qwen3_moe", {"mlp_only_layers": [1], "moe_intermediate_size": 20, "norm_topk_prob": False, "attention_bias": True}),
    "qwen3_moe, every other block": ("qwen3_moe", {"decoder_sparse_step": 2, "moe_intermediate_size": 20}),
    "gemma2, biases": ("gemma2", {"attention_bias": True, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    "gemma3_text, capped": ("gemma3_text", {"final_logit_softcapping": 3.0, "attention_bias": True, "sliding_window_pattern": 3}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}),
    "phi3, window and partial rotary": ("phi3", WINDOW | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}),
    "opt, projections": ("opt", {"word_embed_proj_dim": 16, "tied": True}),
    "opt, norms after": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt, no final norm, no biases": ("opt", {"_remove_final_layer_norm": True, "enable_bias": False}),
    "gpt_neox, in turns": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "gpt2, scaled by place": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, width left out": ("gpt2", {"n_inner": None, "ffn": 128}),
}
GROUPED = [model_type for model_type, architecture in ARCHITECTURES.items() if not architecture.groups_fixed]
MIXTURES = [model_type for model_type, architecture in ARCHITECTURES.items() if architecture.experts]


def make(folder: Path, variant: str) -> Path:
    model_type, more = VARIANTS[variant]
    return make_checkpoint(folder, model_type, **more)


def some_tokens(rows: int = 5, length: int = 24) -> Tensor:
    return torch.randint(0, 320, (rows, length), generator=torch.Generator().manual_seed(1))


def scratch(folder: Path) -> Path:
    folder.mkdir()
    return folder


@torch.no_grad()
def assert_streamed_as_loaded(folder: Path, work: Path) -> None:
    tokens = some_tokens()
    torch.testing.assert_close(logits(BlockStream(read_source(folder)), tokens, scratch(work)), load_model(folder)(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_streamed_logits_are_those_of_the_loaded_model(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "TOKENS_AT_ONCE", 48)  # two sequences at a time, and one left over
    monkeypatch.setattr(blocks, "HEAD_ROWS_AT_ONCE", 150)
    folder = make(tmp_path / "model", variant)
    if variant == "gpt2, width left out":
        assert read_source(folder).tensors["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    assert_streamed_as_loaded(folder, tmp_path / "work")


@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_and_the_rest_are_all_of_the_checkpoint(variant: str, tmp_path: Path) -> None:
    source = read_source(make(tmp_path, variant))
    stream = BlockStream(source)
    assert {str(name) for name, buffer in stream._model.named_buffers() if buffer.is_meta} == set()
    parts = [stream.outer_tensors(), *(stream.block_tensors(index) for index in range(len(stream)))]
    stored = load_file(source.folder / "model.safetensors")
    assert Counter(name for part in parts for name in part) == Counter(stored.keys())
    assert all(torch.equal(tensor, stored[name]) for part in parts for name, tensor in part.items())


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama"])
def test_folders_without_the_base_prefix_and_with_old_buffers_are_read(model_type: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", model_type, tied=True)
    base = ARCHITECTURES[model_type].blocks.split(".")[0]
    weights = {name.removeprefix(f"{base}."): weight for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}, folder / "model.safetensors", {"format": "pt"})
    assert all(name.startswith(base) for name in read_source(folder).tensors)
    tokens = some_tokens()
    whole = load_model(make_checkpoint(tmp_path / "whole", model_type, tied=True))
    with torch.no_grad():
        torch.testing.assert_close(logits(BlockStream(read_source(folder)), tokens, scratch(tmp_path / "work")), whole(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_head_stored_beside_a_tied_embedding_is_used_as_transformers_does(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama", tied=True)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].flip(0)}, folder / "model.safetensors", {"format": "pt"})
    assert_streamed_as_loaded(folder, tmp_path / "work")


# ------------------------------------------------------------------- single blocks


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_weights_are_outputs_by_inputs_and_go_back_as_stored(model_type: str, tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path, model_type, dtype=torch.bfloat16))
    stream, architecture = BlockStream(source), ARCHITECTURES[model_type]
    tensors = stream.block_tensors(1)
    block = stream.materialise(1, tensors)
    weights = {}
    for name, shape in architecture.linear_shapes(source.config, 1):
        weights[name] = stream.weight(tensors, 1, name)
        assert weights[name].dtype == torch.float32
        assert weights[name].shape == shape
        inputs = torch.randn(4, shape[1], generator=torch.Generator().manual_seed(0))
        expected = inputs @ weights[name].T + tensors.get(f"{architecture.block_prefix(1)}{name}.bias", torch.zeros(())).float()
        torch.testing.assert_close(block.get_submodule(name)(inputs), expected)
    assert tuple(weights) == architecture.linears(source.config, 1)
    back = stream.with_weights(tensors, 1, weights)
    assert back.keys() == tensors.keys()
    assert all(back[name].dtype == torch.bfloat16 and torch.equal(back[name], tensor) for name, tensor in tensors.items())
    halved = stream.with_weights(tensors, 1, {name: weights[name] / 2})
    assert torch.equal(stream.weight(halved, 1, name), weights[name] / 2)
    assert torch.equal(stream.weight(tensors, 1, name), weights[name])


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@torch.no_grad()
def test_a_smaller_block_computes_what_it_does_in_its_own_model(model_type: str, tmp_path: Path) -> None:
    """The tensors of a model with fewer channels, KV groups and experts, put into the stream of a larger one."""
    fewer: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_dim": 8} if model_type in GROUPED else {}
    experts: dict[str, Any] = {"num_local_experts": 2} if model_type == "mixtral" else {"num_experts": 2} if model_type == "qwen3_moe" else {}
    stated: dict[str, Any] = {"head_dim": 8} if fewer else {}
    large = BlockStream(read_source(make_checkpoint(tmp_path / "large", model_type, **stated)))
    small = BlockStream(read_source(make_checkpoint(tmp_path / "small", model_type, ffn=20, seed=1, **fewer, **experts)))
    hidden = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    whole = large.materialise(1, large.block_tensors(1))(hidden, **large.block_arguments(24)[1])
    expected = small.materialise(1, small.block_tensors(1))(hidden, **small.block_arguments(24)[1])
    block = large.materialise(1, small.block_tensors(1))
    torch.testing.assert_close(block(hidden, **large.block_arguments(24)[1]), expected)
    again = large.materialise(1, large.block_tensors(1))(hidden, **large.block_arguments(24)[1])
    assert torch.equal(again, whole)


@torch.no_grad()
def test_a_bias_that_the_checkpoint_has_not_is_used_and_forgotten(tmp_path: Path) -> None:
    stream = BlockStream(read_source(make_checkpoint(tmp_path, "llama")))
    tensors, hidden = stream.block_tensors(0), torch.randn(1, 5, 32)
    arguments = stream.block_arguments(5)[0]
    plain = stream.materialise(0, tensors)(hidden, **arguments)
    bias = torch.randn(32)
    torch.testing.assert_close(stream.materialise(0, tensors | {"model.layers.0.mlp.down_proj.bias": bias})(hidden, **arguments), plain + bias)
    assert torch.equal(stream.materialise(0, tensors)(hidden, **arguments), plain)


def test_a_dropped_block_holds_no_weights_and_a_lacking_tensor_is_named(tmp_path: Path) -> None:
    stream = BlockStream(read_source(make_checkpoint(tmp_path, "mixtral")))
    tensors = stream.block_tensors(0)
    first, second = stream.materialise(0, tensors), stream.materialise(0, tensors)
    assert not list(first.parameters())
    assert list(second.parameters())
    stream.drop(0)
    assert not list(second.parameters())
    del tensors["model.layers.0.block_sparse_moe.experts.2.w3.weight"]
    with pytest.raises(ValueError, match=r"block 0 lacks .*experts\.2\.w3"):
        stream.materialise(0, tensors)


def test_blocks_are_held_while_asked_for_and_as_long_as_there_is_room(tmp_path: Path) -> None:
    stream = BlockStream(read_source(make_checkpoint(tmp_path, "llama")))
    first = stream.block_tensors(0)
    size = sum(tensor.nbytes for tensor in first.values())

    def held(index: int) -> bool:
        once, again = stream.block_tensors(index), stream.block_tensors(index)
        once.clear()  # what a caller does with them is its own
        return all(tensor is stream.block_tensors(index).get(name) for name, tensor in again.items())

    with stream.holding_blocks(size + 1) as reads_again:
        assert reads_again
        assert held(0)
        assert not held(1)
        assert all(torch.equal(tensor, stream.block_tensors(0)[name]) for name, tensor in first.items())
    assert not held(0)
    with stream.holding_blocks() as reads_again:
        assert not reads_again  # a mapped file counts as held
        assert held(0) == (stream.device.type == "cuda")
    with stream.holding_blocks(size * len(stream)) as reads_again:
        assert not reads_again


def test_the_next_blocks_bytes_are_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read_source(make_checkpoint(tmp_path, "llama", max_shard_size=20_000))
    stream, asked = BlockStream(source), set()
    monkeypatch.setattr(
        os, "posix_fadvise", lambda file, start, length, advice: asked.add((str(Path(f"/proc/self/fd/{file}").readlink()), start, length, advice))
    )
    stream.materialise(1, stream.block_tensors(1))
    following = [entry for name, entry in source.tensors.items() if name.startswith("model.layers.2.")]
    assert asked == {(str(entry.file), entry.begin, entry.end - entry.begin, os.POSIX_FADV_WILLNEED) for entry in following}
    asked.clear()
    stream.materialise(2, stream.block_tensors(2))
    assert asked == set()


# ------------------------------------------------------------------------- experts


@pytest.mark.parametrize("model_type", MIXTURES)
@torch.no_grad()
def test_each_expert_sees_the_tokens_that_the_router_sends_it(model_type: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, model_type)
    model, tokens = load_model(folder), some_tokens()
    sent: list[Tensor] = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda module, args, output: sent.append(output[2]))
    model(tokens)
    expected = torch.bincount(sent[0].flatten(), minlength=4).tolist()

    stream = BlockStream(read_source(folder))
    block = stream.materialise(0, stream.block_tensors(0))
    seen: dict[int, int] = {}
    for mlp in stream.architecture.mlps(stream.source.config, 0):
        assert mlp.expert is not None

        def count(module: nn.Module, args: tuple[Tensor, ...], number: int = mlp.expert) -> None:
            seen[number] = seen.get(number, 0) + len(args[0])

        block.get_submodule(mlp.down).register_forward_pre_hook(count)
    for hidden in stream.embed(tokens):
        block(hidden, **stream.block_arguments(tokens.shape[1])[0])
    assert sum(expected) == 2 * tokens.numel()
    assert [seen.get(number, 0) for number in range(len(expected))] == expected


def test_dense_blocks_of_a_mixture_are_told_from_the_others() -> None:
    architecture = ARCHITECTURES["qwen3_moe"]
    config = {"num_experts": 3, "intermediate_size": 50, "moe_intermediate_size": 7, "mlp_only_layers": [0], "decoder_sparse_step": 2, "hidden_size": 4}
    assert [architecture.router(config, index) for index in range(4)] == [None, "mlp.gate", None, "mlp.gate"]
    assert [len(architecture.mlps(config, index)) for index in range(4)] == [1, 3, 1, 3]
    assert [architecture.ffn_width(config, index) for index in range(2)] == [50, 7]
    assert [architecture.width_key(config, index) for index in range(2)] == ["intermediate_size", "moe_intermediate_size"]
    assert architecture.mlps(config, 1)[2].linears == ("mlp.experts.2.gate_proj", "mlp.experts.2.up_proj", "mlp.experts.2.down_proj")
    assert architecture.inputs(config, 1)[2:4] == (("mlp.experts.0.gate_proj", "mlp.experts.0.up_proj"), ("mlp.experts.0.down_proj",))


# ------------------------------------------------------- the table and transformers


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_keys_that_are_left_out_mean_what_they_do_in_transformers(model_type: str) -> None:
    architecture, config = ARCHITECTURES[model_type], AutoConfig.for_model(model_type)
    for key, value in {**architecture.defaults, **architecture.needs}.items():
        assert getattr(config, key) == value, key
    for biases in architecture.biases:
        if biases.switch:
            assert architecture.has_bias({}, biases.linears[0]) == getattr(config, biases.switch)
    assert architecture.tied({}) == config.tie_word_embeddings
    optional = {architecture.keys.kv_heads, architecture.keys.head_dim} - {"", *architecture.defaults}
    assert all(getattr(config, key, None) in (None, config.num_attention_heads, config.hidden_size // config.num_attention_heads) for key in optional)


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if VARIANTS[variant][0] in ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")])
def test_layer_types_are_transformers_own(variant: str, tmp_path: Path) -> None:
    folder = make(tmp_path, variant)
    stated = json.loads((folder / "config.json").read_text())
    expected = getattr(AutoConfig.from_pretrained(folder), "layer_types", None)
    assert ARCHITECTURES[stated["model_type"]].layer_types(stated) == expected


@pytest.mark.parametrize(
    "variant",
    ["llama", "qwen2, window", "gemma2", "gemma3_text", "qwen3_moe, a dense block", "qwen3_moe, every other block", "mixtral", "opt", "gpt_neox", "gpt2"],
)
def test_a_model_of_some_blocks_computes_what_these_blocks_do(variant: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", variant)
    source = read_source(folder)
    architecture, kept = ARCHITECTURES[source.model_type], [1, 2]
    stream = BlockStream(source)
    part = make(tmp_path / "part", variant)
    tensors = dict(stream.outer_tensors())
    for place, index in enumerate(kept):
        for name, tensor in stream.block_tensors(index).items():
            tensors[architecture.block_prefix(place) + name.removeprefix(architecture.block_prefix(index))] = tensor
    save_file(tensors, part / "model.safetensors", {"format": "pt"})
    write_json(part / "config.json", architecture.keep_blocks(source.config, kept))

    tokens = some_tokens(rows=1)
    arguments = stream.block_arguments(tokens.shape[1])
    with torch.no_grad():
        (hidden,) = stream.embed(tokens)
        for index in kept:
            hidden = stream.materialise(index, stream.block_tensors(index))(hidden, **arguments[index])
        torch.testing.assert_close(load_model(part)(tokens).logits, stream.logits(hidden), atol=1e-4, rtol=1e-4)


def test_blocks_that_depend_on_their_place_stay() -> None:
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        ARCHITECTURES["gpt2"].keep_blocks({"n_layer": 2, "n_embd": 4, "n_head": 2, "vocab_size": 8, "scale_attn_by_inverse_layer_idx": True}, [1])


def test_bias_slots() -> None:
    slots = {
        model_type: [architecture.slot(linear) is not None for linear in (architecture.attention.output, architecture.mlp.down)]
        for model_type, architecture in ARCHITECTURES.items()
    }
    none, attention, both = [False, False], [True, False], [True, True]
    assert slots == {
        **dict.fromkeys(("mistral", "mixtral", "qwen2", "phi3"), none),
        **dict.fromkeys(("qwen3", "qwen3_moe", "gemma2", "gemma3_text"), attention),
        **dict.fromkeys(("llama", "opt", "gpt_neox", "gpt2"), both),
    }
    slot = ARCHITECTURES["llama"].slot("mlp.down_proj")
    assert slot is not None
    assert (slot.switch, slot.linears) == ("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))


def test_a_text_longer_than_the_position_table_is_refused(tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path, "gpt2", n_positions=64))
    recipe = {"method": "wanda", "sparsity": 0.5, "calibration": {"sequence_length": 64}}
    check_recipe(Recipe.model_validate(recipe | {"evaluation": None}), source)
    with pytest.raises(RecipeError) as refused:
        check_recipe(Recipe.model_validate(recipe | {"evaluation": {"sequence_length": 65}}), source)
    assert (refused.value.code, refused.value.pointer) == ("sequence_too_long", "/evaluation/sequence_length")
