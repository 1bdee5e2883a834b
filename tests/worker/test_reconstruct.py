"""Blocks are fitted one by one to the dense blocks: the same as by hand, also after a break, and every zero stays."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from app.recovery import Perp
from app.report import Report
from app.source import read_source
from tests.models import load_model, make_checkpoint, make_text
from tests.worker.test_perp import text_of
from tests.worker.test_pipeline import engine, finished, hashes
from tests.worker.test_recovery import masks_of, pruned_folder, recipe_of, stored
from tests.worker.test_recovery_pipeline import write_recipe
from worker.blocks import BlockStream
from worker.recovery.reconstruct import modules_before, reconstruct
from worker.recovery.retrain import Retrained
from worker.state import WalkState
from worker.training import Step

SMALL: dict[str, Any] = {"mode": "reconstruct", "sequence_length": 16, "samples": 6, "steps": 5, "batch": 4, "micro_batch": 4, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"), words=4000)


def recovered(config: Perp, dense: Path, text: Path, work: Path, recipe: Any, tell: Callable[[Step], None] = lambda step: None) -> tuple[Path, Retrained]:
    """Prune and reconstruct in this process; a state that is in `work` is gone on with."""
    source, pruned = pruned_folder(dense, recipe, work / "pruning")
    state = WalkState.open(work / "state", "job")
    return source.folder, reconstruct(config, source.folder, pruned, BlockStream(read_source(dense)), text_of(dense, text, config), state, tell)


@contextmanager
def inputs_of(model: Any) -> Any:
    """The arguments of each block in the next forward pass."""
    found: list[tuple[Tensor, dict[str, Any]]] = []
    blocks = model.model.layers if hasattr(model.model, "layers") else model.model.decoder.layers
    handles = [
        block.register_forward_pre_hook(lambda module, args, kwargs: found.append((args[0].detach().clone(), kwargs)), with_kwargs=True) for block in blocks
    ]
    yield found
    for handle in handles:
        handle.remove()


def blocks_of(model: Any) -> Any:
    return model.model.layers if hasattr(model.model, "layers") else model.model.decoder.layers


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_it_is_what_whole_models_give_by_hand(model_type: str, text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", model_type, tied=True, layers=3)
    config = Perp.model_validate(SMALL | {"train": "biases+norms", "warmup": 0.0, "clip": None})
    windows, recipe = text_of(dense, text, config).windows, recipe_of(text, "wanda", 0.5)
    assert windows.shape == (6, 16)
    pruned, whole = load_model(pruned_folder(dense, recipe, tmp_path / "by-hand")[0].folder), load_model(dense)
    with torch.no_grad(), inputs_of(pruned) as arguments:
        pruned(windows, use_cache=False)
    hidden = arguments[0][0]
    errors = []
    for block, target_block, (_, others) in zip(blocks_of(pruned), blocks_of(whole), arguments, strict=True):
        with torch.no_grad():
            target = target_block(hidden, **others)
            before = float(mse_loss(block(hidden, **others), target))
        vectors = [parameter for parameter in block.parameters() if parameter.dim() == 1]
        optimizer = torch.optim.AdamW(vectors, lr=0.01, weight_decay=0.0)
        for step in range(5):
            rows = torch.arange(4 * step, 4 * step + 4) % 6
            optimizer.param_groups[0]["lr"] = 0.01 * (5 - step) / 5
            gradients = torch.autograd.grad(mse_loss(block(hidden[rows], **of_rows(others, rows)), target[rows]), vectors)
            for vector, gradient in zip(vectors, gradients, strict=True):
                vector.grad = gradient
            optimizer.step()
        with torch.no_grad():
            after = block(hidden, **others)
        errors.append((before, float(mse_loss(after, target))))
        hidden = after

    folder, found = recovered(config, dense, text, tmp_path / "work", recipe)
    assert found.blocks is not None
    for error, (before, after) in zip(found.blocks, errors, strict=True):
        assert (error.before, error.after) == pytest.approx((before, after), rel=1e-3)
        assert error.after < error.before
    result = stored(folder)
    for name, parameter in pruned.named_parameters():
        torch.testing.assert_close(result[name], parameter.detach(), atol=1e-4, rtol=1e-3)
    everything = sum(parameter.numel() for parameter in pruned.parameters())
    vectors = [parameter for block in blocks_of(pruned) for parameter in block.parameters() if parameter.dim() == 1]
    assert found.parameters == sum(vector.numel() for vector in vectors)
    assert found.share == found.parameters / everything
    assert (found.tokens, found.trained.steps) == (6 * 16, 5)


def of_rows(arguments: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The arguments for some of the sequences; those that are the same for all stay."""
    return {name: value[rows] if isinstance(value, Tensor) and value.shape[0] == 6 and value.dim() == 4 else value for name, value in arguments.items()}


