"""Quality, time and memory of the engine on SmolLM2-135M, as ratios measured side by side in one run.

    python -m benchmarks.engine [--data FOLDER] [--seeds 3] [--only quality|time|memory]

FOLDER holds `wiki.valid.raw` (calibration) and `wiki.test.raw` (evaluation) of WikiText-2. Results go to `benchmarks/engine.json`, and from there
into `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.recipe import Recipe
from app.source import read_source
from espalier.demo import converted_model
from worker.blocks import BlockStream
from worker.checkpoint import finish
from worker.data import leading_windows, random_windows, tokenize
from worker.evaluation import count_parameters, perplexity, run_blocks
from worker.pipeline import target_of
from worker.pruners import PRUNERS
from worker.pruning import prune
from worker.state import WalkState
from worker.walk import Pruned, Pruning

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
PER_LAYER: dict[str, Any] = {"output": {"layout": "per_layer"}}

# name, method, sparsity, further recipe fields, perplexity of the authors' released code on the same model and the same kind of data
CONTENDERS: list[tuple[str, Any, Any, dict[str, Any], float | None]] = [
    *(
        (f"CFSP, authors' mode, per layer, FFN {s:.0%}", {"name": "cfsp", "mode": "code"}, s, PER_LAYER, them)
        for s, them in ((0.2, 47.6), (0.3, 63.0), (0.5, 131.6))
    ),
    *((f"CFSP, default mode, per layer, FFN {s:.0%}", "cfsp", s, PER_LAYER, them) for s, them in ((0.2, 47.6), (0.3, 63.0), (0.5, 131.6))),
    ("CFSP, default mode, uniform, FFN 20%", "cfsp", 0.2, {}, None),
    ("Wanda 50%", "wanda", 0.5, {}, 71.4),
    ("Wanda, variant, 50%", {"name": "wanda", "variant": True}, 0.5, {}, None),
    ("Wanda 2:4", "wanda", "2:4", {}, None),
    ("Magnitude 50%", "magnitude", 0.5, {}, 565.0),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "wikitext-2")
    parser.add_argument("--seeds", type=int, default=3, help="calibration samples drawn anew, to show the spread")
    parser.add_argument("--only", choices=["quality", "time", "memory"])
    asked = parser.parse_args()
    if not (asked.data / "wiki.test.raw").is_file():
        parser.error(f"{asked.data} has no wiki.test.raw; name the folder of WikiText-2 raw with --data")

    model = converted_model(REPOSITORY / "var" / "cache")
    parts: dict[str, Callable[[], Any]] = {
        "time": lambda: time_ratios(model, asked.data),
        "memory": lambda: memory(model, asked.data),
        "quality": lambda: quality(model, asked.data, asked.seeds, lambda rows: keep("quality", rows)),
    }
    stored = HERE / "engine.json"

    def keep(name: str, result: Any) -> None:
        results: dict[str, Any] = json.loads(stored.read_text()) if stored.is_file() else {}
        results[name] = result
        results["machine"] = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
        stored.write_text(json.dumps(results, indent=2) + "\n")
        (HERE / "README.md").write_text(render(results))

    for name, measure in parts.items():
        if asked.only in (None, name):
            keep(name, measure())
    print((HERE / "README.md").read_text())


def recipe_of(method: Any, sparsity: Any, data: Path, seed: int = 0, **more: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "method": method,
            "sparsity": sparsity,
            "calibration": {"source": str(data / "wiki.valid.raw"), "samples": 8, "sequence_length": 512, "seed": seed},
            "evaluation": {"source": str(data / "wiki.test.raw"), "windows": 24, "sequence_length": 512, "speed": False},
            **more,
        }
    )


def prune_into(work: Path, stream: BlockStream, recipe: Recipe, tokens: Tensor) -> Pruned:
    shutil.rmtree(work, ignore_errors=True)
    run = Pruning(stream=stream, recipe=recipe, tokens=tokens, state=WalkState.open(work, "benchmark"), block_done=lambda done, total: None)
    return prune(run, PRUNERS[recipe.method.name], target_of(recipe, count_parameters(stream.source, [])))


# ------------------------------------------------------------------------- quality


def quality(model: Path, data: Path, seeds: int, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Perplexity over the first 24 windows of 512 tokens of the test text, for several draws of 8 × 512 calibration tokens."""
    source = read_source(model)
    stream = BlockStream(source)
    valid = tokenize(model, str(data / "wiki.valid.raw"), {})
    first = recipe_of("cfsp", 0.2, data)
    assert first.evaluation is not None
    windows = leading_windows(tokenize(model, first.evaluation.source, {}), first.evaluation)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        dense = perplexity(stream, windows, Path(scratch))
        print(f"dense {dense:.2f}", flush=True)
        for name, method, sparsity, more, authors in CONTENDERS:
            values = []
            compared_by_draws = authors is not None and method != "magnitude"
            for seed in range(seeds if compared_by_draws else 1):
                recipe = recipe_of(method, sparsity, data, seed, **more)
                pruned = prune_into(Path(scratch, "work"), stream, recipe, random_windows(valid, recipe.calibration))
                finish(pruned.folder, source, pruned.kept, recipe.output.layout, "source", pruned.switches)
                values.append(perplexity(BlockStream(read_source(pruned.folder)), windows, Path(scratch)))
            rows.append({"name": name, "perplexity": values, "authors": authors})
            print(name, [round(value, 2) for value in values], flush=True)
            keep({"dense": dense, "rows": rows})
    return {"dense": dense, "rows": rows}


# ---------------------------------------------------------------------------- time


