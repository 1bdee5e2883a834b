"""`/livez`: the process answers. `/readyz`: it can take jobs and give results; without the broker it still can, since submitting works without it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field

import migrations
from app import queue
from app.database import Database
from app.exceptions import EspalierError, UnavailableError
from app.probing import Probe
from app.problems import declared
from app.settings import Settings
from app.storage import Store

CHECK_SECONDS = 1.0  # that an answer may take
KEEP_SECONDS = 1.0  # for which it is given again

log = structlog.get_logger(__name__)
router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The process's condition."""

    status: Literal["ok"] = Field("ok", description="`ok`; anything else is told as an error.")


class Readiness(BaseModel):
    """The service's condition."""

    status: Literal["ok", "degraded"] = Field("ok", description="`degraded`: jobs are accepted, but wait until the broker answers again.")
    detail: str | None = Field(None, description="What does not answer.", examples=["The broker does not answer within 1 s."])


def make_checks(database: Database, store: Store, settings: Settings) -> dict[str, Probe[None]]:
    """What readiness depends on. The last one, the broker, only degrades it."""
    questions: dict[str, Callable[[], None]] = {
        "database": partial(_check_schema, database),
        "object store": store.check,
        "broker": partial(_check_broker, settings),
    }
    return {name: Probe(question, patience=CHECK_SECONDS, keep=KEEP_SECONDS) for name, question in questions.items()}


async def _checks(request: Request) -> Mapping[str, Probe[None]]:
    checks: Mapping[str, Probe[None]] = request.app.state.checks
    return checks


@router.get("/livez", responses=declared())
async def is_alive() -> Health:
    """Whether the process answers."""
    return Health()


@router.get("/readyz", responses=declared(), response_model_exclude_none=True)
async def is_ready(checks: Annotated[Any, Depends(_checks)]) -> Readiness:
    """Whether the database answers and is migrated, and the store answers; and whether the broker does."""
    answers = await asyncio.gather(*(check.answer() for check in checks.values()), return_exceptions=True)
    faults = {name: _fault(name, answer) for name, answer in zip(checks, answers, strict=True) if isinstance(answer, BaseException)}
    degraded = faults.pop("broker", None)
    if faults:
        first, *_ = faults.values()
        raise UnavailableError(" ".join(fault.message for fault in faults.values()), code=first.code, hint=first.hint)
    return Readiness() if degraded is None else Readiness(status="degraded", detail=degraded.message)


def _fault(name: str, error: BaseException) -> EspalierError:
    """An error that may be shown."""
    if isinstance(error, EspalierError):
        return error
    within = f" within {CHECK_SECONDS:g} s" if isinstance(error, TimeoutError) else ""
    log.warning("not ready", part=name, cause=repr(error))
    return UnavailableError(f"The {name} does not answer{within}.", code=f"{name.split()[-1]}_unavailable", hint="Try again in a while.")


def _check_schema(database: Database) -> None:
    with database.reading() as session:
        if not migrations.is_at_head(session.connection()):
            raise UnavailableError("The database is not migrated to this version.", code="not_migrated", hint="Run python -m migrations.")


def _check_broker(settings: Settings) -> None:
    queue.depth(settings)