def test_each_half_is_compared_with_the_dense_half_on_the_same_inputs(text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", "llama", layers=1)
    config = Perp.model_validate(SMALL | {"train": "norms", "parts": "attention_ffn"})
    windows, recipe = text_of(dense, text, config).windows, recipe_of(text, "wanda", 0.5)
    folder, found = recovered(config, dense, text, tmp_path / "work", recipe)
    pruned, whole, result = load_model(pruned_folder(dense, recipe, tmp_path / "again")[0].folder), load_model(dense), load_model(folder)
    with inputs_of(whole) as arguments, torch.no_grad():
        whole(windows, use_cache=False)
    hidden, others = arguments[0]

    def with_attention_of(other: Any, block: Any) -> Any:
        mixed = copy.deepcopy(block)
        mixed.self_attn, mixed.input_layernorm = other.self_attn, other.input_layernorm
        return mixed

    @torch.no_grad()
    def difference(one: nn.Module, other: nn.Module) -> float:
        return float(mse_loss(one(hidden, **others), other(hidden, **others)))

    (old,), (new,), (target,) = blocks_of(pruned), blocks_of(result), blocks_of(whole)
    assert found.blocks is not None
    assert [(error.index, error.part) for error in found.blocks] == [(0, "attention"), (0, "ffn")]
    attention, ffn = found.blocks
    # what attention adds to the residual is the same whatever FFN comes after, and so taken without one
    for block in (old, new, target):
        block.without_ffn = copy.deepcopy(block)
        nn.init.zeros_(block.without_ffn.mlp.down_proj.weight)
    assert attention.before == pytest.approx(difference(old.without_ffn, target.without_ffn), rel=1e-4)
    assert attention.after == pytest.approx(difference(new.without_ffn, target.without_ffn), rel=1e-4)
    assert ffn.before == pytest.approx(difference(with_attention_of(new, old), with_attention_of(new, target)), rel=1e-4)
    assert ffn.after == pytest.approx(difference(new, with_attention_of(new, target)), rel=1e-4)
    assert attention.after < attention.before
    assert ffn.after < ffn.before


@pytest.mark.parametrize(
    ("model_type", "first", "last"),
    [
        ("llama", {"input_layernorm", "self_attn.o_proj"}, {"post_attention_layernorm", "mlp.down_proj"}),
        ("gemma2", {"input_layernorm", "self_attn.q_proj"}, {"post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}),
        ("qwen3", {"self_attn.q_norm", "self_attn.k_norm"}, {"post_attention_layernorm", "mlp.gate_proj"}),
        ("opt", {"self_attn_layer_norm", "self_attn.out_proj"}, {"final_layer_norm", "fc1", "fc2"}),
        ("gpt_neox", {"input_layernorm", "attention.dense"}, {"post_attention_layernorm", "mlp.dense_4h_to_h"}),
        ("gpt2", {"ln_1", "attn.c_proj"}, {"ln_2", "mlp.c_fc"}),
    ],
)
def test_a_block_is_cut_behind_its_attention(model_type: str, first: set[str], last: set[str], tmp_path: Path) -> None:
    stream = BlockStream(read_source(make_checkpoint(tmp_path, model_type, layers=1)))
    block = stream.materialise(0, stream.block_tensors(0))
    ran = modules_before(block, stream.architecture.attention.output, stream.block_arguments(8)[0], torch.randn(1, 8, 32))
    assert first <= ran
    assert not last & ran
    assert last <= {name for name, _ in block.named_modules()}


@pytest.mark.parametrize("parts", ["block", "attention_ffn"])
@pytest.mark.parametrize(
    ("model_type", "method", "sparsity", "adapter"),
    [
        ("llama", "wanda", "2:4", "mask_lora"),
        ("gpt2", "magnitude", 0.5, "scale_lora"),
        ("opt", "wanda", 0.5, "lora_prune"),
        ("llama", "flap", 0.4, "mask_lora"),
    ],
)
def test_it_helps_and_goes_on_after_a_break(model_type: str, method: str, sparsity: Any, adapter: str, parts: str, text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", model_type, tied=True, layers=3)
    config = Perp.model_validate(SMALL | {"steps": 12, "parts": parts, "adapter": adapter, "rank": 2, "train": "all"})
    recipe = recipe_of(text, method, sparsity, output={"layout": "per_layer"} if method == "flap" else {})
    steps: list[tuple[int, int]] = []
    folder, found = recovered(config, dense, text, tmp_path / "one", recipe, lambda step: steps.append((step.done, step.total)))
    total = 12 * 3 * (1 if parts == "block" else 2)
    assert steps == [(done, total) for done in range(1, total + 1)]
    assert found.blocks is not None
    assert sum(error.after for error in found.blocks) < 0.9 * sum(error.before for error in found.blocks)
    after = stored(folder)
    assert all(torch.equal(after[name] != 0, mask) for name, mask in masks_of(folder).items())
    assert "A reconstruction fits blocks, so the head was not trained." in found.pruned.notes

    def stop(step: Step) -> None:
        if step.done == total // 3 + 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recovered(config, dense, text, tmp_path / "two", recipe, stop)
    more: list[int] = []
    source, pruned = pruned_folder(dense, recipe, tmp_path / "two" / "pruning-again")
    state = WalkState.open(tmp_path / "two" / "state", "job")
    assert state.refused is None
    assert len(state.blocks("reconstruct")) == 1
    again = reconstruct(
        config, source.folder, pruned, BlockStream(read_source(dense)), text_of(dense, text, config), state, lambda step: more.append(step.done)
    )
    assert more[0] > total // 3
    assert more[-1] == total
    assert again.blocks == found.blocks
    assert (again.parameters, again.share) == (found.parameters, found.share)
    assert all(torch.equal(stored(source.folder)[name], tensor) for name, tensor in after.items())


def test_what_training_makes_no_better_stays(text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", "llama", tied=True, dtype=torch.bfloat16)
    recipe = recipe_of(text, "wanda", 0.5)
    before = stored(pruned_folder(dense, recipe, tmp_path / "pruned")[0].folder)
    folder, found = recovered(Perp.model_validate(SMALL | {"learning_rate": 1.0, "clip": None, "warmup": 0.0}), dense, text, tmp_path / "work", recipe)
    assert found.blocks is not None
    assert all(error.after <= error.before for error in found.blocks)
    after = stored(folder)
    for error in found.blocks:
        same = all(torch.equal(after[name], tensor) for name, tensor in before.items() if name.startswith(f"model.layers.{error.index}."))
        assert same == (error.after == error.before)
    assert any(error.after == error.before for error in found.blocks)


def test_a_job_reconstructs_also_after_a_kill(text: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "dense", "llama", tied=True, layers=4)
    recovery = {"name": "perp", "source": "mine", **SMALL, "parts": "attention_ffn", "samples": 16, "steps": 10}
    recipe = write_recipe(tmp_path, method="wanda", sparsity="2:4", output={}, recovery=recovery)
    other = ("--text", "other", str(make_text(tmp_path, words=500, seed=1)))
    code, events, stderr = finished(engine(recipe, source, tmp_path / "one", text, *other))
    assert code == 0, stderr
    fractions = [event["fraction"] for event in events if event["event"] == "progress"]
    assert fractions == sorted(fractions)
    report = Report.model_validate_json((tmp_path / "one" / "report.json").read_bytes())
    assert report.recovery is not None
    assert report.recovery.blocks is not None
    assert len(report.recovery.blocks) == 8
    assert report.recovery.tokens == 16 * 16
    assert report.sparsity.decoder == 0.5
    assert report.after is not None
    assert report.pruned is not None
    assert report.after.perplexity is not None
    assert report.pruned.perplexity is not None

    killed = engine(recipe, source, tmp_path / "two", text, *other)
    assert killed.stdout is not None
    for line in killed.stdout:
        event = json.loads(line)
        if event["event"] == "progress" and (event["phase"], event["done"]) == ("recover", 45):
            killed.send_signal(signal.SIGKILL)
            break
    killed.communicate()
    code, events, stderr = finished(engine(recipe, source, tmp_path / "two", text, *other))
    assert code == 0, stderr
    assert next(event["done"] for event in events if event["event"] == "progress" and event["phase"] == "recover") > 40
    again = Report.model_validate_json((tmp_path / "two" / "report.json").read_bytes())
    assert again.recovery is not None
    assert again.recovery.blocks == report.recovery.blocks
    assert hashes(tmp_path / "two" / "checkpoint") == hashes(tmp_path / "one" / "checkpoint")
