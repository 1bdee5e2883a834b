"""The way of news to a webhook: written with the event that it tells of, taken by a process that sends it, and recorded as taken, to be sent again, or given up.

A try is taken under a lock that others pass over, in the database's clock: it is counted, and the next one put past the time that this one may last, so that
the news of a process that dies is sent again. What came of it is recorded on condition that no other try has begun. The functions take part in the
caller's transaction and don't commit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import Select, bindparam, delete, func, insert, or_, select, update
from sqlalchemy.orm import Session, aliased
from uuid_utils import uuid7

from app import totals
from app.database import db_now
from app.models import Delivery, Job, Webhook

DAY = 24 * 3600
DISABLED_AFTER_SECONDS = 5 * DAY  # in which nothing was taken
KEPT_SECONDS = 30 * DAY  # in the log
LONGEST_WAIT = float(DAY)  # that a receiver may ask for
MAX_ERROR_LENGTH = 500
OUTCOMES = ("delivered", "retried", "failed")
UNSYNCHRONIZED = {"synchronize_session": False}

# Of each kind of event that is told: the name under which it is, and the state in which it left the job.
NEWS = {
    "claimed": ("job.started", "running"),
    "succeeded": ("job.succeeded", "succeeded"),
    "failed": ("job.failed", "failed"),
    "cancelled": ("job.cancelled", "cancelled"),
    "requeued": ("job.requeued", "queued"),
    "artifacts_deleted": ("artifacts.deleted", "succeeded"),
}
PING = "ping"


@dataclass(frozen=True)
class Try:
    """One try to send a delivery, which this process has taken."""

    delivery_id: str
    webhook_id: str
    number: int  # 1, 2, …
    payload: dict[str, Any]
    happened_at: datetime
    url: str
    secrets: str  # encrypted


@dataclass(frozen=True)
class Answer:
    """What came of a try."""

    status: int | None  # of HTTP; None: there was no answer
    error: str | None = None  # why it doesn't count as taken
    wait_seconds: float = 0.0  # that the receiver asked for

    @property
    def gone(self) -> bool:
        return self.status == 410


# ------------------------------------------------------------------ written


def announce(session: Session, job_id: str, tenant_id: str, kind: str, sequence: int) -> None:
    """Write the news of a job's event for every webhook that is to hear of it."""
    if kind not in NEWS:
        return
    name, state = NEWS[kind]
    listening = session.execute(_listening(), {"tenant": tenant_id, "job": job_id})
    webhooks = [webhook_id for webhook_id, kinds in listening if name in kinds]
    if webhooks:
        payload = {"type": name, "data": {"job_id": job_id, "state": state, "sequence": sequence, "url": f"/v1/jobs/{job_id}"}}
        session.execute(insert(Delivery), [_row(webhook_id, tenant_id, payload) | {"job_id": job_id} for webhook_id in webhooks])


@lru_cache  # every claim and every end of a job asks, and it takes longer to build than to execute
def _listening() -> Select[str, list[str]]:
    """The webhooks of a tenant that hear of a job. They are locked, so that none is deleted before its news is written."""
    named = select(Job.webhook_id).where(Job.id == bindparam("job")).scalar_subquery()
    enabled = select(Webhook.id, Webhook.kinds).where(Webhook.tenant_id == bindparam("tenant"), Webhook.disabled_at.is_(None))
    return enabled.where(or_(Webhook.every_job, Webhook.id == named)).with_for_update(read=True, key_share=True)


def ping(session: Session, webhook: Webhook) -> Delivery:
    payload = {"type": PING, "data": {"webhook_id": webhook.id}}
    return session.scalars(insert(Delivery).values(_row(webhook.id, webhook.tenant_id, payload)).returning(Delivery)).one()


def _row(webhook_id: str, tenant_id: str, payload: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"dlv_{uuid7().hex}", "webhook_id": webhook_id, "tenant_id": tenant_id, "kind": payload["type"], "payload": payload}


# -------------------------------------------------------------------- taken


