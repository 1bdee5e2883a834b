"""`/v1/webhooks`: who hears of jobs, and what was sent there."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Response

from app import audit
from app.auth import Admin
from app.dependencies import Configuration, OpenDatabase
from app.problems import declared
from app.vault import Vault
from app.webhooks import repository, service
from app.webhooks.schemas import WEBHOOK_ID, Delivery, DeliveryPage, NewWebhook, Webhook, WebhookList, WebhookWithSecret

DELIVERY_ID = re.compile(r"dlv_[0-9a-f]{32}")
MAX_OVERLAP = 7 * 24 * 3600
LOCATION = {"description": "The webhook's path.", "schema": {"type": "string"}}
NO_STORE = {"Cache-Control": {"description": "`no-store`: the answer holds a secret.", "schema": {"type": "string"}}}
FIRST = {"webhook_id": "$request.path.webhook_id", "delivery_id": "$response.body#/items/0/id"}
LINK_TO_FIRST = {"replay_delivery": {"operationId": "replay_delivery", "parameters": FIRST}}

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"], responses=declared(401, 403, 422))


async def _webhook_id(webhook_id: Annotated[str, Path(description="The webhook's id.", examples=["wh_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])]) -> str:
    if not re.fullmatch(WEBHOOK_ID, webhook_id):
        raise service.no_webhook(webhook_id)
    return webhook_id


async def _delivery_id(delivery_id: Annotated[str, Path(description="The delivery's id.", examples=["dlv_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])]) -> str:
    if not DELIVERY_ID.fullmatch(delivery_id):
        raise service.no_delivery(delivery_id)
    return delivery_id


async def _checked(caller: Admin, new: NewWebhook, settings: Configuration) -> NewWebhook:
    """The look-up of the name may take a while, in which it holds no connection and no thread of the requests."""
    await service.check_address(new.url, settings)
    return new


WebhookId = Annotated[str, Depends(_webhook_id)]
DeliveryId = Annotated[str, Depends(_delivery_id)]


@router.post("", status_code=201, responses={201: {"headers": {"Location": LOCATION, **NO_STORE}}, **declared(400, 409, 413, 415)})
def create_webhook(
    caller: Admin, new: Annotated[NewWebhook, Depends(_checked)], database: OpenDatabase, settings: Configuration, response: Response
) -> WebhookWithSecret:
    """Have news of jobs posted to an address. The answer holds the secret that signs it, this once. Messages follow Standard Webhooks and come at least once."""
    with database.writing() as session:
        webhook, secret = service.create(session, caller.tenant_id, new, Vault(settings))
        audit.record(session, caller, "webhook.create", webhook.id)
    response.headers.update({"Location": f"/v1/webhooks/{webhook.id}", "Cache-Control": "no-store"})
    return WebhookWithSecret.of(webhook, secret)


@router.get("")
def list_webhooks(caller: Admin, database: OpenDatabase) -> WebhookList:
    """All webhooks, without their secrets."""
    with database.reading() as session:
        return WebhookList(items=[Webhook.model_validate(webhook) for webhook in repository.list_webhooks(session, caller.tenant_id)])


@router.get("/{webhook_id}", responses=declared(404))
def get_webhook(caller: Admin, webhook_id: WebhookId, database: OpenDatabase) -> Webhook:
    """One webhook, without its secret."""
    with database.reading() as session:
        return Webhook.model_validate(service.get(session, caller.tenant_id, webhook_id))


@router.delete("/{webhook_id}", status_code=204, responses=declared(404))
def delete_webhook(caller: Admin, webhook_id: WebhookId, database: OpenDatabase) -> None:
    """Delete a webhook and the log of what was sent there. To change an address, make a new webhook and delete the old one."""
    with database.writing() as session:
        service.delete(session, caller.tenant_id, webhook_id)
        audit.record(session, caller, "webhook.delete", webhook_id)


@router.post("/{webhook_id}/enable", responses=declared(404))
def enable_webhook(caller: Admin, webhook_id: WebhookId, database: OpenDatabase) -> Webhook:
    """Send again to a webhook that was disabled. What failed meanwhile can be replayed; what happened meanwhile was not written down for it."""
    with database.writing() as session:
        webhook = service.enable(session, caller.tenant_id, webhook_id)
        audit.record(session, caller, "webhook.enable", webhook_id)
    return Webhook.model_validate(webhook)


@router.post("/{webhook_id}/rotate", responses={200: {"headers": NO_STORE}, **declared(404)})
def rotate_secret(
    caller: Admin,
    webhook_id: WebhookId,
    database: OpenDatabase,
    settings: Configuration,
    response: Response,
    overlap: Annotated[int, Query(ge=0, le=MAX_OVERLAP, description="Seconds for which messages are also signed by the secret before.")] = 24 * 3600,
) -> WebhookWithSecret:
    """Make a new secret, which is shown this once. For a while messages carry a signature by each of the two."""
    with database.writing() as session:
        webhook, secret = service.rotate(session, caller.tenant_id, webhook_id, overlap, Vault(settings))
        audit.record(session, caller, "webhook.rotate", webhook_id, overlap=overlap)
    response.headers["Cache-Control"] = "no-store"
    return WebhookWithSecret.of(webhook, secret)


@router.post("/{webhook_id}/test", status_code=202, responses=declared(404, 409))
def ping_webhook(caller: Admin, webhook_id: WebhookId, database: OpenDatabase) -> Delivery:
    """Send a message of the kind `ping`. What came of it is in the deliveries."""
    with database.writing() as session:
        delivery = service.send_ping(session, caller.tenant_id, webhook_id)
        audit.record(session, caller, "webhook.test", webhook_id)
    return Delivery.model_validate(delivery)


@router.get("/{webhook_id}/deliveries", responses={200: {"links": LINK_TO_FIRST}, **declared(400, 404)})
def list_deliveries(
    caller: Admin,
    webhook_id: WebhookId,
    database: OpenDatabase,
    job_id: Annotated[str | None, Query(max_length=64, pattern=r"^[^\x00]*$", description="Only what tells of this job.")] = None,
    cursor: Annotated[str | None, Query(max_length=1024, description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Most items of a page.")] = 20,
) -> DeliveryPage:
    """What was and is to be sent to a webhook, newest first."""
    with database.reading() as session:
        found, following = service.list_deliveries(session, caller.tenant_id, webhook_id, job_id, cursor, limit)
    return DeliveryPage(items=[Delivery.model_validate(delivery) for delivery in found], next=following)


@router.post("/{webhook_id}/deliveries/{delivery_id}/replay", status_code=202, responses=declared(404, 409))
def replay_delivery(caller: Admin, webhook_id: WebhookId, delivery_id: DeliveryId, database: OpenDatabase) -> Delivery:
    """Send a message once more, whether or not it was taken. It keeps its id, by which a receiver knows what it has seen."""
    with database.writing() as session:
        delivery = service.replay(session, caller.tenant_id, webhook_id, delivery_id)
        audit.record(session, caller, "webhook.replay", delivery_id)
    return Delivery.model_validate(delivery)
