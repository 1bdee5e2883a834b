"""Jobs as a poll is told of them. While a job does not change, a poll costs a look at its version, which those that come at the same moment share.

Every change of what is told of a job counts its version up, so an answer that was made for a version is right as long as that is the job's.
"""

from __future__ import annotations

import asyncio
from contextvars import Context
from dataclasses import dataclass

from anyio.to_thread import run_sync

from app.database import Database
from app.jobs import repository
from app.jobs.schemas import Job
from app.models import FINISHED

MOST_KEPT = 2000
MOST_KEPT_BYTES = 16 * 1024  # of one answer; a recipe can be long

Key = tuple[str, str]
"""A tenant's id and a job's."""


@dataclass(frozen=True)
class Told:
    version: int
    finished: bool
    body: bytes  # JSON


class ToldJobs:
    """What this process has told of jobs. One question at a time goes to the database; who asks meanwhile shares the next one."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._kept: dict[Key, Told] = {}
        self._turn = asyncio.Lock()
        self._keys: set[Key] = set()  # of the next question
        self._next: asyncio.Task[dict[Key, Told]] | None = None

    async def find(self, tenant_id: str, job_id: str) -> Told | None:
        """The job as it is after this call began; None where the tenant has none with that id."""
        if self._next is None:
            self._next = asyncio.create_task(self._ask(), context=Context())  # it is no single request's
        self._keys.add((tenant_id, job_id))
        found = await asyncio.shield(self._next)
        return found.get((tenant_id, job_id))

    async def _ask(self) -> dict[Key, Told]:
        async with self._turn:
            keys, self._keys, self._next = self._keys, set(), None
            return await run_sync(self._read, keys)

    def _read(self, keys: set[Key]) -> dict[Key, Told]:
        known = {key: told for key in keys if (told := self._kept.get(key)) is not None}
        with self._database.reading() as session:
            versions = repository.find_versions(session, [*known]) if known else {}
            current = {key: told for key, told in known.items() if versions.get(key) == told.version}
            others = [key for key in keys if key not in current and (key in versions or key not in known)]
            jobs = repository.find_jobs(session, others) if others else []
        for job in jobs:
            key = job.tenant_id, job.id
            current[key] = told = Told(job.version, job.state in FINISHED, Job.of(job).model_dump_json().encode())
            self._keep(key, told)
        return current

    def _keep(self, key: Key, told: Told) -> None:
        self._kept.pop(key, None)
        if len(told.body) > MOST_KEPT_BYTES:
            return
        while len(self._kept) >= MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = told