def time_ratios(model: Path, data: Path, repetitions: int = 5) -> list[dict[str, Any]]:
    """Seconds of the pruning phase over seconds of one bare forward of the blocks on the same tokens, taken in turns."""
    stream = BlockStream(read_source(model))
    tokens = random_windows(tokenize(model, str(data / "wiki.valid.raw"), {}), recipe_of("cfsp", 0.2, data).calibration)
    recipes = {
        "CFSP 20 %, uniform": recipe_of("cfsp", 0.2, data),
        "CFSP 20 %, per layer": recipe_of("cfsp", 0.2, data, **PER_LAYER),
        "Wanda 50 %": recipe_of("wanda", 0.5, data),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ["bare forward", *recipes]}
    with tempfile.TemporaryDirectory() as scratch:
        run_blocks(stream, tokens, Path(scratch))  # warms the page cache
        for _ in range(repetitions):
            seconds["bare forward"].append(_seconds(lambda: run_blocks(stream, tokens, Path(scratch))))
            for name, recipe in recipes.items():
                seconds[name].append(_seconds(lambda recipe=recipe: prune_into(Path(scratch, "work"), stream, recipe, tokens)))  # type: ignore[misc]  # the default binds the loop's value
    ratios = {name: [own / bare for own, bare in zip(values, seconds["bare forward"], strict=True)] for name, values in seconds.items()}
    return [{"name": name, "seconds": statistics.median(seconds[name]), "ratio": statistics.median(ratios[name]), "ratios": ratios[name]} for name in seconds]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# -------------------------------------------------------------------------- memory


def memory(model: Path, data: Path) -> list[dict[str, Any]]:
    """Resident memory of the engine child by phase, sampled from outside while it runs a whole job."""
    rows = []
    for name, method, sparsity in (("CFSP 20 %", "cfsp", 0.2), ("Wanda 50 %", "wanda", 0.5), ("Magnitude 50 %", "magnitude", 0.5)):
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder, "recipe.json")
            recipe.write_text(recipe_of(method, sparsity, data).model_dump_json())
            rows.append({"name": name, **_watch([sys.executable, "-m", "worker.pipeline", str(recipe), str(model), str(Path(folder, "out"))])})
    return rows


def _watch(command: list[str]) -> dict[str, Any]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    phase, peaks = ["imports"], {"imports": {"resident": 0, "anonymous": 0}}
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.01):
            now = _resident(process.pid)
            best = peaks.setdefault(phase[0], {"resident": 0, "anonymous": 0})
            for kind, value in now.items():
                best[kind] = max(best[kind], value)

    sampler = threading.Thread(target=sample)
    sampler.start()
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "phase":
            phase[0] = event["phase"]
    code = process.wait()
    stop.set()
    sampler.join()
    if code != 0:
        raise RuntimeError(f"{command} ended with {code}")
    return {
        "phases": peaks,
        "peak_resident": max(peak["resident"] for peak in peaks.values()),
        "peak_anonymous": max(peak["anonymous"] for peak in peaks.values()),
    }


def _resident(pid: int) -> dict[str, int]:
    """Resident and anonymous bytes of a process; zeros once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {"resident": 0, "anonymous": 0}
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return {"resident": int(values.get("VmRSS", 0)) * 1024, "anonymous": int(values.get("RssAnon", 0)) * 1024}


# -------------------------------------------------------------------------- report


def render(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        "# Benchmarks",
        "",
        f"Written by `make bench` from `engine.json`; don't edit. {machine['cores']} shared CPU cores, {machine['threads']} threads, torch {machine['torch']}, float32,",
        "SmolLM2-135M-Instruct, calibration on 8 × 512 tokens of WikiText-2 valid.",
    ]
    if "quality" in results:
        quality = results["quality"]
        lines += [
            "",
            "## Quality",
            "",
            f"Perplexity over the first 24 windows of 512 tokens of WikiText-2 test; the dense model has {quality['dense']:.2f}.",
            "",
        ]
        lines += ["| | mean over draws of calibration text | each draw | authors' released code |", "|---|---|---|---|"]
        for row in quality["rows"]:
            values, authors = row["perplexity"], "" if row["authors"] is None else f"{row['authors']:g}"
            lines.append(f"| {row['name']} | {statistics.mean(values):.2f} | {', '.join(f'{value:.2f}' for value in values)} | {authors} |")
    if "time" in results:
        lines += [
            "",
            "## Time",
            "",
            "The pruning phase (read, measure, decide, write all shards) over one bare forward of the decoder blocks on the same tokens, taken in turns.",
            "",
        ]
        lines += ["| | seconds (median) | ratio (median) | all ratios |", "|---|---|---|---|"]
        lines += [
            f"| {row['name']} | {row['seconds']:.2f} | {row['ratio']:.2f} | {', '.join(f'{ratio:.2f}' for ratio in row['ratios'])} |" for row in results["time"]
        ]
    if "memory" in results:
        phases = ["imports", "load", "evaluate_dense", "prune", "write", "evaluate", "verify"]
        lines += ["", "## Memory", "", "MB of the engine process by phase, sampled from outside: resident (with mapped file pages) / anonymous.", ""]
        lines += [f"| | {' | '.join(phases)} | peak |", f"|---|{'---|' * (len(phases) + 1)}"]
        for row in results["memory"]:
            cells = [f"{row['phases'][phase]['resident'] / 1e6:.0f} / {row['phases'][phase]['anonymous'] / 1e6:.0f}" for phase in phases]
            lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['peak_resident'] / 1e6:.0f} / {row['peak_anonymous'] / 1e6:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
