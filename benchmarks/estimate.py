"""What a job was predicted to hold in memory and on disk, and what it held: the engine as its own process, sampled from outside while it runs.

    python -m benchmarks.estimate [--data FOLDER] [--rows REGEX] [--folder FOLDER]

SmolLM2-135M-Instruct with few tokens, so that each row takes less than a minute of a core, and once with the recipe's own sizes; a random Llama of two wide
layers in bfloat16. The engine is told that it may hold a quarter more than predicted, so that it tries no whole model where that would take more. The large
checkpoints that benchmarks/large.py measured are predicted from headers alone. Where there is a GPU, only its memory is looked at, CUDA's own reckoned in. Results go to `benchmarks/engine.json` and `README.md`, one by one; with
`--rows`, rows with other names stay as they were measured before.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.estimate import Estimate, estimate
from app.footprint import DRIVER
from app.recipe import Recipe
from app.source import read_source
from benchmarks.large import recipe_of as recipe_of_large
from benchmarks.random_llama import Shape, write_hollow_llama, write_random_llama
from benchmarks.results import HERE, keep, stored
from benchmarks.watch import watch
from espalier.demo import converted_model

SMOL, WIDE = "SmolLM2-135M", "2 × (hidden 2048, FFN 5504)"
WIDE_SHAPE = Shape(layers=2, hidden=2048, ffn=5504, heads=16, kv_heads=16)
TEXT_BYTES = {"calibration": 150_000, "evaluation": 100_000}  # of the texts: what tokenises a whole one would hide all else
TRAINING = {"steps": 2, "batch": 2, "micro_batch": 1, "sequence_length": 128, "held_out": 2}
LONGER = TRAINING | {"micro_batch": 2, "sequence_length": 512}
ROWS: dict[str, dict[str, Any]] = {
    "CFSP, uniform": {"method": "cfsp", "sparsity": 0.2},
    "CFSP, per layer, least squares": {"method": "cfsp", "sparsity": 0.2, "output": {"layout": "per_layer"}, "restoration": "least_squares"},
    "CFSP, uniform, least squares, reselected": {"method": "cfsp", "sparsity": 0.2, "restoration": {"name": "least_squares", "reselect": True}},
    "FLAP": {"method": "flap", "sparsity": 0.2},
    "Bonsai, 8 masks": {"method": {"name": "bonsai", "masks": 8, "prune_fraction": 0.1}, "sparsity": 0.1},
    "Wanda": {"method": "wanda", "sparsity": 0.5},
    "Wanda, swaps": {"method": "wanda", "sparsity": 0.5, "restoration": {"name": "swaps", "rounds": 2}},
    "SparseGPT": {"method": "sparsegpt", "sparsity": 0.5},
    "Magnitude, PERP": {"method": "magnitude", "sparsity": 0.5, "recovery": {"name": "perp", **TRAINING}},
    "Magnitude, PERP, reconstruction": {"method": "magnitude", "sparsity": 0.5, "recovery": {"name": "perp", "mode": "reconstruct", "samples": 8, **TRAINING}},
    "Magnitude, full retraining": {"method": "magnitude", "sparsity": 0.5, "recovery": {"name": "full", **TRAINING}},
    "Wanda, LoRA": {"method": "wanda", "sparsity": 0.5, "recovery": {"name": "lora", **TRAINING}},
    "CFSP, LoRA": {"method": "cfsp", "sparsity": 0.2, "recovery": {"name": "lora", **TRAINING}},
    "CFSP, LoRA, 2 × 512 tokens": {"method": "cfsp", "sparsity": 0.2, "recovery": {"name": "lora", **LONGER}},
    "CFSP, LoRA, 2 × 512 tokens, activations kept": {
        "method": "cfsp",
        "sparsity": 0.2,
        "recovery": {"name": "lora", **LONGER, "gradient_checkpointing": False},
    },
    "CFSP, the recipe's own sizes": {"method": "cfsp", "sparsity": 0.3},
}
OF_WIDE = (
    "CFSP, uniform",
    "CFSP, per layer, least squares",
    "CFSP, uniform, least squares, reselected",
    "FLAP",
    "Wanda",
    "Wanda, swaps",
    "SparseGPT",
    "Magnitude, PERP",
    "Wanda, LoRA",
    "CFSP, LoRA",
)
SAMPLE_SECONDS = 0.05
ALLOWED = 1.25  # of what is predicted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data" / "wikitext-2")
    parser.add_argument("--rows", type=re.compile, default=re.compile(""), help="measure only rows whose names this finds")
    parser.add_argument("--folder", type=Path, help="where the random checkpoint is written (default: the system's temporary folder)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        texts = _shortened(asked.data, Path(folder))
        write_random_llama(Path(folder, "wide"), WIDE_SHAPE)
        models = {SMOL: converted_model(HERE.parent / "var" / "cache"), WIDE: Path(folder, "wide")}
        for model, path in models.items():
            for name in ROWS if model == SMOL else OF_WIDE:
                if asked.rows.search(name):
                    _keep(measure(model, name, recipe_of(name, texts, evaluates=model == SMOL), path, Path(folder)))
    for row in _large(asked.data):
        _keep(row)


def recipe_of(name: str, texts: dict[str, Path], *, evaluates: bool) -> Recipe:
    """With little text, but where the row is about the recipe's own sizes. Random models have no perplexity worth measuring."""
    row = ROWS[name]
    if name == "CFSP, the recipe's own sizes":
        return Recipe.model_validate(row | {"evaluation": {"speed": False}})
    evaluation = {"source": str(texts["evaluation"]), "windows": 2, "sequence_length": 128, "speed": False}
    common = {"calibration": {"source": str(texts["calibration"]), "samples": 8, "sequence_length": 128}, "evaluation": evaluation if evaluates else None}
    return Recipe.model_validate(common | row)


