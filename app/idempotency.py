"""`Idempotency-Key`: a request that is sent again, since its answer was lost, gets that answer and does nothing again.

The key's row is written in the transaction of what the request makes, so there are both or neither. Of two at the same moment, the second waits for the first
one's transaction. A refused request is not kept: its key may come with a corrected one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from sqlalchemy import delete, select, text, update
from sqlalchemy.dialects.postgresql import insert as insert_postgres
from sqlalchemy.dialects.sqlite import insert as insert_sqlite
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from app.database import Database, db_now
from app.exceptions import ConflictError, KeyReuseError
from app.models import IdempotencyKey

KEPT_SECONDS = 24 * 3600
WAIT_SECONDS = 5  # for the transaction of another request with the same key
LOCK_NOT_AVAILABLE = "55P03"  # Postgres's code
REPLAYED = {"description": "`true` where this is the answer to an earlier request with the same Idempotency-Key.", "schema": {"type": "string"}}


@dataclass(frozen=True)
class Asked:
    """A request that carries a key."""

    key: str
    sha256: str  # of operation and body


@dataclass(frozen=True)
class Answer:
    """What a request is answered, as it is kept."""

    status: int
    body: str  # JSON
    headers: dict[str, str] = field(default_factory=dict)

    def response(self, **more: str) -> Response:
        return Response(self.body, self.status, self.headers | more, "application/json")


async def _asked(
    request: Request,
    key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            pattern=r"^[!-~]{1,255}$",
            description="Any text that is new with every new request. A request that is sent again with it, within 24 hours and with the very same body, "
            "is answered as it was the first time, and does nothing again.",
            examples=["6f1f8a52-5c8e-4b0e-9b1c-0d8f7a3e2c11"],
        ),
    ] = None,
) -> Asked | None:
    if key is None:
        return None
    operation = f"{request.method} {request.url.path}\n".encode()
    return Asked(key, hashlib.sha256(operation + await request.body()).hexdigest())


MayBeAsked = Annotated[Asked | None, Depends(_asked)]


def find_answer(database: Database, tenant_id: str, asked: Asked | None) -> Response | None:
    """What this very request was answered before. Raises KeyReuseError where the key came with another one."""
    if asked is None:
        return None
    with database.reading() as session:
        return _find(session, tenant_id, asked)


def answer_once(database: Database, tenant_id: str, asked: Asked | None, act: Callable[[Session], Answer], *, at_once: bool = False) -> Response:
    """Do what the request asks for, unless it was done before. at_once: all that `act` writes is one statement.

    Raises KeyReuseError where the key came with another request, ConflictError where one with this key takes too long, and what `act` raises.
    """
    if asked is None:
        with database.writing_at_once() if at_once else database.writing() as session:
            return act(session).response()
    with database.writing() as session:
        if not _reserve(session, tenant_id, asked):
            answered = _find(session, tenant_id, asked)
            if answered is not None:
                return answered
        answer = act(session)
        reserved = update(IdempotencyKey).where(IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.key == asked.key)
        session.execute(reserved.values(answer=asdict(answer)), execution_options={"synchronize_session": False})
    return answer.response()


def forget(session: Session) -> None:
    """Delete the keys that are too old."""
    old = IdempotencyKey.created_at < db_now(-KEPT_SECONDS)
    session.execute(delete(IdempotencyKey).where(old), execution_options={"synchronize_session": False})


def _find(session: Session, tenant_id: str, asked: Asked) -> Response | None:
    columns = (IdempotencyKey.request_sha256, IdempotencyKey.answer)
    row = session.execute(select(*columns).where(IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.key == asked.key)).one_or_none()
    if row is None:
        return None
    if row.request_sha256 != asked.sha256:
        hint = "Use a new key for a new request, and the very same body for one that is sent again."
        raise KeyReuseError("Another request came with this Idempotency-Key.", code="idempotency_key_reused", hint=hint)
    return Answer(**row.answer).response(**{"Idempotency-Replayed": "true"})


def _reserve(session: Session, tenant_id: str, asked: Asked) -> bool:
    """Whether this request is the first one with its key, once no other one's transaction is open."""
    row: dict[str, Any] = {"tenant_id": tenant_id, "key": asked.key, "request_sha256": asked.sha256, "answer": {}}
    if session.get_bind().dialect.name != "postgresql":  # SQLite's transaction is the only one that writes
        inserted = insert_sqlite(IdempotencyKey).values(row).on_conflict_do_nothing()
        return session.scalar(inserted.returning(IdempotencyKey.key)) is not None
    session.execute(text(f"SET LOCAL lock_timeout = '{WAIT_SECONDS}s'"))
    try:
        first = session.scalar(insert_postgres(IdempotencyKey).values(row).on_conflict_do_nothing().returning(IdempotencyKey.key)) is not None
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE:
            raise
        conflict = ConflictError("A request with this Idempotency-Key is being answered.", code="idempotency_key_in_flight", hint="Send it again in a while.")
        conflict.headers = {"Retry-After": str(WAIT_SECONDS)}
        raise conflict from error
    session.execute(text("SET LOCAL lock_timeout TO DEFAULT"))
    return first
