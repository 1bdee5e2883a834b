"""`/livez`: the process answers. `/readyz`: it can take jobs and give results; the broker is not asked, since submitting works without it."""

from __future__ import annotations

from typing import Literal

import anyio
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

import migrations
from app.database import Database
from app.dependencies import OpenDatabase, OpenStore
from app.exceptions import UnavailableError
from app.problems import declared

CHECK_SECONDS = 3

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The service's condition."""

    status: Literal["ok"] = Field("ok", description="`ok`; anything else is told as an error.")


@router.get("/livez", responses=declared())
async def is_alive() -> Health:
    """Whether the process answers."""
    return Health()


@router.get("/readyz", responses=declared())
async def is_ready(database: OpenDatabase, store: OpenStore, request: Request) -> Health:
    """Whether the database answers and is migrated, and the store answers."""
    with anyio.move_on_after(CHECK_SECONDS) as scope:
        await anyio.to_thread.run_sync(_check_schema, database, abandon_on_cancel=True)
        await anyio.to_thread.run_sync(store.check, abandon_on_cancel=True)
    if scope.cancelled_caught:
        raise UnavailableError(f"The database and the store do not answer within {CHECK_SECONDS} s.", code="not_ready")
    return Health()


def _check_schema(database: Database) -> None:
    with database.reading() as session:
        if not migrations.is_at_head(session.connection()):
            raise UnavailableError("The database is not migrated to this version.", code="not_migrated", hint="Run python -m migrations.")
