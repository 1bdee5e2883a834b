"""Every method on every model type: what comes out loads, computes what the engine computed, and has exactly the asked sparsity."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import espalier.loader  # noqa: F401  makes from_pretrained build per-layer widths
from app.architecture import ARCHITECTURES
from app.counting import count_parameters, macs_per_token, sparsities
from app.exceptions import RecipeError
from app.recipe import METHODS, MODEL_TYPES, Budget, Evaluation, Fraction, Recipe, Structured
from app.source import Source, check_recipe, read_source
from tests.models import load_model, make_checkpoint, make_text
from worker import evaluation
from worker.blocks import BlockStream
from worker.calibration import StatesOnDevice, forward, measuring
from worker.checkpoint import checkpoint_bytes, finish, read_masks, write_padded
from worker.data import leading_windows, random_windows, tokenize
from worker.evaluation import logits, perplexity
from worker.pipeline import target_of
from worker.pruners import PRUNERS, cfsp, wanda
from worker.pruners.base import Target
from worker.pruning import prune
from worker.state import WalkState
from worker.walk import Pruned, Pruning

FFN, LAYERS = 48, 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"), words=4000)


def recipe_of(method: Any, sparsity: Any, text: Path, **more: Any) -> Recipe:
    calibration = {"source": str(text), "samples": 6, "sequence_length": 32}
    return Recipe.model_validate({"method": method, "sparsity": sparsity, "calibration": calibration, "evaluation": None, **more})


def prune_folder(folder: Path, recipe: Recipe, out: Path, stop_after: int | None = None) -> tuple[Source, Pruned]:
    """Prune and finish a checkpoint in this process; `stop_after` dies like a killed process after so many blocks of all walks."""
    source = read_source(folder)
    check_recipe(recipe, source)
    stream = BlockStream(source)
    tokens = random_windows(tokenize(folder, recipe.calibration.source, {}), recipe.calibration)

    def block_done(done: int, total: int) -> None:
        assert done <= total
        if done == stop_after:
            raise KeyboardInterrupt

    run = Pruning(stream=stream, recipe=recipe, tokens=tokens, state=WalkState.open(out, recipe.model_dump_json()), block_done=block_done)
    target = None if isinstance(recipe.sparsity, Budget) else target_of(recipe, count_parameters(source, []))
    pruned = prune(run, PRUNERS[recipe.method.name], target)
    finish(pruned.folder, source, pruned.kept, recipe.output.layout, recipe.output.dtype, pruned.switches)
    return read_source(pruned.folder), pruned


def widths_of(pruned: Pruned) -> list[int]:
    return [layer.ffn_channels for layer in pruned.layers]


def groups_of(pruned: Pruned) -> list[int]:
    return [layer.kv_groups for layer in pruned.layers]


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


TIED = ("llama", "qwen2", "gemma2", "gemma3_text", "opt", "gpt2")


def check_result(folder: Path, result: Source, pruned: Pruned, scratch: Path, left: Path | None = None) -> Any:
    """What every result must be: loaded by from_pretrained, it computes what the engine computed, generates, and has the parameters that were counted.

    `left` is where it stays, with what it computes, to be loaded by another process.
    """
    model = load_model(pruned.folder).float()
    tokens = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    scratch.mkdir()
    own = logits(BlockStream(result), tokens, scratch)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, own, atol=1e-4, rtol=1e-4)
    if left is not None:
        shutil.copytree(pruned.folder, left / "checkpoint")
        save_file({"tokens": tokens, "logits": own}, left / "expected.safetensors")
    generated = model.generate(tokens[:1, :4], attention_mask=torch.ones(1, 4, dtype=torch.int64), max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert 5 <= generated.shape[1] <= 9
    counted = count_parameters(result, pruned.zeros_after)
    assert counted.all == sum(parameter.numel() for parameter in model.parameters())
    assert sum(layer.weights for layer in pruned.layers) == counted.decoder
    return model


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the matrix leaves its results."""
    return tmp_path_factory.mktemp("matrix")


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_matrix(method: str, model_type: str, layout: str, text: Path, matrix: Path, tmp_path: Path) -> None:
    facts, architecture = METHODS[method][1], ARCHITECTURES[model_type]
    if layout == "per_layer" and not issubclass(METHODS[method][0], Structured):
        with pytest.raises(ValueError, match="per_layer"):
            recipe_of(method, 0.25, text, output={"layout": layout})
        return
    folder = make_checkpoint(tmp_path / "dense", model_type, tied=model_type in TIED, ffn=64, layers=4, hidden=64, heads=8, kv_heads=4)
    asked = {"name": method} | ({"prune_fraction": 0.15, "masks": 8} if method == "bonsai" else {})
    recipe = recipe_of(asked, 0.25, text, output={"layout": layout})
    prunes_groups = method in ("flap", "bonsai")
    refused = model_type not in facts.model_types or (layout == "per_layer" and not architecture.per_layer) or (prunes_groups and architecture.groups_fixed)
    if refused:
        with pytest.raises(RecipeError) as refusal:
            check_recipe(recipe, read_source(folder))
        assert refusal.value.code in ("method_does_not_fit", "layout_not_loadable", "groups_fixed")
        assert model_type in refusal.value.message
        if not prunes_groups or model_type not in facts.model_types or layout == "per_layer":
            return
        recipe = recipe_of(asked | {"units": "ffn"}, {"fraction": 0.25, "of": "decoder"} if method == "bonsai" else 0.25, text)
    result, pruned = prune_folder(folder, recipe, tmp_path / "work")
    model = check_result(folder, result, pruned, tmp_path / "scratch", left=matrix / f"{method}-{model_type}-{layout}")
    assert model.config.tie_word_embeddings == (model_type in TIED)

    before = count_parameters(read_source(folder), pruned.zeros_before)
    after = count_parameters(result, pruned.zeros_after)
    reached = sparsities(before, after)
    if not facts.structured:
        assert after.decoder == before.decoder
        assert reached.decoder == pytest.approx(0.25, abs=0.002)
        stream = BlockStream(result)
        for index in range(len(stream)):
            tensors = stream.block_tensors(index)
            for name in architecture.linears(result.config, index):
                assert float((stream.weight(tensors, index, name) == 0).float().mean()) == pytest.approx(0.25, abs=0.002), name
    elif method == "depth":
        assert len(pruned.kept) == len(BlockStream(result)) == 3
        assert reached.decoder == pytest.approx(0.25)
    elif method == "experts":
        experts = architecture.expert_count(read_source(folder).config)
        assert {layer.experts for layer in pruned.kept} == {experts - round(experts * 0.25)}
        assert reached.ffn == pytest.approx(round(experts * 0.25) / experts)
    else:
        assert isinstance(recipe.sparsity, Fraction)
        of = recipe.denominator if recipe.sparsity.of == "method" else recipe.sparsity.of
        assert getattr(reached, of) == pytest.approx(0.25, abs=0.005)
        if layout == "uniform":
            assert len(set(zip(widths_of(pruned), groups_of(pruned), strict=True))) == 1


