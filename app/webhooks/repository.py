"""Every query on webhooks that the API makes. Each one names the tenant; what is sent is in `deliveries.py`."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, func, insert, literal, select, tuple_, update
from sqlalchemy.orm import Session
from uuid_utils import uuid7

from app.database import UtcDateTime, db_now
from app.models import Delivery, Webhook
from app.webhooks.schemas import NewWebhook

UNSYNCHRONIZED = {"synchronize_session": False}


def insert_webhook(session: Session, tenant_id: str, new: NewWebhook, secrets: str) -> Webhook:
    row = {"id": f"wh_{uuid7().hex}", "tenant_id": tenant_id, "secrets": secrets, **new.model_dump(mode="json")}
    return session.scalars(insert(Webhook).values(row).returning(Webhook)).one()


def count_webhooks(session: Session, tenant_id: str) -> int:
    return session.scalar(select(func.count()).select_from(Webhook).where(Webhook.tenant_id == tenant_id)) or 0


def list_webhooks(session: Session, tenant_id: str) -> Sequence[Webhook]:
    return session.scalars(select(Webhook).where(Webhook.tenant_id == tenant_id).order_by(Webhook.created_at, Webhook.id)).all()


def find_webhook(session: Session, tenant_id: str, webhook_id: str, *, to_change: bool = False) -> Webhook | None:
    query = select(Webhook).where(Webhook.id == webhook_id, Webhook.tenant_id == tenant_id)
    return session.scalar(query.with_for_update(key_share=True) if to_change else query)


def delete_webhook(session: Session, tenant_id: str, webhook_id: str) -> bool:
    """Whether there was one."""
    gone = delete(Webhook).where(Webhook.id == webhook_id, Webhook.tenant_id == tenant_id)
    return session.scalar(gone.returning(Webhook.id), execution_options=UNSYNCHRONIZED) is not None


def find_delivery(session: Session, tenant_id: str, webhook_id: str, delivery_id: str) -> Delivery | None:
    return session.scalar(select(Delivery).where(Delivery.id == delivery_id, Delivery.webhook_id == webhook_id, Delivery.tenant_id == tenant_id))


def list_deliveries(session: Session, tenant_id: str, webhook_id: str, job_id: str | None, before: Delivery | None, limit: int) -> Sequence[Delivery]:
    """Newest first, from the one before another on; all, or those that tell of one job."""
    query = select(Delivery).where(Delivery.webhook_id == webhook_id, Delivery.tenant_id == tenant_id)
    if job_id is not None:
        query = query.where(Delivery.job_id == job_id)
    if before is not None:
        query = query.where(tuple_(Delivery.created_at, Delivery.id) < tuple_(literal(before.created_at, UtcDateTime()), literal(before.id)))
    return session.scalars(query.order_by(Delivery.created_at.desc(), Delivery.id.desc()).limit(limit)).all()


def send_again(session: Session, delivery: Delivery) -> Delivery | None:
    """Have a delivery that waits no more sent as if it were new; None if another request was faster."""
    again = update(Delivery).where(Delivery.id == delivery.id, Delivery.tenant_id == delivery.tenant_id, Delivery.state != "waiting")
    again = again.values(state="waiting", tries=0, next_at=db_now(), delivered_at=None)
    return session.scalar(again.returning(Delivery), execution_options={"populate_existing": True, **UNSYNCHRONIZED})
