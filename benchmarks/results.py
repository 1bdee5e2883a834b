"""The results of all benchmarks: kept in `engine.json` part by part, rendered into `README.md`."""

from __future__ import annotations

import json
import math
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
SHARED_GPU = "Measured on one {}, in bfloat16 where autocast allows, which up to nine processes shared: seconds compare rows, and are no one's alone."
FEW = 0.0035  # of a model's parameters: the most that a recovery of few may train
ASKED_OF_FULL = 0.95  # of what full retraining closes of the log-perplexity gap, by such a recovery
RIVALS = {"Magnitude 50%": ("Wanda 50%", "SparseGPT 50%")}  # which a recovered model is to beat as they are
ON_CPU = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # of a process whose own memory is measured, so that all of it is there
ROUNDS = ("sub-models", "seconds a round", "ETA after the first, off by")


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
    parts = {
        "quality": _quality,
        "time": _time,
        "memory": _memory,
        "large": _large,
        "estimate": _estimate,
        "bonsai": _bonsai,
        "recovery": _recovery,
        "gpu": _gpu,
        "service": _service,
    }
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


def _estimate(results: dict[str, Any]) -> list[str]:
    def cell(row: dict[str, Any], name: str) -> str:
        if name not in row["sizes"]:
            return ""
        predicted, measured = row["sizes"][name]
        return f"{predicted / 1e6:.0f} / {measured / 1e6:.0f} ({predicted / measured - 1:+.0%})"

    columns = ("load", "evaluate", "prune", "recover", "verify", "peak", "device", "disk", "output")
    return [
        "## What is predicted of memory and disk",
        "",
        "MB, predicted from the recipe and the checkpoint's headers / measured (difference): anonymous memory of the engine with the processes that it starts, by",
        "phase, of a GPU (an H100, measured apart), the most that lies in the work directory, and the checkpoint. Calibration on 8 × 128 tokens but for the recipe's own sizes; where the whole result",
        "would not fit in a quarter more than predicted, blocks of it are tried. Of models of 32 and 64 blocks the engine alone was measured, before it verifies.",
        "",
        *_table(("", "", *columns), [(row["model"], row["name"], *(cell(row, column) for column in columns)) for row in results["estimate"]]),
    ]


RELEASED_FIT = [
    "The released masks take the one candidate of every attention with few KV groups at the same time, so the released fit can't tell these apart, and whether it lets",
    "some of them go is chance: perplexities of sub-models that differ in the seventh digit, as between widths that are padded and not, led to models of 64.0 and 1605",
    "in the authors' mode. By default a coin is tossed for each module.",
]


def _bonsai(results: dict[str, Any]) -> list[str]:
    parts = results["bonsai"]
    layout = "Calibration on 4 × 256 tokens; the layout is per layer, and shares are of all parameters but embedding and head."
    lines = ["## Bonsai", "", layout, "", *RELEASED_FIT]
    if "quality" in parts:
        lines += ["", "### Quality at equal numbers of parameters", "", *_bonsai_quality(sorted(parts["quality"], key=lambda row: row["name"] != "dense"))]
    if "decoding" in parts:
        lines += ["", "### Tokens a second", "", *_bonsai_decoding(parts["decoding"])]
    if "speed" in parts:
        paces = {row["name"]: sum(row["rounds"]) / sum(row["masks"]) for row in parts["speed"]}
        timed = [
            (
                row["name"],
                *_rounds(row),
                f"{sum(row['rounds']):.0f}",
                f"{paces[row['name']]:.2f}",
                f"{paces['naive'] / paces[row['name']]:.2f}" if "naive" in paces else "",
                f"{row['perplexity']:.2f}",
            )
            for row in parts["speed"]
        ]
        head = ("", *ROUNDS, "seconds in all", "a sub-model", "times as fast as naive", "perplexity")
        lines += [
            "",
            "### Time of 20%, beside the released algorithm on a resident model with masks multiplied in",
            "",
            *_table(head, timed),
        ]
    if "memory" in parts:
        plain = next((row["bytes"] for row in parts["memory"] if row["name"] == "inference"), None)
        peaks = [(row["name"], f"{row['bytes'] / 1e6:.0f}", "" if plain is None else f"{row['bytes'] / plain:.2f}") for row in parts["memory"]]
        lines += ["", "### Peak anonymous memory of a fresh process, on the same batch", "", *_table(("", "MB", "of plain inference"), peaks)]
    return lines


