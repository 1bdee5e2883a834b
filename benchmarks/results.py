"""The results of all benchmarks: kept in `engine.json` part by part, rendered into `README.md`."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
STORED = HERE / "engine.json"
PHASES = ("imports", "load", "evaluate_dense", "prune", "write", "evaluate", "verify")


def stored() -> dict[str, Any]:
    """What was measured so far, by part."""
    results: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8")) if STORED.is_file() else {}
    return results


def keep(part: str, result: Any) -> None:
    """Replace a part and render all anew."""
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version()}
    results = stored() | {part: result, "machine": machine}
    STORED.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (HERE / "README.md").write_text(render(results), encoding="utf-8")


def render(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        "# Benchmarks",
        "",
        f"Written by `make bench` and `make bench-large` from `engine.json`; don't edit. {machine['cores']} shared CPU cores, {machine['threads']} threads,",
        f"torch {machine['torch']}, float32, SmolLM2-135M-Instruct, calibration on 8 × 512 tokens of WikiText-2 valid where a row doesn't say otherwise.",
    ]
    parts = {"quality": _quality, "time": _time, "memory": _memory, "large": _large, "bonsai": _bonsai, "gpu": _gpu}
    for part, rendered in parts.items():
        if part in results:
            lines += ["", *rendered(results)]
    return "\n".join(lines) + "\n"


def _quality(results: dict[str, Any]) -> list[str]:
    quality = results["quality"]
    lines = ["## Quality", "", f"Perplexity over the first 24 windows of 512 tokens of WikiText-2 test; the dense model has {quality['dense']:.2f}."]
    for section, rows in groupby(quality["rows"], lambda row: row["section"]):
        lines += ["", f"### {section}", ""]
        cells = [(row["name"], _mean(row), ", ".join(f"{value:.2f}" for value in row["perplexity"]), _number(row["authors"])) for row in rows]
        lines += _table(("", "mean over draws of calibration text", "each draw", "authors' released code"), cells)
    return lines


def _time(results: dict[str, Any]) -> list[str]:
    perplexities = {row["name"]: _mean(row) for row in results.get("quality", {}).get("rows", [])}
    rows = [
        (
            row["name"],
            f"{row['seconds']:.2f}",
            f"{row['ratio']:.2f}",
            _number(row["limit"]),
            ", ".join(f"{ratio:.2f}" for ratio in row["ratios"]),
            perplexities.get(row["name"], ""),
        )
        for row in results["time"]
    ]
    return [
        "## Time",
        "",
        "The pruning phase (read, measure, decide, write all shards) over one bare forward of the decoder blocks on the same tokens, taken in turns; beside it",
        "what it is good for.",
        "",
        *_table(("", "seconds (median)", "ratio (median)", "asked for: at most", "all ratios", "perplexity"), rows),
    ]


def _memory(results: dict[str, Any]) -> list[str]:
    def pair(peak: dict[str, int]) -> str:
        return f"{peak['resident'] / 1e6:.0f} / {peak['anonymous'] / 1e6:.0f}"

    rows = [(row["name"], *(pair(row["phases"][phase]) for phase in PHASES), pair(row["peak"])) for row in results["memory"]]
    return [
        "## Memory",
        "",
        "MB of the engine process by phase, sampled from outside: resident (with mapped file pages) / anonymous.",
        "",
        *_table(("", *PHASES, "peak"), rows),
    ]


def _large(results: dict[str, Any]) -> list[str]:
    phases = [phase for phase in PHASES if "evaluate" not in phase]
    rows = [
        (
            f"{row['layers']} × (hidden {row['hidden']}, FFN {row['ffn']}), {row['bytes'] / 1e9:.1f} GB",
            row["name"],
            *(f"{row['phases'][phase]['anonymous'] / 1e9:.2f}" for phase in phases),
            f"{row['peak']['anonymous'] / 1e9:.2f}",
            row["asked"],
            f"{row['peak']['mapped'] / 1e9:.2f}",
            f"{row['seconds']['prune']:.0f} of {sum(row['seconds'].values()):.0f}",
        )
        for row in results["large"]
    ]
    return [
        "## Memory of large models",
        "",
        "Random Llamas in bfloat16, calibration on 8 × 128 tokens. GB of the engine process by phase, sampled from outside: anonymous memory, and mapped file pages",
        "apart, which the system takes back when it needs them.",
        "",
        *_table(("", "", *phases, "peak", "asked for", "mapped", "seconds (prune, of all)"), rows),
    ]


def _bonsai(results: dict[str, Any]) -> list[str]:
    parts = results["bonsai"]
    lines = ["## Bonsai", "", "Calibration on 4 × 256 tokens; the layout is per layer, and shares are of all parameters but embedding and head."]
    if "quality" in parts:
        rows = [(row["name"], f"{row['perplexity']:.2f}", f"{row['parameters']:,}", *_rounds(row)) for row in parts["quality"]]
        lines += ["", "### Quality at equal numbers of parameters", "", *_table(("", "perplexity", "parameters left", "sub-models", "seconds a round"), rows)]
    if "speed" in parts:
        naive = next((sum(row["rounds"]) for row in parts["speed"] if row["name"] == "naive"), None)
        timed = [
            (row["name"], *_rounds(row), f"{sum(row['rounds']):.0f}", "" if naive is None else f"{naive / sum(row['rounds']):.2f}", f"{row['perplexity']:.2f}")
            for row in parts["speed"]
        ]
        head = ("", "sub-models", "seconds a round", "seconds in all", "times as fast as naive", "perplexity")
        lines += ["", "### Time of 20%, beside the released algorithm on a resident model with masks multiplied in", "", *_table(head, timed)]
    if "memory" in parts:
        plain = next((row["bytes"] for row in parts["memory"] if row["name"] == "inference"), None)
        peaks = [(row["name"], f"{row['bytes'] / 1e6:.0f}", "" if plain is None else f"{row['bytes'] / plain:.2f}") for row in parts["memory"]]
        lines += ["", "### Peak anonymous memory of a fresh process, on the same batch", "", *_table(("", "MB", "of plain inference"), peaks)]
    return lines


def _rounds(row: dict[str, Any]) -> tuple[str, str]:
    return ", ".join(map(str, row["masks"])), ", ".join(f"{seconds:.0f}" for seconds in row["rounds"])


def _gpu(results: dict[str, Any]) -> list[str]:
    gpu = results["gpu"]
    lines = ["## GPU", ""]
    if "skipped" in gpu:
        return [*lines, f"Not run: {gpu['skipped']}."]
    rows = [(row["name"], f"{row['seconds']:.0f}", f"{row['peak'] / 1e9:.1f}") for row in gpu["rows"]]
    return [
        *lines,
        f"A random Llama of the 8B shape in bfloat16 on one {gpu['device']}, calibration on {gpu['calibration']} tokens: the pruning phase.",
        "",
        *_table(("", "seconds", "peak device memory, GB"), [*rows, ("Published: a GPTQ-class sequential pass over Llama-3-8B", "745", "5.8")]),
    ]


def _mean(row: dict[str, Any]) -> str:
    return f"{statistics.mean(row['perplexity']):.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]
