"""`/v1/queues`: the classes of workers, and how busy they are."""

from __future__ import annotations

from fastapi import APIRouter

from app.auth import JobReader
from app.dependencies import Configuration, OpenDatabase
from app.problems import declared
from app.queues import service
from app.queues.schemas import QueueList

router = APIRouter(prefix="/v1/queues", tags=["queues"], responses=declared(401, 403))


@router.get("")
def list_queues(caller: JobReader, database: OpenDatabase, settings: Configuration) -> QueueList:
    """The classes of workers with their live workers and devices, how many jobs run and wait, and since when the oldest does."""
    with database.reading() as session:
        return QueueList(items=service.list_queues(session, settings.lease_seconds))
