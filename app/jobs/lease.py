"""Who may work on a job: each step is one conditional UPDATE, in the database's clock.

A worker holds a lease: the job's id and a token that no other attempt has. Whatever it writes is conditional on the token;
`LeaseLost` means that zero rows matched, so the worker must stop and write nothing more.

claim    queued → running, the attempt is counted, the token goes up; which job a worker gets is decided here, whatever message woke it
beat     the lease runs anew; progress, phase and events are stored with it; tells whether a cancel is requested
finish   running → succeeded | failed, cancelling → cancelled, with report and artifacts
release  running → queued, to be claimed again
reap     leases that ran out: running → queued or failed(worker_lost), cancelling → cancelled
give_up  queued → failed(max_pending_exceeded) where no attempt began in time

Each attempt's time, from its claim to its end, is added to the job's `ran_seconds`. The functions take part in the caller's transaction and don't commit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Executable,
    Insert,
    Row,
    ScalarSelect,
    String,
    Subquery,
    bindparam,
    delete,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
    union,
    update,
)
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased
from sqlalchemy.sql.dml import ReturningUpdate

from app.database import Base, db_now, seconds_between
from app.jobs.repository import JOBS, OUTBOX, insert_event
from app.models import RETRIED, Artifact, Job, OutboxMessage, Tenant, Worker

ARTIFACTS, TENANTS, WORKERS = (Base.metadata.tables[model.__tablename__] for model in (Artifact, Tenant, Worker))
HELD = ("running", "cancelling")
WAITS = literal_column("'queued'", String())  # as a parameter, no plan that is kept could use the index on queued jobs
CLAIM_LOCK = 4_771_020_601  # any number that nothing else locks
PHASE_LENGTH = 32  # characters of Job.phase
UNSYNCHRONIZED = {"synchronize_session": False}  # rows are only written here, never kept as objects


class LeaseLost(Exception):  # noqa: N818  it is an outcome that every worker must expect, not a fault
    """Another attempt, a cancel or the reaper has the job now."""


@dataclass(frozen=True)
class Lease:
    """One attempt's right to write a job."""

    job_id: str
    tenant_id: str
    queue: str
    token: int
    attempt: int
    max_attempts: int
    capped: bool  # whether the tenant may run only so many jobs at once
    # The reaper, which does no work, has none of these.
    recipe: dict[str, Any] = field(default_factory=dict)
    seconds_to_run: float = 0.0  # what earlier attempts left of limits.max_runtime
    trace_parent: str | None = None  # of the request that made the job

    @property
    def last_attempt(self) -> bool:
        return self.attempt >= self.max_attempts

    @property
    def artifact_prefix(self) -> str:
        """Where this attempt, and no other, stores its files."""
        return self.prefix_of(self.token)

    @property
    def resume_prefix(self) -> str:
        """Where the attempts of the job store what the next one goes on from, each under its token."""
        return f"{self.tenant_id}/jobs/{self.job_id}/resume/"

    def prefix_of(self, token: int) -> str:
        return f"{self.tenant_id}/jobs/{self.job_id}/a{token}/"


_capped = select(TENANTS.c.max_running.is_not(None)).where(TENANTS.c.id == JOBS.c.tenant_id).correlate(JOBS).scalar_subquery()
OF_LEASE = (JOBS.c.id, JOBS.c.tenant_id, JOBS.c.queue, JOBS.c.lease_token, JOBS.c.attempt, JOBS.c.max_attempts, _capped.label("capped"))


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


MAX_PENDING_EXCEEDED = {
    "code": "max_pending_exceeded",
    "message": "No worker began the job within limits.max_pending.",
    "hint": "Raise limits.max_pending, or choose another queue; GET /v1/queues tells how busy they are.",
}


def claim_next(session: Session, worker: Worker, lease_seconds: float) -> Lease | None:
    """Take the job that this worker should do next; None where nothing waits that it may do.

    That is, of the queued jobs of its class that fit into its memory and whose tenant runs fewer than it may: those of the highest priority, of these
    those of the tenant with the fewest running jobs, of these the oldest. One claim is made at a time, so order and caps hold exactly.
    """
    if session.get_bind().dialect.name == "postgresql":  # SQLite has one writer anyway
        session.execute(select(func.pg_advisory_xact_lock(CLAIM_LOCK)))
    return _claim(session, _claiming_next(worker.queue, worker.host_bytes, worker.device_bytes, lease_seconds), {"owner": worker.id})


