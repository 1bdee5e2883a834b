"""How each endpoint is called so that it succeeds, for tests that walk through all of them."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.auth import SCOPES
from app.checkpoints import repository as checkpoints
from app.models import Checkpoint, Delivery, SinkRun, Tenant
from app.recipe import Recipe
from app.report import Report
from app.vault import Vault
from app.webhooks import deliveries
from app.webhooks import repository as webhooks
from app.webhooks.schemas import NewWebhook
from tests.app.conftest import RECIPE, Api

NETWORKS = ["127.0.0.0/8"]  # in which webhooks may lie
WEBHOOK = {"url": "http://127.0.0.1:1024/"}
SINK = {"name": "s3", "url": "s3://models/pruned", "access_key": "a", "secret_key": "b"}
CONTENT = b"{}"
DIGEST = f"sha-256=:{base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()}:"
FILES = ["config.json", "tokenizer.json", "model.safetensors"]
DECLARATION = {"name": "tiny", "files": [{"path": path, "bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()} for path in FILES]}


@dataclass(frozen=True)
class Call:
    """An endpoint that is called with these path parameters and options of the client."""

    method: str
    path: str
    options: dict[str, Any]

    def send(self, api: Api, key: str | None = None) -> httpx2.Response:
        return api.request(self.method, self.path, key=key, **self.options)


def operations(api: Api) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of every endpoint."""
    for path, methods in api.client.app.openapi()["paths"].items():  # type: ignore[attr-defined]  # of FastAPI
        for method, operation in methods.items():
            yield method.upper(), path, operation


def prepare(api: Api, endpoint: str, folder: Path) -> Call:
    """A call that will succeed, of an endpoint such as `GET /v1/jobs`, on things of this tenant that are made for it."""
    make, options = CALLS[endpoint]
    method, path = endpoint.split()
    return Call(method, path.format(**make(api, folder)), options)


# ------------------------------------------------------- what there must be before


def nothing(api: Api, folder: Path) -> dict[str, str]:
    return {}


def queued_job(api: Api, folder: Path) -> dict[str, str]:
    return {"job_id": api.submit()}


def failed_job(api: Api, folder: Path) -> dict[str, str]:
    job_id = api.submit()
    api.fail(job_id)
    return {"job_id": job_id}


def succeeded_job(api: Api, folder: Path) -> dict[str, str]:
    report = simplest(Report.model_json_schema(mode="serialization")) | {"recipe": Recipe.model_validate(RECIPE).model_dump(mode="json")}
    return {"job_id": api.succeed(folder, {"checkpoint/config.json": b"{}", "report.json": b"{}"}, report), "path": "checkpoint/config.json"}


def failed_sink(api: Api, folder: Path) -> dict[str, str]:
    made = succeeded_job(api, folder)
    assert api.post(f"/v1/jobs/{made['job_id']}/sinks", json=SINK).status_code == 202
    with api.database.writing() as session:
        session.execute(update(SinkRun).where(SinkRun.job_id == made["job_id"]).values(state="failed", next_at=None))
    return made | {"number": "0"}


def key(api: Api, folder: Path) -> dict[str, str]:
    return {"key_id": "key_" + api.new_key().split("_")[1]}


def webhook(api: Api, folder: Path) -> dict[str, str]:
    with api.database.writing() as session:
        made = webhooks.insert_webhook(session, tenant_id(session, api), NewWebhook.model_validate(WEBHOOK), Vault(api.settings).seal([["whsec_MfKQ", None]]))
        return {"webhook_id": made.id}


def failed_delivery(api: Api, folder: Path) -> dict[str, str]:
    made = webhook(api, folder)
    with api.database.writing() as session:
        row = webhooks.find_webhook(session, tenant_id(session, api), made["webhook_id"])
        assert row is not None
        delivery = deliveries.ping(session, row)
        session.execute(update(Delivery).where(Delivery.id == delivery.id).values(state="failed", next_at=None))
    return made | {"delivery_id": delivery.id}


def declared_checkpoint(api: Api, folder: Path) -> dict[str, str]:
    answer = api.post("/v1/checkpoints", json=DECLARATION)
    assert answer.status_code == 201, answer.text
    return {"checkpoint_id": answer.json()["id"], "path": "tokenizer.json", "number": "0"}


def uploaded_checkpoint(api: Api, folder: Path) -> dict[str, str]:
    made = declared_checkpoint(api, folder)
    with api.database.writing() as session:
        checkpoint = session.get_one(Checkpoint, made["checkpoint_id"])
        for file in checkpoints.list_files(session, checkpoint):
            checkpoints.insert_part(session, file, 0, file.sha256)
    return made


