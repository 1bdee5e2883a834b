"""The benchmark of recoveries on a tiny model: one budget for all, held-out text that none trains on, a record that is gone on with, verdicts from figures."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.exceptions import RecipeError
from app.source import read_source
from benchmarks import recovery, results
from benchmarks.recovery import CONTENDERS, MASKED, SLICED, Contender, Setting
from tests.models import load_model, make_checkpoint, make_wikitext
from tests.worker.test_pipeline import hashes
from worker.data import tokenize
from worker.pipeline import run

BLOCKS = "norms, MaskLoRA, reconstructed by block"
FIGURES: dict[str, Any] = {"parameters": 7, "share": 0.0003, "stored_more": 0, "seconds": 1.0, "peak": 10**6, "device_peak": 2 * 10**6, "tokens": 30720}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("benchmark")
    data = make_wikitext(folder / "data", words=4200)
    model = make_checkpoint(folder / "model", "llama", tied=True, layers=2)
    return Setting(model, data, folder / "pruned", 2, 2, re.compile("^Magnitude 50%"), re.compile("^norms$"))


@pytest.fixture
def setting(tiny: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(results, "STORED", tmp_path / "engine.json")
    return tiny


def contender(name: str) -> Contender:
    return next(each for each in CONTENDERS if each.name == name)


def test_every_contender_is_a_valid_recovery_with_a_grid_that_can_grow() -> None:
    assert len({each.name for each in CONTENDERS}) == len(CONTENDERS)
    for each in CONTENDERS:
        places = [recovery.RATES.index(rate) for rate in each.rates]
        assert places == [*range(places[0], places[0] + len(places))]


def test_all_train_on_the_same_windows_and_none_on_the_held_out_ones(setting: Setting) -> None:
    tokens = tokenize(setting.model, str(setting.data / "wiki.valid.raw"), {}).tokens
    trained = []
    for name in ("full retraining", "norms", BLOCKS):
        recipe = recovery.recipe_with(setting, MASKED, contender(name), 1e-3, 3)
        text, held_out = recovery.texts(setting, recipe)
        assert text.windows.shape == (3 * 4, 256)
        assert torch.equal(held_out.flatten(), tokens[-16 * 256 :])
        if text.held_out is not None:
            assert torch.equal(text.held_out, held_out)
        trained.append(text.windows)
    assert torch.equal(trained[0], trained[1])
    assert torch.equal(trained[0], trained[2])
    starts = [next(start for start in range(len(tokens)) if torch.equal(tokens[start : start + 256], window)) for window in trained[0]]
    assert max(starts) + 256 <= len(tokens) - 16 * 256


@pytest.mark.parametrize(
    ("lowest", "tried", "best"),
    [
        (1e-4, {3e-5, 1e-4, 3e-4}, 1e-4),
        (3e-3, {3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2}, 3e-3),
        (1e-9, {1e-5, 3e-5, 1e-4, 3e-4}, 1e-5),
        (math.nan, {3e-5, 1e-4, 3e-4}, None),
    ],
)
def test_a_grid_grows_while_the_best_rate_is_at_its_edge(lowest: float, tried: set[float], best: float | None) -> None:
    asked: list[float] = []

    def loss(rate: float) -> float:
        asked.append(rate)
        return abs(math.log(rate / lowest))

    assert recovery.lowest(loss, (3e-5, 1e-4, 3e-4)) == best
    assert set(asked) == tried
    assert len(asked) == len(tried)


def test_rows_are_kept_as_they_come_and_not_measured_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = []

    def figures(setting: Setting, base: Any, recipe: Any) -> dict[str, Any]:
        assert len(recovery.on_record("tuning")) == min(3, len(measured))  # each row is kept before the next is measured
        rate = recipe.recovery.learning_rate
        measured.append(rate)
        if rate == 0.03:
            raise RecipeError("The training loss is nan at step 2.", code="training_diverged", hint="")
        return {"held_out": 4 + abs(math.log(rate / 0.01)), "perplexity": 80.0, **FIGURES}

    monkeypatch.setattr(recovery, "recovered", figures)
    recovery.quality(setting)
    record = json.loads(results.STORED.read_text())["recovery"]
    assert measured == [0.003, 0.01, 0.03]
    assert [each["rate"] for each in record["tuning"]] == measured
    assert record["quality"] == record["tuning"][1:2]
    [base] = record["bases"]
    pruned = load_model(setting.folder / "magnitude-50" / "checkpoint")
    windows = recovery.evaluated_windows(setting)
    assert base == {"name": "Magnitude 50%", "perplexity": pytest.approx(math.exp(_loss(pruned, windows)), rel=1e-4)}
    assert record["dense"] == pytest.approx(math.exp(_loss(load_model(setting.model), windows)), rel=1e-4)
    readme = (results.HERE / "README.md").read_text()
    assert "### Magnitude 50%, recovered in 2 steps" in readme
    assert "Not measured: full retraining; full retraining in each of 3 rounds of pruning; biases; head;" in readme
    assert "| norms | 0.003: 5.2040, 0.01: 4.0000, 0.03: diverged |" in readme

    before = hashes(setting.folder / "magnitude-50" / "checkpoint")
    recovery.quality(setting)
    assert json.loads(results.STORED.read_text())["recovery"] == record
    assert hashes(setting.folder / "magnitude-50" / "checkpoint") == before
    assert len(measured) == 3
    recovery.quality(replace(setting, steps=1))  # tuned already
    assert measured[3:] == [0.01]
    assert [kept["steps"] for kept in recovery.on_record("quality")] == [1, 2]

    recovery.forget(replace(setting, rows=re.compile("^head$")))
    assert len(recovery.on_record("tuning")) == 3
    recovery.forget(setting)
    assert recovery.on_record("tuning") == recovery.on_record("quality") == []
    assert recovery.on_record("bases") == [base]


@pytest.mark.parametrize(("name", "trained"), [("norms", 160), ("norms, LoRA-Prune", None), ("all: norms, head, MaskLoRA", None), (BLOCKS, None)])
def test_a_row_tells_of_the_written_model(name: str, trained: int | None, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[Any, torch.Tensor]] = []
    monkeypatch.setattr(recovery, "perplexity_of", _spy(recovery.perplexity_of, lambda folder, windows: written.append((load_model(folder), windows))))
    row = recovery.measured(setting, MASKED, contender(name), 1e-2, 3)
    model, windows = written[-1]
    assert windows.shape == (24, 512)
    assert row["perplexity"] == pytest.approx(math.exp(_loss(model, windows)), rel=1e-4)
    tokens = tokenize(setting.model, str(setting.data / "wiki.valid.raw"), {}).tokens
    assert row["held_out"] == pytest.approx(_loss(model, tokens[-16 * 256 :].view(16, 256)), rel=1e-4)
    assert trained in (None, row["parameters"])
    assert row["tokens"] == 3 * 4 * 256
    assert row["stored_more"] == (320 * 32 if "head" in name else 0)
    assert row["seconds"] > 0
    assert row["peak"] > 50e6
    assert {path.name for path in setting.folder.iterdir()} == {"magnitude-50"}


def test_rounds_of_pruning_and_retraining_share_the_budget(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints: list[Any] = []

    def watched(recipe: Any, source: Path, out: Path, *rest: Any) -> Any:
        report = run(recipe, source, out, *rest)
        checkpoints.append(load_model(out / "checkpoint"))
        return report

    monkeypatch.setattr(recovery, "run", watched)
    name = "full retraining in each of 3 rounds of pruning"
    row = recovery.measured(setting, MASKED, contender(name), 1e-3, 7)
    [model] = checkpoints
    assert row["tokens"] == 3 * 2 * 4 * 256
    assert row["perplexity"] == pytest.approx(math.exp(_loss(model, recovery.evaluated_windows(setting))), rel=1e-4)
    weights = {name: weight for name, weight in model.named_parameters() if name.endswith("_proj.weight")}
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    assert zeros == sum(weight.numel() for weight in weights.values()) // 2
    assert row["parameters"] == sum(weight.numel() for weight in model.parameters()) - zeros
    assert "wanda" in recovery.measured(setting, recovery.BASES[1], contender(name), 1e-3, 7)["refused"]


def _spy(function: Any, first: Any) -> Any:
    def both(*arguments: Any) -> Any:
        first(*arguments)
        return function(*arguments)

    return both


@torch.no_grad()
def _loss(model: Any, windows: torch.Tensor) -> float:
    return sum(float(model(row[None], labels=row[None]).loss) for row in windows) / len(windows)


def test_what_the_engine_refuses_is_a_row_that_says_why(setting: Setting) -> None:
    recovery.quality(replace(setting, rows=re.compile("^biases$")))
    [biases] = recovery.on_record("quality")
    assert "has no biases to train" in biases["refused"]
    assert recovery.on_record("tuning") == []
    readme = (results.HERE / "README.md").read_text()
    assert f"| biases | {biases['refused']} |" in readme


def test_learning_rates_are_tuned_on_a_base_of_the_same_kind(setting: Setting) -> None:
    assert [recovery.tuned_on(setting, base) for base in recovery.BASES] == [MASKED, MASKED, MASKED, SLICED]


def test_the_doubled_model_computes_the_blocks_twice(setting: Setting, tmp_path: Path) -> None:
    recovery.write_doubled(setting.model, tmp_path / "doubled")
    single, doubled = load_model(setting.model), load_model(tmp_path / "doubled")
    single.model.layers.extend(load_model(setting.model).model.layers)
    for place, layer in enumerate(single.model.layers):
        layer.self_attn.layer_idx = place
    single.config.num_hidden_layers = 4
    tokens = torch.arange(20)[None]
    assert torch.allclose(single(tokens, use_cache=False).logits, doubled(tokens, use_cache=False).logits, atol=1e-5)
    assert len(read_source(tmp_path / "doubled").tensors) == 2 * 9 * 2 + 2


def test_memory_is_that_of_a_fresh_process(setting: Setting) -> None:
    recovery.memory(replace(setting, rows=re.compile("twice the blocks$")))
    [twice] = recovery.on_record("memory")
    assert twice["bytes"] > 50e6
    assert (twice["of"], twice["asked"]) == ("reconstructed by block", 1.05)


def row(name: str, value: float, share: float, held_out: float) -> dict[str, Any]:
    return FIGURES | {"base": "Magnitude 50%", "name": name, "rate": 1e-3, "steps": 30, "perplexity": value, "share": share, "held_out": held_out}


def test_verdicts_follow_from_the_figures() -> None:
    assert results.gap_closed(math.e**6, math.e**4.5, math.e**3) == pytest.approx(0.5)
    rows = [
        row("full retraining", math.e**4, 1.0, 3.9),
        row("norms", math.e**4.2, 0.0003, 4.1),
        row("published", math.e**4.1, 0.0025, 4.0),
        row("wide", 50.0, 0.03, 3.0),
    ]
    part: dict[str, Any] = {
        "dense": math.e**3,
        "bases": [{"name": name, "perplexity": value} for name, value in (("Magnitude 50%", math.e**6), ("Wanda 50%", 70.0), ("SparseGPT 50%", 60.0))],
        "contenders": [each["name"] for each in rows],
        "quality": rows,
        "memory": [
            {"name": "full retraining", "bytes": 2 * 10**9, "of": "full retraining", "asked": None},
            {"name": "norms", "bytes": 9 * 10**8, "of": "full retraining", "asked": 0.5},
        ],
    }
    text = "\n".join(results._recovery({"recovery": part}))
    assert "0.250% of the parameters (published; of those with at most 0.35%, the best on held-out text) recover 95.0% of the log-perplexity gap" in text
    assert "that holds." in text
    assert "has a perplexity of 60.34; without recovery Wanda 50% 70.00 and SparseGPT 50% 60.00: not better than SparseGPT 50%." in text
    assert "| published | 0.001 | 7 | 0.250% |  | 1.0 | 1 | 2 | 4.0000 | 60.34 | 63.3% | 95.0% |" in text
    assert "Not measured" not in text
    assert "| full retraining | 2000 |  |  |\n| norms | 900 | 0.450 of full retraining | 0.5 |" in text
    rows[2] |= {"perplexity": math.e**4.3}
    text = "\n".join(results._recovery({"recovery": part}))
    assert "recover 85.0% of the log-perplexity gap that full retraining recovers; asked for: at least 95%; 10.0 points are missing." in text