def _shortened(data: Path, folder: Path) -> dict[str, Path]:
    found = {}
    for name, file in (("calibration", "wiki.valid.raw"), ("evaluation", "wiki.test.raw")):
        found[name] = folder / f"{name}.txt"
        found[name].write_bytes((data / file).read_bytes()[: TEXT_BYTES[name]].rpartition(b"\n")[0])
    return found


def measure(model: str, name: str, recipe: Recipe, path: Path, folder: Path) -> dict[str, Any]:
    """A row: sizes in bytes of a job that ran, and what was predicted of it."""
    predicted = estimate(recipe, read_source(path), {text: Path(text).stat().st_size for text in recipe.texts.values() if Path(text).is_file()})
    with tempfile.TemporaryDirectory(dir=folder) as out, watching_disk(Path(out)) as disk:
        found = watch(recipe, path, Path(out), "--memory", str(round(ALLOWED * predicted.host_bytes)))
        output = bytes_on_disk(Path(out, "out", "checkpoint"))
        on_device = json.loads(Path(out, "out", "report.json").read_text(encoding="utf-8"))["peak_device_bytes"]
    if on_device is not None:  # the host's memory is predicted for machines without a GPU
        return {"model": model, "name": name, "sizes": {"device": [predicted.device_bytes, DRIVER + on_device]}}
    peaks = {phase: of_phase["family"] for phase, of_phase in found["phases"].items()}
    files = {"disk": [predicted.disk_bytes, max(disk)], "output": [predicted.output_bytes, output]}
    return {"model": model, "name": name, "sizes": _sizes(predicted, peaks) | files}


def _sizes(predicted: Estimate, peaks: dict[str, int]) -> dict[str, list[int]]:
    """Bytes of each phase and of the highest, as predicted and as measured; of phases too short for a sample, none."""
    phases = {phase: [told, peaks[phase]] for phase, told in predicted.phase_host_bytes.items() if peaks.get(phase)}
    return phases | {"peak": [max(sizes[number] for sizes in phases.values()) for number in range(2)]}


def _large(data: Path) -> Iterator[dict[str, Any]]:
    """The rows that benchmarks/large.py measured, of the engine alone."""
    for row in stored().get("large", []):
        shape = Shape(row["layers"], row["hidden"], row["ffn"], row["hidden"] // 128, row["hidden"] // 128)
        recipe = recipe_of_large(row["name"], data)
        with tempfile.TemporaryDirectory() as folder:
            write_hollow_llama(Path(folder, "model"), shape)
            predicted = estimate(recipe, read_source(Path(folder, "model")), {recipe.calibration.source: Path(recipe.calibration.source).stat().st_size})
        alone = {phase: peaks["anonymous"] for phase, peaks in row["phases"].items() if phase != "verify"}
        yield {"model": f"{row['layers']} × (hidden {row['hidden']}, FFN {row['ffn']})", "name": row["name"], "sizes": _sizes(predicted, alone)}


@contextmanager
def watching_disk(folder: Path) -> Iterator[list[int]]:
    """Samples of what lies in a folder, in bytes, while the context is entered."""
    samples, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            samples.append(bytes_on_disk(folder))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def bytes_on_disk(folder: Path) -> int:
    """Blocks that the files in a folder take, several names of one file counted once."""
    found: dict[int, int] = {}
    for path, _, files in os.walk(folder):
        for file in files:
            try:
                facts = Path(path, file).stat()
            except FileNotFoundError:  # gone since it was listed
                continue
            found[facts.st_ino] = facts.st_blocks * 512
    return sum(found.values())


def _keep(row: dict[str, Any]) -> None:
    """Keep a row in the place of an earlier one of the same model and name."""
    rows = stored().get("estimate", [])
    places = [place for place, earlier in enumerate(rows) if (earlier["model"], earlier["name"]) == (row["model"], row["name"])]
    if places:
        rows[places[0]] = row | {"sizes": rows[places[0]]["sizes"] | row["sizes"]}
    else:
        rows.append(row)
    keep("estimate", rows)
    predicted, measured = row["sizes"].get("device") or row["sizes"]["peak"]
    print(f"{row['model']}, {row['name']}: {predicted / 1e6:.0f} MB predicted, {measured / 1e6:.0f} MB measured", flush=True)


if __name__ == "__main__":
    main()