def _bonsai_quality(rows: list[dict[str, Any]]) -> list[str]:
    before_after = []
    for row in rows:
        adapted = row.get("adapted", {})
        of_draws = ", ".join(f"{value:.2f}" for value in row.get("draws", []))
        cells = (row["name"], f"{row['perplexity']:.2f}", of_draws, _zero_shot(row), f"{row['parameters']:,}")
        after = (f"{adapted['perplexity']:.2f}", _zero_shot(adapted), f"{adapted['tokens']:,}", f"{adapted['seconds']:.0f}") if adapted else ("",) * 4
        before_after.append((*cells, *after))
    after_head = ("adapted: perplexity", "adapted: WinoGrande, %", "tokens trained on", "seconds of training")
    head = ("", "perplexity", "with three draws of calibration text", "WinoGrande, %", "parameters left", *after_head)
    return [
        "Perplexity over the first 24 windows of 512 tokens of WikiText-2 test; zero-shot accuracy on WinoGrande (half are right by chance) ± its standard error.",
        "Adapted: trained on WikiText-2 valid by LoRA and a head of its own, with distillation from the dense model; as published, but for a CPU's size and learning rate.",
        "",
        *_table(head, before_after),
        "",
        "What the rounds took; the ETA is the engine's own after the first, off by its share of what the others and the writing then took.",
        "",
        *_table(("", *ROUNDS), [(row["name"], *_rounds(row)) for row in rows if row["rounds"]]),
    ]


def _zero_shot(row: dict[str, Any]) -> str:
    if "winogrande" not in row:
        return ""
    share, items = row["winogrande"], row["items"]
    return f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / items):.1f}"


def _bonsai_decoding(rows: list[dict[str, Any]]) -> list[str]:
    cells = [(row["name"], f"{row['prefill']:.0f}", f"{row['prefill_ratio']:.2f}", f"{row['decode']:.1f}", f"{row['decode_ratio']:.2f}") for row in rows]
    return [
        "Plain transformers in float32 with the cache, batch 1, medians of turns: prefill of 512 tokens, and 64 tokens written after 128. The 2:4 model runs on dense",
        "kernels: torch has none for its zeros on a CPU (`torch.sparse`'s semi-structured tensors are for CUDA alone), so that they save nothing here.",
        "",
        *_table(("", "prefill", "of dense", "decode", "of dense"), cells),
    ]


def _rounds(row: dict[str, Any]) -> tuple[str, ...]:
    """The cells below ROUNDS."""
    error = row.get("eta_error")
    return ", ".join(map(str, row["masks"])), ", ".join(f"{seconds:.0f}" for seconds in row["rounds"]), "" if error is None else f"{error:+.0%}"


def _recovery(results: dict[str, Any]) -> list[str]:
    part = results["recovery"]
    lines = [
        "## Recovery",
        "",
        "All train on the same windows of WikiText-2 valid, its end held out, with one seed, and at a learning rate that was chosen by the held-out loss on the first",
        "of the masked models, or on the sliced one. A reconstruction takes as many steps in each block, or in each of its halves, as the others in the whole model,",
        "so every weight that is trained gets its gradient from as many tokens; rounds divide the steps among them. Share: trained, of all parameters in training. Gap closed: (ln before − ln after) /",
        "(ln before − ln dense), of perplexities over the first 24 windows of 512 tokens of WikiText-2 test; and the same as a share of what full retraining closes.",
        "Seconds and peak memory are of the phase that trains, with load and write; the memory is anonymous, and of one process for all rows.",
        *([f"Measured on: {part['device']}."] if part.get("device") == "CPU" else [SHARED_GPU.format(part["device"])] if "device" in part else []),
    ]
    bases, dense = {base["name"]: base["perplexity"] for base in part.get("bases", [])}, part.get("dense")
    if dense is not None:
        rows = [("dense", f"{dense:.2f}"), *((name, f"{value:.2f}") for name, value in bases.items())]
        lines += ["", "### Before", "", *_table(("", "perplexity"), rows)]
    for (base, steps), group in groupby(part.get("quality", []), lambda row: (row["base"], row["steps"])):
        own = list(group)
        missing = [name for name in part["contenders"] if name not in {row["name"] for row in own}]
        lines += ["", f"### {base}, recovered in {steps} steps", "", *_recoveries(own, bases[base], dense, part.get("device"))]
        lines += ["", *_verdict(own, bases, dense), *([f"Not measured: {'; '.join(missing)}."] if missing else [])]
    for (base, steps), group in groupby(part.get("tuning", []), lambda row: (row["base"], row["steps"])):
        tried = [(name, ", ".join(map(_tried, rows))) for name, rows in groupby(group, lambda row: row["name"])]
        lines += ["", f"### Held-out loss by learning rate, {base}, {steps} steps", "", *_table(("", "learning rate: loss"), tried)]
    if part.get("memory"):
        lines += ["", "### Peak anonymous memory of a fresh process that recovers 50% magnitude", "", *_recovery_memory(part["memory"])]
    return lines