def test_the_matrix_loads_in_a_fresh_process(matrix: Path) -> None:
    """The results of the test before this one, all of them: the same logits, and they generate."""
    left = sorted(folder.name for folder in matrix.iterdir())
    assert {name.partition("-")[0] for name in left} == set(METHODS)
    assert {name.split("-")[1] for name in left} == set(MODEL_TYPES)
    command = [sys.executable, "-m", "tests.worker.reload", str(matrix)]
    loaded = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout) == left


@pytest.mark.parametrize("model_type", [name for name, architecture in ARCHITECTURES.items() if not architecture.groups_fixed])
@pytest.mark.parametrize("units", ["attention", "both"])
def test_kv_groups_go_whole(units: str, model_type: str, text: Path, tmp_path: Path) -> None:
    """Three of four groups stay; 6 heads don't divide 64, so a Llama is written as the same computation under another name."""
    folder = make_checkpoint(tmp_path / "dense", model_type, ffn=64, hidden=64, heads=8, kv_heads=4)
    result, pruned = prune_folder(folder, recipe_of({"name": "cfsp", "units": units}, 0.25, text), tmp_path / "work")
    model = check_result(folder, result, pruned, tmp_path / "scratch")
    groups = 4 if model_type.startswith("gemma") else 3  # Gemma's config refuses 6 heads
    assert groups_of(pruned) == [groups] * LAYERS
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2 * groups, groups)
    assert model.config.model_type == ("mistral" if model_type == "llama" else model_type)
    reached = sparsities(count_parameters(read_source(folder), []), count_parameters(result, []))
    assert reached.decoder == pytest.approx(0.25, abs=0.005) if units == "both" else reached.ffn == 0


