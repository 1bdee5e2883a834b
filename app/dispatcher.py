"""Keeps jobs moving: publishes the outbox, publishes again what the broker lost, takes back jobs whose worker was lost, and sends news to webhooks.

Runs in threads of the API, in as many processes as there are, and alone as `python -m app.dispatcher`. An outage of broker or database stops nothing but its own step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from app import queue
from app.background import run
from app.checkpoints.verifying import keep_verifying
from app.database import Database
from app.jobs import lease
from app.queues import repository as workers
from app.retention import keep_tidy
from app.settings import Settings
from app.webhooks.sending import keep_sending

BATCH = 100
FORGOTTEN_AFTER_SECONDS = 3600.0  # without a beat, a worker's row goes
LONGEST_PAUSE = 30.0  # seconds between two tries of a step that fails
GATHER_SECONDS = 0.05  # in which news gather after a step that succeeded: many submissions a second share one transaction

log = structlog.get_logger(__name__)
_alarms: set[threading.Event] = set()  # of the dispatchers that run in this process: one each, since a thread that wakes up clears what woke it


def wake() -> None:
    """Have this process's dispatcher look at once; without one, the next sweep of another finds the work."""
    for alarm in tuple(_alarms):
        alarm.set()


class Dispatcher:
    """Each step has a thread of its own, so that none waits for a server that another needs."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._stopping = threading.Event()
        self._stale_at = 0.0  # when to look for what the broker lost
        self._news = threading.Event()
        steps = {self._reap: threading.Event(), self._reach_broker: self._news}
        self._alarms = list(steps.values())
        self._threads = [threading.Thread(target=self._run, args=step, name=f"dispatcher {step[0].__name__}", daemon=True) for step in steps.items()]
        self._threads.append(threading.Thread(target=keep_tidy, args=(database, settings, self._stopping), name="retention", daemon=True))
        self._threads.append(threading.Thread(target=keep_verifying, args=(database, settings, self._stopping), name="verifying", daemon=True))
        self._threads.append(threading.Thread(target=keep_sending, args=(database, settings, self._stopping), name="webhooks", daemon=True))

    def start(self) -> None:
        _alarms.add(self._news)
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        _alarms.discard(self._news)
        for alarm in self._alarms:
            alarm.set()
        for thread in self._threads:
            thread.join(timeout=15)

    def _run(self, step: Callable[[], None], alarm: threading.Event) -> None:
        pause = self._settings.sweep_seconds
        while True:
            alarm.clear()
            if self._stopping.is_set():  # asked after the alarm is cleared, so that the one that `stop` gives is not lost
                return
            if self._try(step):
                pause = self._settings.sweep_seconds
                self._stopping.wait(GATHER_SECONDS)
                alarm.wait(pause)
            else:
                self._stopping.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def sweep(self) -> bool:
        """Each step once; whether all of it succeeded."""
        self._stale_at = 0.0
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
                reaped, late = lease.reap(session, BATCH), lease.give_up(session, BATCH)
                workers.forget(session, FORGOTTEN_AFTER_SECONDS)
            if reaped:
                log.warning("leases expired", jobs=reaped)
                wake()  # most of them are to be published again
            if late:
                log.warning("not begun in time", jobs=late)
            if max(len(reaped), len(late)) < BATCH:
                return

    def _reach_broker(self) -> None:
        if time.monotonic() >= self._stale_at:  # not at each submission
            self._publish_stale()
            self._stale_at = time.monotonic() + self._settings.sweep_seconds
        self._publish()

    def _publish_stale(self) -> None:
        with self._database.reading() as session:
            waiting = lease.waiting(session)
        for name, jobs in waiting.items():
            # As long as the broker holds a message for every queued job, none is lost and none need be added.
            if queue.depth(self._settings, queue.of_class(name)) < jobs:
                with self._database.writing() as session:
                    again = lease.publish_stale(session, name, self._settings.republish_seconds, BATCH)
                if again:
                    log.warning("published again", jobs=again, queue=name)

    def _publish(self) -> None:
        while not self._stopping.is_set():
            with self._database.writing() as session:
                messages = lease.take_outbox(session, BATCH)
                if messages:
                    queue.publish_all(self._settings, [(message.job_id, queue.of_class(message.queue)) for message in messages])
                    lease.delete_messages(session, messages)
            if len(messages) < BATCH:
                return


if __name__ == "__main__":
    run(Dispatcher)
