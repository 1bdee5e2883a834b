"""Quality, time and memory of the engine on SmolLM2-135M, as ratios measured side by side in one run; and a pass over an 8B shape where there is a GPU.

    python -m benchmarks.engine [--data FOLDER] [--seeds 3] [--only quality|time|memory|gpu] [--rows REGEX] [--repetitions 5]

FOLDER holds `wiki.valid.raw` (calibration) and `wiki.test.raw` (evaluation) of WikiText-2. Results go to `benchmarks/engine.json`, and from there
into `benchmarks/README.md`, as soon as they are there. With `--rows`, rows with other names stay as they were measured before.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.counting import count_parameters
from app.recipe import Recipe
from app.source import read_source
from benchmarks.random_llama import Shape, write_random_llama
from benchmarks.results import HERE, keep, stored
from benchmarks.watch import watch
from espalier.demo import converted_model
from worker.blocks import BlockStream
from worker.checkpoint import finish
from worker.data import leading_windows, random_windows, tokenize
from worker.evaluation import perplexity, run_blocks
from worker.pipeline import target_of
from worker.pruners import PRUNERS
from worker.pruning import prune
from worker.state import WalkState
from worker.walk import Pruned, Pruning

REPOSITORY = HERE.parent
PER_LAYER: dict[str, Any] = {"output": {"layout": "per_layer"}}
RESTORED: dict[str, Any] = {"restoration": "least_squares"}
RESELECTED: dict[str, Any] = {"restoration": {"name": "least_squares", "reselect": True}}
OF_RIDGE_3: dict[str, Any] = {"restoration": {"name": "least_squares", "ridge": 3.0}}  # the default until it was chosen for each linear
SWAPPED: dict[str, Any] = {"restoration": {"name": "swaps", "rounds": 10}}
OWL: dict[str, Any] = {"allocation": "owl"}
LAYOUTS: dict[str, dict[str, Any]] = {"per layer": PER_LAYER, "uniform": {}}
FLAP_CODE = {"name": "flap", "mode": "code"}
WANDA_SP = {"name": "flap", "units": "ffn", "metric": "wifn", "compensate": False}  # as CFSP's authors release it: dense inputs, one ranking of all layers
PUBLISHED, ALLOCATION, RESTORATION, STRUCTURE = "Methods as published", "Allocation", "Restoration without training", "What is removed"


@dataclass(frozen=True)
class Contender:
    """A row: what is run, and what the authors' released code reaches on the same model and the same kind of data."""

    section: str
    name: str
    method: Any
    sparsity: Any
    more: dict[str, Any] = field(default_factory=dict)  # further fields of the recipe
    authors: float | None = None
    draws: int = 1  # of calibration text; more where rows are compared with a figure or with each other
    samples: int = 8


