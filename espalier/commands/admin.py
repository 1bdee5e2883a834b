"""Commands for keys with the scope `admin`: keys, webhooks, the audit log."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer
from rich.markup import escape

from espalier.answers import Delivery, NewKey
from espalier.commands.common import AsJson, Offers, connect, new_app, offer_jobs
from espalier.display import err, moment, number, out, print_json, state, table

SCOPES = ("jobs:read", "jobs:write", "artifacts:read", "checkpoints:write", "admin")

app = new_app()
keys = new_app(help="API keys of the tenant.")
webhooks = new_app(help="Addresses that hear of jobs.")
app.add_typer(keys, name="keys")
app.add_typer(webhooks, name="webhooks")


def offer_scopes(incomplete: str) -> Offers:
    return [(scope, "") for scope in SCOPES if scope.startswith(incomplete)]


KeyId = Annotated[str, typer.Argument(help="The key's id, key_…", metavar="KEY")]
WebhookId = Annotated[str, typer.Argument(help="The webhook's id, wh_…", metavar="WEBHOOK")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many.")]


@keys.command(name="create")
def create_key(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    scope: Annotated[list[str], typer.Option(help=f"What it may do: {', '.join(SCOPES)}. May be repeated.", autocompletion=offer_scopes)],
    lifetime: Annotated[int | None, typer.Option(help="Seconds after which it expires.", min=60)] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once."""
    with connect() as client:
        _print_key(client.create_key(name, scope, lifetime=lifetime), as_json)


@keys.command(name="list")
def list_keys(as_json: AsJson = False) -> None:
    """List the keys, without their secrets."""
    with connect() as client:
        found = list(client.keys())
    if as_json:
        print_json(found)
        return
    rows = table("key", "name", "scopes", "last used", "expires", wide=0)
    for key in found:
        rows.add_row(key["id"], escape(key["name"]), " ".join(key["scopes"]), moment(key["last_used_at"]), moment(key["expires_at"]))
    out.print(rows)


@keys.command(name="revoke")
def revoke_key(key_id: KeyId, as_json: AsJson = False) -> None:
    """End a key now."""
    with connect() as client:
        client.revoke_key(key_id)
    print_json({"id": key_id, "revoked": True}) if as_json else out.print(f"{escape(key_id)} is revoked")


@keys.command(name="rotate")
def rotate_key(
    key_id: KeyId,
    overlap: Annotated[int, typer.Option(help="Seconds for which the old key stays good.", min=0)] = 3600,
    as_json: AsJson = False,
) -> None:
    """Make a key that takes the place of another, and print it, this once."""
    with connect() as client:
        _print_key(client.rotate_key(key_id, overlap=overlap), as_json)


def _print_key(key: NewKey, as_json: bool) -> None:
    if as_json:
        print_json(key)
    else:
        err.print(f"{key['id']}, told this once:")
        out.print(key["key"], soft_wrap=True)


# ------------------------------------------------------------------- webhooks


@webhooks.command(name="create")
def create_webhook(
    url: Annotated[str, typer.Argument(help="A public https address that takes news by POST.")],
    kind: Annotated[list[str] | None, typer.Option(help="News that it hears of, e.g. job.succeeded; all otherwise. May be repeated.")] = None,
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    every_job: Annotated[bool, typer.Option(help="Whether it hears of every job, or of those that name it.")] = True,
    as_json: AsJson = False,
) -> None:
    """Have news of jobs posted to an address. Its secret is printed, this once."""
    with connect() as client:
        webhook = client.create_webhook(url, kinds=kind or (), description=description, every_job=every_job)
    if as_json:
        print_json(webhook)
    else:
        err.print(f"{webhook['id']}, whose secret is told this once:")
        out.print(webhook["secret"], soft_wrap=True)


@webhooks.command(name="list")
def list_webhooks(as_json: AsJson = False) -> None:
    """List the webhooks, without their secrets."""
    with connect() as client:
        found = client.webhooks()
    if as_json:
        print_json(found)
        return
    rows = table("webhook", "address", "hears of", "state", wide=0)
    for webhook in found:
        is_on = f"disabled: {webhook['disabled_reason']}" if webhook["disabled_at"] else "enabled"
        rows.add_row(webhook["id"], escape(webhook["url"]), " ".join(webhook["kinds"]), escape(is_on))
    out.print(rows)


@webhooks.command()
def deliveries(
    webhook_id: WebhookId,
    job: Annotated[str | None, typer.Option(help="Only what tells of this job.", autocompletion=offer_jobs)] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """List what was and is to be sent to a webhook, newest first."""
    with connect() as client:
        found = list(islice(client.deliveries(webhook_id, job_id=job), limit))
    if as_json:
        print_json(found)
        return
    rows = table("delivery", "kind", "state", "tries", "answer", wide=0)
    for delivery in found:
        answer = delivery["last_error"] or ("" if delivery["last_status"] is None else str(delivery["last_status"]))
        rows.add_row(delivery["id"], delivery["kind"], state(delivery["state"]), number(delivery["tries"]), escape(answer))
    out.print(rows)


@webhooks.command()
def replay(
    webhook_id: WebhookId, delivery_id: Annotated[str, typer.Argument(help="The delivery's id, dlv_…", metavar="DELIVERY")], as_json: AsJson = False
) -> None:
    """Send a message once more."""
    with connect() as client:
        _tell_delivery(client.replay(webhook_id, delivery_id), as_json)


@webhooks.command(name="test")
def ping(webhook_id: WebhookId, as_json: AsJson = False) -> None:
    """Send a message of the kind `ping`."""
    with connect() as client:
        _tell_delivery(client.test_webhook(webhook_id), as_json)


@webhooks.command()
def enable(webhook_id: WebhookId, as_json: AsJson = False) -> None:
    """Send again to a webhook that was disabled."""
    with connect() as client:
        webhook = client.enable_webhook(webhook_id)
    print_json(webhook) if as_json else out.print(f"{webhook['id']} is enabled")


@webhooks.command()
def delete(webhook_id: WebhookId, as_json: AsJson = False) -> None:
    """Delete a webhook and the log of what was sent there."""
    with connect() as client:
        client.delete_webhook(webhook_id)
    print_json({"id": webhook_id, "deleted": True}) if as_json else out.print(f"{escape(webhook_id)} is deleted")


def _tell_delivery(delivery: Delivery, as_json: bool) -> None:
    print_json(delivery) if as_json else out.print(f"{delivery['id']} is {state(delivery['state'])}")


# ---------------------------------------------------------------------- audit


@app.command()
def audit(
    action: Annotated[str | None, typer.Option(help="Only this action, e.g. job.submit.")] = None,
    target: Annotated[str | None, typer.Option(help="Only what was done to this id.")] = None,
    key: Annotated[str | None, typer.Option(help="Only what was done with this key, key_…")] = None,
    after: Annotated[str | None, typer.Option(help="Only entries of this time or later, e.g. 2026-11-22T00:00:00Z.", metavar="TIME")] = None,
    before: Annotated[str | None, typer.Option(help="Only entries from before this time.", metavar="TIME")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """List the calls that changed something, newest first."""
    with connect() as client:
        found = list(islice(client.audit(action=action, target=target, key_id=key, created_after=after, created_before=before), limit))
    if as_json:
        print_json(found)
        return
    rows = table("when", "action", "target", "key", wide=2)
    for entry in found:
        rows.add_row(moment(entry["created_at"]), entry["action"], escape(entry["target"]), escape(entry["key_id"]))
    out.print(rows)
