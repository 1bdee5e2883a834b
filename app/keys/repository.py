"""Every query on keys that the API makes. Each one names the tenant."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from app.auth import usable
from app.database import db_now
from app.models import ApiKey, Tenant


def list_keys(session: Session, tenant_id: str, before: str | None, limit: int) -> Sequence[ApiKey]:
    """Keys that were not revoked, newest first, from the one before the id `before` on."""
    query = select(ApiKey).where(ApiKey.tenant_id == tenant_id, ApiKey.revoked_at.is_(None))
    if before is not None:
        query = query.where(ApiKey.id < before)
    return session.scalars(query.order_by(ApiKey.id.desc()).limit(limit)).all()


def find_key(session: Session, tenant_id: str, key_id: str) -> ApiKey | None:
    return session.scalar(select(ApiKey).where(ApiKey.id == key_id, ApiKey.tenant_id == tenant_id, ApiKey.revoked_at.is_(None)))


def is_usable(session: Session, tenant_id: str, key_id: str) -> bool:
    return session.scalar(select(usable()).where(ApiKey.id == key_id, ApiKey.tenant_id == tenant_id)) is True


def lock_keys(session: Session, tenant_id: str) -> None:
    """Have other changes of the tenant's keys wait until this transaction ends."""
    session.execute(select(Tenant.id).where(Tenant.id == tenant_id).with_for_update(key_share=True))


def has_other_admin(session: Session, key: ApiKey) -> bool:
    """Whether the tenant has another usable key with the scope `admin` that ends no sooner than this one."""
    others = select(ApiKey.scopes).where(ApiKey.tenant_id == key.tenant_id, ApiKey.id != key.id, usable())
    others = others.where(ApiKey.expires_at.is_(None) if key.expires_at is None else or_(ApiKey.expires_at.is_(None), ApiKey.expires_at >= key.expires_at))
    return any("admin" in scopes for scopes in session.scalars(others))


def revoke(session: Session, tenant_id: str, key_id: str) -> None:
    revoked = update(ApiKey).where(ApiKey.id == key_id, ApiKey.tenant_id == tenant_id).values(revoked_at=db_now())
    session.execute(revoked, execution_options={"synchronize_session": False})


def end_within(session: Session, tenant_id: str, key_id: str, seconds: int) -> None:
    """Have a key expire in as many seconds, unless it does so before."""
    later = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > db_now(seconds))
    ended = update(ApiKey).where(ApiKey.id == key_id, ApiKey.tenant_id == tenant_id, later).values(expires_at=db_now(seconds))
    session.execute(ended, execution_options={"synchronize_session": False})
