"""How the command line shows things: tables on stdout, bars and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from espalier.answers import Job, Report
from espalier.gates import Verdict

STYLES = {
    "cyan": ("queued", "pending", "uploading"),
    "blue": ("running", "waiting", "verifying"),
    "yellow": ("cancelling", "cancelled", "skipped"),
    "green": ("succeeded", "ready", "delivered"),
    "red": ("failed",),
}

out = Console(width=None if sys.stdout.isatty() else 200)  # a file or a pipe breaks no lines
err = Console(stderr=True)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def table(*columns: str, wide: int | None = None, right: int | None = None) -> Table:
    """wide: the column that is never broken. right: from this column on all are numbers."""
    made = Table(box=None, pad_edge=False)
    for index, name in enumerate(columns):
        justify: JustifyMethod = "right" if right is not None and index >= right else "left"
        made.add_column(name, no_wrap=index == wide, min_width=38 if index == wide else None, overflow="fold", justify=justify)
    return made


def state(name: str) -> str:
    style = next((style for style, names in STYLES.items() if name in names), "white")
    return f"[{style}]{name}[/{style}]"


def moment(time: str | None) -> str:
    return time[:19].replace("T", " ") if time else ""


def number(value: int) -> str:
    return f"{value:,}"


def verdicts(found: Sequence[Verdict]) -> Table:
    """Bounds beside what was measured."""
    rows = table("bound", "limit", "measured", "")
    for verdict in found:
        measured = "not measured" if verdict["measured"] is None else f"{verdict['measured']:,.6g}"
        rows.add_row(verdict["gate"].replace("_", " "), f"{verdict['limit']:,.6g}", measured, "[green]met[/green]" if verdict["met"] else "[red]not met[/red]")
    return rows


def before_after(report: Report) -> Table:
    """A report as a table: dense, pruned, and the change."""
    table = Table("", "dense", "pruned", "change", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, before, after, shape in comparison(report):
        change = f"{after / before - 1:+.1%}" if before else ""
        table.add_row(name, format(before, shape), format(after, shape), change)
    return table


def comparison(report: Report) -> list[tuple[str, float, float, str]]:
    """Rows (name, dense, pruned, format) of what a report measured on both models; what was not measured is left out."""
    dense, pruned = report["parameters_before"], report["parameters_after"]
    rows: list[tuple[str, float, float, str]] = [
        ("parameters, all", dense["all"], pruned["all"], ",d"),
        ("parameters, non-embedding", dense["non_embedding"], pruned["non_embedding"], ",d"),
        ("parameters, decoder linears", dense["decoder"], pruned["decoder"], ",d"),
        ("parameters, MLPs", dense["ffn"], pruned["ffn"], ",d"),
        ("FFN channels", dense["ffn_channels"], pruned["ffn_channels"], ",d"),
        ("zeros in decoder linears", dense["decoder_zeros"], pruned["decoder_zeros"], ",d"),
    ]
    before, after = report["before"], report["after"]
    if before and after:
        rows.append(("weight files, bytes", before["checkpoint_bytes"], after["checkpoint_bytes"], ",d"))
        rows.append(("MACs a token", before["macs_per_token"], after["macs_per_token"], ",d"))
        if before["perplexity"] and after["perplexity"]:
            rows.append(("perplexity", before["perplexity"]["value"], after["perplexity"]["value"], ".2f"))
        if before["speed"] and after["speed"]:
            slow, fast = before["speed"], after["speed"]
            rows.append(("prefill, tokens/s", slow["prefill_tokens_per_second"], fast["prefill_tokens_per_second"], ".1f"))
            rows.append(("decode, tokens/s", slow["decode_tokens_per_second"], fast["decode_tokens_per_second"], ".1f"))
        if before["peak_memory_bytes"] and after["peak_memory_bytes"]:
            rows.append(("peak memory, bytes", before["peak_memory_bytes"], after["peak_memory_bytes"], ",d"))
    return rows


@contextmanager
def job_bar(*, quiet: bool = False) -> Iterator[Any]:
    """A bar on stderr that follows a job; what it yields takes a Job."""
    columns = (TextColumn("{task.description}", style="bold"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, disable=quiet) as bar:
        task = bar.add_task("queued", total=1.0)

        def on_progress(job: Job) -> None:
            done = 1.0 if job["state"] == "succeeded" else fraction(job)
            again = f", attempt {job['attempt']}" if job["attempt"] > 1 else ""
            now = job["phase"] if job["state"] == "running" and job["phase"] else job["state"]
            rounds = f", round {job['progress']['round']} of {job['progress']['rounds']}" if now == "prune" and job["progress"]["rounds"] else ""
            bar.update(task, completed=done, description=f"{now.replace('_', ' ')}{rounds}{again}")

        yield on_progress


def byte_bars(*, quiet: bool) -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=err, disable=quiet)


def fraction(job: Job) -> float:
    """How far a job is, 0 to 1."""
    return 1.0 if job["state"] == "succeeded" else job["progress"]["fraction"]