def _named(row: dict[str, Any], device: str | None) -> str:
    """The row's name, with where it was measured if that isn't where most were."""
    return str(row["name"]) if row.get("device", device) == device else f"{row['name']} ({row['device']})"


def _recoveries(rows: list[dict[str, Any]], before: float, dense: float, device: str | None) -> list[str]:
    head = (
        *("", "learning rate", "trained parameters", "share", "stored more", "seconds", "peak, MB", "peak of the GPU, MB"),
        *("held-out loss", "perplexity", "gap closed", "of full's"),
    )
    full = _perplexity_of_full(rows)
    cells = []
    for row in rows:
        if "refused" in row:
            cells.append((_named(row, device), row["refused"], *[""] * (len(head) - 2)))
            continue
        after = row["perplexity"]
        cells.append(
            (
                _named(row, device),
                _number(row["rate"]),
                f"{row['parameters']:,}",
                f"{row['share']:.3%}",
                f"{row['stored_more']:,}" if row["stored_more"] else "",
                f"{row['seconds']:.1f}",
                f"{row['peak'] / 1e6:.0f}",
                "" if row.get("device_peak") is None else f"{row['device_peak'] / 1e6:.0f}",
                f"{row['held_out']:.4f}",
                f"{after:.2f}",
                f"{gap_closed(before, after, dense):.1%}",
                "" if full is None else f"{gap_closed(before, after, full):.1%}",
            )
        )
    return _table(head, cells)


def gap_closed(before: float, after: float, goal: float) -> float:
    """Share of the log-perplexity between `before` and `goal` that `after` has come back by; NaN where there is no gap."""
    gap = math.log(before) - math.log(goal)
    return (math.log(before) - math.log(after)) / gap if gap else math.nan


def _perplexity_of_full(rows: list[dict[str, Any]]) -> float | None:
    return next((row["perplexity"] for row in rows if row["name"] == "full retraining" and "refused" not in row), None)


def _verdict(rows: list[dict[str, Any]], bases: dict[str, float], dense: float) -> list[str]:
    """What the rows of a base say about the claims, in sentences."""
    few = [row for row in rows if "refused" not in row and row["share"] <= FEW]
    if not few:
        return []
    best, base, full = min(few, key=lambda row: float(row["held_out"])), rows[0]["base"], _perplexity_of_full(rows)
    lines = []
    if full is not None:
        share = gap_closed(bases[base], best["perplexity"], full)
        held = "that holds" if share >= ASKED_OF_FULL else f"{100 * (ASKED_OF_FULL - share):.1f} points are missing"
        lines.append(
            f"{best['share']:.3%} of the parameters ({best['name']}; of those with at most {FEW:.2%}, the best on held-out text) recover {share:.1%} of the log-perplexity "
            f"gap that full retraining recovers; asked for: at least {ASKED_OF_FULL:.0%}; {held}."
        )
    rivals = {name: bases[name] for name in RIVALS.get(base, ()) if name in bases}
    if rivals:
        beaten = [name for name, value in rivals.items() if best["perplexity"] < value]
        lost = [name for name in rivals if name not in beaten]
        told = " and ".join(f"{name} {value:.2f}" for name, value in rivals.items())
        verdict = f"not better than {' and '.join(lost)}" if lost else f"better than {'both' if len(rivals) == 2 else beaten[0]}"
        lines.append(f"So recovered, {base} has a perplexity of {best['perplexity']:.2f}; without recovery {told}: {verdict}.")
    return lines


def _tried(row: dict[str, Any]) -> str:
    return f"{_number(row['rate'])}: {'diverged' if row['held_out'] is None else format(row['held_out'], '.4f')}"


def _recovery_memory(rows: list[dict[str, Any]]) -> list[str]:
    sizes = {row["name"]: row["bytes"] for row in rows}
    cells = [
        (
            row["name"],
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['bytes'] / sizes[row['of']]:.3f} of {row['of']}" if row["of"] in sizes and row["of"] != row["name"] else "",
            _number(row["asked"]),
        )
        for row in rows
    ]
    return _table(("", "MB", "ratio", "asked for: at most"), cells)


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


