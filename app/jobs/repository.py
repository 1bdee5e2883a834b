"""Every query on jobs that the API makes. Each one names the tenant; what a worker writes is in `lease.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import ColumnElement, Insert, Select, String, bindparam, case, delete, exists, func, insert, literal, select, tuple_, type_coerce, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session, defer, joinedload
from sqlalchemy.sql.dml import ReturningInsert
from uuid_utils import uuid7

from app import telemetry, totals
from app.database import Base, UtcDateTime, db_now
from app.models import FINISHED, RETRIED, Artifact, Job, JobEvent, OutboxMessage, SinkRun, Tenant, Worker
from app.recipe import Limits, Recipe
from app.sinks import repository as sinks
from app.webhooks.deliveries import announce

MAX_MESSAGE_LENGTH = 10_000
COUNTED = ("claimed", "requeued", "lease_expired", "succeeded", "failed", "cancelled")  # events of which the metrics tell how many there were

JOBS, EVENTS, OUTBOX = (Base.metadata.tables[model.__tablename__] for model in (Job, JobEvent, OutboxMessage))  # written by without an ORM's detours
TIMES = (JOBS.c.created_at, JOBS.c.updated_at, JOBS.c.start_by)
UNTOLD = (  # what only concerns who does the job; each column takes time to read
    *(Job.report, Job.host_bytes, Job.device_bytes, Job.max_runtime, Job.ran_seconds, Job.claimed_at, Job.start_by, Job.trace_parent),
    *(Job.lease_owner, Job.lease_token, Job.lease_until, Job.published_at, Job.cancel_requested_at, Job.stored_bytes),
)
TOLD_OF_SINK = (SinkRun.name, SinkRun.target, SinkRun.state, SinkRun.tries, SinkRun.result, SinkRun.error, SinkRun.updated_at)
NEW: dict[str, Any] = {"state": "queued", "progress": {}, "attempt": 0, "lease_token": 0, "ran_seconds": 0.0, "stored_bytes": 0, "version": 1}


@dataclass(frozen=True)
class JobFilter:
    """Which jobs a list shows; an empty field shows all."""

    states: tuple[str, ...] = ()
    method: str | None = None
    model: str | None = None
    queue: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    labels: tuple[tuple[str, str], ...] = ()


def insert_job(
    session: Session,
    tenant_id: str,
    recipe: Recipe,
    *,
    queue: str = "default",
    priority: int = 0,
    labels: dict[str, str] | None = None,
    webhook_id: str | None = None,
    host_bytes: int | None = None,
    device_bytes: int | None = None,
    message: str = "Queued.",
) -> Job:
    """A queued job, its first event and the message that is to be published. The session does not know the object."""
    row = {
        "id": f"job_{uuid7().hex}",
        "tenant_id": tenant_id,
        "model": recipe.model,
        "method": recipe.method.name,
        "recipe": _stored(recipe),
        "queue": queue,
        "priority": priority,
        "webhook_id": webhook_id,
        "host_bytes": host_bytes,
        "device_bytes": device_bytes,
        "max_attempts": recipe.limits.max_attempts,
        "max_runtime": recipe.limits.max_runtime,
        "trace_parent": telemetry.trace_parent(),
        "last_event": 1,
        **NEW,
    }
    of_job = {"of_job": row["id"], "of_tenant": tenant_id, "said": message}
    first, *others = _insertions(session.get_bind().dialect.name, recipe.limits.max_pending)
    times = session.execute(first, row | of_job | {"metadata": labels or {}}).one()
    for other in others:
        session.execute(other, of_job)
    return Job(**row, labels=labels or {}, **times._mapping)


@lru_cache(maxsize=64)  # every submission needs them, and they take longer to build than to execute
def _insertions(dialect: str, max_pending: float | None) -> Sequence[ReturningInsert[Any] | Insert]:
    """A job, whose times are returned, its first event and its message: on Postgres as one statement, which saves two round trips."""
    of_job = {"job_id": bindparam("of_job", type_=String()), "tenant_id": bindparam("of_tenant", type_=String())}
    event = insert(EVENTS).values(**of_job, sequence=1, kind="queued", message=bindparam("said"), data={})
    message = insert(OUTBOX).from_select(list(of_job), select(*of_job.values()))  # by VALUES, a statement within another would name the id that is counted up
    job = insert(JOBS).values(start_by=None if max_pending is None else db_now(max_pending)).returning(*TIMES)
    return (job.add_cte(event.cte("event"), message.cte("message")),) if dialect == "postgresql" else (job, event, message)


@dataclass(frozen=True)
class Admission:
    """What a submission meets."""

    waiting: int  # jobs of its tenant
    bound: int | None  # as many may wait, if the tenant has a bound of its own
    served: bool  # a worker of its class lives


def find_admission(session: Session, tenant_id: str, queue: str, lease_seconds: float) -> Admission:
    waiting, bound, served = session.execute(_admission(lease_seconds), {"tenant": tenant_id, "class": queue}).one()
    return Admission(waiting, bound, served)


@lru_cache(maxsize=4)  # every submission asks, and it takes longer to build than to execute
def _admission(lease_seconds: float) -> Select[int, int | None, bool]:
    waiting = select(func.count()).where(Job.tenant_id == bindparam("tenant"), Job.state == "queued").scalar_subquery()
    served = exists().where(Worker.queue == bindparam("class"), Worker.seen_at > db_now(-lease_seconds))
    return select(waiting, Tenant.max_queued, served).where(Tenant.id == bindparam("tenant"))


def add_event(session: Session, job_id: str, tenant_id: str, kind: str, message: str, data: dict[str, Any] | None = None) -> int:
    """Add an event to a job and count the job's version up; the event's sequence number."""
    counted = update(Job).where(Job.id == job_id, Job.tenant_id == tenant_id)
    counted = counted.values(last_event=Job.last_event + 1, version=Job.version + 1, updated_at=db_now())
    sequence, queue = session.execute(counted.returning(Job.last_event, Job.queue), execution_options={"synchronize_session": False}).one()
    insert_event(session, job_id, tenant_id, queue, sequence, kind, message, data or {})
    return int(sequence)


def insert_event(session: Session, job_id: str, tenant_id: str, queue: str, sequence: int, kind: str, message: str, data: dict[str, Any]) -> None:
    """Write the event with this number, which the job's `last_event` counts already, and the news of it."""
    text = message.replace("\0", "")[:MAX_MESSAGE_LENGTH]  # Postgres stores no NUL
    row = {"job_id": job_id, "sequence": sequence, "tenant_id": tenant_id, "kind": kind, "message": text, "data": data}
    session.execute(insert(EVENTS), row)
    if kind in COUNTED:
        totals.count(session, totals.EVENTS, kind=kind, queue=queue, code=str(data.get("code", "")))
    if kind in FINISHED:
        sinks.job_ended(session, job_id, kind)
    elif kind == "retried":
        sinks.job_begins_anew(session, job_id)
    announce(session, job_id, tenant_id, kind, sequence)


