"""How the command line shows things: tables on stdout, bars and errors on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from espalier.client import Job

out = Console()
err = Console(stderr=True)


def before_after(report: dict[str, Any]) -> Table:
    """A report as a table: dense, pruned, and the change."""
    table = Table("", "dense", "pruned", "change", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, before, after, shape in comparison(report):
        change = f"{after / before - 1:+.1%}" if before else ""
        table.add_row(name, format(before, shape), format(after, shape), change)
    return table


def comparison(report: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    """Rows (name, dense, pruned, format) of what a report measured on both models; what was not measured is left out."""
    rows: list[tuple[str, float, float, str]] = []
    names = {"all": "parameters, all", "non_embedding": "parameters, non-embedding", "decoder": "parameters, decoder linears", "ffn": "parameters, MLPs"}
    names |= {"ffn_channels": "FFN channels", "decoder_zeros": "zeros in decoder linears"}
    for field, name in names.items():
        rows.append((name, report["parameters_before"][field], report["parameters_after"][field], ",d"))
    before, after = report["before"], report["after"]
    if before and after:
        rows.append(("weight files, bytes", before["checkpoint_bytes"], after["checkpoint_bytes"], ",d"))
        rows.append(("MACs a token", before["macs_per_token"], after["macs_per_token"], ",d"))
        if before["perplexity"] and after["perplexity"]:
            rows.append(("perplexity", before["perplexity"]["value"], after["perplexity"]["value"], ".2f"))
        if before["speed"] and after["speed"]:
            for kind in ("prefill", "decode"):
                field = f"{kind}_tokens_per_second"
                rows.append((f"{kind}, tokens/s", before["speed"][field], after["speed"][field], ".1f"))
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