def claim(session: Session, job_id: str, owner: str, lease_seconds: float) -> Lease | None:
    """Take a queued job; None where there is nothing to take."""
    return _claim(session, _claiming(bindparam("wanted", type_=String()), lease_seconds), {"owner": owner, "wanted": job_id})


@lru_cache(maxsize=64)  # as of `_next_for`
def _claiming_next(queue: str, host_bytes: int, device_bytes: int, lease_seconds: float) -> Executable:
    return _claiming(_next_for(queue, host_bytes, device_bytes), lease_seconds)


def _claiming(job_id: ColumnElement[str], lease_seconds: float) -> Executable:
    """The claim of a job for the `owner`."""
    queued = update(JOBS).where(JOBS.c.id == job_id, JOBS.c.state == "queued")
    claimed = queued.values(
        state="running",
        phase=None,
        progress={},
        attempt=JOBS.c.attempt + 1,
        lease_token=JOBS.c.lease_token + 1,
        lease_owner=bindparam("owner"),
        lease_until=db_now(lease_seconds),
        claimed_at=db_now(),
        started_at=func.coalesce(JOBS.c.started_at, db_now()),
        **_told(1),
    )
    return claimed.returning(*OF_LEASE, JOBS.c.recipe, JOBS.c.max_runtime, JOBS.c.ran_seconds, JOBS.c.trace_parent, JOBS.c.last_event)


def _claim(session: Session, claiming: Executable, wanted: dict[str, str]) -> Lease | None:
    row = session.execute(claiming, wanted).one_or_none()
    if row is None:
        return None
    runtime = row.max_runtime or row.recipe["limits"]["max_runtime"]  # a release before this one wrote it only there
    lease = _lease(row, recipe=row.recipe, seconds_to_run=runtime - row.ran_seconds, trace_parent=row.trace_parent)
    event = Event("claimed", f"Attempt {lease.attempt} of {lease.max_attempts} started.", {"attempt": lease.attempt, "worker": wanted["owner"]})
    _tell(session, lease, row.last_event, [event])
    return lease


def work_waits(session: Session, worker: Worker) -> bool:
    """Whether the worker has no job and could claim one."""
    idle = ~exists().where(Job.lease_owner == worker.id, Job.state.in_(HELD))
    return session.scalar(select(_next_for(worker.queue, worker.host_bytes, worker.device_bytes)).where(idle)) is not None


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
    news: dict[str, Any] = {}
    if phase is not None:
        news["phase"] = phase[:PHASE_LENGTH]
    if progress is not None:
        news["progress"] = progress
    told = len(events) if news or events else None
    return _write(session, lease, _beating(lease_seconds, told), news, events) == "cancelling"


@lru_cache(maxsize=64)  # as of `_next_for`
def _beating(lease_seconds: float, told: int | None) -> ReturningUpdate[str, int]:
    return _held(HELD).values(lease_until=db_now(lease_seconds), **({} if told is None else _told(told)))


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
    result: dict[str, Any] = {"report": report, "error": error}
    if state == "succeeded":
        result |= {"artifact_prefix": lease.artifact_prefix, "stored_bytes": sum(file.bytes for file in files)}
    if progress is not None:
        result |= {"progress": progress}
    _write(session, lease, _finishing(state), result, [_ending(state, error)])
    if files:
        of_job = {"job_id": lease.job_id, "tenant_id": lease.tenant_id}
        session.execute(insert(ARTIFACTS), [of_job | {"path": f.path, "role": f.role, "bytes": f.bytes, "sha256": f.sha256} for f in files])
    _pass_on(session, lease)


@lru_cache  # as of `_next_for`
def _finishing(state: str) -> ReturningUpdate[str, int]:
    return _held(("cancelling",) if state == "cancelled" else ("running",)).values(**_ended(state), **_told(1))


