"""Commands that tell what the service can do, and how busy it is."""

from __future__ import annotations

from rich.markup import escape

from espalier.commands.common import AsJson, connect, new_app
from espalier.display import moment, number, out, print_json, table

app = new_app()


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the pruning methods of the service."""
    with connect() as client:
        found = client.methods()
    if as_json:
        print_json(found)
        return
    rows = table("method", "removes", "sparsity is of", "N:M", "smaller file", "published")
    for method in found:
        yes_no = ["yes" if holds else "no" for holds in (method["patterns"], method["structured"])]
        rows.add_row(method["name"], method["prunes"], method["denominator"], *yes_no, escape(method["paper"]))
    out.print(rows)


@app.command()
def recoveries(as_json: AsJson = False) -> None:
    """List what can follow pruning."""
    with connect() as client:
        found = client.recoveries()
    if as_json:
        print_json(found)
        return
    rows = table("recovery", "presets", "what it does")
    for recovery in found:
        rows.add_row(recovery["name"], ", ".join(recovery["presets"]), escape(recovery["summary"]))
    out.print(rows)


@app.command()
def queues(as_json: AsJson = False) -> None:
    """List the classes of workers, and how busy they are."""
    with connect() as client:
        found = client.queues()
    if as_json:
        print_json(found)
        return
    rows = table("queue", "workers", "devices", "running", "queued", "oldest since")
    for queue in found:
        devices = sorted({device["name"] for worker in queue["workers"] for device in worker["devices"][:1]})
        counts = (queue["running"], queue["queued"])
        rows.add_row(queue["name"], number(len(queue["workers"])), escape(", ".join(devices)) or "CPU", *map(number, counts), moment(queue["oldest_queued_at"]))
    out.print(rows)


@app.command()
def usage(as_json: AsJson = False) -> None:
    """Show what the tenant has, and what it may have."""
    with connect() as client:
        found = client.usage()
    if as_json:
        print_json(found)
        return
    rows = table("", "used", "at most", right=1)
    for name, share in (
        ("queued jobs", found["queued"]),
        ("running jobs", found["running"]),
        ("bytes of results", found["stored_bytes"]),
        ("bytes of checkpoints", found["checkpoint_bytes"]),
    ):
        rows.add_row(name, number(share["used"]), "no cap" if share["cap"] is None else number(share["cap"]))
    out.print(rows)
