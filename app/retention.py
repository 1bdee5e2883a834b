"""What is deleted as time goes by, above all of the object store: results that are too old, or more than their tenant may keep, and files that no job has
use for.

A result is given up in one transaction, which takes the pointer to its files off the job's row; row, report and manifest stay. The files go after that, and where
that fails, or whoever does it dies, the sweep finds files that no row points to. It also finds what lost workers left. It looks only at tenants of this database.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import TypeVar

import structlog
from sqlalchemy import Row, Select, and_, func, literal, or_, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from app import idempotency
from app.audit import repository as audit
from app.checkpoints import repository as checkpoints
from app.database import Database, db_now
from app.jobs.repository import add_event
from app.models import FINISHED, RETRIED, Artifact, Job, Tenant
from app.settings import Settings
from app.storage import Store, open_store

BATCH = 100  # rows of one transaction
DAY = 24 * 3600
LEADER_LOCK = 4_771_020_602  # any number that nothing else locks
KEY = re.compile(r"[^/]+/jobs/(?P<job>[^/]+)/(a(?P<token>\d+)/)?.+")

T = TypeVar("T")
log = structlog.get_logger(__name__)


def keep_tidy(database: Database, settings: Settings, stopping: threading.Event) -> None:
    """Tidy up now and every `retention_seconds` until `stopping` is set. Of all processes on a Postgres database one does it; when it ends, another does."""
    store = open_store(settings)
    while not stopping.is_set():
        try:
            with database.engine.connect() as connection:
                connection.detach()  # so that closing it gives the lock back, whatever the pool would do
                while not stopping.is_set():
                    if leads(connection):
                        tidy(database, store, settings, stopping)
                    stopping.wait(settings.retention_seconds)
        except Exception:  # whatever a driver or the store raises, the next round tries again
            log.exception("tidying up failed")
            stopping.wait(settings.retention_seconds)


def leads(connection: Connection) -> bool:
    """Whether this connection is, from now on or still, the one that may tidy up. SQLite has one service, where no lock is needed."""
    if connection.dialect.name != "postgresql":
        return True
    leading = connection.scalar(select(func.pg_try_advisory_lock(LEADER_LOCK)))
    connection.commit()
    return bool(leading)


def tidy(database: Database, store: Store, settings: Settings, stopping: threading.Event) -> None:
    """Forget old entries, give up results past their bounds, then delete what no job has use for; ends early once `stopping` is set."""
    with database.writing() as session:
        idempotency.forget(session)
    if settings.audit_days:
        _in_batches(database, stopping, lambda session: audit.forget(session, settings.audit_days, BATCH))
    _in_batches(database, stopping, lambda session: count_bytes(session, BATCH))
    _in_batches(database, stopping, lambda session: give_up_results(session, settings, BATCH), store.delete_prefix)
    _in_batches(database, stopping, lambda session: checkpoints.give_up(session, settings.upload_days, BATCH), store.delete_prefix)
    delete_orphans(database, store, settings, stopping)


def _in_batches(
    database: Database, stopping: threading.Event, step: Callable[[Session], Sequence[T]], follow: Callable[[T], object] = lambda done: None
) -> None:
    """Take a step, each time in a transaction of its own, until it finds less than a batch; what follows is done once the transaction is committed."""
    while not stopping.is_set():
        with database.writing() as session:
            done = step(session)
        for each in done:
            follow(each)
        if len(done) < BATCH:
            return


# ------------------------------------------------------------------- results


def count_bytes(session: Session, limit: int) -> Sequence[str]:
    """Fill in the bytes of up to `limit` results that a worker of an earlier release stored; returns the jobs' ids."""
    taken = select(func.sum(Artifact.bytes)).where(Artifact.job_id == Job.id).scalar_subquery()
    uncounted = select(Job.id).where(Job.artifact_prefix.is_not(None), Job.stored_bytes == 0, taken > 0).limit(limit)
    counted = update(Job).where(Job.id.in_(uncounted)).values(stored_bytes=taken).returning(Job.id)
    return session.scalars(counted, execution_options={"synchronize_session": False}).all()


