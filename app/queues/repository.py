"""Every query on workers and on what their classes have to do. Jobs are counted for all tenants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import case, delete, func, insert, select, update
from sqlalchemy.orm import Session

from app.database import db_now
from app.models import Job, Worker


@dataclass(frozen=True)
class Load:
    """The unfinished jobs of a class."""

    queue: str
    queued: int
    running: int
    oldest_queued_at: datetime | None


def announce(session: Session, worker: Worker, *, disk_bytes: int, draining: bool) -> None:
    """Tell of a worker that it lives, now by the database's clock."""
    told = {name: getattr(worker, name) for name in ("queue", "devices", "host_bytes", "device_bytes", "version")}
    told |= {"disk_bytes": disk_bytes, "draining": draining, "seen_at": db_now()}
    known = update(Worker).where(Worker.id == worker.id).values(**told).returning(Worker.id)
    if session.scalar(known, execution_options={"synchronize_session": False}) is None:
        session.execute(insert(Worker).values(id=worker.id, **told))


def withdraw(session: Session, worker_id: str) -> None:
    session.execute(delete(Worker).where(Worker.id == worker_id), execution_options={"synchronize_session": False})


def forget(session: Session, unseen_seconds: float) -> None:
    """Remove the rows of workers that ended without a word."""
    session.execute(delete(Worker).where(Worker.seen_at < db_now(-unseen_seconds)), execution_options={"synchronize_session": False})


def live_workers(session: Session, lease_seconds: float) -> Sequence[Worker]:
    """The workers that were heard of within the length of a lease."""
    return session.scalars(select(Worker).where(Worker.seen_at > db_now(-lease_seconds)).order_by(Worker.queue, Worker.started_at, Worker.id)).all()


def loads(session: Session) -> list[Load]:
    """The classes that have unfinished jobs."""
    queued = Job.state == "queued"
    counts = (func.sum(case((queued, 1), else_=0)), func.sum(case((queued, 0), else_=1)), func.min(case((queued, Job.created_at))))
    query = select(Job.queue, *counts).where(Job.state.in_(("queued", "running", "cancelling"))).group_by(Job.queue)
    return [Load(*row) for row in session.execute(query)]
