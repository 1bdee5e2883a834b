"""What a job would cost, told before it is submitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.counting import count_parameters
from app.estimate import bonsai_rounds, estimate, phase_costs
from app.recipe import Recipe
from app.source import Source, read_source
from tests.app.conftest import RECIPE, Api
from tests.models import make_checkpoint

CALIBRATION = {"samples": 4, "sequence_length": 16}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return read_source(make_checkpoint(tmp_path_factory.mktemp("estimate") / "model", "llama"))


def recipe_of(**fields: Any) -> Recipe:
    return Recipe.model_validate({"method": "cfsp", "sparsity": 0.3, "calibration": CALIBRATION, "evaluation": None} | fields)


def test_the_text_passes_once_for_cfsp_three_times_for_wanda_and_not_at_all_for_magnitude(source: Source) -> None:
    tokens = {name: phase_costs(recipe_of(method=name), source)["prune"] for name in ("cfsp", "wanda", "magnitude")}
    assert (tokens["cfsp"] - tokens["magnitude"], tokens["wanda"] - tokens["magnitude"]) == (64, 192)


def test_evaluation_teaching_and_training_cost_what_they_read(source: Source) -> None:
    plain = estimate(recipe_of(), source)
    more = estimate(
        recipe_of(
            evaluation={"windows": 2, "sequence_length": 100, "speed": False},
            recovery={"name": "lora", "steps": 10, "batch": 4, "sequence_length": 32, "source": "c4", "distillation": {}},
        ),
        source,
    )
    added = {phase: tokens for phase, tokens in more.phases.items() if phase not in plain.phases}
    assert added == {"evaluate_dense": 300, "evaluate": 300, "evaluate_pruned": 300, "recover": 10 * 4 * 32 * 4 + 2000, "teach": 1536}
    assert more.forward_tokens == sum(more.phases.values())
    assert more.multiply_accumulates / plain.multiply_accumulates == pytest.approx(more.forward_tokens / plain.forward_tokens)


def test_bonsai_s_rounds_get_cheaper_and_all_its_sub_models_count(source: Source) -> None:
    recipe = recipe_of(method={"name": "bonsai", "masks": 10, "prune_fraction": 0.1}, sparsity=0.25)
    rounds = bonsai_rounds(recipe, source)
    assert len(rounds) == 3
    counted, head = count_parameters(source, []).non_embedding, 320 * 32
    assert rounds[0] == pytest.approx(1.5 * (counted * 2 / 3 + head) / (counted + head))  # of three blocks, those from the first, the second or the third on
    of_one_part = recipe_of(method={"name": "bonsai", "masks": 10, "prune_fraction": 0.1, "scope": "local"}, sparsity=0.25)
    assert bonsai_rounds(of_one_part, source)[0] == 1.5
    assert rounds == sorted(rounds, reverse=True)
    told = estimate(recipe, source)
    assert (told.rounds, told.sub_models) == (3, 30)
    assert told.phases["prune"] == round(64 * (1 + 11 * sum(rounds)) + 1000)
    assert bonsai_rounds(recipe_of(), source) == []


def test_passes_are_walks_over_all_blocks_and_a_hash_and_a_check(source: Source) -> None:
    def passes(**fields: Any) -> int:
        return estimate(recipe_of(**fields), source).passes

    assert (passes(), passes(method="wanda"), passes(method="wanda", allocation="owl")) == (4, 3, 4)
    assert passes(evaluation={"windows": 1}) == 6
    assert passes(method={"name": "bonsai", "masks": 10, "prune_fraction": 0.1}, sparsity=0.25) == 4 + 3 * 11 - 1
    taught = {"name": "lora", "steps": 10, "batch": 128, "sequence_length": 512, "source": "c4", "distillation": {}}
    assert passes(recovery=taught) == 4 + 2 + 10  # 65536 tokens are read for at once


def test_seconds_lie_between_a_large_gpu_s_and_two_busy_cores(source: Source) -> None:
    short, long = estimate(recipe_of(), source), estimate(recipe_of(calibration={"samples": 65536, "sequence_length": 4096}), source)
    assert short.seconds_least < short.seconds_most
    assert long.seconds_least < long.seconds_on_two_cores < long.seconds_most


def test_validate_only_answers_with_the_whole_recipe_and_its_cost_and_submits_nothing(api: Api, roots: Path) -> None:
    make_checkpoint(roots / "models" / "estimated", "llama")
    asked = RECIPE | {"model": "estimated", "method": {"name": "bonsai", "masks": 8}, "sparsity": 0.1, "evaluation": None}
    answer = api.post("/v1/jobs?validate_only=true", json=asked)
    assert answer.status_code == 200
    assert answer.json()["recipe"]["method"]["prune_fraction"] == 0.05
    told = answer.json()["estimate"]
    assert (told["rounds"], told["sub_models"]) == (2, 16)
    assert told["host_bytes"] == told["phase_host_bytes"][told["peak_phase"]]
    assert told["disk_bytes"] > told["output_bytes"] > 0
    assert api.get("/v1/jobs").json()["items"] == []


def test_validate_only_refuses_what_can_t_be_run_and_knows_no_cost_of_what_lies_elsewhere(api: Api, roots: Path) -> None:
    make_checkpoint(roots / "models" / "refused", "llama")
    asked = RECIPE | {"model": "refused", "method": {"name": "cfsp", "units": "attention"}, "sparsity": {"fraction": 0.9, "of": "decoder"}}
    refused = api.post("/v1/jobs?validate_only=true", json=asked)
    assert (refused.status_code, refused.json()["code"]) == (422, "target_unreachable")
    assert api.post("/v1/jobs?validate_only=true", json=RECIPE).json()["estimate"] is None