def take(session: Session, busy: Collection[str], limit: int, lease_seconds: float) -> list[Try]:
    """Up to `limit` deliveries that are due, the oldest of each webhook that is not `busy`. Reads one of each webhook, along an index."""
    waiting, candidate = aliased(Delivery), aliased(Delivery)
    first = select(waiting.id).where(waiting.webhook_id == Webhook.id, waiting.state == "waiting").order_by(waiting.next_at).limit(1)
    due = (
        select(candidate.id, candidate.webhook_id, candidate.tries + 1, candidate.payload, candidate.created_at, Webhook.url, Webhook.secrets)
        .select_from(Webhook)
        .join(candidate, candidate.id == first.correlate(Webhook).scalar_subquery())
        .where(Webhook.disabled_at.is_(None), Webhook.id.not_in(busy), candidate.state == "waiting", candidate.next_at <= db_now())
        .order_by(candidate.next_at)
        .limit(limit)
        .with_for_update(skip_locked=True, of=candidate)
    )
    # Locked by a statement of its own: inside the UPDATE, Postgres may run it more than once and take more than it limits.
    tries = [Try(*row) for row in session.execute(due)]
    if tries:
        taken = update(Delivery).where(Delivery.id.in_([sent.delivery_id for sent in tries]))
        session.execute(taken.values(tries=Delivery.tries + 1, next_at=db_now(lease_seconds)), execution_options=UNSYNCHRONIZED)
    return tries


# ----------------------------------------------------------------- recorded


def record(session: Session, sent: Try, answer: Answer, retry_seconds: Sequence[float]) -> None:
    """Write down what came of a try, and disable a webhook that wants or takes no more."""
    too_long = _note(session, sent.webhook_id, failing=answer.error is not None)  # first, as whoever deletes a webhook also locks it before its deliveries
    if answer.error is None:
        _record(session, sent, "delivered", {"state": "delivered", "next_at": None, "delivered_at": db_now(), "last_status": answer.status, "last_error": None})
        return
    values: dict[str, Any] = {"last_status": answer.status, "last_error": answer.error[:MAX_ERROR_LENGTH]}
    if sent.number > len(retry_seconds):
        _record(session, sent, "failed", values | {"state": "failed", "next_at": None})
    else:
        pause = retry_seconds[sent.number - 1] * random.uniform(0.9, 1.1)  # noqa: S311  it only spreads the load
        _record(session, sent, "retried", values | {"next_at": db_now(max(pause, min(answer.wait_seconds, LONGEST_WAIT)))})
    if answer.gone:
        disable(session, sent.webhook_id, "The receiver answered 410 Gone.")
    elif too_long:
        disable(session, sent.webhook_id, f"Nothing was taken for {DISABLED_AFTER_SECONDS // DAY} days; the last error: {answer.error}")


def _note(session: Session, webhook_id: str, *, failing: bool) -> bool:
    """Keep since when a webhook has taken nothing; whether that is too long ago."""
    if not failing:
        recovered = update(Webhook).where(Webhook.id == webhook_id, Webhook.failing_since.is_not(None)).values(failing_since=None)
        session.execute(recovered, execution_options=UNSYNCHRONIZED)
        return False
    kept = update(Webhook).where(Webhook.id == webhook_id).values(failing_since=func.coalesce(Webhook.failing_since, db_now()))
    return bool(session.scalar(kept.returning(Webhook.failing_since < db_now(-DISABLED_AFTER_SECONDS)), execution_options=UNSYNCHRONIZED))


def _record(session: Session, sent: Try, outcome: str, values: dict[str, Any]) -> None:
    own = update(Delivery).where(Delivery.id == sent.delivery_id, Delivery.state == "waiting", Delivery.tries == sent.number)
    if session.scalar(own.values(values).returning(Delivery.id), execution_options=UNSYNCHRONIZED) is not None:
        totals.count(session, totals.DELIVERIES, outcome=outcome)


def disable(session: Session, webhook_id: str, reason: str) -> None:
    """Send nothing more to a webhook, of what waits for it neither; that can be sent by a replay."""
    off = update(Webhook).where(Webhook.id == webhook_id, Webhook.disabled_at.is_(None))
    session.execute(off.values(disabled_at=db_now(), disabled_reason=reason[:MAX_ERROR_LENGTH]), execution_options=UNSYNCHRONIZED)
    dropped = update(Delivery).where(Delivery.webhook_id == webhook_id, Delivery.state == "waiting")
    rows = session.scalars(dropped.values(state="failed", next_at=None).returning(Delivery.id), execution_options=UNSYNCHRONIZED).all()
    if rows:
        totals.count(session, totals.DELIVERIES, len(rows), outcome="failed")


def forget(session: Session) -> None:
    """Remove old entries of the log."""
    before = f"dlv_{int((time.time() - KEPT_SECONDS) * 1000):012x}"  # ids begin with the time in milliseconds, so the key's index finds them
    session.execute(delete(Delivery).where(Delivery.id < before, Delivery.state != "waiting"), execution_options=UNSYNCHRONIZED)
