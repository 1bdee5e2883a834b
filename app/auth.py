"""API keys. `esp_<id>_<secret>` names a tenant and scopes; only the secret's sha256 is stored, which suffices for 256 random bits.

`python -m app.auth create-key --tenant NAME` makes a key and prints it, this once; `revoke-key ID` ends one; `set-caps --tenant NAME` bounds what a tenant may have.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import ipaddress
import re
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal, get_args

import structlog
from anyio.to_thread import run_sync
from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer, SecurityScopes
from sqlalchemy import ColumnElement, and_, insert, or_, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from uuid_utils import uuid7

from app import audit
from app.database import Database, db_now, seconds_between
from app.exceptions import AuthenticationError, EspalierError, NotFoundError, ScopeError
from app.logging import bind_request
from app.models import ApiKey, Tenant
from app.rates import Rates
from app.settings import get_settings

Scope = Literal["jobs:read", "jobs:write", "artifacts:read", "checkpoints:write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
KEY = re.compile(r"esp_([0-9a-f]{32})_([A-Za-z0-9_-]{43})")
NO_SECRET = "0" * 64  # compared with when there is no such key, so that both cases take the same time
OPERATOR = "operator"  # who makes keys by hand, in place of a key's id
CAPS = {
    "max_queued": "jobs that may wait",
    "max_running": "jobs that may run at once",
    "max_stored_bytes": "bytes of results that are kept, and of checkpoints",
}
MAX_KNOWN_KEYS = 10_000
USE_SECONDS = 60.0  # between two times that the use of keys is written

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Caller:
    """Who sent the request."""

    tenant_id: str
    key_id: str
    scopes: frozenset[str]


def usable() -> ColumnElement[bool]:
    """Whether a key is neither revoked nor expired."""
    return and_(ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > db_now()))


def insert_key(session: Session, tenant_id: str, scopes: Sequence[str], name: str, lifetime: timedelta | None) -> tuple[ApiKey, str]:
    """-> the row, and the key, which can't be had again."""
    key_id, secret = uuid7().hex, secrets.token_urlsafe(32)
    row = {"id": f"key_{key_id}", "tenant_id": tenant_id, "name": name, "secret_sha256": _sha256(secret), "scopes": list(scopes)}
    expires_at = None if lifetime is None else db_now(lifetime.total_seconds())
    return session.scalars(insert(ApiKey).values(row | {"expires_at": expires_at}).returning(ApiKey)).one(), f"esp_{key_id}_{secret}"


def create_key(session: Session, tenant_name: str, scopes: Sequence[str] = SCOPES, *, name: str = "", lifetime: timedelta | None = None) -> str:
    """Make a key as the operator, and the tenant if it is new. Returns the key, which can't be had again; raises ValueError for an unknown scope."""
    unknown = set(scopes) - set(SCOPES)
    if unknown or not scopes:
        raise ValueError(f"unknown scopes {sorted(unknown)}: choose from {', '.join(SCOPES)}")
    tenant_id = session.scalar(select(Tenant.id).where(Tenant.name == tenant_name))
    if tenant_id is None:
        tenant_id = f"tenant_{uuid7().hex}"
        session.add(Tenant(id=tenant_id, name=tenant_name))
        session.flush()  # the key refers to it
    row, key = insert_key(session, tenant_id, scopes, name, lifetime)
    audit.record(session, _operator_of(tenant_id), "key.create", row.id, name=name, scopes=list(scopes))
    return key


def revoke_key(session: Session, key_id: str) -> None:
    """End a key at once, as the operator. Raises NotFoundError."""
    tenant_id = session.scalar(update(ApiKey).where(ApiKey.id == key_id).values(revoked_at=db_now()).returning(ApiKey.tenant_id))
    if tenant_id is None:
        raise NotFoundError(f"There is no key {key_id}.", code="key_not_found", hint="Its id is 'key_' and the part of the key between the underscores.")
    audit.record(session, _operator_of(tenant_id), "key.revoke", key_id)


def set_caps(session: Session, tenant_name: str, caps: dict[str, int | None]) -> None:
    """Bound what a tenant may have, as the operator; None takes a bound off. Raises NotFoundError."""
    tenant_id = session.scalar(update(Tenant).where(Tenant.name == tenant_name).values(caps).returning(Tenant.id))
    if tenant_id is None:
        raise NotFoundError(f"There is no tenant '{tenant_name}'.", code="tenant_not_found", hint="Its first key makes it.")
    audit.record(session, _operator_of(tenant_id), "tenant.set_caps", tenant_id, **caps)


def has_keys(session: Session) -> bool:
    return session.scalar(select(ApiKey.id).limit(1)) is not None


