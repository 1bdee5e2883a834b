"""API keys. `esp_<id>_<secret>` names a tenant and scopes; only the secret's sha256 is stored, which suffices for 256 random bits.

`python -m app.auth create-key --tenant NAME` makes a key and prints it, this once; `revoke-key ID` ends one.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal, get_args

from fastapi import Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session
from uuid_utils import uuid7

from app.database import Database, db_now
from app.dependencies import OpenDatabase
from app.exceptions import AuthenticationError, EspalierError, NotFoundError, ScopeError
from app.logging import bind_request
from app.models import ApiKey, Tenant
from app.settings import get_settings

Scope = Literal["jobs:read", "jobs:write", "artifacts:read", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
KEY = re.compile(r"esp_([0-9a-f]{32})_([A-Za-z0-9_-]{43})")
NO_SECRET = "0" * 64  # compared with when there is no such key, so that both cases take the same time


@dataclass(frozen=True)
class Caller:
    """Who sent the request."""

    tenant_id: str
    key_id: str
    scopes: frozenset[str]


def create_key(session: Session, tenant_name: str, scopes: Sequence[str] = SCOPES, *, name: str = "", lifetime: timedelta | None = None) -> str:
    """Make a key, and the tenant if it is new. Returns the key, which can't be had again; raises ValueError for an unknown scope."""
    unknown = set(scopes) - set(SCOPES)
    if unknown or not scopes:
        raise ValueError(f"unknown scopes {sorted(unknown)}: choose from {', '.join(SCOPES)}")
    tenant_id = session.scalar(select(Tenant.id).where(Tenant.name == tenant_name))
    if tenant_id is None:
        tenant_id = f"tenant_{uuid7().hex}"
        session.add(Tenant(id=tenant_id, name=tenant_name))
        session.flush()  # the key refers to it
    key_id, secret = uuid7().hex, secrets.token_urlsafe(32)
    expires_at = None if lifetime is None else db_now(lifetime.total_seconds())
    session.add(ApiKey(id=f"key_{key_id}", tenant_id=tenant_id, name=name, secret_sha256=_sha256(secret), scopes=list(scopes), expires_at=expires_at))
    session.flush()
    return f"esp_{key_id}_{secret}"


def revoke_key(session: Session, key_id: str) -> None:
    """End a key at once. Raises NotFoundError."""
    if session.scalar(update(ApiKey).where(ApiKey.id == key_id).values(revoked_at=db_now()).returning(ApiKey.id)) is None:
        raise NotFoundError(f"There is no key {key_id}.", code="key_not_found", hint="Its id is 'key_' and the part of the key between the underscores.")


def has_keys(session: Session) -> bool:
    return session.scalar(select(ApiKey.id).limit(1)) is not None


def verify_key(session: Session, key: str) -> Caller:
    """The caller that a key stands for. Raises AuthenticationError."""
    parts = KEY.fullmatch(key)
    if parts is None:
        raise _unauthenticated("key_malformed", "The API key is not of the form esp_<id>_<secret>.")
    usable: ColumnElement[bool] = and_(ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > db_now()))
    row = session.execute(select(ApiKey.tenant_id, ApiKey.secret_sha256, ApiKey.scopes, usable).where(ApiKey.id == f"key_{parts[1]}")).one_or_none()
    right = secrets.compare_digest(_sha256(parts[2]), NO_SECRET if row is None else row[1])
    if row is None or not right:
        raise _unauthenticated("key_unknown", "There is no such API key.")
    if not row[3]:
        raise _unauthenticated("key_ended", "The API key was revoked or has expired.")
    return Caller(row[0], f"key_{parts[1]}", frozenset(row[2]))


bearer = HTTPBearer(auto_error=False, scheme_name="API key", bearerFormat="esp_<id>_<secret>", description="`Authorization: Bearer esp_<id>_<secret>`")


def authenticate(needed: SecurityScopes, database: OpenDatabase, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]) -> Caller:
    """The caller, if its key has every scope that the endpoint needs; `admin` has them all."""
    if credentials is None:
        raise _unauthenticated("key_missing", "The request carries no API key.")
    with database.reading() as session:
        caller = verify_key(session, credentials.credentials)
    bind_request(tenant_id=caller.tenant_id)
    missing = [scope for scope in needed.scopes if scope not in caller.scopes and "admin" not in caller.scopes]
    if missing:
        raise ScopeError(f"This needs the scope {missing[0]}.", code="scope_missing", hint=f"Use a key with the scope {missing[0]}.")
    return caller


JobReader = Annotated[Caller, Security(authenticate, scopes=["jobs:read"])]
JobWriter = Annotated[Caller, Security(authenticate, scopes=["jobs:write"])]
ArtifactReader = Annotated[Caller, Security(authenticate, scopes=["artifacts:read"])]


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _unauthenticated(code: str, message: str) -> AuthenticationError:
    return AuthenticationError(message, code=code, hint="Send the header 'Authorization: Bearer esp_<id>_<secret>'; an operator makes keys.")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m app.auth", description="API keys of this service.")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create-key", help="make a key and print it")
    create.add_argument("--tenant", required=True, help="name of the tenant, made if it is new")
    create.add_argument("--name", default="", help="what the key is for")
    create.add_argument("--scope", action="append", choices=SCOPES, help="may be given again; default: all but admin")
    create.add_argument("--days", type=float, help="lifetime; default: no end")
    revoke = commands.add_parser("revoke-key", help="end a key at once")
    revoke.add_argument("key_id", help="key_…, or the part of the key between the underscores")
    given = parser.parse_args(arguments)

    database = Database(get_settings().database_url.get_secret_value())
    try:
        with database.writing() as session:
            if given.command == "create-key":
                scopes = given.scope or [scope for scope in SCOPES if scope != "admin"]
                lifetime = None if given.days is None else timedelta(days=given.days)
                key = create_key(session, given.tenant, scopes, name=given.name, lifetime=lifetime)
            else:
                revoke_key(session, "key_" + given.key_id.removeprefix("key_"))
                key = ""
    except EspalierError as error:
        sys.stderr.write(f"{error.message} {error.hint}\n")
        return 1
    finally:
        database.dispose()
    if key:
        sys.stdout.write(f"{key}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
