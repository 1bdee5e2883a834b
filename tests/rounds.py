"""Runs of Bonsai on tiny models, for tests of its rounds and of their sub-models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.counting import count_parameters
from app.recipe import Recipe
from app.source import check_recipe, read_source
from tests.models import make_checkpoint
from worker import perturbing
from worker.blocks import BlockStream
from worker.data import random_windows, tokenize
from worker.perturbing import choose_in_rounds
from worker.pipeline import target_of
from worker.pruners import bonsai
from worker.state import WalkState
from worker.structured import Keep
from worker.walk import Pruning, RoundStep

LAYERS, HIDDEN, FFN, HEADS, GROUPS = 3, 64, 60, 8, 4
PER_LAYER = {"output": {"layout": "per_layer"}}


def make_dense(folder: Path, model_type: str, **more: Any) -> Path:
    sizes: dict[str, Any] = {"layers": LAYERS, "hidden": HIDDEN, "ffn": FFN, "heads": HEADS, "kv_heads": GROUPS}
    return make_checkpoint(folder, model_type, **(sizes | more))


def recipe_of(text: Path, sparsity: Any = 0.3, more: dict[str, Any] = PER_LAYER, **method: Any) -> Recipe:
    asked = {"name": "bonsai", "masks": 12, "prune_fraction": 0.12} | method
    calibration = {"source": str(text), "samples": 3, "sequence_length": 24}
    return Recipe.model_validate({"method": asked, "sparsity": sparsity, "calibration": calibration, "evaluation": None, **more})


def open_run(folder: Path, recipe: Recipe, work: Path, told: Callable[[RoundStep], None] = lambda step: None) -> Pruning:
    source = read_source(folder)
    check_recipe(recipe, source)
    tokens = random_windows(tokenize(folder, recipe.calibration.source, {}), recipe.calibration)
    state = WalkState.open(work, recipe.model_dump_json())
    return Pruning(BlockStream(source), recipe, tokens, state, lambda done, total: None, round_step=told)


def choose(folder: Path, recipe: Recipe, work: Path, told: Callable[[RoundStep], None] = lambda step: None) -> tuple[list[Keep], list[str], Pruning]:
    run = open_run(folder, recipe, work, told)
    assert recipe.method.name == "bonsai"
    choice, notes = choose_in_rounds(run, bonsai.PRUNER, recipe.method, target_of(recipe, count_parameters(run.stream.source, [])).fraction)
    return [keep for keep in choice.keeps if keep is not None], notes, run


def left_of(keeps: list[Keep]) -> list[Tensor]:
    """Masks of all modules, block by block, FFN before attention."""
    of_blocks = [
        (
            torch.ones(FFN, dtype=torch.bool) if keep.channels is None else keep.channels[0],
            torch.ones(GROUPS, dtype=torch.bool) if keep.groups is None else keep.groups,
        )
        for keep in keeps
    ]
    return [mask for pair in of_blocks for mask in pair]


def facts_of(run: Pruning) -> list[dict[str, Any]]:
    return [record["facts"] for record in run.state.blocks(perturbing.WALK)]
