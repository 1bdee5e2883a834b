"""Keeps jobs moving: publishes the outbox, publishes again what the broker lost, and takes back jobs whose worker was lost.

Runs as a thread of the API, as many as there are, and alone as `python -m app.dispatcher`. An outage of broker or database stops nothing but its own step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import structlog

from app import queue
from app.database import Database
from app.jobs import lease
from app.settings import Settings, get_settings

BATCH = 100
LONGEST_PAUSE = 30.0  # seconds between two tries of a step that fails

log = structlog.get_logger(__name__)
_wake = threading.Event()


def wake() -> None:
    """Have this process's dispatcher look at once; without one, the next sweep of another finds the work."""
    _wake.set()


class Dispatcher:
    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        wake()
        self._thread.join(timeout=15)

    def _run(self) -> None:
        pause = self._settings.sweep_seconds
        while not self._stopping.is_set():
            _wake.clear()
            if self.sweep():
                pause = self._settings.sweep_seconds
                _wake.wait(pause)
            else:
                self._stopping.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def sweep(self) -> bool:
        """Reap, re-publish and publish once; whether all of it succeeded. A broker that is down keeps no lease from being reaped."""
        return all([self._try(self._reap), self._try(self._reach_broker)])

    def _try(self, step: Callable[[], None]) -> bool:
        try:
            step()
        except Exception:  # whatever a driver raises, the next sweep tries again
            log.exception("dispatcher step failed", step=step.__name__.strip("_"))
            return False
        return True

    def _reap(self) -> None:
        while not self._stopping.is_set():
            with self._database.writing() as session:
                reaped = lease.reap(session, BATCH)
            if reaped:
                log.warning("leases expired", jobs=reaped)
            if len(reaped) < BATCH:
                return

    def _reach_broker(self) -> None:
        self._publish_stale()
        self._publish()

    def _publish_stale(self) -> None:
        with self._database.reading() as session:
            waiting = lease.queued(session)
        # As long as the broker holds a message for every queued job, none is lost and none need be added.
        if waiting and queue.depth(self._settings) < waiting:
            with self._database.writing() as session:
                again = lease.publish_stale(session, self._settings.republish_seconds, BATCH)
            if again:
                log.warning("published again", jobs=again)

    def _publish(self) -> None:
        while not self._stopping.is_set():
            with self._database.writing() as session:
                messages = lease.take_outbox(session, BATCH)
                for _, job_id in messages:
                    queue.publish(self._settings, job_id)
                if messages:
                    lease.mark_published(session, messages)
            if len(messages) < BATCH:
                return


def main() -> None:
    from app.logging import configure

    configure()
    settings = get_settings()
    database = Database(settings.database_url.get_secret_value())
    dispatcher = Dispatcher(database, settings)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    dispatcher.start()
    stopped.wait()
    dispatcher.stop()
    database.dispose()


if __name__ == "__main__":
    main()