def find_job(session: Session, tenant_id: str, job_id: str) -> Job | None:
    """A job with its sinks by the same query, and of each what may be told, without the report, which is long."""
    return session.scalars(_found(), {"wanted": job_id, "tenant": tenant_id}).unique().one_or_none()


@lru_cache  # as of the others that every request needs
def _found() -> Select[Job]:
    one = select(Job).where(Job.id == bindparam("wanted"), Job.tenant_id == bindparam("tenant"))
    return one.options(*(defer(column, raiseload=True) for column in UNTOLD), joinedload(Job.sinks).load_only(*TOLD_OF_SINK, raiseload=True))


def find_report(session: Session, tenant_id: str, job_id: str) -> dict[str, Any] | None:
    return session.scalar(select(Job.report).where(Job.id == job_id, Job.tenant_id == tenant_id))


def list_jobs(session: Session, tenant_id: str, wanted: JobFilter, before: tuple[datetime, str] | None, limit: int) -> Sequence[Job]:
    """Newest first, from the one before `(created_at, id)` on, without reports."""
    query = select(Job).where(Job.tenant_id == tenant_id).options(defer(Job.report, raiseload=True))
    if wanted.states:
        query = query.where(Job.state.in_(wanted.states))
    if wanted.method is not None:
        query = query.where(Job.method == wanted.method)
    if wanted.model is not None:
        query = query.where(Job.model == wanted.model)
    if wanted.queue is not None:
        query = query.where(Job.queue == wanted.queue)
    if wanted.created_after is not None:
        query = query.where(Job.created_at > wanted.created_after)
    if wanted.created_before is not None:
        query = query.where(Job.created_at < wanted.created_before)
    if wanted.labels and session.get_bind().dialect.name == "postgresql":
        query = query.where(type_coerce(Job.labels, JSONB).contains(dict(wanted.labels)))  # along an index, which SQLite has not
    else:
        query = query.where(*(Job.labels[name].as_string() == value for name, value in wanted.labels))
    if before is not None:
        query = query.where(tuple_(Job.created_at, Job.id) < tuple_(literal(before[0], UtcDateTime()), literal(before[1])))
    return session.scalars(query.order_by(Job.created_at.desc(), Job.id.desc()).limit(limit)).all()


