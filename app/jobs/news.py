"""Who waits for news of a job: long polls and event streams.

One task of the process asks the database for all watched jobs at once and wakes those who watch a job that has changed. They hold neither a connection nor a
thread while they wait. A stream begins with what lies in the database and goes on, number by number, with what that task brings, so nothing is lost or doubled.
"""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from types import FrameType
from typing import TypeVar

import anyio
import structlog
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from app.database import Database
from app.exceptions import UnavailableError
from app.jobs import repository
from app.jobs.repository import Standing
from app.jobs.schemas import Event
from app.models import JobEvent

ASK_SECONDS = 0.3  # between two questions to the database
KEPT_EVENTS = 100  # the latest of a watched job; who is further behind reads the database
MOST_EVENTS = 5000  # that one question brings
KEEP_ALIVE_SECONDS = 15.0
AUTHORIZE_SECONDS = 60.0
RECONNECT_SECONDS = 2
THREADS = 4  # for all questions, apart from those that answer requests

Sent = tuple[int, bytes]
"""An event's number, and the event as a stream sends it."""
Result = TypeVar("Result")

log = structlog.get_logger(__name__)


class Watched:
    """A job that someone watches."""

    def __init__(self) -> None:
        self.watchers = 0
        self.standing: Standing | None = None  # None until the database has been asked
        self.last_event = 0  # that the database has told of
        self.over = False  # nothing more will be told: the job was deleted, or the server stops
        self._events: deque[Sent] = deque(maxlen=KEPT_EVENTS)
        self._told = anyio.Event()

    def tell(self, standing: Standing, events: list[Sent]) -> None:
        if events:
            if events[0][0] != self.last_event + 1:  # more happened than is kept
                self._events.clear()
            self._events.extend(events)
            self.last_event = events[-1][0]
        elif self.standing is None:
            self.last_event = standing.last_event
        if standing != self.standing:
            self.standing = standing
            self._wake()

    def end(self) -> None:
        self.over = True
        self._wake()

    def _wake(self) -> None:
        self._told.set()
        self._told = anyio.Event()

    def after(self, number: int) -> list[Sent] | None:
        """The events after this one; None where the database must be asked for them."""
        if self.standing is None:
            return None
        if number >= self.last_event:
            return []
        kept = [event for event in self._events if event[0] > number]
        return kept if kept and kept[0][0] == number + 1 else None

    async def until(self, condition: Callable[[Standing], bool], seconds: float) -> bool:
        """Wait until the condition holds or the watch is over, for so long at most; False where the time ran out."""
        with anyio.move_on_after(seconds):
            while not (self.over or (self.standing is not None and condition(self.standing))):
                await self._told.wait()
            return True
        return False


