"""Every method on every model type: what comes out loads, computes what the engine computed, and has exactly the asked sparsity."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espalier.loader  # noqa: F401  makes from_pretrained build per-layer widths
from app.exceptions import RecipeError
from app.recipe import METHODS, MODEL_TYPES, Evaluation, Recipe
from app.source import Source, read_source
from tests.models import load_model, make_checkpoint, make_text
from worker.blocks import BlockStream
from worker.calibration import forward, measuring
from worker.checkpoint import finish, read_masks
from worker.data import leading_windows, random_windows, tokenize
from worker.evaluation import count_parameters, logits, macs_per_token, perplexity, sparsities
from worker.pipeline import target_of
from worker.pruners import PRUNERS, cfsp, wanda
from worker.pruners.base import Target
from worker.pruning import Pruned, Pruning, prune
from worker.state import WalkState

FFN, LAYERS = 48, 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"), words=4000)


def recipe_of(method: Any, sparsity: Any, text: Path, **more: Any) -> Recipe:
    calibration = {"source": str(text), "samples": 6, "sequence_length": 32}
    return Recipe.model_validate({"method": method, "sparsity": sparsity, "calibration": calibration, "evaluation": None, **more})


def prune_folder(folder: Path, recipe: Recipe, out: Path, stop_after: int | None = None) -> tuple[Source, Pruned]:
    """Prune and finish a checkpoint in this process; `stop_after` dies like a killed process after that block."""
    source = read_source(folder)
    stream = BlockStream(source)
    tokens = random_windows(tokenize(folder, recipe.calibration.source, {}), recipe.calibration)

    def block_done(index: int) -> None:
        if index == stop_after:
            raise KeyboardInterrupt

    pruned = prune(
        Pruning(
            stream=stream,
            config=recipe.method,
            target=target_of(recipe, count_parameters(source, [])),
            tokens=tokens,
            layout=recipe.output.layout,
            dtype=None if recipe.output.dtype == "source" else getattr(torch, recipe.output.dtype),
            state=WalkState.open(out, recipe.model_dump_json()),
            block_done=block_done,
        ),
        PRUNERS[recipe.method.name],
    )
    finish(pruned.folder, source, pruned.widths, recipe.output.layout, recipe.output.dtype)
    return read_source(pruned.folder), pruned


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("method", METHODS)
def test_the_matrix(method: str, model_type: str, layout: str, text: Path, tmp_path: Path) -> None:
    facts = METHODS[method][1]
    if layout == "per_layer" and not facts.structured:
        with pytest.raises(ValueError, match="per_layer"):
            recipe_of(method, 0.25, text, output={"layout": layout})
        return
    folder = make_checkpoint(tmp_path / "dense", model_type, tied=model_type in ("llama", "qwen2"), ffn=FFN, layers=LAYERS)
    recipe = recipe_of(method, 0.25, text, output={"layout": layout})
    result, pruned = prune_folder(folder, recipe, tmp_path / "work")

    model = load_model(pruned.folder)
    tokens = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    (tmp_path / "scratch").mkdir()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, logits(BlockStream(result), tokens, tmp_path / "scratch"), atol=1e-4, rtol=1e-4)
    generated = model.generate(tokens[:1, :4], attention_mask=torch.ones(1, 4, dtype=torch.int64), max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert 5 <= generated.shape[1] <= 9

    before = count_parameters(read_source(folder), pruned.zeros_before)
    after = count_parameters(result, pruned.zeros_after)
    reached = sparsities(before, after)
    if facts.structured:
        assert sum(pruned.widths) == round(FFN * 0.75) * LAYERS
        assert (len(set(pruned.widths)) == 1) == (layout == "uniform")
        assert reached.ffn == pytest.approx(0.25)
        assert after.all == sum(parameter.numel() for parameter in model.parameters())
    else:
        assert after.decoder == before.decoder
        assert reached.decoder == pytest.approx(0.25, abs=0.002)
        for layer in model.model.layers:
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    assert float((module.weight == 0).float().mean()) == pytest.approx(0.25, abs=0.002), name
    assert model.config.tie_word_embeddings == (model_type in ("llama", "qwen2"))


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
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
    recipe = recipe_of({"name": "cfsp", "mode": "code", "allocation_strength": 0.05}, 0.3, text, output={"layout": "per_layer"})
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
    for layer, width in zip(range(LAYERS), pruned.widths, strict=True):
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
    with measuring(chain, ("parts.a", "parts.b"), stop="parts.b") as measured:
        forward(chain, {}, x, None)
        norms = measured()
    torch.testing.assert_close(norms["parts.a"], x.square().mean((0, 1)).sqrt())
    torch.testing.assert_close(norms["parts.b"], block["a"](x).square().mean((0, 1)).sqrt())
    assert calls == []


def test_perplexity_is_transformers_own(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    windows = leading_windows(tokenize(folder, str(text), {}), Evaluation(source=str(text), windows=5, sequence_length=40))
    model = load_model(folder)
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in windows]
    assert perplexity(BlockStream(read_source(folder)), windows, tmp_path) == pytest.approx(math.exp(sum(losses) / 5), rel=1e-4)


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
    assert len(set(pruned.widths)) == 1


def test_a_target_beyond_what_the_method_prunes_is_refused(tmp_path: Path, text: Path) -> None:
    dense = count_parameters(read_source(make_checkpoint(tmp_path / "dense", "llama")), [])
    with pytest.raises(RecipeError, match="more than all") as refused:
        target_of(recipe_of("cfsp", {"fraction": 0.95, "of": "decoder"}, text), dense)
    assert refused.value.code == "target_unreachable"
    assert target_of(recipe_of("wanda", "1:4", text), dense) == Target(0.75, (1, 4))


def test_widths_keep_to_the_methods_bounds(tmp_path: Path, text: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    bounded = recipe_of({"name": "cfsp", "max_layer_width": 0.75, "multiple_of": 4}, 0.4, text, output={"layout": "per_layer"})
    widths = prune_folder(folder, bounded, tmp_path / "work")[1].widths
    assert all(width <= 36 and width % 4 == 0 for width in widths)
    assert sum(widths) == 88  # 3 · 48 · 0.6 = 86.4, to a multiple of 4
    narrow = recipe_of({"name": "cfsp", "max_layer_width": 0.5}, 0.2, text)
    with pytest.raises(RecipeError) as refused:
        prune_folder(folder, narrow, tmp_path / "narrow")
    assert refused.value.code == "target_unreachable"


def test_almost_everything_removed_still_leaves_a_channel(tmp_path: Path, text: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    assert prune_folder(folder, recipe_of("cfsp", 0.995, text), tmp_path / "work")[1].widths == [1, 1, 1]


# ------------------------------------------------------------------ durability


@pytest.mark.parametrize("method", ["cfsp", "wanda", "magnitude"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_killed_walk_goes_on_at_its_last_block_and_ends_bit_identical(method: str, block: int, text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama", dtype=torch.bfloat16)
    recipe = recipe_of(method, 0.5, text, output={"layout": "per_layer"} if method == "cfsp" else {})
    undisturbed = shard_bytes(prune_folder(folder, recipe, tmp_path / "one")[1].folder)
    with pytest.raises(KeyboardInterrupt):
        prune_folder(folder, recipe, tmp_path / "two", stop_after=block)
    assert len(json.loads((tmp_path / "two" / "state.json").read_text())["blocks"]) == block + 1
    assert shard_bytes(prune_folder(folder, recipe, tmp_path / "two")[1].folder) == undisturbed


def test_state_that_does_not_belong_or_is_damaged_is_not_gone_on_with(text: Path, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "dense", "llama")
    recipe = recipe_of("wanda", 0.5, text)
    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        prune_folder(folder, recipe, work, stop_after=1)
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
        assert state.blocks == []
        assert state.refused
        assert [entry.name for entry in copy.iterdir()] == ["state.json"]
    assert len(WalkState.open(work, recipe.model_dump_json()).blocks) == 2


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
    assert cfsp.fine_importance(torch.rand(6, 8), torch.rand(8, 6), torch.rand(8, 6), norm, "paper").shape == (8,)
