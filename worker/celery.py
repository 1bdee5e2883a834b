"""The Celery worker: `celery -A worker.celery worker`. One job at a time; the engine, and with it torch, runs in a child process of the task.

It listens to the queue of its class, and to one of its own.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from ctypes import c_bool
from functools import lru_cache, partial
from typing import Any

from celery import Celery, signals
from celery.exceptions import Reject

from app import logging, telemetry
from app.database import Database
from app.models import Worker
from app.queue import TASK, declare, make_celery, of_worker, publish
from app.settings import Settings, get_settings
from worker.announce import Presence, describe
from worker.tasks import ENGINE, clean_up, run_next

# Shared with the pool's process: the main process gets the signal, the pool's process has the child.
_draining = multiprocessing.RawValue(c_bool, False)


def is_draining() -> bool:
    return bool(_draining.value)


def make_worker(settings: Settings, engine: Sequence[str] = ENGINE) -> Celery:
    """A Celery app whose only task makes one attempt at a job, with another engine where a test needs one."""
    logging.configure()  # Celery warns of some things before it asks for it
    celery = make_celery(settings)
    celery.conf.update(
        worker_pool="prefork",
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_proc_alive_timeout=60,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # the lease, not the broker, says whose job it is
    )

    # Acknowledged late, so that a busy worker holds back no other message. What a message says is not read: it is a hint that there may be work.
    @celery.task(name=TASK, acks_late=True, shared=False)  # type: ignore[untyped-decorator, unused-ignore]
    def run(*_: Any, **__: Any) -> None:
        if is_draining():
            raise Reject("the worker shuts down", requeue=True)
        run_next(_this_worker(), settings, _database(), engine=engine, draining=is_draining)

    return celery


@lru_cache(maxsize=1)
def _this_worker() -> Worker:
    """Told in the main process; the pool's process inherits it."""
    return describe(get_settings())


@lru_cache(maxsize=1)
def _database() -> Database:
    """Opened in the pool's process: connections don't survive a fork."""
    return Database(get_settings().database_url.get_secret_value())


@lru_cache(maxsize=1)
def _presence() -> Presence:
    """Of the pool's process, which is the one that must live for jobs to run."""
    settings, database, worker = get_settings(), _database(), _this_worker()
    return Presence(
        worker,
        settings,
        database,
        draining=is_draining,
        wake=partial(publish, settings, "", of_worker(worker.id)),
        clean_up=partial(clean_up, settings, database),
    )


@signals.celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def _listen(instance: Any, **_: Any) -> None:
    instance.app.amqp.queues.select_add(declare(of_worker(_this_worker().id)))


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]
def _appear(**_: Any) -> None:
    telemetry.configure("espalier-worker")
    _presence().start()


@signals.worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def _leave(**_: Any) -> None:
    _presence().stop()
    telemetry.flush()


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _log(**_: Any) -> None:
    logging.configure()


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _drain(**_: Any) -> None:
    """End the child, put the job back into the queue, exit."""
    _draining.value = True


app = make_worker(get_settings())
