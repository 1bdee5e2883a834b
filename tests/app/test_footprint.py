"""What is predicted of memory and disk: counted by hand on small checkpoints, and held against the engine."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from app import footprint as engine
from app.estimate import Estimate, estimate
from app.exceptions import RecipeError
from app.footprint import Footprint, footprint, parameters_left, sizes_of, trained_parameters, training_bytes
from app.recipe import METHODS, Recipe
from app.source import Source, check_recipe, read_source
from benchmarks.estimate import bytes_on_disk, watching_disk
from benchmarks.random_llama import Shape, write_hollow_llama, write_random_llama
from tests.models import CLASSES, make_checkpoint, make_text
from worker import blocks, evaluation, memory, pipeline, swaps
from worker.recovery import distillation, perp

BF16 = torch.bfloat16
CALIBRATION = {"samples": 8, "sequence_length": 128}
TRAINING = {"steps": 4, "batch": 2, "micro_batch": 1, "sequence_length": 64, "source": "c4"}
RECOVERIES: list[dict[str, Any] | None] = [
    None,
    {"name": "full", **TRAINING},
    {"name": "lora", **TRAINING, "head": True},
    {"name": "lora", **TRAINING, "distillation": {"hidden": 1.0}},
    {"name": "perp", **TRAINING},
    {"name": "perp", **TRAINING, "mode": "reconstruct"},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return read_source(make_checkpoint(tmp_path_factory.mktemp("llama") / "model", "llama", dtype=BF16, hidden=64, ffn=160, vocab=1000))


def recipe_of(**fields: Any) -> Recipe:
    return Recipe.model_validate({"method": "cfsp", "sparsity": 0.25, "calibration": CALIBRATION, "evaluation": None} | fields)


def of(source: Source, **fields: Any) -> Footprint:
    return footprint(recipe_of(**fields), source, {})


def held(recipe: Recipe, source: Source, phase: str) -> int:
    """Of a phase, besides what a process holds that computes nothing."""
    return footprint(recipe, source, dict.fromkeys(recipe.texts.values(), 0)).host[phase] - engine.LIBRARIES - engine.WARM


# ---------------------------------------------------------------- counted by hand


def test_the_engine_s_numbers_are_the_engine_s() -> None:
    assert (engine.TOKENS_AT_ONCE, engine.HEAD_ROWS_AT_ONCE) == (blocks.TOKENS_AT_ONCE, blocks.HEAD_ROWS_AT_ONCE)
    assert (engine.TOKENS_PER_HEAD, engine.TOKENS_CHECKED) == (evaluation.TOKENS_PER_HEAD, pipeline.CHECKED_TOKENS)
    assert (engine.TOKENS_TAUGHT_AT_ONCE, engine.PUBLISHED_SHARE) == (distillation.TOKENS_AT_ONCE, perp.PUBLISHED_SHARE)
    assert engine.MAPPED_BYTES == memory.MAPPED_BYTES
    assert engine.SWAP_TENSORS % (4 * swaps.ELEMENTS) == 0
    texts = find_spec("exllamav2")
    assert texts is not None
    assert texts.origin is not None
    folder = Path(texts.origin).parent / "conversion" / "standard_cal_data"
    assert {name: (folder / f"{name}.utf8").stat().st_size for name in engine.BUNDLED_TEXT_BYTES} == engine.BUNDLED_TEXT_BYTES


@pytest.mark.parametrize("model_type", CLASSES)
def test_sizes_are_those_of_the_stored_tensors(model_type: str, tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "model", model_type, layers=3))
    stored = {name: tensor.numel() for file in source.folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    inside = {name: count for name, count in stored.items() if any(part.isdigit() for part in name.split("."))}
    by_block: dict[str, int] = {}
    for name, count in inside.items():
        number = next(part for part in name.split(".") if part.isdigit())
        by_block[number] = by_block.get(number, 0) + count
    sizes = sizes_of(source)
    assert (sizes.block, sizes.dense.all, sizes.outer) == (max(by_block.values()), sum(stored.values()), sum(stored.values()) - sum(inside.values()))
    assert sizes.is_f32
    assert sizes.item == 4


def test_a_survey_holds_a_block_its_activations_and_the_weights_scored_before(llama: Source) -> None:
    hidden, ffn, tokens = 64, 160, 1024  # all 8 × 128 tokens are computed at once
    attention, channels, norms = 2 * hidden * hidden + 2 * hidden * hidden // 2, 3 * hidden * ffn, 2 * hidden
    activations = tokens * (3 * ffn + 4 * hidden)
    assert held(recipe_of(), llama, "prune") == 4 * (attention + channels + norms + channels + activations)
    assert held(recipe_of(method={"name": "cfsp", "units": "both"}), llama, "prune") - held(recipe_of(), llama, "prune") == 4 * hidden * hidden
    fewer = recipe_of(calibration={"samples": 2, "sequence_length": 128})
    assert held(recipe_of(), llama, "prune") - held(fewer, llama, "prune") == 4 * (tokens - 256) * (3 * ffn + 4 * hidden)


def test_float32_weights_are_used_as_they_lie_in_the_file_but_copied_to_a_device(tmp_path: Path) -> None:
    short, wide = Shape(2, 128, 384, 4, 4, 1000), Shape(2, 256, 768, 4, 4, 1000)
    mapped = read_source(make_checkpoint(tmp_path / "mapped", "llama", layers=2, hidden=128, ffn=384, kv_heads=4, vocab=1000))
    for name, shape in (("short", short), ("wide", wide)):
        write_hollow_llama(tmp_path / name, shape)
    stored = read_source(tmp_path / "short")
    assert held(recipe_of(), stored, "prune") - held(recipe_of(), mapped, "prune") == 4 * (sizes_of(stored).block + 3 * 128 * 384)
    assert of(mapped).device == of(stored).device < of(read_source(tmp_path / "wide")).device


def test_training_holds_every_float_four_times_where_it_is_trained(llama: Source) -> None:
    sizes, full = sizes_of(llama), recipe_of(method="magnitude", recovery={"name": "full", **TRAINING})
    assert full.recovery is not None
    assert trained_parameters(full.recovery, sizes.dense.all, sizes) == sizes.dense.all
    assert training_bytes(1000, 1000) == 16_000
    lora = recipe_of(recovery={"name": "lora", "rank": 4, **TRAINING})
    assert lora.recovery is not None
    of_rank = 3 * (4 * 64 + 64 + 32 + 32 + 64 + 3 * (64 + 160))  # inputs of q, k, v and o; their outputs; gate, up and down
    assert trained_parameters(lora.recovery, sizes.dense.all, sizes) == 4 * of_rank
    more = recipe_of(recovery={"name": "lora", "rank": 5, **TRAINING})
    assert held(more, llama, "recover") - held(lora, llama, "recover") == 4 * 4 * of_rank  # the weight itself, its gradient and two moments


def test_a_text_is_what_loading_takes_memory_for(llama: Source) -> None:
    recipe = recipe_of(calibration={"source": "a.txt"} | CALIBRATION)
    short, long = (footprint(recipe, llama, {"a.txt": size}).host for size in (10_000, 10_000_000))
    assert long["load"] - short["load"] == 135 * 9_990_000
    assert estimate(recipe, llama, {"a.txt": 10_000_000}).peak_phase == "load"
    assert footprint(recipe, llama, {}) == footprint(recipe, llama, {"a.txt": 2_093_275})  # the larger bundled one


def test_the_disk_holds_hidden_states_twice_and_five_times_where_drift_is_measured(llama: Source) -> None:
    states = 4 * 8 * 128 * 64
    checked = 4 * 128 * 1000
    assert of(llama).disk == of(llama).output + 2 * states + checked
    assert of(llama, restoration="least_squares").disk == of(llama).output + 5 * states + checked
    assert of(llama, method="magnitude").disk == of(llama, method="magnitude").output + checked


# ------------------------------------------------------------------ never less


@pytest.mark.parametrize("recovery", RECOVERIES, ids=str)
def test_more_of_anything_never_predicts_less(recovery: dict[str, Any] | None, llama: Source) -> None:
    def told(calibration: dict[str, int], windows: int, training: dict[str, int]) -> Estimate:
        trains = None if recovery is None else recovery | training
        measures = {"windows": windows, "sequence_length": 64, "speed": False}
        method = "magnitude" if recovery and recovery["name"] == "perp" else "cfsp"
        return estimate(recipe_of(method=method, calibration=CALIBRATION | calibration, evaluation=measures, recovery=trains), llama)

    least = told({}, 2, {})
    more = [
        *(told({"samples": samples}, 2, {}) for samples in (16, 1000)),
        *(told({"sequence_length": length}, 2, {}) for length in (200, 4096)),
        told({}, 2000, {}),
        *(told({}, 2, {name: value}) for name, value in (("steps", 40), ("micro_batch", 2), ("sequence_length", 640)) if recovery),
    ]
    for name, other in product(("host_bytes", "device_bytes", "disk_bytes", "output_bytes", "passes", "seconds_least", "seconds_most"), more):
        assert getattr(other, name) >= getattr(least, name), name


def test_every_method_with_every_recovery_has_an_estimate(tmp_path: Path) -> None:
    sources = [read_source(make_checkpoint(tmp_path / name, name)) for name in ("llama", "qwen3_moe", "gemma2", "gpt2", "opt")]
    told, allowed = set(), set()
    for method, restoration, recovery, layout in product(METHODS, (None, "least_squares", "swaps"), RECOVERIES, ("uniform", "per_layer")):
        fields = {"method": method, "restoration": restoration, "recovery": recovery, "output": {"layout": layout}, "sparsity": 0.5}
        try:
            recipe = recipe_of(**fields)
        except ValidationError:
            continue
        allowed.add((method, recipe.recovery.name if recipe.recovery else None))
        for source in sources:
            try:
                check_recipe(recipe, source)
            except RecipeError:
                continue
            found = estimate(recipe, source)
            assert min(found.host_bytes, found.device_bytes, found.output_bytes, found.passes) > 0
            assert found.host_bytes == found.phase_host_bytes[found.peak_phase] == max(found.phase_host_bytes.values())
            assert found.disk_bytes > found.output_bytes
            assert found.seconds_least < found.seconds_most
            told.add((method, recipe.recovery.name if recipe.recovery else None))
    assert told == allowed


def test_what_stays_is_what_the_recipe_asks_for(llama: Source) -> None:
    sizes = sizes_of(llama)
    dense = sizes.dense.all
    assert parameters_left(recipe_of(method="wanda"), sizes) == dense
    assert parameters_left(recipe_of(sparsity=0.25), sizes) == dense - 3 * 3 * 64 * 160 // 4
    assert parameters_left(recipe_of(sparsity={"target_parameters": 100_000}), sizes) == 100_000
    assert parameters_left(recipe_of(sparsity={"max_perplexity_increase": 0.1}, evaluation={"source": "wiki"}), sizes) == dense


# ----------------------------------------------------------------- the real engine


def test_the_engine_holds_and_writes_what_was_predicted(tmp_path: Path) -> None:
    """Blocks so wide that they are two fifths of the memory; the rest are libraries."""
    write_random_llama(tmp_path / "model", Shape(layers=2, hidden=1024, ffn=4096, heads=8, kv_heads=8, vocab=2000))
    source, text = read_source(tmp_path / "model"), make_text(tmp_path / "text", 20_000)
    recipe = recipe_of(calibration={"source": str(text), "samples": 16, "sequence_length": 128})
    told = estimate(recipe, source, {str(text): text.stat().st_size})
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "worker.pipeline", tmp_path / "recipe.json", source.folder, tmp_path / "job" / "out"]
    (tmp_path / "job").mkdir()
    with watching_disk(tmp_path / "job") as disk:
        subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=300)
    report = json.loads((tmp_path / "job" / "out" / "report.json").read_text(encoding="utf-8"))
    alone = max(size for phase, size in told.phase_host_bytes.items() if phase != "verify")
    assert report["peak_memory_bytes"] == pytest.approx(alone, rel=0.2)
    assert bytes_on_disk(tmp_path / "job" / "out" / "checkpoint") == pytest.approx(told.output_bytes, rel=0.02)
    assert max(disk) == pytest.approx(told.disk_bytes, rel=0.03)
    assert math.isclose(told.output_bytes, 2 * report["parameters_after"]["all"], rel_tol=0.01)
