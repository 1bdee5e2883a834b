"""A job with a recovery, as its own process, also one that is killed while it learns."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from app.recipe import Recipe
from app.report import Report
from tests.models import load_model, make_checkpoint, make_text
from tests.worker.test_pipeline import engine, finished, hashes
from worker.data import tokenize
from worker.pipeline import run

RECOVERY: dict[str, Any] = {
    "name": "lora",
    "rank": 4,
    "ranks": "importance",
    "head": True,
    "sequence_length": 32,
    "steps": 8,
    "batch": 4,
    "checkpoint_every": 2,
    "learning_rate": 0.01,
    "distillation": {"kl": 0.5, "hidden": 0.01, "top_k": 16},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("text")
    return make_text(folder, words=3000), make_text(folder, words=500, seed=1)


def write_recipe(folder: Path, **more: Any) -> Path:
    body: dict[str, Any] = {
        "method": "cfsp",
        "sparsity": 0.5,
        "calibration": {"source": "mine", "samples": 4, "sequence_length": 32},
        "evaluation": {"source": "other", "windows": 4, "sequence_length": 32, "speed": False},
        "output": {"layout": "per_layer", "padded": True},
        "recovery": RECOVERY,
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(body | more))
    return path


def test_a_model_is_pruned_and_recovered_also_after_kills(texts: tuple[Path, Path], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "dense", "llama", tied=True, layers=4)
    recipe, other = write_recipe(tmp_path), ("--text", "other", str(texts[1]))
    code, events, stderr = finished(engine(recipe, source, tmp_path / "one", texts[0], *other))
    assert code == 0, stderr
    phases = ["load", "evaluate_dense", "prune", "write", "evaluate_pruned", "teach", "recover", "evaluate", "verify"]
    assert [event["phase"] for event in events if event["event"] == "phase"] == phases
    progress = [event for event in events if event["event"] == "progress"]
    assert [event["fraction"] for event in progress] == sorted(event["fraction"] for event in progress)
    steps = [event for event in progress if event["phase"] == "recover"]
    assert [(event["done"], event["total"]) for event in steps] == [(done, 8) for done in range(1, 9)]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[0]["eta_seconds"] > steps[-1]["eta_seconds"] > 0  # of the whole job
    assert all(event["tokens_per_second"] > 0 for event in steps)

    report = Report.model_validate_json((tmp_path / "one" / "report.json").read_bytes())
    recovered = report.recovery
    assert recovered is not None
    assert (recovered.steps, recovered.tokens) == (8, 8 * 4 * 32)
    assert recovered.held_out_loss_before is not None
    assert recovered.held_out_loss_after is not None
    assert recovered.held_out_loss_after < recovered.held_out_loss_before
    assert recovered.peak_memory_bytes > 0
    assert report.before is not None
    assert report.before.perplexity is not None
    assert report.pruned is not None
    assert report.pruned.perplexity is not None
    assert report.after is not None
    assert report.after.perplexity is not None
    assert report.after.perplexity.value < report.pruned.perplexity.value
    head = 320 * 32
    assert report.parameters_after.all == report.pruned.parameters.all + head
    assert report.parameters_after.non_embedding == report.pruned.parameters.non_embedding
    assert recovered.trained_parameters > head
    assert recovered.trained_share == pytest.approx(recovered.trained_parameters / (report.parameters_after.all + recovered.trained_parameters - head))
    assert [(check.layout, check.checked) for check in report.loads_with] == [("per_layer", "logits"), ("padded", "logits")]
    card = (tmp_path / "one" / "checkpoint" / "README.md").read_text()
    assert "## Recovery" in card
    assert f"{recovered.trained_parameters:,} parameters" in card
    outer, dense = load_file(tmp_path / "one" / "checkpoint" / "model-00005-of-00005.safetensors"), load_file(source / "model.safetensors")
    assert (outer["model.embed_tokens.weight"] == dense["model.embed_tokens.weight"]).all()
    assert (outer["lm_head.weight"] != dense["model.embed_tokens.weight"]).any()

    for phase, done in (("teach", 4), ("recover", 5)):
        killed = engine(recipe, source, tmp_path / "two", texts[0], *other)
        assert killed.stdout is not None
        for line in killed.stdout:
            event = json.loads(line)
            if event["event"] == "progress" and (event["phase"], event["done"]) == (phase, done):
                killed.send_signal(signal.SIGKILL)
                break
        killed.communicate()
        assert killed.returncode == -signal.SIGKILL
    code, events, stderr = finished(engine(recipe, source, tmp_path / "two", texts[0], *other))
    assert code == 0, stderr
    assert [event["phase"] for event in events if event["event"] == "phase"] == ["load", "prune", "write", "teach", "recover", "evaluate", "verify"]
    assert [event["done"] for event in events if event["event"] == "progress" and event["phase"] in ("teach", "recover")] == [5, 6, 7, 8]
    again = Report.model_validate_json((tmp_path / "two" / "report.json").read_bytes())
    varying = {"seconds", "peak_memory_bytes", "resumed_at_block", "recovery"}
    assert again.model_dump(exclude=varying) == report.model_dump(exclude=varying)
    assert again.recovery is not None
    assert again.recovery.model_dump(exclude=varying) == recovered.model_dump(exclude=varying)
    for folder in ("checkpoint", "padded"):
        assert hashes(tmp_path / "two" / folder) == hashes(tmp_path / "one" / folder)


def test_zeros_survive_a_job(texts: tuple[Path, Path], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "dense", "gpt2", tied=True, layers=2)
    recovery = {"name": "full", "sequence_length": 32, "steps": 3, "batch": 4, "learning_rate": 0.003}
    recipe = write_recipe(tmp_path, method="wanda", sparsity="2:4", output={"dtype": "bfloat16"}, recovery=recovery)
    code, _, stderr = finished(engine(recipe, source, tmp_path / "out", texts[0], "--text", "other", str(texts[1])))
    assert code == 0, stderr
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_bytes())
    assert report.parameters_after.decoder_zeros == report.parameters_after.decoder / 2
    assert report.sparsity.decoder == 0.5
    assert all(layer.zeros == layer.weights / 2 for layer in report.layers)
    assert report.after is not None
    assert report.after.perplexity is not None
    assert report.pruned is not None
    assert report.pruned.perplexity is not None
    assert report.after.perplexity.value < report.pruned.perplexity.value
    assert report.recovery is not None
    assert report.recovery.trained_parameters == report.parameters_after.all - report.parameters_after.decoder_zeros


def test_the_evaluation_text_by_another_name_is_refused(texts: tuple[Path, Path], tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "dense", "llama")
    recipe = write_recipe(tmp_path)
    code, events, _ = finished(engine(recipe, source, tmp_path / "out", texts[0], "--text", "other", str(texts[0])))
    assert code == 2
    assert events[-1]["code"] == "training_on_evaluation_text"


# ------------------------------------------------------------ any recovery, any pruner

TRAINING: dict[str, Any] = {"source": "mine", "sequence_length": 32, "steps": 6, "batch": 4, "learning_rate": 0.01, "held_out": 4, "checkpoint_every": 2}
EVERY_RECOVERY: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 2, "ranks": "importance"},
    "taught": {"name": "lora", "rank": 2, "dropout": 0.05, "head": True, "distillation": {"kl": 0.5, "hidden": 0.01, "top_k": 16}},
    "perp": {"name": "perp", "train": "all", "rank": 2},
    "reconstruct": {"name": "perp", "rank": 2, "mode": "reconstruct", "parts": "attention_ffn", "samples": 8},
}
EVERY_PRUNER: list[tuple[str, Any, Any]] = [
    ("llama", "magnitude", "2:4"),
    ("llama", "wanda", 0.5),
    ("llama", "sparsegpt", 0.5),
    ("llama", "cfsp", 0.25),
    ("llama", {"name": "flap", "units": "both"}, 0.25),
    ("llama", {"name": "bonsai", "masks": 8, "prune_fraction": 0.2}, 0.2),
    ("llama", "depth", 0.25),
    ("mixtral", "experts", 0.5),
    ("mixtral", "wanda", 0.5),
    ("qwen3_moe", "experts", 0.25),
    ("qwen3_moe", "cfsp", 0.25),
]


@pytest.mark.parametrize("recovery", EVERY_RECOVERY)
@pytest.mark.parametrize(("model_type", "method", "sparsity"), EVERY_PRUNER)
def test_any_recovery_follows_any_pruner(
    model_type: str, method: Any, sparsity: Any, recovery: str, texts: tuple[Path, Path], unverified: None, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "dense", model_type, layers=4)
    written = write_recipe(tmp_path, method=method, sparsity=sparsity, output={}, recovery=TRAINING | EVERY_RECOVERY[recovery]).read_bytes()
    if method == "depth" and recovery == "reconstruct":
        with pytest.raises(ValidationError, match="nothing to reconstruct"):
            Recipe.model_validate_json(written)
        return
    recipe = Recipe.model_validate_json(written)
    named = {"mine": texts[0], "other": texts[1]}
    bare = run(recipe.model_copy(update={"recovery": None}), source, tmp_path / "bare", tmp_path / "bare-work", lambda event: None, named)
    report = run(recipe, source, tmp_path / "out", tmp_path / "work", lambda event: None, named)
    assert report.recovery is not None
    assert report.recovery.trained_parameters > 0
    assert report.after is not None
    assert report.after.perplexity is not None
    if report.recovery.blocks is None:
        assert bare.after is not None
        assert bare.after.perplexity is not None
        assert report.after.perplexity.value < bare.after.perplexity.value
    else:  # of a block alone; what that does to the whole of a random model is chance
        assert any(block.after < 0.999 * block.before for block in report.recovery.blocks)
    assert (report.sparsity, report.layers) == (bare.sparsity, bare.layers)
    for file in (tmp_path / "bare" / "checkpoint").glob("masks-*"):
        assert (tmp_path / "out" / "checkpoint" / file.name).read_bytes() == file.read_bytes()
    model = load_model(tmp_path / "out" / "checkpoint")
    other = tokenize(source, "other", named).tokens[: 4 * 32].view(4, 32)
    with torch.no_grad():
        logits = model(other).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), other[:, 1:].flatten())
    assert float(loss.exp()) == pytest.approx(report.after.perplexity.value, rel=1e-4)
