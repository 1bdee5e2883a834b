"""Commands that submit jobs, follow them and tell what came out."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from espalier.answers import Event, Job, SinkRun
from espalier.client import FINISHED, Client
from espalier.commands.common import FAILED, NOT_MET, SUCCEEDED, AsJson, JobId, connect, new_app, offer_methods, offer_queues
from espalier.commands.files import fetch
from espalier.display import before_after, err, fraction, job_bar, moment, number, out, print_json, state, table, verdicts
from espalier.gates import Verdict, judge

app = new_app()
sinks = new_app(help="Places where the results of jobs go, too: a model hub, MLflow, a bucket.")
app.add_typer(sinks, name="sinks")


class Layout(StrEnum):
    uniform = "uniform"
    per_layer = "per_layer"


Model = Annotated[str, typer.Argument(help="Hub id, id of an uploaded checkpoint, or a folder that the service may read.")]
MethodName = Annotated[str, typer.Option("--method", "-m", help="A name from `espalier methods`.", autocompletion=offer_methods)]
SparsityText = Annotated[str, typer.Option("--sparsity", "-s", help="A fraction such as 0.2, or a pattern such as 2:4.")]
LayoutName = Annotated[Layout | None, typer.Option(help="One width for all layers, or a width per layer.")]
More = Annotated[str, typer.Option("--recipe", help="Further fields of the recipe, as JSON or as @FILE.", metavar="JSON")]
Queue = Annotated[str | None, typer.Option(help="The class of workers, from `espalier queues`, or auto.", autocompletion=offer_queues)]
Metadata = Annotated[list[str] | None, typer.Option("--metadata", help="A pair of your own. May be repeated.", metavar="NAME=VALUE")]


@app.command()
def submit(
    model: Model,
    method: MethodName = "cfsp",
    sparsity: SparsityText = "0.2",
    layout: LayoutName = None,
    recipe: More = "{}",
    queue: Queue = None,
    priority: Annotated[int | None, typer.Option(min=-10, max=10, help="Jobs of higher priority are begun first.")] = None,
    metadata: Metadata = None,
    idempotency_key: Annotated[str | None, typer.Option(help="Under the same key the same job is submitted once only.", metavar="KEY")] = None,
    wait_for_it: Annotated[bool, typer.Option("--wait", help="Wait for the result, as `espalier wait` does.")] = False,
    download_to: Annotated[Path | None, typer.Option("--download", help="Wait, and download the files below this folder.", file_okay=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Submit a job and print its id."""
    fields = _fields(method, sparsity, layout, recipe)
    fields |= {name: value for name, value in {"queue": queue, "priority": priority, "metadata": _pairs(metadata)}.items() if value is not None}
    with connect() as client:
        job = client.submit(model, **fields, idempotency_key=idempotency_key)
        if not wait_for_it and download_to is None:
            print_json(job) if as_json else out.print(job["id"])
            return
        err.print(job["id"])
        job = _follow(client, job["id"], timeout=None, quiet=as_json)
        more: dict[str, Any] = {}
        if download_to is not None and job["state"] == "succeeded":
            more["files"] = fetch(client, job["id"], download_to, quiet=as_json)
    print_json({**job, **more}) if as_json else _describe(job)
    raise typer.Exit(SUCCEEDED if job["state"] == "succeeded" else FAILED)


@app.command()
def estimate(
    model: Model, method: MethodName = "cfsp", sparsity: SparsityText = "0.2", layout: LayoutName = None, recipe: More = "{}", as_json: AsJson = False
) -> None:
    """Submit nothing; check the recipe and tell what the job would cost and where it would run."""
    with connect() as client:
        told = client.estimate(model, **_fields(method, sparsity, layout, recipe))
    if as_json:
        print_json(told)
        return
    cost, place = told["estimate"], told["placement"]
    if cost is None:
        out.print("The recipe is valid. What it costs is known once the worker has fetched the checkpoint.", soft_wrap=True)
    else:
        phases = table("phase", "tokens through all blocks", right=1)
        for phase, tokens in cost["phases"].items():
            phases.add_row(phase.replace("_", " "), f"{tokens:,}")
        out.print(phases)
        if cost["rounds"] and cost["sub_models"]:
            out.print(f"{cost['rounds']} rounds of at most {cost['sub_models'] // cost['rounds']} sub-models")
        out.print(f"{cost['seconds_least']:,.0f} to {cost['seconds_most']:,.0f} s, about {cost['seconds_on_two_cores']:,.0f} s on two CPU cores")
        sizes = {"memory": cost["host_bytes"], "device": cost["device_bytes"], "disk": cost["disk_bytes"], "result": cost["output_bytes"]}
        out.print(", ".join(f"{name} {size:,} bytes" for name, size in sizes.items()), soft_wrap=True)
    fits = {True: "it fits there", False: "none of them has the memory", None: "whether it fits is not known"}[place["fits"]]
    out.print(f"queue {place['queue']}: {place['live_workers']} live workers, {fits}", soft_wrap=True)