def _service(results: dict[str, Any]) -> list[str]:
    part = results["service"]
    lines = [
        "## Service",
        "",
        "On loopback, with Postgres 18 (fsync off) and Valkey on the same cores as client and service. CPU time is of the processes named, from /proc; what is measured by the",
        "clock depends on what else the machine did: load is the run queue's average over a minute, before and after.",
    ]
    rendered = {
        "requests": ("Requests", _requests),
        "cycle": ("Claim, beat and finish, two processes", _cycle),
        "dispatch": ("Dispatch", _dispatch),
        "lists": ("Lists", _lists),
        "download": ("A download from the local store", _download),
        "streams": ("Event streams", _streams),
    }
    for name, (title, render_part) in rendered.items():
        if name in part:
            before, after = part[name]["load"]
            lines += ["", f"### {title}", "", f"Load {before:.1f} to {after:.1f}.", *render_part(part[name])]
    return lines


def _requests(found: dict[str, Any]) -> list[str]:
    plain = {row["name"].partition(",")[0]: row["milliseconds"] for row in found["rows"] if row["name"].endswith("plain")}
    rows = [
        (
            row["name"],
            f"{row['milliseconds']:.2f}",
            f"{plain[kind] / row['milliseconds']:.2f}" if (kind := row["name"].partition(",")[0]) in plain else "",
            f"{row['database_milliseconds']:.2f}",
            f"{row['a_second']:.0f}",
            f"{row['p99_milliseconds']:.0f}",
        )
        for row in found["rows"]
    ]
    return [
        f"Two processes of the API, {found['connections']} connections; medians of turns of {found['seconds']:g} s. Plain: `benchmarks/plain_service.py`. A POST is counted with",
        "what its message to the broker costs; a GET is a poll of one job that does not change meanwhile. Asked for: at least 3 times fewer milliseconds than plain.",
        "",
        *_table(("", "CPU-ms of the API", "times fewer than plain", "CPU-ms of Postgres", "requests a second", "p99, ms"), rows),
    ]


def _cycle(found: dict[str, Any]) -> list[str]:
    rows = [(row["name"], f"{row['a_second']:.0f}", f"{row['milliseconds']:.2f}", f"{row['database_milliseconds']:.2f}") for row in found["rows"]]
    head = ("", "jobs a second", "CPU-ms of the workers", "CPU-ms of Postgres")
    return [f"{found['jobs']} jobs of four tenants, each in three transactions. Asked for: 300 jobs a second.", "", *_table(head, rows)]


def _dispatch(found: dict[str, Any]) -> list[str]:
    measured = f"p50 {found['p50_milliseconds']:.0f} ms, p95 {found['p95_milliseconds']:.0f} ms"
    return [f"From submission to claim by a real, idle worker on Valkey, {found['jobs']} times: {measured}. Asked for: p95 below 250 ms."]


def _lists(found: dict[str, Any]) -> list[str]:
    rows = [(row["name"], f"{row['p50_milliseconds']:.1f}", f"{row['p95_milliseconds']:.1f}") for row in found["rows"]]
    title = f"A page of 20 of {found['jobs']:,} jobs of ten tenants, by its filters; rare ones match a job in a thousand, or none. Asked for: p95 below 20 ms."
    return [title, "", *_table(("", "p50, ms", "p95, ms"), rows)]


def _download(found: dict[str, Any]) -> list[str]:
    rows = [
        (
            row["name"],
            f"{row['bytes'] / 1e9:.1f}",
            f"{row['bytes'] / row['seconds'] / 1e6:.0f}",
            f"{row['growth']['resident'] / 1e6:.0f} / {row['growth']['anonymous'] / 1e6:.0f}",
        )
        for row in found["rows"]
    ]
    return ["Asked for: less than 64 MB.", "", *_table(("", "GB", "MB a second", "growth of the API, MB (resident / anonymous)"), rows)]


def _streams(found: dict[str, Any]) -> list[str]:
    growth = found["growth"]
    memory = f"{growth['resident'] / 1e6:.0f} MB more resident, {growth['anonymous'] / 1e6:.0f} MB anonymous"
    return [f"{found['streams']} open streams on one process: {memory}, and {found['cpu']:.1%} of a core while nothing happens."]


def _mean(row: dict[str, Any]) -> str:
    return f"{statistics.mean(row['perplexity']):.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]