def release(session: Session, lease: Lease, why: str, *, charged: bool) -> None:
    """Put the job back into the queue; an attempt that isn't `charged` doesn't count against `max_attempts`."""
    event = Event("requeued", why, {"attempt": lease.attempt, "charged": charged})
    _write(session, lease, _held(("running",)).values(**_requeued(), attempt=Job.attempt - (0 if charged else 1), **_told(1)), {}, [event])
    _publish_again(session, lease.job_id, lease.tenant_id)


def reap(session: Session, limit: int = 100) -> list[str]:
    """End or requeue up to `limit` jobs whose lease ran out; returns their ids. Many reapers at once share the rows among them."""
    run_out = (Job.state.in_(HELD), Job.lease_until < db_now())
    query = select(*OF_LEASE, Job.state).where(*run_out).order_by(Job.lease_until).limit(limit)
    rows = session.execute(query.with_for_update(skip_locked=True, of=Job)).all()
    reaped = []
    for row in rows:
        lease = _lease(row)
        error = None
        if row.state == "cancelling":
            values, event = _ended("cancelled"), _ending("cancelled", None)
        elif lease.last_attempt:
            error = worker_lost(lease.attempt)
            values, event = _ended("failed") | {"error": error}, _ending("failed", error)
        else:
            values, event = _requeued(), Event("requeued", "The worker was lost; another one will go on.", {"attempt": lease.attempt, "charged": True})
        values["ran_seconds"] = _ran_until(Job.lease_until)
        expired = Event("lease_expired", f"Nothing was heard of attempt {lease.attempt} for the length of its lease.", {"attempt": lease.attempt})
        try:
            _write(session, lease, _held((row.state,)).where(*run_out).values(**values, **_told(2)), {}, [expired, event])
        except LeaseLost:
            continue
        if values["state"] == "queued":
            _publish_again(session, lease.job_id, lease.tenant_id)
        else:
            _pass_on(session, lease)
        reaped.append(row.id)
    return reaped


def give_up(session: Session, limit: int = 100) -> list[str]:
    """End up to `limit` jobs of which no attempt began within limits.max_pending; returns their ids."""
    late = aliased(Job)
    ids = select(late.id).where(late.state == "queued", late.started_at.is_(None), late.start_by < db_now()).order_by(late.start_by)
    ended = update(Job).where(Job.id.in_(ids.limit(limit).with_for_update(skip_locked=True)), Job.state == "queued")
    ended = ended.values(**_ended("failed"), error=MAX_PENDING_EXCEEDED, **_told(1))
    rows = session.execute(ended.returning(Job.id, Job.tenant_id, Job.queue, Job.last_event), execution_options=UNSYNCHRONIZED).all()
    for row in rows:
        event = _ending("failed", MAX_PENDING_EXCEEDED)
        insert_event(session, row.id, row.tenant_id, row.queue, row.last_event, event.kind, event.message, event.data)
    return [row.id for row in rows]


def seconds_over(session: Session, job_ids: Sequence[str]) -> dict[str, float]:
    """For how long these jobs have been over: since their end, or for ever where nothing goes on any more, as after success. Those that go on are left out."""
    since_end = seconds_between(Job.finished_at, db_now()).label("since_end")
    jobs = {row.id: row for row in session.execute(select(Job.id, Job.state, since_end).where(Job.id.in_(job_ids)))}
    over = {job_id: math.inf for job_id in job_ids if job_id not in jobs or jobs[job_id].state == "succeeded"}
    return over | {row.id: max(0.0, row.since_end) for row in jobs.values() if row.state in RETRIED}


def is_result(session: Session, job_id: str, prefix: str) -> bool:
    """Whether the files under this prefix are the job's result."""
    return session.scalar(select(Job.artifact_prefix).where(Job.id == job_id)) == prefix


# -------------------------------------------------------------------- outbox


@dataclass(frozen=True)
class Message:
    """An outbox row: there may be work in this class."""

    id: int
    job_id: str
    queue: str