@app.command(name="list")
def list_jobs(
    state_name: Annotated[list[str] | None, typer.Option("--state", help="Only jobs in this state. May be repeated.")] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="Only jobs with this method.", autocompletion=offer_methods)] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs on this model.")] = None,
    queue: Annotated[str | None, typer.Option(help="Only jobs of this class of workers.", autocompletion=offer_queues)] = None,
    after: Annotated[str | None, typer.Option(help="Only jobs submitted after this time, e.g. 2026-11-22T00:00:00Z.", metavar="TIME")] = None,
    before: Annotated[str | None, typer.Option(help="Only jobs submitted before this time.", metavar="TIME")] = None,
    metadata: Metadata = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with connect() as client:
        filters = {"method": method, "model": model, "queue": queue, "created_after": after, "created_before": before}
        found = client.jobs(state=state_name, metadata=_pairs(metadata), page_size=min(limit, 100), **filters)
        jobs = list(islice(found, limit))
    if as_json:
        print_json(jobs)
        return
    rows = table("job", "state", "method", "model", "done", "submitted", wide=0)
    for job in jobs:
        rows.add_row(job["id"], state(job["state"]), job["method"], escape(job["model"]), f"{fraction(job):.0%}", moment(job["created_at"]))
    out.print(rows)


@app.command()
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Show one job, and what a finished one measured."""
    with connect() as client:
        job = client.get(job_id)
        report = client.report(job_id) if job["state"] == "succeeded" else None
    if as_json:
        print_json({**job, "report": report})
        return
    _describe(job)
    if report is not None:
        out.print(before_after(report))
        for note in report["notes"]:
            out.print(escape(note), soft_wrap=True)


app.command(name="get", hidden=True)(show)


@app.command()
def report(job_id: JobId, as_json: AsJson = False) -> None:
    """Show what a succeeded job measured, layer by layer; with --json all of it."""
    with connect() as client:
        told = client.report(job_id)
    if as_json:
        print_json(told)
        return
    out.print(before_after(told))
    layers = table("layer", "FFN channels", "KV groups", "weights", "zeros", right=1)
    for layer in told["layers"]:
        widths = (
            ("removed", "")
            if layer["dropped"]
            else (f"{layer['ffn_channels']} of {layer['ffn_channels_before']}", f"{layer['kv_groups']} of {layer['kv_groups_before']}")
        )
        layers.add_row(str(layer["index"]), *widths, f"{layer['weights']:,}", f"{layer['zeros']:,}")
    out.print(layers)
    for note in told["notes"]:
        out.print(escape(note), soft_wrap=True)


@app.command()
def wait(
    job_id: JobId,
    timeout: Annotated[float | None, typer.Option(help="Give up after so many seconds; the job goes on.")] = None,
    max_perplexity_increase: Annotated[float | None, typer.Option(help="Perplexity may rise by this fraction, e.g. 0.1.", metavar="FRACTION")] = None,
    max_perplexity: Annotated[float | None, typer.Option(help="The result's perplexity at most.")] = None,
    max_parameters: Annotated[int | None, typer.Option(help="Parameters of the result at most.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Bytes of its weight files at most.")] = None,
    min_sparsity: Annotated[float | None, typer.Option(help="At least this fraction of all parameters is removed or zero.", metavar="FRACTION")] = None,
    min_speedup: Annotated[float | None, typer.Option(help="It generates at least so many times as many tokens a second.", metavar="FACTOR")] = None,
    as_json: AsJson = False,
) -> None:
    """Wait for a job. The exit code is its result: 0 succeeded, 1 failed or cancelled, 4 succeeded past a bound that is given here."""
    limits: dict[str, float | None] = {
        "max_perplexity_increase": max_perplexity_increase,
        "max_perplexity": max_perplexity,
        "max_parameters": max_parameters,
        "max_bytes": max_bytes,
        "min_sparsity": min_sparsity,
        "min_speedup": min_speedup,
    }
    found: list[Verdict] = []
    with connect() as client:
        job = _follow(client, job_id, timeout=timeout, quiet=as_json)
        succeeded = job["state"] == "succeeded"
        if succeeded and any(limit is not None for limit in limits.values()):
            found = judge(client.report(job_id), limits)
    if as_json:
        print_json({**job, "gates": found})
    else:
        _describe(job)
        if found:
            out.print(verdicts(found))
    raise typer.Exit(FAILED if not succeeded else SUCCEEDED if all(verdict["met"] for verdict in found) else NOT_MET)


@app.command()
def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has finished.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the events of a job; with --json one object a line."""
    with connect() as client:
        for event in client.stream(job_id) if follow else client.events(job_id):
            typer.echo(json.dumps(event) if as_json else _event_line(event))


