"""Memory of the engine on checkpoints of large shapes, random and written for the purpose; everything written is deleted after.

    python -m benchmarks.large [--hidden 4096 --ffn 11008 --heads 32 --layers 32 64] [--data FOLDER] [--folder FOLDER]

Each number of layers is pruned by CFSP and by Wanda with 8 × 128 calibration tokens while memory is sampled from outside. The engine is told that it may hold
4 GB, so it checks names and shapes of the result and a few blocks, and doesn't load it whole. A run that would leave less than 15 GB of disk is refused
beforehand: source and result lie there together. Results go to `benchmarks/engine.json` and `README.md`, one by one.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from app.recipe import Recipe
from benchmarks.random_llama import Shape, write_random_llama
from benchmarks.results import HERE, keep, stored
from benchmarks.watch import watch

METHODS = {"CFSP, FFN 20%": ("cfsp", 0.2), "Wanda 50%": ("wanda", 0.5)}
LEFT_FREE = 15e9  # bytes of disk
PEAK_OF_7B = 4e9  # bytes of anonymous memory that 32 layers of the 7B model may take
GROWTH = 1.05  # of the peak, from 32 layers to 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = Shape()
    parser.add_argument("--hidden", type=int, default=sizes.hidden)
    parser.add_argument("--ffn", type=int, default=sizes.ffn)
    parser.add_argument("--heads", type=int, default=sizes.heads)
    parser.add_argument("--layers", type=int, nargs="+", default=[sizes.layers])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data" / "wikitext-2")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written (default: the system's temporary folder)")
    asked = parser.parse_args()
    failed = False
    for layers in asked.layers:
        shape = Shape(layers, asked.hidden, asked.ffn, asked.heads, asked.heads)
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            free = shutil.disk_usage(folder).free
            if free - 2 * shape.bytes < LEFT_FREE:
                parser.error(f"{layers} layers need {2 * shape.bytes / 1e9:.0f} GB and {LEFT_FREE / 1e9:.0f} GB beside them; {free / 1e9:.0f} GB are free")
            print(f"writing {layers} layers, {shape.bytes / 1e9:.1f} GB", flush=True)
            write_random_llama(Path(folder, "model"), shape)
            for name in METHODS:
                with tempfile.TemporaryDirectory(dir=folder) as out:
                    measured = watch(recipe_of(name, asked.data), Path(folder, "model"), Path(out), "--memory", str(round(PEAK_OF_7B)))
                failed |= not _keep(name, shape, measured)
    return failed


def recipe_of(name: str, data: Path) -> Recipe:
    method, sparsity = METHODS[name]
    calibration = {"source": str(data / "wiki.valid.raw"), "samples": 8, "sequence_length": 128}
    return Recipe.model_validate({"method": method, "sparsity": sparsity, "calibration": calibration, "evaluation": None})


def _keep(name: str, shape: Shape, measured: dict[str, Any]) -> bool:
    """Keep a row in the place of an earlier one of the same shape and method; whether its peak is as low as asked."""
    row = {"name": name, "layers": shape.layers, "hidden": shape.hidden, "ffn": shape.ffn, "bytes": shape.bytes, **measured}
    same = ("name", "hidden", "ffn", "layers")
    rows = [earlier for earlier in stored().get("large", []) if any(earlier[key] != row[key] for key in same)] + [row]
    limit = PEAK_OF_7B if (shape.hidden, shape.layers) == (Shape.hidden, Shape.layers) else None
    shorter = [earlier for earlier in rows if shape.layers == 64 and [earlier[key] for key in same] == [*(row[key] for key in same[:-1]), 32]]
    if shorter:
        limit = GROWTH * shorter[0]["peak"]["anonymous"]
    row["asked"] = "" if limit is None else f"{limit / 1e9:.2f}"
    keep("large", sorted(rows, key=lambda each: (-each["hidden"], each["name"], each["layers"])))
    peak = row["peak"]["anonymous"]
    print(f"{name}, {shape.layers} layers: peak {peak / 1e9:.2f} GB anonymous, {row['peak']['mapped'] / 1e9:.2f} GB mapped {row['asked']}", flush=True)
    return limit is None or peak <= limit


if __name__ == "__main__":
    sys.exit(main())
