"""What can be done with webhooks, apart from HTTP. Raises the errors of `app.exceptions`; the caller commits."""

from __future__ import annotations

from sqlalchemy.orm import Session

from app.addresses import read_url, resolve
from app.exceptions import AddressError, ConflictError, NotFoundError, RecipeError
from app.models import Delivery, Webhook
from app.paging import make_cursor, no_cursor, read_cursor
from app.settings import Settings
from app.vault import Vault
from app.webhooks import deliveries, repository
from app.webhooks.schemas import NewWebhook
from app.webhooks.signing import rotate as rotated

MOST_WEBHOOKS = 20  # of a tenant


async def check_address(url: str, settings: Settings) -> None:
    """Refuse an address that could never be sent to; it is checked again at every try."""
    try:
        await resolve(read_url(url, https_only=settings.environment == "production"), settings.webhook_networks)
    except AddressError as error:
        error.pointer = "/url"
        raise


def create(session: Session, tenant_id: str, new: NewWebhook, vault: Vault) -> tuple[Webhook, str]:
    """-> the webhook, and its secret, which can't be had again."""
    if repository.count_webhooks(session, tenant_id) >= MOST_WEBHOOKS:
        raise ConflictError(f"There are {MOST_WEBHOOKS} webhooks, which is the most.", code="too_many_webhooks", hint="Delete one that is not used.")
    secrets = rotated([], 0)
    return repository.insert_webhook(session, tenant_id, new, vault.seal(secrets)), secrets[0][0]


def get(session: Session, tenant_id: str, webhook_id: str, *, to_change: bool = False) -> Webhook:
    webhook = repository.find_webhook(session, tenant_id, webhook_id, to_change=to_change)
    if webhook is None:
        raise no_webhook(webhook_id)
    return webhook


def no_webhook(webhook_id: str) -> NotFoundError:
    return NotFoundError(f"There is no webhook {webhook_id[:100]}.", code="webhook_not_found", hint="List them with GET /v1/webhooks.")


def check_named(session: Session, tenant_id: str, webhook_id: str | None) -> None:
    """Refuse a job that names a webhook which is not there."""
    if webhook_id is not None and repository.find_webhook(session, tenant_id, webhook_id) is None:
        error = no_webhook(webhook_id)
        raise RecipeError(error.message, code=error.code, hint=error.hint, pointer="/webhook")


def enable(session: Session, tenant_id: str, webhook_id: str) -> Webhook:
    webhook = get(session, tenant_id, webhook_id, to_change=True)
    webhook.disabled_at = webhook.disabled_reason = webhook.failing_since = None
    return webhook


def rotate(session: Session, tenant_id: str, webhook_id: str, overlap: int, vault: Vault) -> tuple[Webhook, str]:
    """-> the webhook, and its new secret; those before it sign for at most `overlap` more seconds."""
    webhook = get(session, tenant_id, webhook_id, to_change=True)
    secrets = rotated(vault.open(webhook.secrets), overlap)
    webhook.secrets = vault.seal(secrets)
    return webhook, secrets[0][0]


def delete(session: Session, tenant_id: str, webhook_id: str) -> None:
    if not repository.delete_webhook(session, tenant_id, webhook_id):
        raise no_webhook(webhook_id)


def send_ping(session: Session, tenant_id: str, webhook_id: str) -> Delivery:
    return deliveries.ping(session, _enabled(session, tenant_id, webhook_id))


def list_deliveries(session: Session, tenant_id: str, webhook_id: str, job_id: str | None, cursor: str | None, limit: int) -> tuple[list[Delivery], str | None]:
    """A page of deliveries, newest first, all or those that tell of one job, and the cursor of the next page."""
    get(session, tenant_id, webhook_id)
    before = None if cursor is None else repository.find_delivery(session, tenant_id, webhook_id, read_cursor(cursor, job_id))
    if cursor is not None and before is None:
        raise no_cursor()
    found = list(repository.list_deliveries(session, tenant_id, webhook_id, job_id, before, limit + 1))
    return found[:limit], make_cursor(found[limit - 1].id, job_id) if len(found) > limit else None


def replay(session: Session, tenant_id: str, webhook_id: str, delivery_id: str) -> Delivery:
    """Send a delivery once more, under the same id."""
    _enabled(session, tenant_id, webhook_id)
    delivery = repository.find_delivery(session, tenant_id, webhook_id, delivery_id)
    if delivery is None:
        raise no_delivery(delivery_id)
    again = repository.send_again(session, delivery)
    if again is None:
        raise ConflictError("The delivery is still being tried.", code="delivery_waiting", hint="Wait until its state is delivered or failed.")
    return again


def no_delivery(delivery_id: str) -> NotFoundError:
    return NotFoundError(f"There is no delivery {delivery_id[:100]}.", code="delivery_not_found", hint="List them with GET /v1/webhooks/{id}/deliveries.")


def _enabled(session: Session, tenant_id: str, webhook_id: str) -> Webhook:
    webhook = get(session, tenant_id, webhook_id)
    if webhook.disabled_at is not None:
        raise ConflictError("The webhook is disabled.", code="webhook_disabled", hint="POST /v1/webhooks/{id}/enable, once its receiver answers again.")
    return webhook