def list_events(session: Session, tenant_id: str, job_id: str, after: int, limit: int) -> Sequence[JobEvent]:
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.tenant_id == tenant_id, JobEvent.sequence > after)
    return session.scalars(query.order_by(JobEvent.sequence).limit(limit)).all()


def request_cancel(session: Session, tenant_id: str, job_id: str) -> str | None:
    """End a queued job, ask a running one to end; its new state, or None where there was nothing to change."""
    queued = Job.state == "queued"
    changed = (
        update(Job)
        .where(Job.id == job_id, Job.tenant_id == tenant_id, Job.state.in_(("queued", "running")))
        .values(
            state=case((queued, "cancelled"), else_="cancelling"),
            finished_at=case((queued, db_now()), else_=None),
            cancel_requested_at=db_now(),
        )
    )
    return session.scalar(changed.returning(Job.state), execution_options={"synchronize_session": False})


def queue_again(session: Session, job: Job, start_by: ColumnElement[datetime] | None) -> bool:
    """Queue a job that failed or was cancelled, with as many attempts and as much time as a new one; False if another request was faster."""
    again = (
        update(Job)
        .where(Job.id == job.id, Job.tenant_id == job.tenant_id, Job.state.in_(RETRIED))
        .values(
            state="queued",
            error=None,
            progress={},
            max_attempts=Job.attempt + job.recipe["limits"]["max_attempts"],
            ran_seconds=0.0,
            start_by=start_by,
            started_at=None,
            finished_at=None,
            cancel_requested_at=None,
            published_at=None,
        )
    )
    if session.scalar(again.returning(Job.id), execution_options={"synchronize_session": False}) is None:
        return False
    session.execute(insert(OutboxMessage).values(job_id=job.id, tenant_id=job.tenant_id))
    return True


def delete_job(session: Session, tenant_id: str, job_id: str) -> bool:
    """Delete the row of a job that has finished, and all that refers to it; whether there was such a job."""
    finished = delete(Job).where(Job.id == job_id, Job.tenant_id == tenant_id, Job.state.in_(FINISHED))
    return session.scalar(finished.returning(Job.id), execution_options={"synchronize_session": False}) is not None


@dataclass(frozen=True)
class Standing:
    """How far a job is, as those who watch it need to know."""

    version: int
    last_event: int
    state: str

    @property
    def finished(self) -> bool:
        return self.state in FINISHED


def find_standings(session: Session, job_ids: Sequence[str]) -> dict[str, Standing]:
    """Of those of some jobs that exist. They may be of any tenant: who asks for a job has been shown it before."""
    rows = session.execute(select(Job.id, Job.version, Job.last_event, Job.state).where(Job.id.in_(job_ids)))
    return {row.id: Standing(row.version, row.last_event, row.state) for row in rows}


def find_events(session: Session, numbers: Sequence[tuple[str, int]]) -> Sequence[JobEvent]:
    """The events with these jobs and sequence numbers, in their order."""
    query = select(JobEvent).where(tuple_(JobEvent.job_id, JobEvent.sequence).in_(numbers))
    return session.scalars(query.order_by(JobEvent.job_id, JobEvent.sequence)).all()


def list_artifacts(session: Session, tenant_id: str, job_id: str) -> Sequence[Artifact]:
    return session.scalars(select(Artifact).where(Artifact.job_id == job_id, Artifact.tenant_id == tenant_id).order_by(Artifact.path)).all()


def find_artifact(session: Session, tenant_id: str, job_id: str, path: str) -> Artifact | None:
    return session.scalar(select(Artifact).where(Artifact.job_id == job_id, Artifact.tenant_id == tenant_id, Artifact.path == path))


def _stored(recipe: Recipe) -> dict[str, Any]:
    """The recipe as workers of this release and of the one before read it: that one knows only two limits, and no others are told that aren't used."""
    unused = {name for name, field in Limits.model_fields.items() if getattr(recipe.limits, name) == field.default} - {"max_attempts", "max_runtime"}
    return recipe.model_dump(mode="json", include=set(Recipe.model_fields), exclude={"limits": unused})
