"""Holds a job's lease from a thread while the work goes on, and carries the work's news to the job's row."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from types import TracebackType
from typing import Any, Literal, Self

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.database import Database
from app.jobs.lease import Event, Lease, LeaseLost, beat

TELL_SECONDS = 2.0  # how often news and cancel requests pass between the row and the worker
MAX_EVENTS = 500  # of one attempt, told by the engine

Interruption = Literal["lost", "cancelled", "draining"]

log = structlog.get_logger(__name__)


def never() -> bool:
    return False


class Heartbeat:
    """While it is entered, the lease is beaten. A database that is away for less than the lease changes nothing."""

    def __init__(
        self, database: Database, lease: Lease, *, claimed_at: float, lease_seconds: float, beat_seconds: float, draining: Callable[[], bool] = never
    ) -> None:
        self.lease = lease
        self._database = database
        self._lease_seconds = lease_seconds
        self._pause = min(beat_seconds, TELL_SECONDS)
        self._draining = draining
        self._held_until = claimed_at + lease_seconds  # by time.monotonic(); the database may hold it longer, never shorter
        self._lost = False
        self._cancelled = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), name="heartbeat", daemon=True)  # its log lines name the attempt
        self._news = threading.Lock()
        self._phase: str | None = None
        self._progress: dict[str, Any] | None = None
        self.last_progress: dict[str, Any] = {}
        self._events: list[Event] = []
        self._events_told = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Beat for the last time, with the last news; harmless when called again."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._thread.join(timeout=self.seconds_left())
        if not self._thread.is_alive() and not self._lost:
            self._beat()

    def seconds_left(self) -> float:
        """For how long the lease is surely held."""
        return max(0.0, self._held_until - time.monotonic())

    def interruption(self) -> Interruption | None:
        """Why the work must stop, if it must."""
        if self._lost or not self.seconds_left():
            return "lost"
        if self._cancelled:
            return "cancelled"
        return "draining" if self._draining() else None

    def enter_phase(self, phase: str) -> None:
        with self._news:
            self._phase = phase
        self.tell("phase", f"Phase: {phase}.", {"phase": phase})

    def progress(self, progress: dict[str, Any]) -> None:
        with self._news:
            self._progress = self.last_progress = progress

    def tell(self, kind: str, message: str, data: dict[str, Any] | None = None) -> None:
        """Add an event to the job's log, unless an attempt that talks too much has used up its share."""
        with self._news:
            self._events_told += 1
            if self._events_told == MAX_EVENTS:
                kind, message, data = "log", "This attempt's further events are left out.", None
            if self._events_told <= MAX_EVENTS:
                self._events.append(Event(kind, message, data or {}))

    def _run(self) -> None:
        while not self._stopped.wait(self._pause) and not self._lost:
            self._beat()

    def _beat(self) -> None:
        with self._news:
            phase, progress, events = self._phase, self._progress, self._events
            self._phase, self._progress, self._events = None, None, []
        sent = time.monotonic()
        try:
            with self._database.writing() as session:
                cancelled = beat(session, self.lease, self._lease_seconds, phase=phase, progress=progress, events=events)
        except LeaseLost:
            self._lost = True
        except SQLAlchemyError as error:
            log.warning("no heartbeat", error=str(error).splitlines()[0], seconds_left=round(self.seconds_left(), 1))
            with self._news:
                self._phase, self._progress, self._events = self._phase or phase, self._progress or progress, [*events, *self._events]
        else:
            self._held_until = sent + self._lease_seconds
            self._cancelled = self._cancelled or cancelled
