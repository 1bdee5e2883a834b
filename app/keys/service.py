"""What can be done with keys, apart from HTTP. Raises the errors of `app.exceptions`; the caller commits."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy.orm import Session

from app import audit
from app.auth import Caller, insert_key
from app.exceptions import ConflictError, NotFoundError
from app.keys import repository
from app.keys.schemas import KeyRequest
from app.models import ApiKey
from app.paging import make_cursor, read_cursor


def create(session: Session, caller: Caller, request: KeyRequest) -> tuple[ApiKey, str]:
    """-> the row, and the key, which can't be had again."""
    lifetime = None if request.lifetime is None else timedelta(seconds=request.lifetime)
    row, key = insert_key(session, caller.tenant_id, request.scopes, request.name, lifetime)
    audit.record(session, caller, "key.create", row.id, name=row.name, scopes=row.scopes)
    return row, key


def list_keys(session: Session, tenant_id: str, cursor: str | None, limit: int) -> tuple[list[ApiKey], str | None]:
    """A page of keys, newest first, and the cursor of the next page."""
    keys = list(repository.list_keys(session, tenant_id, None if cursor is None else read_cursor(cursor, "keys"), limit + 1))
    return keys[:limit], make_cursor(keys[limit - 1].id, "keys") if len(keys) > limit else None


def get(session: Session, tenant_id: str, key_id: str) -> ApiKey:
    key = repository.find_key(session, tenant_id, key_id)
    if key is None:
        raise no_key(key_id)
    return key


def no_key(key_id: str) -> NotFoundError:
    return NotFoundError(f"There is no key {key_id[:100]}.", code="key_not_found", hint="List keys with GET /v1/keys; a revoked one is not among them.")


def revoke(session: Session, caller: Caller, key_id: str) -> None:
    """End a key now. Raises ConflictError for the last one by which the tenant can manage its keys."""
    repository.lock_keys(session, caller.tenant_id)
    key = get(session, caller.tenant_id, key_id)
    if "admin" in key.scopes and repository.is_usable(session, caller.tenant_id, key_id) and not repository.has_other_admin(session, key):
        raise ConflictError(
            "No other key with the scope admin is good for as long as this one, so the tenant would lose the control of its keys.",
            code="last_admin_key",
            hint="Make another key with the scope admin first, or rotate this one.",
        )
    repository.revoke(session, caller.tenant_id, key_id)
    audit.record(session, caller, "key.revoke", key_id)


def rotate(session: Session, caller: Caller, key_id: str, overlap: int) -> tuple[ApiKey, str]:
    """Make a key with the name, the scopes and the lifetime of another, which ends after `overlap` seconds. -> the new row, and the new key."""
    repository.lock_keys(session, caller.tenant_id)
    old = get(session, caller.tenant_id, key_id)
    if not repository.is_usable(session, caller.tenant_id, key_id):
        raise ConflictError("The key has expired.", code="key_ended", hint="Make a new one with POST /v1/keys.")
    lifetime = None if old.expires_at is None else old.expires_at - old.created_at
    row, key = insert_key(session, caller.tenant_id, old.scopes, old.name, lifetime)
    if overlap:
        repository.end_within(session, caller.tenant_id, key_id, overlap)
    else:
        repository.revoke(session, caller.tenant_id, key_id)
    audit.record(session, caller, "key.rotate", key_id, replaced_by=row.id, overlap=overlap)
    return row, key