class News:
    """The watched jobs of this process."""

    def __init__(self, database: Database, most_watchers: int) -> None:
        self._database = database
        self._most = most_watchers
        self._jobs: dict[str, Watched] = {}
        self._watchers = 0
        self._stopping = False
        self._asked_for = anyio.Event()  # set while any job is watched
        self._threads = CapacityLimiter(THREADS)

    @contextmanager
    def watch(self, job_id: str) -> Iterator[Watched]:
        """Have the job watched. What the database tells after this call is compared with what comes here. Raises UnavailableError where too many watch."""
        if self._watchers >= self._most:
            hint = "Try again in a while, or ask for the job without waiting."
            raise UnavailableError(f"{self._most} others wait for news already.", code="too_many_streams", hint=hint)
        job = self._jobs.setdefault(job_id, Watched())
        job.over = job.over or self._stopping
        job.watchers += 1
        self._watchers += 1
        self._asked_for.set()
        try:
            yield job
        finally:
            job.watchers -= 1
            self._watchers -= 1
            if not job.watchers:
                self._jobs.pop(job_id)

    async def ask(self, question: Callable[[], Result]) -> Result:
        """The answer of the database, from one of the few threads that all watchers share."""
        return await run_sync(question, limiter=self._threads)

    @asynccontextmanager
    async def told(self) -> AsyncIterator[None]:
        """Watch while this is entered, or until the server is told to stop."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._tell)
            with _heard(self.stop):
                yield
            self.stop()
            tasks.cancel_scope.cancel()

    def stop(self) -> None:
        """Send home all who wait, and who will."""
        self._stopping = True
        for job in self._jobs.values():
            job.end()

    async def _tell(self) -> None:
        while True:
            if not self._jobs:
                self._asked_for = anyio.Event()
            await self._asked_for.wait()
            known = {job_id: job.last_event if job.standing else None for job_id, job in self._jobs.items()}
            try:
                standings, events = await self.ask(partial(self._read, known))
            except Exception:  # whatever a driver raises, the next question may be answered
                log.exception("no news of jobs")
            else:
                for job_id, job in self._jobs.items():
                    if job_id in standings:
                        job.tell(standings[job_id], events.get(job_id, []))
                    elif job_id in known:
                        job.end()
            await anyio.sleep(ASK_SECONDS)

    def _read(self, known: Mapping[str, int | None]) -> tuple[dict[str, Standing], dict[str, list[Sent]]]:
        """How the watched jobs stand, and the events after those that are known of them."""
        with self._database.reading() as session:
            standings = repository.find_standings(session, list(known))
            later = [
                (job_id, number)
                for job_id, standing in standings.items()
                if (last := known[job_id]) is not None
                for number in range(max(last, standing.last_event - KEPT_EVENTS) + 1, standing.last_event + 1)
            ]
            events: dict[str, list[Sent]] = {}
            if later:
                for event in repository.find_events(session, later[:MOST_EVENTS]):
                    events.setdefault(event.job_id, []).append(_sent(event))
        return standings, events


@contextmanager
def _heard(stop: Callable[[], None]) -> Iterator[None]:
    """Have `stop` called by the signal that ends the server: it waits for the last answer before it tells the application anything."""
    loop = asyncio.get_running_loop()
    before: dict[int, Callable[[int, FrameType | None], object]] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: handler for number in (signal.SIGTERM, signal.SIGINT) if callable(handler := signal.getsignal(number))}

    def hear(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(stop)
        before[number](number, frame)

    for number in before:
        signal.signal(number, hear)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------- streams


async def stream(news: News, job: Watched, read: Callable[[int], Sequence[JobEvent]], authorized: Callable[[], bool], after: int) -> AsyncIterator[bytes]:
    """A job's events after this one as server-sent events, then those that happen, until the job has finished: an event `end` tells of that.

    It ends without one when the job is deleted, the server stops, or its reader is not authorized any more.
    read: some of the events after a number, as they lie in the database.
    """
    yield format_sse_event(retry=RECONNECT_SECONDS * 1000)
    checked = time.monotonic()
    while not job.over:
        if time.monotonic() - checked > AUTHORIZE_SECONDS:
            if not await news.ask(authorized):
                return
            checked = time.monotonic()
        events = job.after(after)
        if events is None:
            events = await news.ask(partial(_page, read, after))
        if events:
            for number, event in events:
                yield event
                after = number
            continue
        if job.standing is not None and job.standing.finished and after >= job.standing.last_event:
            yield format_sse_event(event="end", data_str=json.dumps({"state": job.standing.state}))
            return
        if not await job.until(partial(_goes_beyond, after), KEEP_ALIVE_SECONDS):
            yield KEEPALIVE_COMMENT


def _goes_beyond(number: int, standing: Standing) -> bool:
    return standing.finished or standing.last_event > number


def _page(read: Callable[[int], Sequence[JobEvent]], after: int) -> list[Sent]:
    return [_sent(event) for event in read(after)]


def _sent(event: JobEvent) -> Sent:
    data = Event.model_validate(event).model_dump_json()
    return event.sequence, format_sse_event(id=str(event.sequence), event=event.kind, data_str=data)
