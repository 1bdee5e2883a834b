"""Every query on jobs that the API makes. Each one names the tenant; what a worker writes is in `lease.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, TypedDict, Unpack

from sqlalchemy import (
    ColumnElement,
    Insert,
    Integer,
    Select,
    String,
    Text,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    select,
    true,
    tuple_,
    type_coerce,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session, defer, joinedload
from sqlalchemy.sql.dml import ReturningInsert
from uuid_utils import uuid7

from app import telemetry, totals
from app.audit import ENTRIES
from app.database import Base, Json, UtcDateTime, db_now
from app.logging import id_of_request
from app.models import FINISHED, RETRIED, Artifact, Job, JobEvent, OutboxMessage, SinkRun, Tenant, Worker
from app.recipe import LeastSquares, Limits, Recipe
from app.sinks import repository as sinks
from app.webhooks.deliveries import announce

MAX_MESSAGE_LENGTH = 10_000
COUNTED = ("claimed", "requeued", "lease_expired", "succeeded", "failed", "cancelled")  # events of which the metrics tell how many there were

JOBS, EVENTS, OUTBOX, TENANTS, WORKERS = (  # what every request needs goes without an ORM's detours
    Base.metadata.tables[model.__tablename__] for model in (Job, JobEvent, OutboxMessage, Tenant, Worker)
)
TIMES = (JOBS.c.created_at, JOBS.c.updated_at, JOBS.c.start_by)
UNTOLD = (  # what only concerns who does the job; each column takes time to read
    *(Job.report, Job.host_bytes, Job.device_bytes, Job.max_runtime, Job.ran_seconds, Job.claimed_at, Job.start_by, Job.trace_parent),
    *(Job.lease_owner, Job.lease_token, Job.lease_until, Job.published_at, Job.cancel_requested_at, Job.stored_bytes),
)
TOLD_OF_SINK = (SinkRun.name, SinkRun.target, SinkRun.state, SinkRun.tries, SinkRun.result, SinkRun.error, SinkRun.updated_at)
NewRow = dict[str, ColumnElement[Any]]
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


def insert_job(session: Session, tenant_id: str, recipe: Recipe, *, message: str = "Queued.", **more: Unpack[OfSubmission]) -> Job:
    """A queued job, its first event, the message that is to be published and, where a key is named, the audit log's entry. The session does not know the object."""
    row, others = _row(tenant_id, recipe, **more)
    job, *rest = _insertions(recipe.limits.max_pending, others["by_key"] is not None)
    times = session.execute(job, row).one()
    for insertion in rest:
        session.execute(insertion, others | {"of_job": row["id"], "said": message})
    return _job(row, times)


class OfSubmission(TypedDict, total=False):
    """What a submission says of a job, and what is known of it, beside the recipe."""

    queue: str
    priority: int
    labels: dict[str, str]
    webhook_id: str | None
    host_bytes: int | None
    device_bytes: int | None
    key_id: str | None


@dataclass(frozen=True)
class Admission:
    """What a submission meets."""

    waiting: int  # jobs of its tenant
    bound: int  # as many may wait
    served: bool  # a worker of its class lives


def admit_job(
    session: Session, tenant_id: str, recipe: Recipe, lease_seconds: float, most: int, messages: tuple[str, str], **more: Unpack[OfSubmission]
) -> tuple[Admission, Job | None]:
    """`insert_job`, but only if the tenant may have one more waiting: up to `most`, if it has no bound of its own.

    messages: of the first event, where a worker of the job's class lives and where none does. On Postgres all of it is one statement, which saves round trips
    and needs no transaction around it.
    """
    if session.get_bind().dialect.name != "postgresql":
        met = find_admission(session, tenant_id, more.get("queue", "default"), lease_seconds, most)
        admitted = met.waiting < met.bound
        return met, insert_job(session, tenant_id, recipe, message=messages[not met.served], **more) if admitted else None
    row, others = _row(tenant_id, recipe, **more)
    asked = {"tenant": tenant_id, "class": row["queue"], "most": most, "said": messages[0], "said_unserved": messages[1]}
    statement = _admission_and_insertion(tuple(row), lease_seconds, recipe.limits.max_pending, others["by_key"] is not None)
    given = {f"new_{name}": value for name, value in row.items()}
    waiting, bound, served, *times = session.execute(statement, given | others | asked).one()
    return Admission(waiting, bound, served), None if times[0] is None else _job(row, times)


def find_admission(session: Session, tenant_id: str, queue: str, lease_seconds: float, most: int) -> Admission:
    return Admission(*session.execute(_admission(lease_seconds), {"tenant": tenant_id, "class": queue, "most": most}).one())


