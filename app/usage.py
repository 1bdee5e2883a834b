"""`/v1/usage`: what a tenant has, and how much of it it may have."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import Field
from sqlalchemy import and_, func, select
from sqlalchemy.orm import Session

from app.auth import JobReader
from app.dependencies import Configuration, OpenDatabase
from app.models import Checkpoint, Job, Tenant
from app.problems import declared
from app.queues.schemas import Out
from app.settings import Settings

router = APIRouter(prefix="/v1/usage", tags=["usage"], responses=declared(401, 403, 422))


class Share(Out):
    """What there is of something."""

    used: int = Field(description="What the tenant has now.", examples=[3])
    cap: int | None = Field(description="What it may have at once; null: there is no cap.", examples=[10_000])


class Usage(Out):
    """What a tenant has."""

    queued: Share = Field(description="Jobs that wait. A submission past the cap is refused.")
    running: Share = Field(description="Jobs that run. More of them wait until one has ended.")
    stored_bytes: Share = Field(description="Bytes of results. Past the cap the files of the oldest are deleted.")
    checkpoint_bytes: Share = Field(description="Bytes of uploaded checkpoints, and of those that are being uploaded. An upload past the cap is refused.")


@router.get("")
def get_usage(caller: JobReader, database: OpenDatabase, settings: Configuration) -> Usage:
    """What the tenant has, and what it may have."""
    with database.reading() as session:
        return find_usage(session, caller.tenant_id, settings)


def find_usage(session: Session, tenant_id: str, settings: Settings) -> Usage:
    of_jobs, of_checkpoints = Job.tenant_id == tenant_id, and_(Checkpoint.tenant_id == tenant_id, Checkpoint.state != "failed")
    counted = select(
        Tenant,
        select(func.count()).where(of_jobs, Job.state == "queued").scalar_subquery(),
        select(func.count()).where(of_jobs, Job.state.in_(("running", "cancelling"))).scalar_subquery(),
        select(func.coalesce(func.sum(Job.stored_bytes), 0)).where(of_jobs).scalar_subquery(),
        select(func.coalesce(func.sum(Checkpoint.bytes), 0)).where(of_checkpoints).scalar_subquery(),
    )
    tenant, queued, running, stored, uploaded = session.execute(counted.where(Tenant.id == tenant_id)).one()
    max_stored = settings.max_stored_bytes or None if tenant.max_stored_bytes is None else tenant.max_stored_bytes
    return Usage(
        queued=Share(used=queued, cap=settings.max_queued if tenant.max_queued is None else tenant.max_queued),
        running=Share(used=running, cap=tenant.max_running),
        stored_bytes=Share(used=stored, cap=max_stored),
        checkpoint_bytes=Share(used=uploaded, cap=max_stored),
    )
