"""Every query on sinks that the API makes, and what a job's end does to them; what the exporter writes is in `lease.py`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import Update, bindparam, func, insert, select, update
from sqlalchemy.orm import Session

from app.database import Base, db_now
from app.models import SinkRun
from app.sinks.schemas import S3, Hub, Mlflow, secrets_of, target_of
from app.vault import Vault

RUNS = Base.metadata.tables[SinkRun.__tablename__]  # written by without an ORM's detours


def insert_runs(session: Session, tenant_id: str, job_id: str, sinks: Sequence[Hub | Mlflow | S3], vault: Vault, state: Literal["pending", "waiting"]) -> None:
    """Add sinks to a job, in their order, after those that it has."""
    first = session.scalar(select(func.count()).where(SinkRun.job_id == job_id, SinkRun.tenant_id == tenant_id)) or 0
    for number, sink in enumerate(sinks, first):
        row: dict[str, Any] = {"job_id": job_id, "number": number, "tenant_id": tenant_id, "name": sink.name, "target": target_of(sink), "state": state}
        row |= {"secrets": vault.seal(secrets_of(sink)), "next_at": db_now() if state == "waiting" else None}
        session.execute(insert(SinkRun).values(row))


def find_run(session: Session, tenant_id: str, job_id: str, number: int) -> SinkRun | None:
    return session.scalar(select(SinkRun).where(SinkRun.job_id == job_id, SinkRun.tenant_id == tenant_id, SinkRun.number == number))


def count_runs(session: Session, tenant_id: str, job_id: str) -> int:
    return session.scalar(select(func.count()).where(SinkRun.job_id == job_id, SinkRun.tenant_id == tenant_id)) or 0


def begin_anew(session: Session, tenant_id: str, job_id: str, number: int, secrets: str) -> bool:
    """Have a failed sink tried again, with these sealed secrets; whether it had failed."""
    failed = update(SinkRun).where(SinkRun.job_id == job_id, SinkRun.tenant_id == tenant_id, SinkRun.number == number, SinkRun.state == "failed")
    anew = failed.values(state="waiting", tries=0, next_at=db_now(), secrets=secrets, error=None, updated_at=db_now())
    return session.scalar(anew.returning(SinkRun.number)) is not None


def job_ended(session: Session, job_id: str, state: str) -> None:
    """What was to be done after the job is due now, or skipped where it has not succeeded."""
    session.execute(_ending(state == "succeeded"), {"ended": job_id})


@lru_cache  # every end of a job needs it, and it takes longer to build than to execute
def _ending(succeeded: bool) -> Update:
    values = {"state": "waiting", "next_at": db_now()} if succeeded else {"state": "skipped"}
    return update(RUNS).where(RUNS.c.job_id == bindparam("ended"), RUNS.c.state == "pending").values(**values, updated_at=db_now())


def job_begins_anew(session: Session, job_id: str) -> None:
    """A job that had not succeeded is tried again: so are its sinks, then."""
    skipped = update(SinkRun).where(SinkRun.job_id == job_id, SinkRun.state == "skipped")
    session.execute(skipped.values(state="pending", updated_at=db_now()))