@app.command()
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Cancel a job that has not finished."""
    with connect() as client:
        _tell_state(client.cancel(job_id), as_json)


@app.command()
def retry(job_id: JobId, as_json: AsJson = False) -> None:
    """Try a job again that has failed or was cancelled; it goes on from its last verified block."""
    with connect() as client:
        _tell_state(client.retry(job_id), as_json)


@app.command()
def delete(
    identifier: Annotated[str, typer.Argument(help="A finished job, job_…, or an uploaded checkpoint, ckpt_…", metavar="ID")], as_json: AsJson = False
) -> None:
    """Delete a finished job with its report and files, or an uploaded checkpoint."""
    with connect() as client:
        (client.delete_checkpoint if identifier.startswith("ckpt_") else client.delete)(identifier)
    print_json({"id": identifier, "deleted": True}) if as_json else out.print(f"{escape(identifier)} is deleted")


# --------------------------------------------------------------------- sinks


@sinks.command(name="list")
def list_sinks(job_id: JobId, as_json: AsJson = False) -> None:
    """Show where a job's result goes, and what became of that."""
    with connect() as client:
        _print_sinks(client.sinks(job_id), as_json)


@sinks.command(name="add")
def add_sink(
    job_id: JobId,
    sink: Annotated[Path, typer.Argument(help="The sink as a JSON file, or - for stdin: it holds secrets.", metavar="FILE", allow_dash=True)],
    as_json: AsJson = False,
) -> None:
    """Bring the result of a succeeded job to one more place."""
    with connect() as client:
        _print_sinks(client.add_sink(job_id, _json_of(sink))["sinks"], as_json)


@sinks.command(name="retry")
def retry_sink(
    job_id: JobId,
    sink_number: Annotated[int, typer.Argument(help="Its number within the job.", metavar="NUMBER", min=0)],
    secrets: Annotated[
        Path | None, typer.Argument(help="Its secrets as a JSON file, or - for stdin: the service forgot them.", metavar="FILE", allow_dash=True)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Try a sink again that has failed."""
    with connect() as client:
        _print_sinks(client.retry_sink(job_id, sink_number, None if secrets is None else _json_of(secrets))["sinks"], as_json)


def _print_sinks(runs: list[SinkRun], as_json: bool) -> None:
    if as_json:
        print_json(runs)
        return
    rows = table("number", "sink", "state", "tries", "result or error")
    for run in runs:
        told = run["error"]["message"] if run["error"] else json.dumps(run["result"]) if run["result"] else ""
        rows.add_row(number(run["number"]), run["name"], state(run["state"]), number(run["tries"]), escape(told))
    out.print(rows)


# ------------------------------------------------------------------- helpers


def _follow(client: Client, job_id: str, *, timeout: float | None, quiet: bool) -> Job:
    with job_bar(quiet=quiet) as on_progress:
        return client.wait(job_id, on_progress=on_progress, timeout=timeout)


def _describe(job: Job) -> None:
    out.print(f"[bold]{job['id']}[/bold] {state(job['state'])}" + (f", {job['phase']}" if job["state"] not in FINISHED and job["phase"] else ""))
    out.print(f"{escape(job['model'])}, {job['method']}, attempt {job['attempt']} of {job['max_attempts']}, {fraction(job):.0%} done", soft_wrap=True)
    if job["error"]:
        out.print(f"[red]{job['error']['code']}[/red]: {escape(job['error']['message'])} {escape(job['error']['hint'])}", soft_wrap=True)


def _tell_state(job: Job, as_json: bool) -> None:
    print_json(job) if as_json else out.print(f"{job['id']} is {state(job['state'])}")


def _event_line(event: Event) -> str:
    return f"{moment(event['created_at'])}  {event['kind']:<16}  {event['message']}"


def _fields(method: str, sparsity: str, layout: Layout | None, recipe: str) -> dict[str, Any]:
    """The recipe, of which JSON comes before options."""
    more = _json_object(Path(recipe[1:]).read_text(encoding="utf-8") if recipe.startswith("@") else recipe, "--recipe")
    if layout is not None:
        more["output"] = {**more.get("output", {}), "layout": layout.value}
    return {"method": method, "sparsity": _sparsity(sparsity), **more}


def _sparsity(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _pairs(texts: list[str] | None) -> dict[str, str] | None:
    for text in texts or ():
        if "=" not in text:
            raise typer.BadParameter(f"give NAME=VALUE, not '{text}'", param_hint="--metadata")
    return {name: value for name, _, value in (text.partition("=") for text in texts)} if texts else None


def _json_of(file: Path) -> dict[str, Any]:
    return _json_object(sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8"), "FILE")


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint=where) from error
    if not isinstance(value, Mapping):
        raise typer.BadParameter("give a JSON object, e.g. '{\"evaluation\": null}'", param_hint=where)
    return dict(value)