def take_outbox(session: Session, limit: int) -> list[Message]:
    """Up to `limit` messages, oldest first, that no other relay has in its hands."""
    query = select(OutboxMessage.id, OutboxMessage.job_id, Job.queue).join(Job, Job.id == OutboxMessage.job_id).order_by(OutboxMessage.id)
    return [Message(*row) for row in session.execute(query.limit(limit).with_for_update(skip_locked=True, of=OutboxMessage))]


def delete_messages(session: Session, messages: Sequence[Message]) -> None:
    """Of published messages. No job's row is touched: the worker that a message wakes up would find it locked and pass it over."""
    session.execute(delete(OutboxMessage).where(OutboxMessage.id.in_([message.id for message in messages])), execution_options=UNSYNCHRONIZED)


def waiting(session: Session) -> dict[str, int]:
    """How many jobs of each class wait for a worker, where any do."""
    counts = select(Job.queue, func.count()).where(Job.state == "queued").group_by(Job.queue)
    return dict(session.execute(counts).all())


def publish_stale(session: Session, queue: str, older_than_seconds: float, limit: int) -> int:
    """Write an outbox message for up to `limit` queued jobs of a class that have none and whose last one was written long ago; returns how many.

    Jobs of a tenant that runs as many as it may are left out: the end of each of those publishes the next one.
    """
    pending = exists().where(OutboxMessage.job_id == Job.id)
    last = func.coalesce(Job.published_at, Job.updated_at)
    running = _running()
    query = (
        select(Job.id, Job.tenant_id)
        .join(Tenant, Tenant.id == Job.tenant_id)
        .outerjoin(running, running.c.tenant_id == Tenant.id)
        .where(Job.queue == queue, Job.state == "queued", last < db_now(-older_than_seconds), ~pending, _may_run_more(running))
        .order_by(Job.created_at)
        .limit(limit)
        .with_for_update(skip_locked=True, of=Job)
    )
    rows = session.execute(query).all()
    for row in rows:
        _publish_again(session, row.id, row.tenant_id)
    written = update(Job).where(Job.id.in_([row.id for row in rows])).values(published_at=db_now())
    session.execute(written, execution_options=UNSYNCHRONIZED)
    return len(rows)


# --------------------------------------------------------------- whose turn it is


@lru_cache(maxsize=64)  # it takes longer to build than to execute
def _next_for(queue: str, host_bytes: int, device_bytes: int) -> ScalarSelect[str]:
    """The id of the job that a worker with so much memory should do next. Reads one job of each tenant, along the index ix_jobs_claim."""
    head, candidate = JOBS.alias(), JOBS.alias()
    fits = [or_(head.c.host_bytes.is_(None), head.c.host_bytes <= host_bytes)]
    if device_bytes:
        fits.append(or_(head.c.device_bytes.is_(None), head.c.device_bytes <= device_bytes))
    in_time = or_(head.c.start_by.is_(None), head.c.started_at.is_not(None), head.c.start_by > db_now())
    first = (
        select(head.c.id)
        .where(head.c.tenant_id == TENANTS.c.id, head.c.queue == queue, head.c.state == WAITS, in_time, *fits)
        .order_by(head.c.priority.desc(), head.c.created_at, head.c.id)
        .limit(1)
        .correlate(TENANTS)
        .scalar_subquery()
    )
    running = _running()
    return (
        select(candidate.c.id)
        .select_from(TENANTS)
        .join(candidate, candidate.c.id == first)
        .outerjoin(running, running.c.tenant_id == TENANTS.c.id)
        .where(_may_run_more(running))
        .order_by(candidate.c.priority.desc(), func.coalesce(running.c.jobs, 0), candidate.c.created_at, candidate.c.id)
        .limit(1)
        .with_for_update(skip_locked=True, of=candidate)
        .scalar_subquery()
    )


def _running() -> Subquery:
    """How many jobs each tenant runs, where it runs any."""
    job = JOBS.alias()
    return select(job.c.tenant_id, func.count().label("jobs")).where(job.c.state.in_(HELD)).group_by(job.c.tenant_id).subquery()


def _may_run_more(running: Subquery) -> ColumnElement[bool]:
    return or_(TENANTS.c.max_running.is_(None), func.coalesce(running.c.jobs, 0) < TENANTS.c.max_running)


