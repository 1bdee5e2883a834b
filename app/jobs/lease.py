"""Who may work on a job: each step is one conditional UPDATE, in the database's clock.

A worker holds a lease: the job's id and a token that no other attempt has. Whatever it writes is conditional on the token;
`LeaseLost` means that zero rows matched, so the worker must stop and write nothing more.

claim    queued → running, the attempt is counted, the token goes up
beat     the lease runs anew; progress, phase and events are stored with it; tells whether a cancel is requested
finish   running → succeeded | failed, cancelling → cancelled, with report and artifacts
release  running → queued, to be claimed again
reap     leases that ran out: running → queued or failed(worker_lost), cancelling → cancelled

The functions take part in the caller's transaction and don't commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import ColumnElement, delete, exists, func, insert, select, update
from sqlalchemy.orm import Session

from app.database import db_now
from app.jobs.repository import add_event
from app.models import FINISHED, Artifact, Job, OutboxMessage

HELD = ("running", "cancelling")
PHASE_LENGTH = 32  # characters of Job.phase
UNSYNCHRONIZED = {"synchronize_session": False}  # rows are only written here, never kept as objects


class LeaseLost(Exception):  # noqa: N818  it is an outcome that every worker must expect, not a fault
    """Another attempt, a cancel or the reaper has the job now."""


@dataclass(frozen=True)
class Lease:
    """One attempt's right to write a job."""

    job_id: str
    tenant_id: str
    token: int
    attempt: int
    max_attempts: int
    recipe: dict[str, Any]

    @property
    def last_attempt(self) -> bool:
        return self.attempt >= self.max_attempts

    @property
    def artifact_prefix(self) -> str:
        """Where this attempt, and no other, stores its files."""
        return self.prefix_of(self.token)

    def prefix_of(self, token: int) -> str:
        return f"{self.tenant_id}/jobs/{self.job_id}/a{token}/"


@dataclass(frozen=True)
class Event:
    kind: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredFile:
    """A file that lies in the object store under the lease's prefix."""

    path: str
    role: str
    bytes: int
    sha256: str


def worker_lost(attempts: int) -> dict[str, str]:
    return {
        "code": "worker_lost",
        "message": f"The worker or its engine died in each of {attempts} attempts.",
        "hint": "Most often memory ran out: use a smaller model, fewer calibration samples or a larger worker. The job's events show what the engine said last.",
    }


def claim(session: Session, job_id: str, owner: str, lease_seconds: float) -> Lease | None:
    """Take a queued job; None where there is nothing to take, as after a duplicate message."""
    row = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.state == "queued")
        .values(
            state="running",
            phase=None,
            progress={},
            attempt=Job.attempt + 1,
            lease_token=Job.lease_token + 1,
            lease_owner=owner,
            lease_until=db_now(lease_seconds),
            started_at=func.coalesce(Job.started_at, db_now()),
        )
        .returning(Job.tenant_id, Job.lease_token, Job.attempt, Job.max_attempts, Job.recipe),
        execution_options=UNSYNCHRONIZED,
    ).one_or_none()
    if row is None:
        return None
    lease = Lease(job_id, row.tenant_id, row.lease_token, row.attempt, row.max_attempts, row.recipe)
    _add(session, lease, Event("claimed", f"Attempt {lease.attempt} of {lease.max_attempts} started.", {"attempt": lease.attempt, "worker": owner}))
    return lease


def beat(
    session: Session,
    lease: Lease,
    lease_seconds: float,
    *,
    phase: str | None = None,
    progress: dict[str, Any] | None = None,
    events: Sequence[Event] = (),
) -> bool:
    """Hold the lease for `lease_seconds` from now and store the news. Returns whether a cancel is requested."""
    values: dict[str, Any] = {"lease_until": db_now(lease_seconds)}
    if phase is not None:
        values["phase"] = phase[:PHASE_LENGTH]
    if progress is not None:
        values["progress"] = progress
    if len(values) > 1:
        values |= {"version": Job.version + 1, "updated_at": db_now()}
    state = _write(session, lease, HELD, values)
    for event in events:
        _add(session, lease, event)
    return state == "cancelling"


def finish(
    session: Session,
    lease: Lease,
    state: Literal["succeeded", "failed", "cancelled"],
    *,
    progress: dict[str, Any] | None = None,
    report: dict[str, Any] | None = None,
    error: dict[str, str] | None = None,
    files: Sequence[StoredFile] = (),
) -> None:
    """End the job. A job whose cancel is requested ends only as `cancelled`, and no other does: LeaseLost otherwise."""
    values = _ended(state) | {"report": report, "error": error}
    if state == "succeeded":
        values |= {"artifact_prefix": lease.artifact_prefix}
    if progress is not None:
        values |= {"progress": progress}
    _write(session, lease, ("cancelling",) if state == "cancelled" else ("running",), values)
    if files:
        session.execute(
            insert(Artifact),
            [{"job_id": lease.job_id, "tenant_id": lease.tenant_id, "path": f.path, "role": f.role, "bytes": f.bytes, "sha256": f.sha256} for f in files],
        )
    _add(session, lease, _ending(state, error))