CFSP_AUTHORS = {0.2: 47.6, 0.3: 63.0, 0.5: 131.6}
CONTENDERS = [
    *(
        Contender(PUBLISHED, f"CFSP, authors' mode, per layer, FFN {s:.0%}", {"name": "cfsp", "mode": "code"}, s, PER_LAYER, them, 3)
        for s, them in CFSP_AUTHORS.items()
    ),
    *(Contender(PUBLISHED, f"CFSP, default mode, per layer, FFN {s:.0%}", "cfsp", s, PER_LAYER, them, 3) for s, them in CFSP_AUTHORS.items()),
    Contender(PUBLISHED, "Wanda-sp, per layer, FFN 20%", WANDA_SP, 0.2, PER_LAYER, 46.7, 3),
    Contender(PUBLISHED, "FLAP, per layer, decoder 20%", "flap", 0.2, PER_LAYER),
    Contender(PUBLISHED, "FLAP, authors' mode, per layer, decoder 20%", FLAP_CODE, 0.2, PER_LAYER),
    Contender(PUBLISHED, "SparseGPT 50%", "sparsegpt", 0.5, {}, 63.2, 3),
    Contender(PUBLISHED, "SparseGPT 2:4", "sparsegpt", "2:4", {}, 112.0, 3),
    Contender(PUBLISHED, "Wanda 50%", "wanda", 0.5, {}, 71.4, 3),
    Contender(PUBLISHED, "Wanda 2:4", "wanda", "2:4", {}, 217.0, 3),
    Contender(PUBLISHED, "Wanda, variant, 50%", {"name": "wanda", "variant": True}, 0.5),
    Contender(PUBLISHED, "Magnitude 50%", "magnitude", 0.5, {}, 565.0),
    Contender(ALLOCATION, "CFSP, default mode, uniform, FFN 20%", "cfsp", 0.2, {}, None, 3),
    Contender(ALLOCATION, "Wanda-sp, uniform, FFN 20%", WANDA_SP | {"inputs": "pruned"}, 0.2, {}, None, 3),
    Contender(ALLOCATION, "FLAP, uniform, decoder 20%", "flap", 0.2),
    Contender(ALLOCATION, "Wanda 50%, OWL", "wanda", 0.5, OWL, None, 3),
    Contender(ALLOCATION, "Wanda 70%", "wanda", 0.7, {}, None, 3),
    Contender(ALLOCATION, "Wanda 70%, OWL", "wanda", 0.7, OWL, None, 3),
    *(Contender(RESTORATION, f"CFSP, {layout}, FFN 20%, least squares", "cfsp", 0.2, more | RESTORED, None, 3) for layout, more in LAYOUTS.items()),
    *(Contender(RESTORATION, f"CFSP, {layout}, FFN 20%, 32 × 512 tokens", "cfsp", 0.2, more, None, 3, 32) for layout, more in LAYOUTS.items()),
    *(
        Contender(RESTORATION, f"CFSP, {layout}, FFN 20%, least squares, 32 × 512 tokens", "cfsp", 0.2, more | RESTORED, None, 3, 32)
        for layout, more in LAYOUTS.items()
    ),
    *(
        Contender(RESTORATION, f"CFSP, {layout}, FFN 20%, least squares, reselected, {samples} × 512 tokens", "cfsp", 0.2, more | RESELECTED, None, 3, samples)
        for samples in (8, 32)
        for layout, more in LAYOUTS.items()
    ),
    *(
        Contender(RESTORATION, f"CFSP, {layout}, FFN 20%, least squares of ridge 3, {samples} × 512 tokens", "cfsp", 0.2, more | OF_RIDGE_3, None, 3, samples)
        for samples in (32, 64)
        for layout, more in LAYOUTS.items()
    ),
    *(
        Contender(
            RESTORATION,
            f"CFSP on pruned inputs, {layout}, FFN 20%, least squares of ridge 3, 32 × 512 tokens",
            {"name": "cfsp", "inputs": "pruned"},
            0.2,
            more | OF_RIDGE_3,
            None,
            3,
            32,
        )
        for layout, more in LAYOUTS.items()
    ),
    Contender(RESTORATION, "Wanda 50%, swaps", "wanda", 0.5, SWAPPED, None, 3),
    Contender(RESTORATION, "Magnitude 50%, swaps", "magnitude", 0.5, SWAPPED),
    Contender(STRUCTURE, "Depth, blocks 20%", "depth", 0.2),
    Contender(STRUCTURE, "CFSP, uniform, FFN and KV groups 20%", {"name": "cfsp", "units": "both"}, 0.2),
]
# Rows that are timed, with what the pruning phase may take, in bare forwards.
TIMED: dict[str, float | None] = {
    "CFSP, default mode, uniform, FFN 20%": 1.3,
    "CFSP, default mode, per layer, FFN 20%": 1.3,
    "FLAP, per layer, decoder 20%": 1.3,
    "Wanda 50%": 2.3,
    "SparseGPT 50%": 4.0,
    "CFSP, uniform, FFN 20%, least squares": None,
    "Wanda 50%, swaps": None,
}
WATCHED = ("CFSP, default mode, uniform, FFN 20%", "Wanda 50%", "Magnitude 50%")
ON_GPU = ("CFSP, default mode, uniform, FFN 20%", "FLAP, uniform, decoder 20%", "Wanda 50%", "SparseGPT 50%")
GPU_SHAPE = Shape(ffn=14336, kv_heads=8)
GPU_TOKENS = (128, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "wikitext-2")
    parser.add_argument("--seeds", type=int, default=3, help="at most this many draws of calibration text, to show the spread")
    parser.add_argument("--only", choices=["quality", "time", "memory", "gpu"])
    parser.add_argument("--rows", type=re.compile, default=re.compile(""), help="measure only the rows of quality whose names this finds")
    parser.add_argument("--repetitions", type=int, default=5, help="of the timings")
    asked = parser.parse_args()
    if not (asked.data / "wiki.test.raw").is_file():
        parser.error(f"{asked.data} has no wiki.test.raw; name the folder of WikiText-2 raw with --data")

    model = converted_model(REPOSITORY / "var" / "cache")
    parts: dict[str, Callable[[], None]] = {
        "time": lambda: keep("time", time_ratios(model, asked.data, asked.repetitions)),
        "memory": lambda: keep("memory", memory(model, asked.data)),
        "gpu": lambda: gpu(asked.data),
        "quality": lambda: quality(model, asked.data, asked.seeds, asked.rows),
    }
    for name, measure in parts.items():
        if asked.only in (None, name):
            measure()
    print((HERE / "README.md").read_text(encoding="utf-8"))


def named(name: str) -> Contender:
    return next(contender for contender in CONTENDERS if contender.name == name)


def recipe_of(contender: Contender, data: Path, seed: int = 0) -> Recipe:
    return Recipe.model_validate(
        {
            "method": contender.method,
            "sparsity": contender.sparsity,
            "calibration": {"source": str(data / "wiki.valid.raw"), "samples": contender.samples, "sequence_length": 512, "seed": seed},
            "evaluation": {"source": str(data / "wiki.test.raw"), "windows": 24, "sequence_length": 512, "speed": False},
            **contender.more,
        }
    )