def _row(
    tenant_id: str,
    recipe: Recipe,
    queue: str = "default",
    priority: int = 0,
    labels: dict[str, str] | None = None,
    webhook_id: str | None = None,
    host_bytes: int | None = None,
    device_bytes: int | None = None,
    key_id: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A job's row but for its times, and what is written with it."""
    row = {
        "id": f"job_{uuid7().hex}",
        "tenant_id": tenant_id,
        "model": recipe.model,
        "method": recipe.method.name,
        "recipe": _stored(recipe),
        "queue": queue,
        "priority": priority,
        "metadata": labels or {},
        "webhook_id": webhook_id,
        "host_bytes": host_bytes,
        "device_bytes": device_bytes,
        "max_attempts": recipe.limits.max_attempts,
        "max_runtime": recipe.limits.max_runtime,
        "trace_parent": telemetry.trace_parent(),
        "last_event": 1,
        **NEW,
    }
    return row, {"of_tenant": tenant_id, "by_key": key_id, "in_request": id_of_request()}


def _job(row: dict[str, Any], times: Iterable[datetime]) -> Job:
    labels = {"labels": row["metadata"]}
    return Job(**{name: value for name, value in row.items() if name != "metadata"}, **labels, **dict(zip((time.name for time in TIMES), times, strict=True)))


# They take longer to build than to execute.


@lru_cache(maxsize=4)
def _admission(lease_seconds: float) -> Select[int, int, bool]:
    waiting = select(func.count()).where(JOBS.c.tenant_id == bindparam("tenant"), JOBS.c.state == "queued").scalar_subquery()
    bound = func.coalesce(TENANTS.c.max_queued, bindparam("most", type_=Integer()))
    served = exists().where(WORKERS.c.queue == bindparam("class"), WORKERS.c.seen_at > db_now(-lease_seconds))
    return select(waiting.label("waiting"), bound.label("bound"), served.label("served")).where(TENANTS.c.id == bindparam("tenant"))


@lru_cache(maxsize=64)
def _insertions(max_pending: float | None, audited: bool) -> Sequence[ReturningInsert[Any] | Insert]:
    """A job, whose times are returned, and what is written with it."""
    job = insert(JOBS).values(start_by=None if max_pending is None else db_now(max_pending)).returning(*TIMES)
    return job, *_beside_job(bindparam("of_job", type_=String()), bindparam("said", type_=Text()), audited)


@lru_cache(maxsize=64)
def _admission_and_insertion(columns: tuple[str, ...], lease_seconds: float, max_pending: float | None, audited: bool) -> Select[Any]:
    """The admission, the times of the job that it lets in, and what is written with that. columns: of the job, given as `new_…`."""
    met = _admission(lease_seconds).cte("met")
    given: dict[str, ColumnElement[Any]] = {name: bindparam(f"new_{name}", type_=JOBS.c[name].type) for name in columns}
    if max_pending is not None:
        given["start_by"] = db_now(max_pending)
    admitted = select(*given.values()).where(met.c.waiting < met.c.bound)
    job = insert(JOBS).from_select([*given], admitted).returning(JOBS.c.id, *TIMES).cte("job")
    said = case((select(met.c.served).scalar_subquery(), bindparam("said", type_=Text())), else_=bindparam("said_unserved", type_=Text()))
    beside = [insertion.cte(insertion.table.name) for insertion in _beside_job(job.c.id, said, audited)]
    return select(met, *(job.c[time.name] for time in TIMES)).select_from(met.outerjoin(job, true())).add_cte(*beside)


def _beside_job(job_id: ColumnElement[str], message: ColumnElement[str], audited: bool) -> Iterator[Insert]:
    """The first event of a job, its message and its entry in the audit log."""
    tenant_id, by, request = (bindparam(name, type_=String()) for name in ("of_tenant", "by_key", "in_request"))
    nothing = literal({}, Json)
    event: NewRow = {"job_id": job_id, "tenant_id": tenant_id, "sequence": literal(1), "kind": literal("queued"), "message": message, "data": nothing}
    entry: NewRow = {"tenant_id": tenant_id, "key_id": by, "action": literal("job.submit"), "target": job_id, "request_id": request, "data": nothing}
    to_publish: NewRow = {"job_id": job_id, "tenant_id": tenant_id}
    rows = [(EVENTS, event), (OUTBOX, to_publish), (ENTRIES, entry)]
    for table, row in rows if audited else rows[:-1]:
        yield insert(table).from_select([*row], select(*row.values()))


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
    return _told().where(Job.id == bindparam("wanted"), Job.tenant_id == bindparam("tenant"))


def _told() -> Select[Job]:
    return select(Job).options(*(defer(column, raiseload=True) for column in UNTOLD), joinedload(Job.sinks).load_only(*TOLD_OF_SINK, raiseload=True))


def find_jobs(session: Session, keys: Sequence[tuple[str, str]]) -> Sequence[Job]:
    """Those that there are of these tenants' jobs, (tenant, job) each, as `find_job` finds one."""
    return session.scalars(_told().where(tuple_(Job.tenant_id, Job.id).in_(keys))).unique().all()


def find_versions(session: Session, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """The versions of those that there are of these tenants' jobs, (tenant, job) each."""
    rows = session.execute(_versions(), {"keys": keys})
    return {(tenant_id, job_id): version for tenant_id, job_id, version in rows}


@lru_cache
def _versions() -> Select[str, str, int]:
    found = select(JOBS.c.tenant_id, JOBS.c.id, JOBS.c.version)
    return found.where(tuple_(JOBS.c.tenant_id, JOBS.c.id).in_(bindparam("keys", expanding=True)))


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
    """The recipe as workers of this release and of the one before read it: that one knows only two limits, a ridge that is a number, and no `reselect`; what isn't used is left out."""
    limits = {name for name, field in Limits.model_fields.items() if getattr(recipe.limits, name) == field.default} - {"max_attempts", "max_runtime"}
    unused = {"limits": limits}
    if isinstance(recipe.restoration, LeastSquares):
        unused["restoration"] = {name for name in ("ridge", "reselect") if getattr(recipe.restoration, name) == LeastSquares.model_fields[name].default}
    return recipe.model_dump(mode="json", include=set(Recipe.model_fields), exclude=unused)