def give_up_results(session: Session, settings: Settings, limit: int) -> list[str]:
    """Take the files from up to `limit` results past their bounds, the oldest first; the prefixes under which they lie."""
    prefixes = []
    for row in session.execute(_past_bounds(settings, limit)).all():
        given_up = update(Job).where(Job.id == row.id, Job.artifact_prefix == row.artifact_prefix).values(artifact_prefix=None, stored_bytes=0)
        if session.scalar(given_up.returning(Job.id), execution_options={"synchronize_session": False}) is None:
            continue  # another process was faster
        why = f"it is older than {settings.retention_days} days" if row.old else f"newer ones take the {row.most} bytes that the tenant may keep"
        data = {"reason": "age" if row.old else "stored_bytes", "bytes": row.stored_bytes}
        add_event(session, row.id, row.tenant_id, "artifacts_deleted", f"The files of the result were deleted: {why}.", data)
        log.info("result given up", job_id=row.id, tenant_id=row.tenant_id, **data)
        prefixes.append(row.artifact_prefix)
    return prefixes


def _past_bounds(settings: Settings, limit: int) -> Select[tuple[str, str, str, int, bool, int | None]]:
    """Results that are too old, or that with their tenant's newer ones are more than it may keep; a tenant's newest one never is."""
    newest_first = (Job.finished_at.desc(), Job.id.desc())
    old = Job.finished_at < db_now(-settings.retention_days * DAY) if settings.retention_days else literal(False)
    kept = (
        select(
            *(Job.id, Job.tenant_id, Job.artifact_prefix, Job.stored_bytes, Job.finished_at),
            old.label("old"),
            func.coalesce(Tenant.max_stored_bytes, settings.max_stored_bytes or None).label("most"),
            func.sum(Job.stored_bytes).over(partition_by=Job.tenant_id, order_by=newest_first).label("with_newer"),
            func.row_number().over(partition_by=Job.tenant_id, order_by=newest_first).label("rank"),
        )
        .join(Tenant, Tenant.id == Job.tenant_id)
        .where(Job.artifact_prefix.is_not(None))
        .subquery()
    )
    too_many = and_(kept.c.with_newer > kept.c.most, kept.c.rank > 1)
    columns = (kept.c.id, kept.c.tenant_id, kept.c.artifact_prefix, kept.c.stored_bytes, kept.c.old, kept.c.most)
    return select(*columns).where(or_(kept.c.old, too_many)).order_by(kept.c.finished_at).limit(limit)


# ------------------------------------------------------------------- orphans


def delete_orphans(database: Database, store: Store, settings: Settings, stopping: threading.Event) -> None:
    """Delete the files below `tenant/jobs/` and `tenant/checkpoints/` that no job and no checkpoint has use for, page by page; those that changed within
    `orphan_seconds` are left alone."""
    with database.reading() as session:
        tenants = session.scalars(select(Tenant.id)).all()
    before = datetime.now(UTC) - timedelta(seconds=settings.orphan_seconds)
    for tenant_id in tenants:
        for page in chain(store.pages(f"{tenant_id}/jobs"), store.pages(f"{tenant_id}/checkpoints")):
            if stopping.is_set():
                return
            keys = [entry.key for entry in page if entry.modified <= before]
            with database.reading() as session:  # after the listing, so that what is found was stored by an attempt that the row tells of
                orphans = find_orphans(session, keys, settings.keep_work_seconds)
                orphans += checkpoints.find_orphans(session, [key for key in keys if not KEY.fullmatch(key)])
            if orphans:
                store.delete(orphans)
                log.info("orphans deleted", tenant_id=tenant_id, files=len(orphans), first=orphans[0])


def find_orphans(session: Session, keys: Sequence[str], keep_work_seconds: float) -> list[str]:
    """Those of some stored files that no job has use for, even if one that ended within so many seconds is retried."""
    matches = [match for key in keys if (match := KEY.fullmatch(key))]
    retried = and_(Job.state.in_(RETRIED), Job.finished_at > db_now(-keep_work_seconds))
    columns = (Job.id, Job.state, Job.lease_token, Job.artifact_prefix, retried.label("retried"))
    jobs = {row.id: row for row in session.execute(select(*columns).where(Job.id.in_({match["job"] for match in matches})))}
    return [match[0] for match in matches if not _has_use(jobs.get(match["job"]), match)]


def _has_use(job: Row[str, str, int, str | None, bool] | None, key: re.Match[str]) -> bool:
    """Whether a file is of the job's result or of the attempt that goes on, or is what a job that goes on, or may do so, keeps for its next attempt."""
    if job is None:
        return False
    if job.retried and key["token"] is None:
        return True
    if job.state in FINISHED:
        return job.artifact_prefix is not None and key[0].startswith(job.artifact_prefix)
    return key["token"] is None or (job.state != "queued" and int(key["token"]) == job.lease_token)
