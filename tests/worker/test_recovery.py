"""What comes back after pruning: adapters merge exactly, zeros stay, only what was chosen is trained."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from app.counting import count_parameters
from app.exceptions import EspalierError, RecipeError
from app.recipe import Recipe
from app.recovery import Full, LoRA, RecoveryConfig
from app.source import Source, check_recipe, read_source
from tests.models import load_model, make_checkpoint, make_text
from worker.blocks import BlockStream
from worker.checkpoint import finish, read_masks
from worker.data import TokenizedText, random_windows, tokenize
from worker.pipeline import target_of
from worker.pruners import PRUNERS
from worker.pruning import prune
from worker.recovery import RECOVERIES
from worker.recovery.adapters import MaskLoRA
from worker.recovery.base import Adapted, Student
from worker.recovery.lora import share_ranks
from worker.recovery.retrain import Retrained, coarse_importance, load, retrain, write_back
from worker.recovery.text import TrainingText, training_text
from worker.state import WalkState
from worker.training import Step
from worker.walk import Pruned, Pruning

TOKENS = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(1))
SMALL: dict[str, Any] = {"sequence_length": 16, "steps": 3, "batch": 4, "micro_batch": 2, "held_out": 2, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"), words=4000)


def recipe_of(text: Path | str, method: Any = "cfsp", sparsity: Any = 0.25, **more: Any) -> Recipe:
    calibration = {"source": str(text), "samples": 4, "sequence_length": 32}
    return Recipe.model_validate({"method": method, "sparsity": sparsity, "calibration": calibration, "evaluation": None, **more})


def pruned_folder(folder: Path, recipe: Recipe, work: Path) -> tuple[Source, Pruned]:
    """Prune a checkpoint in this process; what is left, written as the engine writes it."""
    source = read_source(folder)
    tokens = random_windows(tokenize(folder, recipe.calibration.source, {}), recipe.calibration)
    run = Pruning(stream=BlockStream(source), recipe=recipe, tokens=tokens, state=WalkState.open(work, "job"), block_done=lambda done, total: None)
    pruned = prune(run, PRUNERS[recipe.method.name], target_of(recipe, count_parameters(source, [])))
    finish(pruned.folder, source, pruned.kept, recipe.output.layout, recipe.output.dtype, pruned.switches)
    return read_source(pruned.folder), pruned


def retrained(
    config: RecoveryConfig, source: Source, pruned: Pruned, stream: BlockStream, training: TrainingText, work: Path, stop_after: int | None
) -> Retrained:
    """Train without a teacher, broken off after a step and taken up again where one is named; the held-out loss has fallen."""

    def tell(step: Step) -> None:
        if step.done == stop_after:
            raise KeyboardInterrupt

    if stop_after is not None:
        with pytest.raises(KeyboardInterrupt):
            retrain(config, source.folder, pruned, stream, training, None, work, tell)
    found = retrain(config, source.folder, pruned, stream, training, None, work, lambda step: None)
    assert found.trained.before is not None
    assert found.trained.best is not None
    assert found.trained.best < found.trained.before
    return found


def student_of(source: Source, pruned: Pruned, masks: dict[str, Tensor] | None = None, importance: list[float] | None = None) -> Student:
    measured = importance or [float(layer.importance or 0) for layer in pruned.kept]
    return Student(load(source, torch.device("cpu"), gradient_checkpointing=False), source, masks or {}, lambda: measured)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    logits: Tensor = model.eval()(TOKENS, use_cache=False).logits
    return logits


def stir(adapted: Adapted) -> None:
    """What a training might do: every trained parameter moves."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def masks_of(folder: Path) -> dict[str, Tensor]:
    return {name: mask for file in sorted(folder.glob("masks-*")) for name, mask in read_masks(file).items()}


def stored(folder: Path) -> dict[str, Tensor]:
    source = read_source(folder)
    return BlockStream(source).tensors(source.tensors)


# ---------------------------------------------------------------------------- LoRA

