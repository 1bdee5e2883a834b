"""The benchmark of Bonsai on a tiny model: what it prunes stays, what it measures is true, and what it measured before is not lost."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import espalier.loader  # noqa: F401  builds layers of different widths
from app.recovery import RECOVERY_PRESETS, LoRA
from benchmarks import bonsai, results, winogrande
from benchmarks.bonsai import Clock, Setting
from tests.models import load_model, make_checkpoint, make_wikitext
from tests.worker.test_pipeline import hashes
from worker.data import tokenize
from worker.walk import RoundStep

ROW = "Bonsai, 20%"
BEFORE = {"name": "FLAP, 50%", "rounds": [], "masks": [], "perplexity": 9.0, "parameters": 7}  # measured when nothing was kept


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("benchmark")
    data = make_wikitext(folder / "data", words=700)
    questions = folder / "questions.jsonl"
    draw = random.Random(0)
    texts = [("bade figo luma", "nepi rosu", "tave bago."), ("dema", "fine lupi maro nesu", "pita rove suba tade."), ("a tree", "a wall", "is pruned")]
    items = [{"context_options": [first, second], "continuation": rest, "gold": draw.randrange(2)} for first, second, rest in texts * 2]
    questions.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    model = make_checkpoint(folder / "model", "llama", tied=True, ffn=64)
    return Setting(model, data, 8, re.compile(f"^dense|^{ROW}"), questions, 5, folder / "checkpoints")


@pytest.fixture
def setting(tiny: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(results, "STORED", tmp_path / "engine.json")
    return tiny


def test_what_is_pruned_stays_and_is_pruned_again_only_by_another_recipe(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    bonsai.quality(setting)
    dense, row = bonsai.kept_rows("quality").values()
    assert (dense["name"], row["name"]) == ("dense", ROW)
    assert row["masks"] == [8] * 4
    assert len(row["rounds"]) == 4
    assert row["eta_error"] > -1
    assert 0.79 * dense["parameters"] < row["parameters"] < 0.81 * dense["parameters"]
    assert (dense["items"], row["items"]) == (5, 5)
    checkpoint = setting.checkpoints / "bonsai-20" / "checkpoint"
    assert sum(weight.numel() for name, weight in load_model(checkpoint).named_parameters() if "embed" not in name) == row["parameters"]

    bonsai.keep_row("quality", row | {"adapted": {"perplexity": 3.0, "tokens": 5, "seconds": 1.0}})
    bonsai.keep_row("quality", BEFORE)
    with monkeypatch.context() as patched:
        patched.delattr(bonsai, "prune_into")
        bonsai.quality(setting)
    assert bonsai.kept_rows("quality")[ROW] == row | {"adapted": {"perplexity": 3.0, "tokens": 5, "seconds": 1.0}}
    assert bonsai.kept_rows("quality")["FLAP, 50%"] == BEFORE

    other = replace(setting, masks=10, winogrande=setting.winogrande.with_name("none"))
    recipe = next(recipe for name, recipe in other.contenders())
    assert bonsai.find_kept(other, ROW, recipe) is None
    bonsai.quality(other)
    again = bonsai.kept_rows("quality")[ROW]
    assert again["masks"] == [10] * 4
    assert not {"adapted", "winogrande"} & again.keys()
    assert bonsai.find_kept(other, ROW, recipe) is not None


def test_draws_are_of_other_calibration_text_and_stay_with_their_row(setting: Setting) -> None:
    bonsai.draws(setting)
    assert not bonsai.kept_rows("quality")  # of rows that were not measured there are none
    bonsai.quality(setting)
    row = bonsai.kept_rows("quality")[ROW]
    bonsai.draws(setting)
    drawn = bonsai.kept_rows("quality")[ROW]
    assert drawn["draws"][0] == row["perplexity"]
    assert len(set(drawn["draws"])) == 3
    assert drawn == row | {"draws": drawn["draws"]}
    bonsai.quality(setting)
    assert bonsai.kept_rows("quality")[ROW] == drawn
    assert ", ".join(f"{value:.2f}" for value in drawn["draws"]) in (results.HERE / "README.md").read_text(encoding="utf-8")


def test_a_kept_checkpoint_is_adapted_on_a_copy(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"sequence_length": 32, "steps": 12, "learning_rate": 0.01, "rank": 2}
    monkeypatch.setattr(bonsai, "ADAPTATION", LoRA.model_validate(bonsai.ADAPTATION.model_dump() | small))
    bonsai.quality(setting)
    bonsai.keep_row("quality", BEFORE)
    kept = setting.checkpoints / "bonsai-20" / "checkpoint"
    row, digests = bonsai.kept_rows("quality")[ROW], hashes(kept)
    bonsai.adaptation(replace(setting, rows=re.compile("")))
    after = bonsai.kept_rows("quality")
    assert list(after) == ["dense", ROW, "FLAP, 50%"]
    assert after["FLAP, 50%"] == BEFORE
    adapted = after[ROW].pop("adapted")
    assert after[ROW] == row
    assert hashes(kept) == digests
    assert adapted["perplexity"] < 0.8 * row["perplexity"]
    assert (adapted["items"], adapted["tokens"]) == (5, 12 * 4 * 32)
    assert 0 <= adapted["winogrande"] <= 1
    assert adapted["seconds"] > 0


def test_the_adaptation_is_the_published_one_but_for_its_size() -> None:
    config, published = bonsai.ADAPTATION, RECOVERY_PRESETS["bonsai"]
    assert isinstance(published, LoRA)
    assert config.head
    assert config.alpha / config.rank == published.alpha / published.rank
    assert config.distillation == published.distillation
    assert config.windows == (120, 8)


def test_decoding_is_timed_in_turns(setting: Setting) -> None:
    bonsai.decoding(setting)
    dense, half, masked = results.stored()["bonsai"]["decoding"]
    assert [row["name"] for row in (dense, half, masked)] == ["dense", "Bonsai, prior alone, 50%", "Wanda 2:4"]
    assert dense["prefill_ratio"] == dense["decode_ratio"] == 1
    assert all(row["prefill"] > row["decode"] > 0 for row in (dense, half, masked))
    weight = load_model(setting.checkpoints / "wanda-2-4" / "checkpoint").model.layers[1].mlp.up_proj.weight
    assert (weight.view(-1, 4) == 0).sum(dim=1).eq(2).all()


def test_ratios_are_of_the_same_turn() -> None:
    own, dense = [(20.0, 3.0), (40.0, 8.0), (30.0, 2.0)], [(10.0, 1.0), (80.0, 2.0), (20.0, 4.0)]
    assert bonsai.medians(own, dense) == {"prefill": 30.0, "prefill_ratio": 1.5, "decode": 3.0, "decode_ratio": 3.0}


def test_the_eta_is_the_first_after_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    clock = Clock(_last=now)

    def told(second: float, number: int, done: int, cost_left: float, pace: float | None) -> None:
        nonlocal now
        now = 100.0 + second
        clock.step(RoundStep(number, 3, done, 2, 0.0, cost_left, pace))

    told(1, 1, 0, 99.0, None)
    told(5, 1, 1, 60.0, 1.0)
    told(9, 1, 2, 50.0, 1.0)
    told(10, 2, 0, 24.0, 0.5)
    told(15, 2, 2, 20.0, 9.0)
    told(16, 3, 0, 10.0, 9.0)
    told(20, 3, 1, 10.0, 9.0)
    now = 126.0
    clock.stop()
    assert clock.rounds() == {"rounds": [10.0, 6.0, 10.0], "masks": [2, 2, 1], "eta_error": pytest.approx(24 * 0.5 / 16 - 1)}
    assert Clock().rounds() == {"rounds": [], "masks": [], "eta_error": None}


def test_zero_shot_accuracy_is_that_of_a_loop(setting: Setting) -> None:
    model, (start,) = load_model(setting.model), tokenize_text(setting, "")
    right, likelihoods = 0, []
    for line in setting.winogrande.read_text().splitlines():
        item = json.loads(line)
        rest = tokenize_text(setting, " " + item["continuation"])[1:]
        for context in item["context_options"]:
            ids = tokenize_text(setting, context)
            assert ids[0] == start
            with torch.no_grad():
                log_probs = model(torch.tensor([ids + rest])).logits[0].double().log_softmax(-1)
            likelihoods.append(sum(float(log_probs[len(ids) + place - 1, token]) for place, token in enumerate(rest)))
        right += (likelihoods[-1] > likelihoods[-2]) == bool(item["gold"])
    share, items = winogrande.accuracy(setting.model, setting.winogrande)
    assert share == pytest.approx(right / 6)
    assert items == 6
    assert 0 < share < 1


def tokenize_text(setting: Setting, text: str) -> list[int]:
    path = setting.data / "some.txt"
    path.write_text(text, encoding="utf-8")
    found: list[int] = tokenize(setting.model, str(path), {}).tokens.tolist()
    return found


def test_results_are_rendered() -> None:
    adapted = {"perplexity": 41.5, "winogrande": 0.5, "items": 400, "seconds": 210.4, "tokens": 30720}
    half: dict[str, Any] = {"name": "Bonsai, 50%", "rounds": [100.2, 90.0], "masks": [40, 32], "eta_error": -0.081, "perplexity": 300.0, "parameters": 53102592}
    parts: dict[str, Any] = {
        "quality": [
            half | {"winogrande": 0.52, "items": 400, "draws": [300.0, 310.21], "adapted": adapted},
            {"name": "FLAP, 50%", "rounds": [], "masks": [], "perplexity": 850.86, "parameters": 53196182},
            {"name": "dense", "rounds": [], "masks": [], "perplexity": 32.6, "parameters": 106205184, "winogrande": 0.53, "items": 100},
        ],
        "decoding": [{"name": "dense", "prefill": 512.4, "prefill_ratio": 1.0, "decode": 20.04, "decode_ratio": 1.0}],
        "speed": [half, {"name": "naive", "rounds": [200.0, 180.4], "masks": [40, 40], "perplexity": 310.0, "parameters": 1}],
    }
    rendered = results.render({"machine": {"cores": 2, "threads": 2, "torch": "2", "python": "3"}, "bonsai": parts}).splitlines()
    assert [line for line in rendered if line.startswith(("| dense", "| Bonsai", "| FLAP", "| naive"))] == [
        "| dense | 32.60 |  | 53.0 ± 5.0 | 106,205,184 |  |  |  |  |",
        "| Bonsai, 50% | 300.00 | 300.00, 310.21 | 52.0 ± 2.5 | 53,102,592 | 41.50 | 50.0 ± 2.5 | 30,720 | 210 |",
        "| FLAP, 50% | 850.86 |  |  | 53,196,182 |  |  |  |  |",
        "| Bonsai, 50% | 40, 32 | 100, 90 | -8% |",
        "| dense | 512 | 1.00 | 20.0 | 1.00 |",
        "| Bonsai, 50% | 40, 32 | 100, 90 | -8% | 190 | 2.64 | 1.80 | 300.00 |",
        "| naive | 40, 40 | 200, 180 |  | 380 | 4.75 | 1.00 | 310.00 |",
    ]
