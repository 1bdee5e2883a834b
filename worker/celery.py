"""The Celery worker: `celery -A worker.celery worker -Q prune`. One job at a time; the engine, and with it torch, runs in a child process of the task."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from ctypes import c_bool
from functools import lru_cache
from typing import Any

from celery import Celery, signals
from celery.exceptions import Reject

from app import logging
from app.database import Database
from app.queue import TASK, make_celery
from app.settings import Settings, get_settings
from worker.tasks import ENGINE, clean_up, run_job

# Shared with the pool's process: the main process gets the signal, the pool's process has the child.
_draining = multiprocessing.RawValue(c_bool, False)


def is_draining() -> bool:
    return bool(_draining.value)


def make_worker(settings: Settings, engine: Sequence[str] = ENGINE) -> Celery:
    """A Celery app whose only task makes one attempt at a job, with another engine where a test needs one."""
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

    # Acknowledged late, so that a busy worker holds back no other message; a redelivery meets a live lease or a finished job and is a no-op.
    @celery.task(name=TASK, acks_late=True, shared=False)  # type: ignore[untyped-decorator, unused-ignore]
    def run(job_id: str) -> None:
        if is_draining():
            raise Reject("the worker shuts down", requeue=True)
        run_job(job_id, settings, _database(settings.database_url.get_secret_value()), engine=engine, draining=is_draining)

    @signals.worker_process_init.connect(weak=False)  # type: ignore[untyped-decorator]
    def start(**_: Any) -> None:
        clean_up(settings, _database(settings.database_url.get_secret_value()))

    return celery


@lru_cache(maxsize=1)
def _database(url: str) -> Database:
    """Opened in the pool's process: connections don't survive a fork."""
    return Database(url)


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _log(**_: Any) -> None:
    logging.configure()


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _drain(**_: Any) -> None:
    """End the child, put the job back into the queue, exit."""
    _draining.value = True


app = make_worker(get_settings())