FAMILIES = [  # tied or not, layout, head trained or not
    ("llama", True, "uniform", False),
    ("llama", True, "per_layer", True),
    ("llama", False, "uniform", True),
    ("qwen3", False, "per_layer", False),
    ("gemma2", True, "uniform", True),
    ("phi3", False, "uniform", False),
    ("opt", True, "uniform", True),
    ("gpt_neox", False, "uniform", True),
    ("gpt2", True, "uniform", False),
    ("gpt2", True, "uniform", True),
    ("mixtral", False, "uniform", True),
    ("qwen3_moe", False, "uniform", False),
]


@pytest.mark.parametrize(("model_type", "tied", "layout", "head"), FAMILIES)
def test_a_merged_adapter_computes_the_same(model_type: str, tied: bool, layout: str, head: bool, text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", model_type, tied=tied, layers=2)
    source, pruned = pruned_folder(dense, recipe_of(text, output={"layout": layout}), tmp_path / "work")
    student, before = student_of(source, pruned), stored(source.folder)
    unadapted = logits_of(student.model)
    adapted = RECOVERIES["lora"](student, LoRA(rank=3, alpha=5, ranks="importance" if layout == "per_layer" else "equal", head=head))
    assert torch.equal(logits_of(student.model), unadapted)  # B is zero
    stir(adapted)
    trained = logits_of(student.model)
    assert (trained - unadapted).abs().max() > 0.05
    adapted.merge()
    torch.testing.assert_close(logits_of(student.model), trained, atol=1e-4, rtol=1e-5)
    write_back(student, pruned)
    torch.testing.assert_close(logits_of(load_model(source.folder)), trained, atol=1e-4, rtol=1e-5)

    after = stored(source.folder)
    linears = {f"{name}.weight" for block in student.linears() for name in block}
    of_head = {student.architecture.head} if head else set()
    assert {name for name in before if not torch.equal(before[name], after[name])} == linears | (of_head & before.keys())
    assert after.keys() == before.keys() | of_head
    assert all(after[name].shape == before[name].shape and after[name].dtype == before[name].dtype for name in before)
    assert student.architecture.tied(read_source(source.folder).config) == (tied and not head)


def test_weights_of_another_type_stay_of_that_type(text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", "llama", tied=True, dtype=torch.bfloat16)
    source, pruned = pruned_folder(dense, recipe_of(text), tmp_path / "work")
    student = student_of(source, pruned)
    adapted = RECOVERIES["lora"](student, LoRA(rank=2, head=True))
    stir(adapted)
    adapted.merge()
    write_back(student, pruned)
    for name, tensor in stored(source.folder).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, student.model.get_parameter(name).detach().bfloat16())


MASKED = [  # sparsity, ranks, head trained or not
    ("llama", 0.5, "importance", True),
    ("gpt2", "2:4", "equal", False),
    ("opt", 0.7, "importance", True),
    ("phi3", "2:4", "equal", False),
    ("mixtral", 0.5, "importance", True),
]


@pytest.mark.parametrize(("model_type", "sparsity", "ranks", "head"), MASKED)
def test_a_product_has_the_zeros_that_pruning_left(model_type: str, sparsity: Any, ranks: str, head: bool, text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", model_type, tied=model_type != "phi3", layers=2)
    source, pruned = pruned_folder(dense, recipe_of(text, "wanda", sparsity), tmp_path / "work")
    masks, before = masks_of(source.folder), stored(source.folder)
    student = student_of(source, pruned, masks, importance=[1.0, 3.0])
    unadapted = logits_of(student.model)
    adapted = RECOVERIES["lora"](student, LoRA.model_validate({"rank": 4, "alpha": 6.0, "dropout": 0.3, "ranks": ranks, "head": head}))
    assert torch.equal(logits_of(student.model), unadapted)
    assert not adapted.jumps
    stir(adapted)
    trained = logits_of(student.model)
    matrices = {name: parameter.detach().clone() for name, parameter in adapted.parameters.items()}
    assert not torch.equal(student.model.train()(TOKENS, use_cache=False).logits, student.model(TOKENS, use_cache=False).logits)  # dropout
    student.model.eval()
    adapted.merge()
    assert torch.equal(logits_of(student.model), trained)
    counted = write_back(student, pruned)

    after = stored(source.folder)
    assert counted.zeros_after == pruned.zeros_after
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(masks)
    for name, mask in masks.items():
        assert torch.equal(after[name] != 0, mask)
        down, up = (matrices[f"{name.removesuffix('.weight')}.parametrizations.weight.0.{side}"] for side in ("down", "up"))
        assert len(down) == up.shape[1] == (4 if ranks == "equal" else 6 if name.startswith(student.architecture.block_prefix(1)) else 2)
        product = down.T @ up.T if student.architecture.transposed else up @ down
        torch.testing.assert_close(after[name], before[name] + 6 / 4 * product * mask, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits_of(load_model(source.folder)), trained, atol=1e-4, rtol=1e-5)


def test_dropout_leaves_out_entries_of_a_product_and_keeps_its_mean() -> None:
    adapter = MaskLoRA(torch.zeros(30, 40), torch.arange(40).expand(30, 40) < 20, rank=2, scale=1.0, transposed=False, dropout=0.25)
    with torch.no_grad():
        adapter.up.fill_(1.0)
    whole = adapter.eval()(torch.zeros(30, 40))
    torch.manual_seed(0)
    dropped = torch.stack([adapter.train()(torch.zeros(30, 40)) for _ in range(400)])[..., :20]
    assert whole[:, 20:].count_nonzero() == 0
    assert float((dropped == 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(dropped.mean(0), whole[:, :20], atol=0.15, rtol=0.0)
    torch.testing.assert_close(dropped[dropped != 0], (whole[:, :20] / 0.75).expand_as(dropped)[dropped != 0])


@pytest.mark.parametrize("targets", ["all", "attention", "ffn"])
def test_gradients_go_where_they_were_asked_and_are_counted(targets: str, text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", "llama", tied=True, layers=2, hidden=32, ffn=48, heads=4, kv_heads=2)
    source, pruned = pruned_folder(dense, recipe_of(text), tmp_path / "work")
    student = student_of(source, pruned)
    adapted = RECOVERIES["lora"](student, LoRA.model_validate({"rank": 3, "targets": targets}))
    cross_entropy(student.model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    with_gradient = {name for name, parameter in student.model.named_parameters() if parameter.grad is not None}
    assert with_gradient == adapted.parameters.keys()
    # q and o are 32 × 32, k and v 16 × 32; gate, up and down 32 × 36, since a quarter of 48 channels is gone
    attention, ffn = 2 * (32 + 32) + 2 * (16 + 32), 3 * (32 + 36)
    assert adapted.count == 2 * 3 * {"all": attention + ffn, "attention": attention, "ffn": ffn}[targets]


def test_the_settings_reach_the_adapters(text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", "llama", layers=3)
    source, pruned = pruned_folder(dense, recipe_of(text), tmp_path / "work")
    student = student_of(source, pruned, importance=[1.0, 2.0, 6.0])
    RECOVERIES["lora"](student, LoRA(rank=6, alpha=3, dropout=0.25, ranks="importance"))
    for index, rank in enumerate((2, 4, 12)):
        layer = student.model.get_submodule(f"model.layers.{index}.self_attn.q_proj")
        assert layer.lora_A["default"].weight.shape == (rank, 32)
        assert layer.scaling["default"] == 0.5  # alpha / rank of all blocks alike
        assert layer.lora_dropout["default"].p == 0.25


@pytest.mark.parametrize(("model_type", "more"), [("mixtral", {}), ("qwen3_moe", {"mlp_only_layers": [1]})])
def test_experts_are_trained_by_their_stored_names(model_type: str, more: dict[str, Any], tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "dense", model_type, **more))
    fused, split = load_model(source.folder), load(source, torch.device("cpu"), gradient_checkpointing=False)
    assert {name: parameter.shape for name, parameter in split.named_parameters()} == {name: entry.shape for name, entry in source.tensors.items()}
    torch.testing.assert_close(logits_of(split), logits_of(fused), atol=1e-5, rtol=1e-5)
    for model in (fused, split.requires_grad_(True)):
        cross_entropy(model(TOKENS, use_cache=False).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    expected, found = fused.model.layers[0].mlp.experts, split.model.layers[0].mlp.experts
    outer = torch.stack([torch.cat([getattr(expert, name).weight.grad for name in (expert.gate, expert.up)]) for expert in found])
    torch.testing.assert_close(outer, expected.gate_up_proj.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.stack([getattr(expert, expert.down).weight.grad for expert in found]), expected.down_proj.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(split.model.layers[0].mlp.gate.weight.grad, fused.model.layers[0].mlp.gate.weight.grad, atol=1e-6, rtol=1e-5)


# --------------------------------------------------------------------------- ranks


def test_ranks_follow_importance_at_equal_cost() -> None:
    assert share_ranks([1.0, 1.0, 1.0], [10, 10, 10], [99] * 3, 4) == [4, 4, 4]
    assert share_ranks([1.0, 2.0, 3.0], [10, 10, 10], [99] * 3, 4) == [2, 4, 6]
    assert sum(share_ranks([0.31, 0.05, 0.07, 0.22], [10] * 4, [99] * 4, 16)) == 64
    assert share_ranks([1.0, 1000.0], [10, 10], [99] * 2, 2) == [1, 3]  # none is left without
    assert share_ranks([1.0, 1.0, 1000.0], [10, 10, 10], [9, 9, 5], 3) == [2, 2, 5]  # what one can't use goes to the others


@pytest.mark.parametrize("seed", range(5))
def test_ranks_of_unequal_layers_keep_the_number_of_parameters(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    importance = (torch.rand(12, generator=generator) + 0.1).tolist()
    costs = torch.randint(50, 100, (12,), generator=generator).tolist()
    ranks = share_ranks(importance, costs, [1000] * 12, 8)
    spent = sum(cost * rank for cost, rank in zip(costs, ranks, strict=True))
    assert 8 * sum(costs) - min(costs) < spent <= 8 * sum(costs)
    scale = 8 * sum(costs) / sum(cost * value for cost, value in zip(costs, importance, strict=True))
    assert all(abs(rank - scale * value) < 1.5 for rank, value in zip(ranks, importance, strict=True))


def test_importance_is_measured_where_the_pruning_did_not(text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", "llama", layers=4)
    pruned = pruned_folder(dense, recipe_of(text, "depth", 0.25), tmp_path / "work")[1]
    stream = BlockStream(read_source(dense))
    assert coarse_importance(pruned, stream, TOKENS, tmp_path / "scratch") == [layer.importance for layer in pruned.kept]
    unknown = Pruned(**{**vars(pruned), "layers": [layer.model_copy(update={"importance": None}) for layer in pruned.layers]})
    with torch.no_grad():
        *states, _ = load_model(dense)(TOKENS, output_hidden_states=True).hidden_states
    cosines = [torch.cosine_similarity(before.double(), after.double(), dim=-1) for before, after in pairwise(states)]
    angles = [float(cosine.clamp(-1, 1).arccos().mean()) / torch.pi for cosine in cosines]
    measured = coarse_importance(unknown, stream, TOKENS, tmp_path / "scratch")
    kept = [layer.index for layer in pruned.kept]
    assert len(measured) == 3
    for index, value in zip(kept, measured, strict=True):
        if index < len(angles):  # transformers gives the last block's output only normed
            assert value == pytest.approx(angles[index], abs=1e-4)


# ---------------------------------------------------------------- the whole training


def text_of(folder: Path, text: Path, config: LoRA | Full) -> TrainingText:
    return training_text(tokenize(folder, str(text), {}), config)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_full_retraining_keeps_every_zero(model_type: str, text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", model_type, tied=True)
    source, pruned = pruned_folder(dense, recipe_of(text, "wanda", "2:4"), tmp_path / "work")
    masks = masks_of(source.folder)
    before, config = stored(source.folder), Full.model_validate(SMALL | {"weight_decay": 0.1})
    told: list[Step] = []
    training = text_of(dense, text, config)
    found = retrain(config, source.folder, pruned, BlockStream(read_source(dense)), training, None, tmp_path / "recovery", told.append)
    after = stored(source.folder)
    assert [step.done for step in told] == [1, 2, 3]
    assert found.trained.before is not None
    assert found.trained.best is not None
    assert found.trained.best < found.trained.before
    for name, tensor in after.items():
        if name in masks:
            assert int((tensor != 0).sum()) == tensor.numel() // 2
            assert torch.equal(tensor != 0, masks[name])
            assert torch.equal(masks[name], before[name] != 0)
            assert not torch.equal(tensor, before[name])
        else:
            assert not torch.equal(tensor, before[name])
    zeros = sum(mask.numel() - int(mask.sum()) for mask in masks.values())
    everything = sum(tensor.numel() for tensor in before.values())
    assert (found.parameters, found.share) == (everything - zeros, (everything - zeros) / everything)
    assert [block.all for block in found.pruned.zeros_after] == [block.all for block in pruned.zeros_after] == [layer.zeros for layer in found.pruned.layers]
    load_model(source.folder)


def test_a_weight_that_was_kept_and_is_zero_may_change_and_one_that_was_not_may_not(text: Path, tmp_path: Path) -> None:
    source, pruned = pruned_folder(make_checkpoint(tmp_path / "dense", "llama"), recipe_of(text), tmp_path / "work")
    name = "model.layers.0.self_attn.q_proj.weight"
    mask = torch.ones(32, 32, dtype=torch.bool)
    mask[0] = False
    student = student_of(source, pruned, masks={name: mask})
    with torch.no_grad():
        student.model.get_parameter(name)[:2] = 0.0
    adapted = RECOVERIES["full"](student, Full())
    optimizer = torch.optim.AdamW(adapted.parameters.values(), lr=0.01)
    for _ in range(3):
        cross_entropy(student.model(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = student.model.get_parameter(name).detach()
    assert weight[0].count_nonzero() == 0
    assert weight[1].count_nonzero() == 32
    with torch.no_grad():
        student.model.get_parameter(name)[0, 0] = 1.0
    with pytest.raises(EspalierError) as refused:
        write_back(student, pruned)
    assert refused.value.code == "zeros_lost"


@pytest.mark.parametrize(
    ("method", "sparsity", "layout"), [("cfsp", 0.25, "uniform"), ("cfsp", 0.25, "per_layer"), ("wanda", 0.5, "uniform"), ("sparsegpt", "2:4", "uniform")]
)
def test_lora_lowers_the_loss_and_goes_on_after_a_break(method: str, sparsity: Any, layout: str, text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", "llama", tied=True)
    config = LoRA.model_validate(SMALL | {"steps": 6, "checkpoint_every": 2, "rank": 2, "dropout": 0.2, "head": True})
    training, stream = text_of(dense, text, config), BlockStream(read_source(dense))
    results = []
    for name, stop_after in (("one", None), ("two", 3)):
        source, pruned = pruned_folder(dense, recipe_of(text, method, sparsity, output={"layout": layout}), tmp_path / name)
        masks = masks_of(source.folder)
        found = retrained(config, source, pruned, stream, training, tmp_path / f"{name}-state", stop_after)
        assert found.merged is None
        results.append((found.trained.best, stored(source.folder)))
        assert all(torch.equal(results[-1][1][name] != 0, mask) for name, mask in masks.items())
    assert results[0][0] == results[1][0]
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(results[1][1][name], tensor) for name, tensor in results[0][1].items())


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_computing_activations_again_changes_no_gradient(model_type: str, text: Path, tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "dense", model_type))
    gradients = []
    for gradient_checkpointing in (False, True):
        model = load(source, torch.device("cpu"), gradient_checkpointing=gradient_checkpointing).train().requires_grad_(True)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        cross_entropy(model(TOKENS, use_cache=False).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-5)


# ----------------------------------------------------------------------------- text


def test_no_held_out_token_is_trained_on() -> None:
    text = TokenizedText("mine", "", torch.arange(1000), bos_added=False)
    found = training_text(text, Full(sequence_length=10, steps=50, batch=8, held_out=3))
    assert found.held_out is not None
    assert found.held_out.flatten().tolist() == list(range(970, 1000))
    assert found.windows.shape == (400, 10)
    assert int(found.windows.max()) < 970
    assert int(found.windows.max()) > 960
    assert torch.equal(found.windows - found.windows[:, :1], torch.arange(10).expand(400, 10))
    again = training_text(text, Full(sequence_length=10, steps=50, batch=8, held_out=3, seed=1))
    assert not torch.equal(again.windows, found.windows)
    assert training_text(text, Full(sequence_length=10, tokens=161, batch=8, held_out=None)).windows.shape == (24, 10)


def test_a_text_that_is_too_short_is_refused() -> None:
    text = TokenizedText("mine", "", torch.arange(40), bos_added=False)
    assert training_text(text, Full(sequence_length=8, held_out=3)).held_out is not None
    with pytest.raises(RecipeError) as refused:
        training_text(text, Full(sequence_length=8, held_out=4))
    assert refused.value.code == "training_text_too_short"


# ------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recovery": "full", "evaluation": {"source": "mine"}}, "can't be trained on"),
        ({"recovery": {"name": "full", "source": "wiki"}, "evaluation": {"source": "wiki"}}, "can't be trained on"),
        ({"sparsity": {"target_bytes": 1000}, "recovery": {"name": "lora", "head": True}}, "set recovery.head to false"),
        ({"recovery": {"name": "full", "steps": 3, "tokens": 1000}}, "give one"),
        ({"recovery": {"name": "full", "distillation": {"kl": 0, "hidden": 0}}}, "teaches nothing"),
        ({"recovery": "dora"}, "does not match any of the expected tags"),
    ],
)
def test_what_a_recipe_may_not_ask(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe_of("mine", **({"method": "cfsp", "sparsity": 0.25} | values))


def test_what_a_model_has_no_place_for(tmp_path: Path) -> None:
    opt = read_source(make_checkpoint(tmp_path / "opt", "opt", max_position_embeddings=64))
    with pytest.raises(RecipeError) as refused:
        check_recipe(recipe_of("mine", recovery={"name": "full", "sequence_length": 128}), opt)
    assert refused.value.code == "sequence_too_long"
    assert str(refused.value.pointer).startswith("/recovery")


def test_a_model_that_does_not_fit_is_not_loaded(text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", "llama")
    source, pruned = pruned_folder(dense, recipe_of(text), tmp_path / "work")
    config, stream = Full.model_validate(SMALL), BlockStream(read_source(dense))
    with pytest.raises(RecipeError) as refused:
        retrain(config, source.folder, pruned, stream, text_of(dense, text, config), None, tmp_path / "state", lambda step: None, memory_allowed=1000)
    assert refused.value.code == "training_does_not_fit"


def test_the_preset_is_what_was_published() -> None:
    expanded = recipe_of("mine", recovery="bonsai").recovery
    assert isinstance(expanded, LoRA)
    assert expanded.distillation is not None
    assert (expanded.rank, expanded.alpha, expanded.dropout, expanded.head, expanded.learning_rate) == (128, 512, 0.05, True, 1e-4)
    assert (expanded.batch, expanded.sequence_length, expanded.total_steps) == (128, 512, 118)
    assert round(expanded.warmup * expanded.total_steps) == 5
    assert expanded.distillation.kl == pytest.approx(5.12)
    assert expanded.distillation.hidden == 0


def test_short_forms_are_expanded_and_survive_json() -> None:
    for short in ("full", "lora", "bonsai", {"name": "lora", "ranks": "importance", "distillation": {"hidden": 0.1}}):
        recipe = recipe_of("mine", recovery=short)
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
        assert recipe.trains_on == "mine"
    assert recipe_of("mine").recovery is None
    with_own = recipe_of("mine", recovery={"name": "full", "source": "other"}, evaluation={"source": "third"})
    assert with_own.texts == {"/calibration/source": "mine", "/evaluation/source": "third", "/recovery/source": "other"}
    json.dumps(Recipe.model_json_schema())
