"""PERP: a small part of the parameters is trained, adapters merge as they say, every zero stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import cross_entropy

from app.architecture import ARCHITECTURES
from app.exceptions import RecipeError
from app.recipe import Recipe
from app.recovery import Perp
from app.report import Report
from app.source import Source, TensorEntry, check_recipe, read_source
from tests.models import load_model, make_checkpoint, make_text
from tests.worker.test_pipeline import engine, finished
from tests.worker.test_recovery import TOKENS, logits_of, masks_of, pruned_folder, recipe_of, retrained, stir, stored, student_of
from tests.worker.test_recovery_pipeline import write_recipe
from worker.blocks import BlockStream
from worker.data import tokenize
from worker.recovery import RECOVERIES
from worker.recovery.perp import choose_rank, modules_of_model
from worker.recovery.retrain import retrain, write_back
from worker.recovery.text import TrainingText, training_text

SMALL: dict[str, Any] = {"sequence_length": 16, "steps": 4, "batch": 4, "held_out": 2, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"), words=4000)


def text_of(folder: Path, text: Path, config: Perp) -> TrainingText:
    return training_text(tokenize(folder, str(text), {}), config)


# -------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora", "lora_prune"])
@pytest.mark.parametrize(
    ("model_type", "tied", "method", "sparsity"),
    [("llama", True, "magnitude", 0.5), ("gpt2", True, "wanda", "2:4"), ("opt", True, "magnitude", "2:4"), ("phi3", False, "wanda", 0.5)],
)
def test_a_merge_keeps_every_zero(model_type: str, tied: bool, method: str, sparsity: Any, adapter: str, text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", model_type, tied=tied, layers=2)
    source, pruned = pruned_folder(dense, recipe_of(text, method, sparsity), tmp_path / "work")
    masks, before = masks_of(source.folder), stored(source.folder)
    student = student_of(source, pruned, masks)
    unadapted = logits_of(student.model)
    adapted = RECOVERIES["perp"](student, Perp.model_validate({"train": "published", "adapter": adapter, "rank": 3, "alpha": 4.5}))
    assert torch.equal(logits_of(student.model), unadapted)
    assert adapted.jumps == (adapter == "lora_prune")
    stir(adapted)
    trained = logits_of(student.model)
    assert (trained - unadapted).abs().max() > 0.05
    adapted.merge()
    merged = logits_of(student.model)
    if adapter == "lora_prune":
        assert (merged - trained).abs().max() > 0.05
    else:
        assert torch.equal(merged, trained)
    counted = write_back(student, pruned)
    torch.testing.assert_close(logits_of(load_model(source.folder)), merged, atol=1e-5, rtol=1e-5)

    after = stored(source.folder)
    assert set(masks) == {f"{name}.weight" for block in student.linears() for name in block}
    assert all(torch.equal(after[name] != 0, mask) for name, mask in masks.items())
    assert counted.zeros_after == pruned.zeros_after
    vectors = {name for name, tensor in before.items() if tensor.dim() == 1}
    assert {name for name in before if not torch.equal(before[name], after[name])} == vectors | set(masks)
    assert after.keys() == before.keys()
    assert student.architecture.tied(read_source(source.folder).config) == tied


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # (C_out, C_in), and (C_in, C_out)
@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora", "lora_prune"])
def test_adapters_are_what_the_paper_says(adapter: str, model_type: str, text: Path, tmp_path: Path) -> None:
    source, pruned = pruned_folder(make_checkpoint(tmp_path / "dense", model_type, layers=1), recipe_of(text, "magnitude", 0.5), tmp_path / "work")
    masks = masks_of(source.folder)
    student = student_of(source, pruned, masks)
    before = {name: parameter.detach().clone() for name, parameter in student.model.named_parameters()}
    adapted = RECOVERIES["perp"](student, Perp.model_validate({"train": "adapters", "adapter": adapter, "rank": 2, "alpha": 3}))
    stir(adapted)
    matrices = {name: parameter.detach().double().clone() for name, parameter in adapted.parameters.items()}
    adapted.merge()
    for name, mask in masks.items():
        linear = name.removesuffix(".weight")
        ends = (".lora_A.default.weight", ".lora_B.default.weight") if adapter == "lora_prune" else (".down", ".up")
        down, up = (next(matrix for key, matrix in matrices.items() if key.startswith(f"{linear}.") and key.endswith(end)) for end in ends)
        product = torch.einsum("or,ri->oi", up, down)
        product = product.T if model_type == "gpt2" else product
        weight = before[name].double()
        expected = weight * product if adapter == "scale_lora" else weight + 3 / 2 * product * mask
        torch.testing.assert_close(student.model.get_parameter(name).detach().double(), expected, atol=1e-6, rtol=1e-6)


def test_scale_lora_uses_its_rank(text: Path, tmp_path: Path) -> None:
    source, pruned = pruned_folder(make_checkpoint(tmp_path / "dense", "llama", layers=1), recipe_of(text, "magnitude", 0.5), tmp_path / "work")
    student = student_of(source, pruned, masks_of(source.folder))
    adapted = RECOVERIES["perp"](student, Perp(train=("adapters",), adapter="scale_lora", rank=3))
    optimizer = torch.optim.AdamW(adapted.parameters.values(), lr=0.01)
    for _ in range(3):
        cross_entropy(student.model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = dict(student.model.named_parameters())
    up, down = (found[f"model.layers.0.mlp.up_proj.parametrizations.weight.0.{name}"].detach() for name in ("up", "down"))
    assert int(torch.linalg.matrix_rank(up @ down, rtol=1e-4)) == 3


@pytest.mark.parametrize("adapter", ["mask_lora", "scale_lora", "lora_prune"])
def test_any_adapter_fits_a_structured_result(adapter: str, text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", "llama", tied=True, layers=3)
    source, pruned = pruned_folder(dense, recipe_of(text, output={"layout": "per_layer"}), tmp_path / "work")
    student = student_of(source, pruned)
    adapted = RECOVERIES["perp"](student, Perp.model_validate({"train": "all", "adapter": adapter, "rank": 2}))
    assert not adapted.jumps
    stir(adapted)
    trained = logits_of(student.model)
    adapted.merge()
    torch.testing.assert_close(logits_of(student.model), trained, atol=1e-4, rtol=1e-5)
    write_back(student, pruned)
    torch.testing.assert_close(logits_of(load_model(source.folder)), trained, atol=1e-4, rtol=1e-5)


def test_a_tied_head_is_trained_as_its_own_matrix(text: Path, tmp_path: Path) -> None:
    source, pruned = pruned_folder(make_checkpoint(tmp_path / "dense", "gpt2", tied=True), recipe_of(text, "magnitude", 0.5), tmp_path / "work")
    before, student = stored(source.folder), student_of(source, pruned, masks_of(source.folder))
    adapted = RECOVERIES["perp"](student, Perp(train=("head",), rank=2))
    stir(adapted)
    trained = logits_of(student.model)
    adapted.merge()
    write_back(student, pruned)
    after = stored(source.folder)
    assert after.keys() == before.keys() | {"lm_head.weight"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    change = after["lm_head.weight"] - before["transformer.wte.weight"]
    assert int(torch.linalg.matrix_rank(change, rtol=1e-3)) == 2
    torch.testing.assert_close(logits_of(load_model(source.folder)), trained, atol=1e-4, rtol=1e-5)


# ------------------------------------------------------------------ what is trained

# llama: per layer q, o 32 × 32, k, v 16 × 32, gate, up, down 48 × 32; 2 norms of 32, and the final one. gpt2: 96, 32, 48 and 32 biases, norms with biases.
LLAMA = {"biases": 0, "norms": 5 * 32, "head": 3 * (320 + 32), "adapters": 2 * 3 * (2 * 64 + 2 * 48 + 3 * 80)}
GPT2 = {
    "biases": 2 * (96 + 32 + 48 + 32 + 2 * 32) + 32,
    "norms": 5 * 2 * 32,
    "head": 3 * (320 + 32),
    "adapters": 2 * 3 * (32 + 96 + 32 + 32 + 2 * 80),
}
SHARED = {"llama": 0, "gpt2": 5 * 32}  # norms' biases are among both


@pytest.mark.parametrize("train", ["norms", "biases+norms", "head", "adapters", "published", "all"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_gradients_go_where_they_were_asked_and_are_counted(model_type: str, train: str, text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", model_type, tied=True, layers=2)
    source, pruned = pruned_folder(dense, recipe_of(text, "magnitude", 0.5), tmp_path / "work")
    student = student_of(source, pruned, masks_of(source.folder))
    config = Perp.model_validate({"train": train, "rank": 3})
    adapted = RECOVERIES["perp"](student, config)
    cross_entropy(student.model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    assert {name for name, parameter in student.model.named_parameters() if parameter.grad is not None} == adapted.parameters.keys()
    counts = LLAMA if model_type == "llama" else GPT2
    both = SHARED[model_type] if {"biases", "norms"} <= set(config.train) else 0
    assert adapted.count == sum(counts[part] for part in config.train) - both
    assert ("The model has no biases, so none were trained." in adapted.notes) == (model_type == "llama" and "biases" in config.train)


def headers_of(model_type: str, config: dict[str, Any]) -> Source:
    """A checkpoint that is all names and shapes."""
    architecture, config = ARCHITECTURES[model_type], {"model_type": model_type, **config}
    shapes = dict(architecture.outer_shapes(config))
    for index in range(architecture.dimensions(config).layers):
        shapes |= {architecture.block_prefix(index) + name: shape for name, shape in architecture.block_shapes(config, index)}
    return Source(Path("nowhere"), config, {name: TensorEntry(Path("file"), name, "F32", shape, 0, 0) for name, shape in shapes.items()})


SMOL = {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152}
OPT = {"num_hidden_layers": 32, "hidden_size": 2560, "num_attention_heads": 32, "ffn_dim": 10240, "vocab_size": 50272, "word_embed_proj_dim": 2560}


@pytest.mark.parametrize(
    ("model_type", "config", "everything", "rank", "trained"),
    [
        # norms, and rank 1 of 10,176 parameters in each of 30 blocks: SmolLM2-135M
        ("llama", SMOL | {"tie_word_embeddings": True}, 134_515_008, 1, 61 * 576 + 30 * 10_176),
        # biases, norms, and rank 5 of 46,080 parameters in each of 32 blocks: OPT-2.7B
        ("opt", OPT, 2_651_596_800, 5, 32 * (5 * 2560 + 10240 + 4 * 2560) + 2 * 2560 + 5 * 32 * 46_080),
    ],
)
def test_the_published_preset_trains_a_third_of_a_percent(model_type: str, config: dict[str, Any], everything: int, rank: int, trained: int) -> None:
    source = headers_of(model_type, config)
    sizes = {name: math.prod(entry.shape) for name, entry in source.tensors.items()}
    assert sum(sizes.values()) == everything
    assert choose_rank(source, Perp()) == rank
    modules = modules_of_model(source)
    vectors = {f"{name}.{kind}" for name in modules.norms for kind in ("weight", "bias")} | {f"{name}.bias" for name in modules.linears}
    adapters = rank * sum(sum(source.tensors[f"{name}.weight"].shape) for name in modules.linears)
    assert sum(sizes.get(name, 0) for name in vectors) + adapters == trained
    assert trained / (everything + adapters) <= 0.0035 < (trained + adapters / rank) / (everything + adapters + adapters / rank)
    assert choose_rank(source, Perp(rank=7)) == 7


# ----------------------------------------------------------------------- the training


@pytest.mark.parametrize(("model_type", "adapter"), [("llama", "mask_lora"), ("gpt2", "scale_lora"), ("llama", "lora_prune")])
def test_it_lowers_the_loss_and_goes_on_after_a_break(model_type: str, adapter: str, text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", model_type, tied=True, layers=2)
    config = Perp.model_validate(SMALL | {"steps": 6, "checkpoint_every": 2, "rank": 2, "adapter": adapter, "train": "all"})
    training, stream = text_of(dense, text, config), BlockStream(read_source(dense))
    results = []
    for name, stop_after in (("one", None), ("two", 3)):
        source, pruned = pruned_folder(dense, recipe_of(text, "wanda", "2:4"), tmp_path / name)
        masks = masks_of(source.folder)

        found = retrained(config, source, pruned, stream, training, tmp_path / f"{name}-state", stop_after)
        after = stored(source.folder)
        assert all(torch.equal(after[name] != 0, mask) for name, mask in masks.items())
        assert (found.merged is None) == (adapter != "lora_prune")
        if found.merged is not None:
            assert training.held_out is not None
            assert found.trained.best is not None
            with torch.no_grad():
                logits = load_model(source.folder)(training.held_out).logits
            by_hand = float(cross_entropy(logits[:, :-1].flatten(0, 1), training.held_out[:, 1:].flatten()))
            assert found.merged == pytest.approx(by_hand, abs=1e-5)
            assert abs(found.merged - found.trained.best) > 1e-4
        results.append((found.trained.best, found.parameters, after))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(results[1][2][name], tensor) for name, tensor in results[0][2].items())


def test_zeros_survive_another_type(text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", "llama", tied=True, dtype=torch.bfloat16)
    source, pruned = pruned_folder(dense, recipe_of(text, "wanda", 0.6), tmp_path / "work")
    masks, config = masks_of(source.folder), Perp.model_validate(SMALL)
    found = retrain(config, source.folder, pruned, BlockStream(read_source(dense)), text_of(dense, text, config), None, tmp_path / "state", lambda step: None)
    after = stored(source.folder)
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    assert all(torch.equal(after[name] != 0, mask) for name, mask in masks.items())
    assert found.pruned.zeros_after == pruned.zeros_after
    assert found.pruned.notes[-1] == "The model has no biases, so none were trained."


def test_a_job_retrains_a_magnitude_pruned_model(text: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "dense", "llama", tied=True, layers=2)
    recovery = {"name": "perp", "source": "mine", **SMALL, "adapter": "lora_prune"}
    recipe = write_recipe(tmp_path, method="magnitude", sparsity=0.5, output={}, recovery=recovery)
    code, _, stderr = finished(engine(recipe, source, tmp_path / "out", text, "--text", "other", str(make_text(tmp_path, words=500, seed=1))))
    assert code == 0, stderr
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_bytes())
    recovered = report.recovery
    assert recovered is not None
    assert recovered.trained_parameters == 5 * 32 + 2 * (2 * 64 + 2 * 48 + 3 * 80)
    assert recovered.held_out_loss_merged is not None
    assert f"to {recovered.held_out_loss_merged:.4f}" in next(note for note in report.notes if note.startswith("Merging under the masks"))
    assert "The model has no biases, so none were trained." in report.notes
    assert report.sparsity.decoder == 0.5
    assert report.after is not None
    assert report.pruned is not None
    assert report.after.perplexity is not None
    assert report.pruned.perplexity is not None
    assert report.after.perplexity.value < report.pruned.perplexity.value


# ------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("recovery", "message"),
    [
        ({"train": []}, "at least 1 item"),
        ({"train": "bias"}, "is none of"),
        ({"train": ["norms", "norms"]}, "names a part twice"),
        ({"parts": "attention_ffn"}, "only in reconstruction"),
        ({"mode": "reconstruct", "train": "head"}, "the head lies outside"),
        ({"mode": "reconstruct", "distillation": {}}, "leave distillation out"),
        ({"adapter": "lora"}, "Input should be"),
    ],
)
def test_what_a_recipe_may_not_ask(recovery: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe_of("mine", "wanda", 0.5, recovery={"name": "perp", **recovery})


def test_what_a_method_leaves_no_room_for() -> None:
    with pytest.raises(ValidationError, match="nothing to reconstruct"):
        recipe_of("mine", "depth", 0.25, recovery={"name": "perp", "mode": "reconstruct"})
    with pytest.raises(ValidationError, match="leave head out"):
        recipe_of("mine", "cfsp", {"target_bytes": 1000}, recovery={"name": "perp", "train": "all"})


def test_biases_alone_need_a_model_that_has_some(tmp_path: Path) -> None:
    llama, gpt2 = (read_source(make_checkpoint(tmp_path / model_type, model_type)) for model_type in ("llama", "gpt2"))
    only_biases, more = ({"name": "perp", "train": train} for train in ("biases", "biases+norms"))
    with pytest.raises(RecipeError) as refused:
        check_recipe(recipe_of("mine", "wanda", 0.5, recovery=only_biases), llama)
    assert (refused.value.code, refused.value.pointer) == ("no_biases", "/recovery/train")
    check_recipe(recipe_of("mine", "wanda", 0.5, recovery=only_biases), gpt2)
    check_recipe(recipe_of("mine", "wanda", 0.5, recovery=more), llama)
    biased = read_source(make_checkpoint(tmp_path / "biased", "llama", attention_bias=True))
    check_recipe(recipe_of("mine", "wanda", 0.5, recovery=only_biases), biased)


def test_short_forms_are_expanded_and_survive_json() -> None:
    for recovery in ("perp", {"name": "perp", "train": "all"}, {"name": "perp", "mode": "reconstruct", "parts": "attention_ffn"}):
        recipe = recipe_of("mine", "wanda", 0.5, recovery=recovery)
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert Perp().train == ("biases", "norms", "adapters")