@dataclass(frozen=True)
class VerifiedKey:
    """A key that was valid when the database was asked."""

    caller: Caller
    secret_sha256: str
    seconds_left: float | None  # until it expires


def split_key(key: str) -> tuple[str, str]:
    """-> its id and the sha256 of its secret. Raises AuthenticationError."""
    parts = KEY.fullmatch(key)
    if parts is None:
        raise _unauthenticated("key_malformed", "The API key is not of the form esp_<id>_<secret>.")
    return f"key_{parts[1]}", _sha256(parts[2])


def verify_key(session: Session, key: str) -> VerifiedKey:
    """What a key stands for. Raises AuthenticationError."""
    key_id, secret_sha256 = split_key(key)
    seconds_left = seconds_between(db_now(), ApiKey.expires_at)
    found = select(ApiKey.tenant_id, ApiKey.secret_sha256, ApiKey.scopes, usable(), seconds_left).where(ApiKey.id == key_id)
    row = session.execute(found).one_or_none()
    right = secrets.compare_digest(secret_sha256, NO_SECRET if row is None else row[1])
    if row is None or not right:
        raise _unauthenticated("key_unknown", "There is no such API key.")
    if not row[3]:
        raise _unauthenticated("key_ended", "The API key was revoked or has expired.")
    return VerifiedKey(Caller(row[0], key_id, frozenset(row[2])), secret_sha256, row[4])


class KnownKeys:
    """Keys that were valid a moment ago, so that a request costs no query for its key; and when keys were last used.

    A key that is revoked in another process is accepted here for up to `seconds`; one that expires ends at its own time. Of secrets it holds the sha256 only.
    """

    def __init__(self, database: Database, seconds: float) -> None:
        self._database = database
        self._seconds = seconds
        self._known: dict[str, tuple[VerifiedKey | None, float]] = {}  # by id, with the moment until which it needs no query, or at which it was forgotten
        self._used: set[str] = set()

    def recall(self, key: str) -> tuple[Caller, bool] | None:
        """The caller of a key that was valid when it was last looked up, and whether that was lately. Raises AuthenticationError."""
        key_id, secret_sha256 = split_key(key)
        verified, fresh_until = self._known.get(key_id, (None, 0.0))
        if verified is None or not secrets.compare_digest(secret_sha256, verified.secret_sha256):
            return None
        self._used.add(key_id)
        return verified.caller, time.monotonic() < fresh_until

    def verify(self, key: str) -> Caller:
        """The caller of a key, as the database knows it now. Raises AuthenticationError."""
        asked_at = time.monotonic()
        with self._database.reading() as session:
            verified = verify_key(session, key)
        key_id = verified.caller.key_id
        seconds = self._seconds if verified.seconds_left is None else min(self._seconds, verified.seconds_left)
        known, moment = self._known.get(key_id, (None, 0.0))
        if known is not None or moment < asked_at:  # else it was revoked while the database was asked
            self._remember(key_id, verified, asked_at + seconds)
        self._used.add(key_id)
        return verified.caller

    def forget(self, key_id: str) -> None:
        """Have the next call with a key ask the database, also one that is asking it now."""
        self._remember(key_id, None, time.monotonic())

    def _remember(self, key_id: str, verified: VerifiedKey | None, moment: float) -> None:
        self._known.pop(key_id, None)
        while len(self._known) >= MAX_KNOWN_KEYS:
            self._known.pop(next(iter(self._known)), None)
        self._known[key_id] = verified, moment

    async def keep_noting_use(self) -> None:
        """Write when keys were used, every minute, until it is cancelled."""
        while True:
            await asyncio.sleep(USE_SECONDS)
            await run_sync(self.note_use)

    def note_use(self) -> None:
        used, self._used = self._used, set()
        if not used:
            return
        try:
            with self._database.writing() as session:
                session.execute(update(ApiKey).where(ApiKey.id.in_(used)).values(last_used_at=db_now()), execution_options={"synchronize_session": False})
        except SQLAlchemyError as error:  # it is no request's fault, and the next use tells as well
            log.warning("use of keys not noted", keys=len(used), cause=repr(error))


async def _known_keys(request: Request) -> KnownKeys:
    keys: KnownKeys = request.app.state.keys
    return keys


OpenKeys = Annotated[KnownKeys, Depends(_known_keys)]