def prune_into(work: Path, stream: BlockStream, recipe: Recipe, tokens: Tensor) -> Pruned:
    shutil.rmtree(work, ignore_errors=True)
    run = Pruning(stream=stream, recipe=recipe, tokens=tokens, state=WalkState.open(work, "benchmark"), block_done=lambda done, total: None)
    return prune(run, PRUNERS[recipe.method.name], target_of(recipe, count_parameters(stream.source, [])))


def quality(model: Path, data: Path, seeds: int, rows: re.Pattern[str]) -> None:
    """Perplexity over the first 24 windows of 512 tokens of the test text, for several draws of calibration tokens; each row is kept when it is there."""
    source = read_source(model)
    stream = BlockStream(source)
    valid = tokenize(model, str(data / "wiki.valid.raw"), {})
    evaluation = recipe_of(CONTENDERS[0], data).evaluation
    assert evaluation is not None
    windows = leading_windows(tokenize(model, evaluation.source, {}), evaluation)
    with tempfile.TemporaryDirectory() as scratch:
        dense = perplexity(stream, windows, Path(scratch))
        print(f"dense {dense:.2f}", flush=True)
        for contender in CONTENDERS:
            if not rows.search(contender.name):
                continue
            values = []
            for seed in range(min(seeds, contender.draws)):
                recipe = recipe_of(contender, data, seed)
                pruned = prune_into(Path(scratch, "work"), stream, recipe, random_windows(valid, recipe.calibration))
                finish(pruned.folder, source, pruned.kept, recipe.output.layout, "source", pruned.switches)
                values.append(perplexity(BlockStream(read_source(pruned.folder)), windows, Path(scratch)))
            print(contender.name, [round(value, 2) for value in values], flush=True)
            measured = {row["name"]: row["perplexity"] for row in stored().get("quality", {}).get("rows", [])} | {contender.name: values}
            table = [
                {"section": row.section, "name": row.name, "perplexity": measured[row.name], "authors": row.authors}
                for row in CONTENDERS
                if row.name in measured
            ]
            keep("quality", {"dense": dense, "rows": table})


def time_ratios(model: Path, data: Path, repetitions: int) -> list[dict[str, Any]]:
    """Seconds of the pruning phase over seconds of one bare forward of the blocks on the same tokens, taken in turns."""
    stream = BlockStream(read_source(model))
    recipes = {name: recipe_of(named(name), data) for name in TIMED}
    tokens = random_windows(tokenize(model, str(data / "wiki.valid.raw"), {}), recipes["Wanda 50%"].calibration)
    seconds: dict[str, list[float]] = {name: [] for name in ["bare forward", *recipes]}
    with tempfile.TemporaryDirectory() as scratch:
        run_blocks(stream, tokens, Path(scratch))  # warms the page cache
        for _ in range(repetitions):
            seconds["bare forward"].append(_seconds(lambda: run_blocks(stream, tokens, Path(scratch))))
            for name, recipe in recipes.items():
                seconds[name].append(_seconds(lambda recipe=recipe: prune_into(Path(scratch, "work"), stream, recipe, tokens)))  # type: ignore[misc]  # the default binds the loop's value
    ratios = {name: [own / bare for own, bare in zip(values, seconds["bare forward"], strict=True)] for name, values in seconds.items()}
    return [
        {
            "name": name,
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(ratios[name]),
            "ratios": ratios[name],
            "limit": TIMED.get(name),
        }
        for name in seconds
    ]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory(model: Path, data: Path) -> list[dict[str, Any]]:
    """Resident memory of the engine child by phase, sampled from outside while it runs a whole job."""
    rows = []
    for name in WATCHED:
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"name": name, **watch(recipe_of(named(name), data), model, Path(folder))})
    return rows


def gpu(data: Path) -> None:
    """Seconds and peak device memory of the pruning phase on a random Llama of the 8B shape (16 GB on disk), where there is a GPU.

    Written against the engine's own device code on a machine without a GPU: it was not run there.
    """
    if not torch.cuda.is_available():
        print("gpu: skipped, torch finds no CUDA device")
        if "gpu" not in stored():
            keep("gpu", {"skipped": "torch finds no CUDA device"})
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_random_llama(Path(folder, "model"), GPU_SHAPE)
        stream = BlockStream(read_source(Path(folder, "model")), "cuda")
        tokens = torch.randint(0, GPU_SHAPE.vocab, GPU_TOKENS, generator=torch.Generator().manual_seed(0))
        for name in ON_GPU:
            torch.cuda.reset_peak_memory_stats()
            recipe = recipe_of(named(name), data)
            start = time.perf_counter()
            prune_into(Path(folder, "work"), stream, recipe, tokens)  # ends with files on disk, so the device is done
            seconds = time.perf_counter() - start
            rows.append({"name": name, "seconds": seconds, "peak": torch.cuda.max_memory_allocated()})
            keep("gpu", {"device": torch.cuda.get_device_name(), "calibration": "{} × {}".format(*GPU_TOKENS), "rows": rows})


if __name__ == "__main__":
    main()