def tenant_id(session: Session, api: Api) -> str:
    return session.scalars(select(Tenant.id).where(Tenant.name == api.tenant)).one()


def simplest(schema: dict[str, Any], definitions: dict[str, Any] | None = None) -> Any:
    """The simplest value of a JSON schema that has every field."""
    definitions = definitions or schema.get("$defs", {})
    match schema:
        case {"$ref": reference}:
            return simplest(definitions[reference.rpartition("/")[2]], definitions)
        case {"anyOf": [first, *_]}:
            return simplest(first, definitions)
        case {"properties": properties}:
            return {name: simplest(value, definitions) for name, value in properties.items()}
        case {"const": value} | {"enum": [value, *_]}:
            return value
        case {"type": "array", "items": items}:
            return [simplest(items, definitions)]
        case {"type": kind}:
            return {"string": "text", "integer": 3, "number": 0.5, "boolean": True, "object": {}}[kind]
        case _:
            return None


PART = {"content": CONTENT, "headers": {"Content-Digest": DIGEST, "Content-Type": "application/octet-stream"}}
CALLS: dict[str, tuple[Callable[[Api, Path], dict[str, str]], dict[str, Any]]] = {
    "POST /v1/jobs": (nothing, {"json": RECIPE}),
    "GET /v1/jobs": (nothing, {}),
    "GET /v1/jobs/{job_id}": (queued_job, {}),
    "DELETE /v1/jobs/{job_id}": (failed_job, {}),
    "GET /v1/jobs/{job_id}/events": (queued_job, {}),
    "POST /v1/jobs/{job_id}/retry": (failed_job, {}),
    "POST /v1/jobs/{job_id}/cancel": (queued_job, {}),
    "GET /v1/jobs/{job_id}/report": (succeeded_job, {}),
    "GET /v1/jobs/{job_id}/artifacts": (succeeded_job, {}),
    "GET /v1/jobs/{job_id}/artifacts/{path}": (succeeded_job, {}),
    "GET /v1/jobs/{job_id}/checkpoint": (succeeded_job, {}),
    "POST /v1/jobs/{job_id}/sinks": (succeeded_job, {"json": SINK}),
    "POST /v1/jobs/{job_id}/sinks/{number}/retry": (failed_sink, {"json": {"access_key": "a", "secret_key": "b"}}),
    "POST /v1/checkpoints": (nothing, {"json": DECLARATION}),
    "GET /v1/checkpoints": (nothing, {}),
    "GET /v1/checkpoints/{checkpoint_id}": (declared_checkpoint, {}),
    "DELETE /v1/checkpoints/{checkpoint_id}": (declared_checkpoint, {}),
    "PUT /v1/checkpoints/{checkpoint_id}/files/{path}/parts/{number}": (declared_checkpoint, PART),
    "POST /v1/checkpoints/{checkpoint_id}/complete": (uploaded_checkpoint, {}),
    "GET /v1/queues": (nothing, {}),
    "GET /v1/methods": (nothing, {}),
    "GET /v1/recoveries": (nothing, {}),
    "POST /v1/keys": (nothing, {"json": {"name": "walk", "scopes": list(SCOPES)}}),
    "GET /v1/keys": (nothing, {}),
    "GET /v1/keys/{key_id}": (key, {}),
    "DELETE /v1/keys/{key_id}": (key, {}),
    "POST /v1/keys/{key_id}/rotate": (key, {"json": {}}),
    "GET /v1/audit": (nothing, {}),
    "GET /v1/usage": (nothing, {}),
    "GET /v1/webhooks": (nothing, {}),
    "POST /v1/webhooks": (nothing, {"json": WEBHOOK}),
    "GET /v1/webhooks/{webhook_id}": (webhook, {}),
    "DELETE /v1/webhooks/{webhook_id}": (webhook, {}),
    "POST /v1/webhooks/{webhook_id}/enable": (webhook, {}),
    "POST /v1/webhooks/{webhook_id}/rotate": (webhook, {}),
    "POST /v1/webhooks/{webhook_id}/test": (webhook, {}),
    "GET /v1/webhooks/{webhook_id}/deliveries": (failed_delivery, {}),
    "POST /v1/webhooks/{webhook_id}/deliveries/{delivery_id}/replay": (failed_delivery, {}),
}
