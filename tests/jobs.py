"""Jobs in a database, for tests of what happens to them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import func, select

import migrations
from app.database import Database
from app.jobs.repository import insert_job, request_cancel
from app.models import FINISHED, Job, JobEvent, OutboxMessage, Tenant
from app.recipe import Recipe

TENANT = "tenant_1"


def open_database(url: str) -> Database:
    """A migrated database with one tenant."""
    migrations.migrate(url)
    database = Database(url)
    with database.writing() as session:
        session.add(Tenant(id=TENANT, name="one"))
    return database


def add_tenant(database: Database, name: str, max_running: int | None = None) -> str:
    with database.writing() as session:
        session.add(Tenant(id=f"tenant_{name}", name=name, max_running=max_running))
    return f"tenant_{name}"


def submit(
    database: Database,
    *,
    model: str = "tiny",
    tenant: str = TENANT,
    queue: str = "default",
    priority: int = 0,
    host_bytes: int | None = None,
    device_bytes: int | None = None,
    **recipe: Any,
) -> str:
    body = {"model": model, "method": "magnitude", "sparsity": 0.5, "evaluation": None} | recipe
    with database.writing() as session:
        checked = Recipe.model_validate(body)
        return insert_job(session, tenant, checked, queue=queue, priority=priority, host_bytes=host_bytes, device_bytes=device_bytes).id


def cancel(database: Database, job_id: str) -> str | None:
    with database.writing() as session:
        return request_cancel(session, TENANT, job_id)


def get(database: Database, job_id: str) -> Job:
    with database.reading() as session:
        return session.get_one(Job, job_id)


def events(database: Database, job_id: str) -> list[str]:
    """The kinds of a job's events, in their order; fails if a number is missing."""
    with database.reading() as session:
        rows = session.execute(select(JobEvent.sequence, JobEvent.kind).where(JobEvent.job_id == job_id).order_by(JobEvent.sequence)).all()
    assert [row.sequence for row in rows] == list(range(1, len(rows) + 1))
    return [row.kind for row in rows]


def messages(database: Database, job_id: str) -> list[str]:
    """What the log events of a job say."""
    with database.reading() as session:
        return list(session.scalars(select(JobEvent.message).where(JobEvent.job_id == job_id).order_by(JobEvent.sequence)))


def outbox(database: Database) -> int:
    with database.reading() as session:
        return session.execute(select(func.count()).select_from(OutboxMessage)).scalar_one()


def wait_until(condition: Callable[[], Any], seconds: float = 60, what: str = "the condition", pause: float = 0.05) -> float:
    """Seconds until it held."""
    start = time.monotonic()
    while not condition():
        waited = time.monotonic() - start
        assert waited < seconds, f"{what} did not come within {seconds} s"
        time.sleep(pause)
    return time.monotonic() - start


def wait_for_state(database: Database, job_id: str, *states: str, seconds: float = 120) -> Job:
    """The job, once it is in one of the states; fails as soon as it has ended in another."""

    def there() -> bool:
        job = get(database, job_id)
        assert job.state in states or job.state not in FINISHED, f"{job.state}: {job.error}"
        return job.state in states

    wait_until(there, seconds, " or ".join(states))
    return get(database, job_id)
