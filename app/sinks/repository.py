"""Every query on sinks that the API makes, and what a job's end does to them; what the exporter writes is in `lease.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import func, insert, select, update
from sqlalchemy.orm import Session

from app.database import db_now
from app.models import SinkRun
from app.sinks.schemas import S3, Hub, Mlflow, secrets_of, target_of
from app.vault import Vault


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
    values = {"state": "waiting", "next_at": db_now()} if state == "succeeded" else {"state": "skipped"}
    pending = update(SinkRun).where(SinkRun.job_id == job_id, SinkRun.state == "pending")
    session.execute(pending.values(**values, updated_at=db_now()))


def job_begins_anew(session: Session, job_id: str) -> None:
    """A job that had not succeeded is tried again: so are its sinks, then."""
    skipped = update(SinkRun).where(SinkRun.job_id == job_id, SinkRun.state == "skipped")
    session.execute(skipped.values(state="pending", updated_at=db_now()))