class Authentication(HTTPBearer):
    """Who calls, as a dependency and as what OpenAPI tells of it."""

    async def __call__(self, request: Request, needed: SecurityScopes) -> Caller:  # type: ignore[override]  # FastAPI calls it with what it names
        """The caller, if its key has every scope that the endpoint needs, `admin` has them all, and has not called too often."""
        credentials = await super().__call__(request)
        if credentials is None:
            raise _unauthenticated("key_missing", "The request carries no API key.")
        keys: KnownKeys = request.app.state.keys  # each of them as a dependency would cost more than what it is asked
        rates: Rates = request.app.state.rates
        caller = await _caller(credentials.credentials, request, keys, rates)
        bind_request(tenant_id=caller.tenant_id, key_id=caller.key_id)
        request.state.headers = await rates.count(request.method, caller.tenant_id, caller.key_id)
        missing = [scope for scope in needed.scopes if scope not in caller.scopes and "admin" not in caller.scopes]
        if missing:
            raise ScopeError(f"This needs the scope {missing[0]}.", code="scope_missing", hint=f"Use a key with the scope {missing[0]}.")
        return caller


authenticate = Authentication(
    auto_error=False, scheme_name="API key", bearerFormat="esp_<id>_<secret>", description="`Authorization: Bearer esp_<id>_<secret>`"
)


async def _caller(key: str, request: Request, keys: KnownKeys, rates: Rates) -> Caller:
    address = client_network(request)
    try:
        known = keys.recall(key)
        if known is not None and known[1]:
            return known[0]
        if known is None:  # a key that was valid is not locked out by what others send from its address
            await rates.check_refused(address)
        return await run_sync(keys.verify, key)
    except AuthenticationError:
        await rates.count_refused(address)
        raise


JobReader = Annotated[Caller, Security(authenticate, scopes=["jobs:read"])]
JobWriter = Annotated[Caller, Security(authenticate, scopes=["jobs:write"])]
ArtifactReader = Annotated[Caller, Security(authenticate, scopes=["artifacts:read"])]
CheckpointWriter = Annotated[Caller, Security(authenticate, scopes=["checkpoints:write"])]
Admin = Annotated[Caller, Security(authenticate, scopes=["admin"])]


def client_network(request: Request) -> str:
    """The client's address; of IPv6 the 64 bits that a client can't choose freely."""
    host = "" if request.client is None else request.client.host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a Unix socket has none
        return host
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else host


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _operator_of(tenant_id: str) -> Caller:
    return Caller(tenant_id, OPERATOR, frozenset())


def _unauthenticated(code: str, message: str) -> AuthenticationError:
    return AuthenticationError(message, code=code, hint="Send the header 'Authorization: Bearer esp_<id>_<secret>'; an operator or an admin makes keys.")


def _bound(text: str) -> int | None:
    if text == "none":
        return None
    if int(text) < 1:
        raise ValueError("a bound is at least 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m app.auth", description="API keys and tenants of this service.")
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create-key", help="make a key and print it")
    create.add_argument("--tenant", required=True, help="name of the tenant, made if it is new")
    create.add_argument("--name", default="", help="what the key is for")
    create.add_argument("--scope", action="append", choices=SCOPES, help="may be given again; default: all but admin")
    create.add_argument("--days", type=float, help="lifetime; default: no end")
    revoke = commands.add_parser("revoke-key", help="end a key at once")
    revoke.add_argument("key_id", help="key_…, or the part of the key between the underscores")
    caps = commands.add_parser("set-caps", help="bound what a tenant may have; what is not named stays")
    caps.add_argument("--tenant", required=True, help="name of the tenant")
    for name, what in CAPS.items():
        caps.add_argument(f"--{name.replace('_', '-')}", type=_bound, default=argparse.SUPPRESS, metavar="N", help=f"{what}; `none`: as the settings say")
    given = parser.parse_args(arguments)

    database = Database(get_settings().database_url.get_secret_value())
    try:
        with database.writing() as session:
            key = _obey(session, given)
    except EspalierError as error:
        sys.stderr.write(f"{error.message} {error.hint}\n")
        return 1
    finally:
        database.dispose()
    if key:
        sys.stdout.write(f"{key}\n")
    return 0


def _obey(session: Session, given: argparse.Namespace) -> str | None:
    """-> the key that was made, if one was."""
    if given.command == "create-key":
        scopes = given.scope or [scope for scope in SCOPES if scope != "admin"]
        lifetime = None if given.days is None else timedelta(days=given.days)
        return create_key(session, given.tenant, scopes, name=given.name, lifetime=lifetime)
    if given.command == "revoke-key":
        revoke_key(session, "key_" + given.key_id.removeprefix("key_"))
    else:
        set_caps(session, given.tenant, {name: value for name, value in vars(given).items() if name in CAPS})
    return None


if __name__ == "__main__":
    sys.exit(main())
