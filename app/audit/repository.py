"""Queries on the audit log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from app.database import db_now
from app.models import AuditEntry

DAY = 24 * 3600


@dataclass(frozen=True)
class AuditFilter:
    """Which entries a list shows; an empty field shows all."""

    action: str | None = None
    target: str | None = None
    key_id: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None


def list_entries(session: Session, tenant_id: str, wanted: AuditFilter, before: int | None, limit: int) -> Sequence[AuditEntry]:
    """Newest first, from the one before the number `before` on."""
    query = select(AuditEntry).where(AuditEntry.tenant_id == tenant_id)
    if wanted.action is not None:
        query = query.where(AuditEntry.action == wanted.action)
    if wanted.target is not None:
        query = query.where(AuditEntry.target == wanted.target)
    if wanted.key_id is not None:
        query = query.where(AuditEntry.key_id == wanted.key_id)
    if wanted.created_after is not None:
        query = query.where(AuditEntry.created_at >= wanted.created_after)
    if wanted.created_before is not None:
        query = query.where(AuditEntry.created_at < wanted.created_before)
    if before is not None:
        query = query.where(AuditEntry.id < before)
    return session.scalars(query.order_by(AuditEntry.id.desc()).limit(limit)).all()


def forget(session: Session, days: int, limit: int) -> Sequence[int]:
    """Delete entries of any tenant that are older than so many days, up to `limit` of them; returns their numbers."""
    first = select(AuditEntry.id, AuditEntry.created_at).order_by(AuditEntry.id).limit(limit).subquery()  # which grow with time, and have an index
    last = session.scalar(select(func.max(first.c.id)).where(first.c.created_at < db_now(-days * DAY)))
    if last is None:
        return []
    old = delete(AuditEntry).where(AuditEntry.id <= last).returning(AuditEntry.id)
    return session.scalars(old, execution_options={"synchronize_session": False}).all()