@pytest.mark.parametrize("model_type", [name for name, architecture in ARCHITECTURES.items() if architecture.per_layer])
def test_layers_of_different_groups_load_and_pad(model_type: str, text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", model_type, ffn=FFN, layers=4, hidden=64, heads=8, kv_heads=4)
    recipe = recipe_of(
        {"name": "cfsp", "units": "both"}, 0.3, text, allocation={"name": "given", "sparsities": [0.0, 0.25, 0.5, 0.45]}, output={"layout": "per_layer"}
    )
    result, pruned = prune_folder(folder, recipe, tmp_path / "work")
    check_result(folder, result, pruned, tmp_path / "scratch")
    assert groups_of(pruned) == [4, 3, 2, 2]
    assert len(set(widths_of(pruned))) > 1
    write_padded(pruned.folder, tmp_path / "padded")
    tokens = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        one, other = (load_model(place)(tokens).logits for place in (pruned.folder, tmp_path / "padded"))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_patterns_hold_in_every_group_and_masks_agree(method: str, text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "qwen2")
    _, pruned = prune_folder(folder, recipe_of(method, "2:4", text), tmp_path / "work")
    model = load_model(pruned.folder)
    masks: dict[str, Tensor] = {}
    for file in sorted(pruned.folder.glob("masks-*.safetensors")):
        masks |= read_masks(file)
    weights = dict(model.named_parameters())
    assert len(masks) == 7 * LAYERS
    for name, mask in masks.items():
        assert mask.reshape(-1, 4).sum(1).tolist() == [2] * (mask.numel() // 4)
        assert not weights[name][~mask].any()
        assert weights[name][mask].all()


# ------------------------------------------------- against the whole model, in the plainest way


def inputs_of(model: Any, module: nn.Module, tokens: Tensor) -> Tensor:
    """(B*T, C) inputs of a module when the whole model runs."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_wanda_is_what_pruning_the_whole_model_layer_by_layer_gives(model_type: str, text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", model_type)
    recipe = recipe_of("wanda", 0.5, text)
    _, pruned = prune_folder(folder, recipe, tmp_path / "work")
    ours = dict(load_model(pruned.folder).named_parameters())

    tokens = random_windows(tokenize(folder, str(text), {}), recipe.calibration)
    model = load_model(folder)
    for layer in model.model.layers:
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        norms = {name: inputs_of(model, module, tokens).norm(dim=0) for name, module in linears.items()}
        for name, module in linears.items():
            score = module.weight.detach().abs() * norms[name]
            order = score.argsort(dim=1)[:, : round(score.shape[1] * 0.5)]
            module.weight.data.scatter_(1, order, 0)
    different = sum(int(((ours[name] != 0) != (parameter != 0)).sum()) for name, parameter in model.named_parameters() if "proj" in name)
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if "proj" in name)
    assert different <= total * 1e-4  # a pair of all but equal scores may be told apart otherwise


def test_cfsp_is_what_its_formulas_give_on_the_whole_model(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "mistral")
    recipe = recipe_of({"name": "cfsp", "mode": "code"}, 0.3, text, allocation={"name": "coarse", "strength": 0.05}, output={"layout": "per_layer"})
    _, pruned = prune_folder(folder, recipe, tmp_path / "work")

    tokens = random_windows(tokenize(folder, str(text), {}), recipe.calibration)
    model = load_model(folder)
    moved, norms = [], []
    states: list[tuple[Tensor, Tensor]] = []
    handles = [layer.register_forward_hook(lambda module, args, output: states.append((args[0], output))) for layer in model.model.layers]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    for layer, (x, y) in zip(model.model.layers, states, strict=True):
        cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
        moved.append(float(cosine.clamp(-1, 1).arccos().mean()) / math.pi)
        norms.append(inputs_of(model, layer.mlp.down_proj, tokens).square().mean(0))
    assert [layer.importance for layer in pruned.layers] == pytest.approx(moved, abs=1e-5)
    mean = sum(moved) / LAYERS
    z = [1 / (1 + math.exp(-0.05 * (value - mean) * 13.1072)) for value in moved]
    for layer, width in zip(range(LAYERS), widths_of(pruned), strict=True):
        assert width == pytest.approx(z[layer] / (sum(z) / LAYERS) * 0.7 * FFN, abs=1)
        kept = norms[layer].topk(width).indices.sort().values
        expected = model.model.layers[layer].mlp.down_proj.weight[:, kept]
        torch.testing.assert_close(dict(load_model(pruned.folder).named_parameters())[f"model.layers.{layer}.mlp.down_proj.weight"], expected)


def test_measured_norms_are_root_mean_squares_and_stop_spares_the_last_linear() -> None:
    block = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(5, 4)})
    calls = []
    block["b"].register_forward_hook(lambda *_: calls.append(1))

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = block

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.parts["b"](self.parts["a"](x))
            return outputs

    chain, x = Chain(), torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))
    with measuring(chain, ("parts.a", "parts.b"), frozenset({"norm"}), stop="parts.b") as measured:
        forward(chain, {}, x, None)
    torch.testing.assert_close(measured["parts.a"].norm, x.square().mean((0, 1)).sqrt())
    torch.testing.assert_close(measured["parts.b"].norm, block["a"](x).square().mean((0, 1)).sqrt())
    assert calls == []


def test_perplexity_is_transformers_own(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    windows = leading_windows(tokenize(folder, str(text), {}), Evaluation(source=str(text), windows=5, sequence_length=40))
    model = load_model(folder)
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in windows]
    assert perplexity(BlockStream(read_source(folder)), windows, tmp_path) == pytest.approx(math.exp(sum(losses) / 5), rel=1e-4)


def test_hidden_states_on_a_device_pass_as_those_in_files(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    windows = leading_windows(tokenize(folder, str(text), {}), Evaluation(source=str(text), windows=5, sequence_length=40))
    stream = BlockStream(read_source(folder))
    value = perplexity(stream, windows, tmp_path)
    monkeypatch.setattr(evaluation, "passing_states", lambda work, shape, device, name="hidden", rooms=2: StatesOnDevice(shape, device, rooms))
    assert perplexity(stream, windows, tmp_path / "none") == value


def test_parameters_and_macs_are_counted_by_every_denominator(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "qwen2", tied=False, layers=2, hidden=32, ffn=48, heads=4, kv_heads=2, vocab=320)
    source, model = read_source(folder), load_model(folder)
    counted = count_parameters(source, [])
    attention, ffn = 2 * (2 * 32 * 32 + 2 * 32 * 16), 2 * 3 * 32 * 48
    assert counted.all == sum(parameter.numel() for parameter in model.parameters())
    assert counted.non_embedding == counted.all - 2 * 320 * 32
    assert (counted.decoder, counted.ffn, counted.ffn_channels) == (attention + ffn, ffn, 96)
    assert macs_per_token(source) == attention + ffn + 320 * 32


@pytest.mark.parametrize(("of", "share"), [("ffn", 0.2), ("decoder", 0.2), ("non_embedding", 0.2), ("all", 0.1)])
def test_a_fraction_of_any_denominator_is_met(of: str, share: float, text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama", ffn=480)
    recipe = recipe_of("cfsp", {"fraction": share, "of": of}, text)
    result, pruned = prune_folder(folder, recipe, tmp_path / "work")
    reached = sparsities(count_parameters(read_source(folder), []), count_parameters(result, []))
    assert getattr(reached, of) == pytest.approx(share, abs=0.002)
    assert len(set(widths_of(pruned))) == 1


def test_a_target_beyond_what_the_method_prunes_is_refused(tmp_path: Path, text: Path) -> None:
    dense = count_parameters(read_source(make_checkpoint(tmp_path / "dense", "llama")), [])
    with pytest.raises(RecipeError, match="more than all") as refused:
        target_of(recipe_of("cfsp", {"fraction": 0.95, "of": "decoder"}, text), dense)
    assert refused.value.code == "target_unreachable"
    assert target_of(recipe_of("wanda", "1:4", text), dense) == Target(0.75, (1, 4))
    with pytest.raises(RecipeError, match="more than all"):
        target_of(recipe_of({"name": "cfsp", "units": "attention"}, {"fraction": 0.1, "of": "ffn"}, text), dense)


def test_widths_keep_to_the_recipes_bounds(tmp_path: Path, text: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    bounds = {"name": "coarse", "max_layer_share": 0.75}
    bounded = recipe_of({"name": "cfsp", "multiple_of": 4}, 0.4, text, allocation=bounds, output={"layout": "per_layer"})
    widths = widths_of(prune_folder(folder, bounded, tmp_path / "work")[1])
    assert all(width <= 36 and width % 4 == 0 for width in widths)
    assert sum(widths) == 88  # 3 · 48 · 0.6 = 86.4, to a multiple of 4
    narrow = recipe_of("cfsp", 0.2, text, allocation={"name": "coarse", "max_layer_share": 0.5}, output={"layout": "per_layer"})
    with pytest.raises(RecipeError) as refused:
        prune_folder(folder, narrow, tmp_path / "narrow")
    assert refused.value.code == "target_unreachable"


def test_almost_everything_removed_still_leaves_a_channel_and_a_group(tmp_path: Path, text: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    assert widths_of(prune_folder(folder, recipe_of("cfsp", 0.995, text), tmp_path / "ffn")[1]) == [1, 1, 1]
    for layout in ("uniform", "per_layer"):
        pruned = prune_folder(folder, recipe_of("flap", 0.995, text, output={"layout": layout}), tmp_path / layout)[1]
        assert (widths_of(pruned), groups_of(pruned)) == ([1, 1, 1], [1, 1, 1])


# ------------------------------------------------------------------ allocation


@pytest.mark.parametrize("method", ["wanda", "cfsp", "flap"])
@pytest.mark.parametrize("allocation", ["uniform", "coarse", "owl", "zscore", "given"])
def test_every_allocation_meets_the_total(allocation: str, method: str, text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama", ffn=96, heads=8, kv_heads=8, hidden=64)
    asked: Any = {"name": "given", "sparsities": [0.2, 0.3, 0.4]} if allocation == "given" else allocation
    layout = {} if method == "wanda" else {"output": {"layout": "per_layer"}}
    result, pruned = prune_folder(folder, recipe_of(method, 0.3, text, allocation=asked, **layout), tmp_path / "work")
    reached = sparsities(count_parameters(read_source(folder), pruned.zeros_before), count_parameters(result, pruned.zeros_after))
    assert (reached.ffn if method == "cfsp" else reached.decoder) == pytest.approx(0.3, abs=0.01)
    left = [layer.weights - layer.zeros for layer in pruned.layers]
    if allocation == "uniform":
        assert max(left) - min(left) <= (2 + 2) * 8 * 64 + 3 * 64  # a KV group and a channel
    else:
        assert len(set(left)) > 1
    if allocation == "given":
        assert left[0] > left[1] > left[2]


# ----------------------------------------------------------------------- FLAP


def test_compensation_puts_the_mean_into_biases_that_the_config_then_has(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama", hidden=64, heads=8, kv_heads=4)
    recipe = recipe_of("flap", 0.5, text)
    result, pruned = prune_folder(folder, recipe, tmp_path / "work")
    model = check_result(folder, result, pruned, tmp_path / "scratch")
    assert model.config.attention_bias
    assert model.config.mlp_bias
    tokens = random_windows(tokenize(folder, str(text), {}), recipe.calibration)
    dense = load_model(folder)
    pruned_down, dense_down = model.model.layers[0].mlp.down_proj, dense.model.layers[0].mlp.down_proj
    kept = [int((dense_down.weight == column[:, None]).all(0).nonzero()) for column in pruned_down.weight.T]
    removed = [index for index in range(FFN) if index not in kept]
    mean = inputs_of(dense, dense_down, tokens).mean(0)
    torch.testing.assert_close(pruned_down.bias, dense_down.weight[:, removed] @ mean[removed], atol=1e-4, rtol=1e-4)
    assert not model.model.layers[0].self_attn.q_proj.bias.any()
    assert pruned.notes == []


@pytest.mark.parametrize(("model_type", "lacking"), [("mistral", "mlp.down_proj, self_attn.o_proj"), ("qwen3", "mlp.down_proj"), ("opt", None), ("gpt2", None)])
def test_compensation_is_left_out_with_a_reason_where_there_is_no_place(model_type: str, lacking: str | None, text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", model_type, hidden=64, heads=8, kv_heads=4)
    method = {"name": "flap", "units": "ffn" if ARCHITECTURES[model_type].groups_fixed else "both"}
    result, pruned = prune_folder(folder, recipe_of(method, 0.5, text), tmp_path / "work")
    check_result(folder, result, pruned, tmp_path / "scratch")
    assert len(pruned.notes) == (lacking is not None)
    if lacking:
        assert lacking in pruned.notes[0]
        assert model_type in pruned.notes[0]


def test_a_llama_that_becomes_a_mistral_gets_no_biases(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama", hidden=64, heads=8, kv_heads=4)
    result, pruned = prune_folder(folder, recipe_of("flap", 0.25, text), tmp_path / "work")
    assert check_result(folder, result, pruned, tmp_path / "scratch").config.model_type == "mistral"
    assert "llama" in pruned.notes[0]


# ---------------------------------------------------------- depth and experts


def test_depth_drops_the_blocks_that_turn_least(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "gemma2", layers=4)
    result, pruned = prune_folder(folder, recipe_of("depth", 0.5, text), tmp_path / "work")
    check_result(folder, result, pruned, tmp_path / "scratch")
    moved = [layer.importance or 0 for layer in pruned.layers]
    kept = sorted(sorted(range(4), key=lambda index: moved[index])[2:])
    assert [layer.index for layer in pruned.kept] == kept
    types = ["sliding_attention", "full_attention"] * 2
    assert result.config["layer_types"] == [types[index] for index in kept]
    dense, model = load_model(folder), load_model(pruned.folder)
    for place, index in enumerate(kept):
        assert torch.equal(model.model.layers[place].mlp.down_proj.weight, dense.model.layers[index].mlp.down_proj.weight)


def test_experts_stay_by_their_weighted_outputs(text: Path, tmp_path: Path) -> None:
    """Saliency by the whole model, token by token."""
    folder = make_checkpoint(tmp_path / "dense", "mixtral", layers=2)
    recipe = recipe_of("experts", 0.5, text)
    result, pruned = prune_folder(folder, recipe, tmp_path / "work")
    check_result(folder, result, pruned, tmp_path / "scratch")
    dense = load_model(folder)
    tokens = random_windows(tokenize(folder, str(text), {}), recipe.calibration)
    mixture = dense.model.layers[0].mlp
    inputs = inputs_of(dense, mixture, tokens)
    shares = (inputs @ mixture.gate.weight.T).softmax(-1)
    top, chosen = shares.topk(2, dim=-1)
    top = top / top.sum(-1, keepdim=True)
    gate, up = mixture.experts.gate_up_proj.chunk(2, dim=1)
    saliency = []
    for expert in range(4):
        reached = (chosen == expert).any(-1)
        x, share = inputs[reached], (top * (chosen == expert)).sum(-1)[reached]
        out = (torch.nn.functional.silu(x @ gate[expert].T) * (x @ up[expert].T)) @ mixture.experts.down_proj[expert].T
        saliency.append(float((out.norm(dim=-1) * share).mean().detach()))
    kept = sorted(sorted(range(4), key=lambda expert: saliency[expert])[2:])
    assert torch.equal(load_model(pruned.folder).model.layers[0].mlp.experts.down_proj, mixture.experts.down_proj[kept])


def test_a_token_needs_as_many_experts_as_the_router_asks(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "mixtral", layers=2)
    with pytest.raises(RecipeError) as refused:
        prune_folder(folder, recipe_of("experts", 0.75, text), tmp_path / "work")
    assert refused.value.code == "target_unreachable"


# -------------------------------------------------------------------- budgets


@pytest.mark.parametrize("method", ["cfsp", {"name": "flap", "units": "both"}, "depth"])
@pytest.mark.parametrize("bound", ["target_parameters", "target_bytes"])
def test_a_size_is_met_by_the_least_pruning(bound: str, method: Any, text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama", layers=4, ffn=96, hidden=64, heads=8, kv_heads=4, dtype=torch.bfloat16)
    dense = count_parameters(read_source(folder), [])
    asked = int(dense.all * 0.75) * (2 if bound == "target_bytes" else 1)
    result, pruned = prune_folder(folder, recipe_of(method, {bound: asked}, text), tmp_path / "work")
    check_result(folder, result, pruned, tmp_path / "scratch")
    reached = checkpoint_bytes(pruned.folder) if bound == "target_bytes" else count_parameters(result, []).all
    a_layer = (dense.decoder / 4 if method == "depth" else 3 * 64 * 4) * (2 if bound == "target_bytes" else 1)
    headers = 2000 if bound == "target_bytes" else 0
    assert asked - a_layer - headers <= reached <= asked


def test_a_size_that_cannot_be_met_is_refused(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    dense = count_parameters(read_source(folder), []).all
    for asked, hint in ((1000, "least that it can leave"), (dense, "less than the dense model")):
        with pytest.raises(RecipeError) as refused:
            prune_folder(folder, recipe_of("cfsp", {"target_parameters": asked}, text), tmp_path / str(asked))
        assert refused.value.code == "target_unreachable"
        assert hint in refused.value.hint


# ----------------------------------------------- on the pruned model's inputs


def test_scores_on_pruned_inputs_are_those_of_the_model_pruned_so_far(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    recipe = recipe_of({"name": "cfsp", "mode": "code", "inputs": "pruned"}, 0.5, text)
    result, pruned = prune_folder(folder, recipe, tmp_path / "work")
    check_result(folder, result, pruned, tmp_path / "scratch")
    tokens = random_windows(tokenize(folder, str(text), {}), recipe.calibration)
    model, ours = load_model(folder), load_model(pruned.folder)
    for layer, sliced in zip(model.model.layers, ours.model.layers, strict=True):
        kept = inputs_of(model, layer.mlp.down_proj, tokens).norm(dim=0).topk(24).indices.sort().values
        torch.testing.assert_close(sliced.mlp.down_proj.weight, layer.mlp.down_proj.weight[:, kept])
        keep = torch.zeros(FFN)
        keep[kept] = 1
        layer.mlp.down_proj.weight.data *= keep


@pytest.mark.parametrize("share", [0.9, 0.4])
def test_a_size_is_met_where_a_bound_on_widths_asks_for_pruning_itself(share: float, text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama", layers=4, ffn=96)
    dense = count_parameters(read_source(folder), [])
    bounded = {"allocation": {"name": "coarse", "max_layer_share": share}, "output": {"layout": "per_layer"}}
    asked = dense.all - int(dense.ffn * 0.7)
    result, pruned = prune_folder(folder, recipe_of("cfsp", {"target_parameters": asked}, text, **bounded), tmp_path / "work")
    assert max(widths_of(pruned)) <= 96 * share
    assert asked - 3 * 32 * 2 <= count_parameters(result, []).all <= asked


# ---------------------------------------------------------------- restoration


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "mixtral"])
def test_least_squares_brings_outputs_nearer_to_the_dense_blocks(model_type: str, text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", model_type, hidden=64, heads=8, kv_heads=4)
    units = "ffn" if ARCHITECTURES[model_type].groups_fixed else "both"
    tokens = random_windows(tokenize(folder, str(text), {}), recipe_of("cfsp", 0.3, text).calibration)
    errors = []
    for restoration in (None, "least_squares"):
        recipe = recipe_of({"name": "cfsp", "units": units}, 0.3, text, restoration=restoration)
        result, pruned = prune_folder(folder, recipe, tmp_path / str(restoration))
        check_result(folder, result, pruned, tmp_path / f"scratch-{restoration}")
        with torch.no_grad():
            states = [load_model(place)(tokens, output_hidden_states=True).hidden_states[1] for place in (folder, pruned.folder)]
        errors.append(float((states[0] - states[1]).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_an_ffn_takes_back_what_the_blocks_before_it_lost(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    recipe = recipe_of("cfsp", 0.4, text)
    tokens = random_windows(tokenize(folder, str(text), {}), recipe.calibration)
    errors = []
    for drift in (0.0, 1.0):
        restored = recipe_of("cfsp", 0.4, text, restoration={"name": "least_squares", "ridge": 0.1, "drift": drift})
        result, pruned = prune_folder(folder, restored, tmp_path / str(drift))
        check_result(folder, result, pruned, tmp_path / f"scratch-{drift}")
        with torch.no_grad():
            states = [load_model(place)(tokens, output_hidden_states=True).hidden_states[1:3] for place in (folder, pruned.folder)]
        errors.append([float((dense - left).square().mean()) for dense, left in zip(*states, strict=True)])
    assert errors[1][0] == pytest.approx(errors[0][0])  # nothing is lost before the first
    assert errors[1][1] < 0.95 * errors[0][1]


@pytest.mark.parametrize(
    ("model_type", "method"),
    [("llama", {"name": "cfsp"}), ("llama", {"name": "flap", "units": "ffn"}), ("gpt2", {"name": "cfsp"}), ("mixtral", {"name": "cfsp"})],
)
def test_of_low_scores_those_channels_go_that_others_can_make_up_for(model_type: str, method: dict[str, Any], text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", model_type, hidden=32, ffn=96)
    calibration = {"source": str(text), "samples": 64, "sequence_length": 32}
    tokens = random_windows(tokenize(folder, str(text), {}), recipe_of("cfsp", 0.4, text, calibration=calibration).calibration)
    errors, kept = [], []
    for reselect in (False, True):
        restoration = {"name": "least_squares", "ridge": 0.5, "drift": 0.0, "reselect": reselect}
        result, pruned = prune_folder(folder, recipe_of(method, 0.4, text, restoration=restoration, calibration=calibration), tmp_path / str(reselect))
        check_result(folder, result, pruned, tmp_path / f"scratch-{reselect}")
        with torch.no_grad():
            states = [load_model(place)(tokens, output_hidden_states=True).hidden_states[1] for place in (folder, pruned.folder)]
        errors.append(float((states[0] - states[1]).square().mean()))
        kept.append(BlockStream(result).tensors(result.tensors))
    assert errors[1] < 0.98 * errors[0]
    assert {name: tensor.shape for name, tensor in kept[0].items()} == {name: tensor.shape for name, tensor in kept[1].items()}


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_swaps_bring_outputs_nearer_to_the_dense_blocks(sparsity: Any, text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "qwen2")
    tokens = random_windows(tokenize(folder, str(text), {}), recipe_of("wanda", 0.3, text).calibration)
    errors, zeros = [], []
    for restoration in (None, {"name": "swaps", "rounds": 20}):
        result, pruned = prune_folder(folder, recipe_of("wanda", sparsity, text, restoration=restoration), tmp_path / str(restoration is None))
        zeros.append(count_parameters(result, pruned.zeros_after).decoder_zeros)
        with torch.no_grad():
            states = [load_model(place)(tokens, output_hidden_states=True).hidden_states[1] for place in (folder, pruned.folder)]
        errors.append(float((states[0] - states[1]).square().mean()))
    assert errors[1] < 0.95 * errors[0]
    assert zeros[0] == zeros[1]


# ------------------------------------------------------------------ durability


WALKS: list[tuple[Any, dict[str, Any], int]] = [  # method, more of the recipe, walks
    ("magnitude", {}, 1),
    ("wanda", {}, 1),
    ("wanda", {"allocation": "owl"}, 2),
    ("sparsegpt", {}, 1),
    ("cfsp", {"output": {"layout": "per_layer"}}, 1),
    ("cfsp", {"restoration": "least_squares"}, 2),
    ({"name": "cfsp", "inputs": "pruned"}, {}, 2),
    ("flap", {"output": {"layout": "per_layer"}, "restoration": "least_squares"}, 2),
    ("depth", {}, 1),
]


@pytest.mark.parametrize(("method", "more", "walks"), WALKS)
def test_a_killed_walk_goes_on_at_its_last_block_and_ends_bit_identical(method: Any, more: dict[str, Any], walks: int, text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama", dtype=torch.bfloat16)
    recipe = recipe_of(method, 0.5, text, **more)
    undisturbed = shard_bytes(prune_folder(folder, recipe, tmp_path / "one")[1].folder)
    for finished in range(1, walks * LAYERS + 1):
        with pytest.raises(KeyboardInterrupt):
            prune_folder(folder, recipe, tmp_path / "two", stop_after=finished)
        assert WalkState.open(tmp_path / "two", recipe.model_dump_json()).finished == finished
    assert shard_bytes(prune_folder(folder, recipe, tmp_path / "two")[1].folder) == undisturbed


def test_state_that_does_not_belong_or_is_damaged_is_not_gone_on_with(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    recipe = recipe_of("wanda", 0.5, text)
    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        prune_folder(folder, recipe, work, stop_after=2)
    for case in ("fingerprint", "shard", "hidden", "json"):
        copy = tmp_path / case
        shutil.copytree(work, copy)
        fingerprint = recipe.model_dump_json()
        if case == "fingerprint":
            fingerprint = "another"
        elif case == "json":
            (copy / "state.json").write_text("{")
        else:
            victim = copy / ("hidden.0.bin" if case == "hidden" else "checkpoint/model-00001-of-00004.safetensors")
            content = bytearray(victim.read_bytes())
            content[-1] ^= 1
            victim.write_bytes(content)
        state = WalkState.open(copy, fingerprint)
        assert state.finished == 0
        assert state.refused
        assert [entry.name for entry in copy.iterdir()] == ["state.json"]
    assert WalkState.open(work, recipe.model_dump_json()).finished == 2


def test_a_shard_that_a_killed_process_was_writing_is_no_part_of_the_checkpoint(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    recipe = recipe_of("wanda", 0.5, text)
    undisturbed = {file.name for file in prune_folder(folder, recipe, tmp_path / "one")[1].folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        prune_folder(folder, recipe, tmp_path / "two", stop_after=2)
    (tmp_path / "two" / "checkpoint" / ".tmpJ3xQ0a").write_bytes(b"half a shard")  # as safetensors names what it writes
    pruned = prune_folder(folder, recipe, tmp_path / "two")[1]
    assert {file.name for file in pruned.folder.iterdir()} == undisturbed


def test_a_damaged_input_of_the_dense_model_is_not_gone_on_with(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    recipe = recipe_of("cfsp", 0.5, text, restoration="least_squares")
    with pytest.raises(KeyboardInterrupt):
        prune_folder(folder, recipe, tmp_path / "work", stop_after=LAYERS + 1)
    with (tmp_path / "work" / "dense.1.bin").open("r+b") as stream:
        stream.write(b"?")
    assert WalkState.open(tmp_path / "work", recipe.model_dump_json()).refused == "dense.1.bin is damaged"


def test_weights_with_nan_are_refused(tmp_path: Path, text: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(tmp_path / "dense", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"layers\.1\.mlp\.up_proj") as refused:
        prune_folder(folder, recipe_of("magnitude", 0.5, text), tmp_path / "work")
    assert refused.value.code == "weights_not_finite"


def test_scores_have_the_shapes_of_their_weights() -> None:
    weight, norm = torch.rand(6, 8), torch.rand(8)
    assert wanda.score(weight, norm).shape == (6, 8)
    assert cfsp.fine_importance(torch.rand(6, 8), (torch.rand(8, 6), torch.rand(8, 6)), norm, "paper").shape == (8,)