# ------------------------------------------------------------------- helpers


def _lease(row: Row[*tuple[Any, ...]], **work: Any) -> Lease:
    return Lease(row.id, row.tenant_id, row.queue, row.lease_token, row.attempt, row.max_attempts, row.capped, **work)


def _requeued() -> dict[str, Any]:
    return {"state": "queued", "phase": None, "lease_owner": None, "lease_until": None, "published_at": None, **_over()}


def _ended(state: str) -> dict[str, Any]:
    return {"state": state, "phase": None, "lease_owner": None, "lease_until": None, "finished_at": db_now(), **_over()}


def _over() -> dict[str, Any]:
    """What an attempt leaves in its job's row."""
    return {"ran_seconds": _ran_until(db_now()), "claimed_at": None}


def _ran_until(moment: ColumnElement[Any] | InstrumentedAttribute[Any]) -> ColumnElement[float]:
    return JOBS.c.ran_seconds + func.coalesce(seconds_between(JOBS.c.claimed_at, moment), 0.0)


def _told(events: int) -> dict[str, Any]:
    """The change of a row that its readers are to see, with so many events."""
    return {"last_event": JOBS.c.last_event + events, "version": JOBS.c.version + 1, "updated_at": db_now()}


def _ending(state: str, error: dict[str, str] | None) -> Event:
    return Event(state, error["message"], {"code": error["code"]}) if error else Event(state, f"The job {'was ' if state == 'cancelled' else ''}{state}.")


def _held(states: Sequence[str]) -> ReturningUpdate[str, int]:
    """The conditional UPDATE that `_write` executes."""
    held = (JOBS.c.id == bindparam("held_job"), JOBS.c.lease_token == bindparam("held_token"), or_(*(JOBS.c.state == state for state in states)))
    return update(JOBS).where(*held).returning(JOBS.c.state, JOBS.c.last_event)


def _write(session: Session, lease: Lease, change: ReturningUpdate[str, int], values: dict[str, Any], events: Sequence[Event]) -> str:
    """Make a change that counts these events, with more values, if the lease is held, and write the events; returns the job's state after it."""
    row = session.execute(change, values | {"held_job": lease.job_id, "held_token": lease.token}).one_or_none()
    if row is None:
        raise LeaseLost(lease.job_id)
    _tell(session, lease, row.last_event, events)
    return str(row.state)


def _tell(session: Session, lease: Lease, last: int, events: Sequence[Event]) -> None:
    """Write events whose numbers end with `last`."""
    for sequence, event in enumerate(events, last - len(events) + 1):
        insert_event(session, lease.job_id, lease.tenant_id, lease.queue, sequence, event.kind, event.message, event.data)


def _publish_again(session: Session, job_id: str, tenant_id: str) -> None:
    session.execute(insert(OutboxMessage).values(job_id=job_id, tenant_id=tenant_id))


def _pass_on(session: Session, lease: Lease) -> None:
    """Publish the next job of a tenant that may run only so many: its message may have come while it had to wait for this one's end."""
    if lease.capped:
        session.execute(_passing_on(), {"of_tenant": lease.tenant_id, "own": lease.queue})


@lru_cache  # as of `_next_for`
def _passing_on() -> Insert:
    """Reads one job of each class that has workers, and of the `own` in any case, along the index ix_jobs_claim."""
    classes = union(select(WORKERS.c.queue), select(bindparam("own", type_=String()).label("queue"))).subquery()
    head, candidate = JOBS.alias(), JOBS.alias()
    waits = select(head.c.id).where(head.c.tenant_id == bindparam("of_tenant"), head.c.queue == classes.c.queue, head.c.state == WAITS)
    first = waits.order_by(head.c.priority.desc(), head.c.created_at, head.c.id).limit(1).correlate(classes).scalar_subquery()
    found = select(candidate.c.id, candidate.c.tenant_id).select_from(classes).join(candidate, candidate.c.id == first)
    return insert(OUTBOX).from_select(["job_id", "tenant_id"], found.order_by(candidate.c.priority.desc(), candidate.c.created_at, candidate.c.id).limit(1))