def release(session: Session, lease: Lease, why: str, *, charged: bool) -> None:
    """Put the job back into the queue; an attempt that isn't `charged` doesn't count against `max_attempts`."""
    _write(session, lease, ("running",), _requeued() | {"attempt": Job.attempt - (0 if charged else 1)})
    _publish_again(session, lease.job_id, lease.tenant_id)
    _add(session, lease, Event("requeued", why, {"attempt": lease.attempt, "charged": charged}))


def reap(session: Session, limit: int = 100) -> list[str]:
    """End or requeue up to `limit` jobs whose lease ran out; returns their ids. Many reapers at once share the rows among them."""
    run_out = (Job.state.in_(HELD), Job.lease_until < db_now())
    columns = (Job.id, Job.tenant_id, Job.lease_token, Job.attempt, Job.max_attempts, Job.state)
    rows = session.execute(select(*columns).where(*run_out).order_by(Job.lease_until).limit(limit).with_for_update(skip_locked=True)).all()
    reaped = []
    for row in rows:
        lease = Lease(row.id, row.tenant_id, row.lease_token, row.attempt, row.max_attempts, {})
        error = None
        if row.state == "cancelling":
            values, event = _ended("cancelled"), _ending("cancelled", None)
        elif lease.last_attempt:
            error = worker_lost(lease.attempt)
            values, event = _ended("failed") | {"error": error}, _ending("failed", error)
        else:
            values, event = _requeued(), Event("requeued", "The worker was lost; another one will go on.", {"attempt": lease.attempt, "charged": True})
        try:
            _write(session, lease, (row.state,), values, *run_out)
        except LeaseLost:
            continue
        _add(session, lease, Event("lease_expired", f"Nothing was heard of attempt {lease.attempt} for the length of its lease.", {"attempt": lease.attempt}))
        _add(session, lease, event)
        if values["state"] == "queued":
            _publish_again(session, lease.job_id, lease.tenant_id)
        reaped.append(row.id)
    return reaped


def finished_jobs(session: Session, job_ids: Sequence[str]) -> set[str]:
    """Which of these jobs have ended, or are not there any more."""
    going_on = select(Job.id).where(Job.id.in_(job_ids), Job.state.not_in(FINISHED))
    return set(job_ids) - set(session.scalars(going_on))


def is_result(session: Session, job_id: str, prefix: str) -> bool:
    """Whether the files under this prefix are the job's result."""
    return session.scalar(select(Job.artifact_prefix).where(Job.id == job_id)) == prefix


# -------------------------------------------------------------------- outbox


def take_outbox(session: Session, limit: int) -> list[tuple[int, str]]:
    """Up to `limit` messages (outbox id, job id), oldest first, that no other relay has in its hands."""
    query = select(OutboxMessage.id, OutboxMessage.job_id).order_by(OutboxMessage.id).limit(limit).with_for_update(skip_locked=True)
    return [(row.id, row.job_id) for row in session.execute(query)]


def mark_published(session: Session, messages: Sequence[tuple[int, str]]) -> None:
    session.execute(delete(OutboxMessage).where(OutboxMessage.id.in_([number for number, _ in messages])), execution_options=UNSYNCHRONIZED)
    published = update(Job).where(Job.id.in_([job_id for _, job_id in messages])).values(published_at=db_now())
    session.execute(published, execution_options=UNSYNCHRONIZED)


def queued(session: Session) -> int:
    """How many jobs wait for a worker."""
    return session.execute(select(func.count()).select_from(Job).where(Job.state == "queued")).scalar_one()


def publish_stale(session: Session, older_than_seconds: float, limit: int) -> int:
    """Write an outbox message for up to `limit` queued jobs that have none and whose last one was published long ago; returns how many."""
    pending = exists().where(OutboxMessage.job_id == Job.id)
    last = func.coalesce(Job.published_at, Job.updated_at)
    query = (
        select(Job.id, Job.tenant_id)
        .where(Job.state == "queued", last < db_now(-older_than_seconds), ~pending)
        .order_by(Job.created_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = session.execute(query).all()
    for row in rows:
        _publish_again(session, row.id, row.tenant_id)
    return len(rows)


# ------------------------------------------------------------------- helpers


def _requeued() -> dict[str, Any]:
    return {"state": "queued", "phase": None, "lease_owner": None, "lease_until": None, "published_at": None}


def _ended(state: str) -> dict[str, Any]:
    return {"state": state, "phase": None, "lease_owner": None, "lease_until": None, "finished_at": db_now()}


def _ending(state: str, error: dict[str, str] | None) -> Event:
    return Event(state, error["message"], {"code": error["code"]}) if error else Event(state, f"The job {'was ' if state == 'cancelled' else ''}{state}.")


def _write(session: Session, lease: Lease, states: Sequence[str], values: dict[str, Any], *conditions: ColumnElement[bool]) -> str:
    """The conditional UPDATE; returns the job's state after it."""
    statement = update(Job).where(Job.id == lease.job_id, Job.lease_token == lease.token, Job.state.in_(states), *conditions).values(**values)
    state = session.execute(statement.returning(Job.state), execution_options=UNSYNCHRONIZED).scalar_one_or_none()
    if state is None:
        raise LeaseLost(lease.job_id)
    return state


def _add(session: Session, lease: Lease, event: Event) -> None:
    add_event(session, lease.job_id, lease.tenant_id, event.kind, event.message, event.data)


def _publish_again(session: Session, job_id: str, tenant_id: str) -> None:
    session.execute(insert(OutboxMessage).values(job_id=job_id, tenant_id=tenant_id))
