"""Tells the service of this worker: what it has, and, from a thread, that it lives."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import structlog

from app.database import Database
from app.jobs.lease import work_waits
from app.models import Worker
from app.queues import repository
from app.settings import Settings
from worker.memory import total_bytes

DRIVERS = ("/dev/nvidiactl", "/dev/kfd")  # NVIDIA's and AMD's
DEVICES = """
import json, torch
found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
print(json.dumps([{"name": device.name, "memory_bytes": device.total_memory} for device in found]))
"""
DEVICES_SECONDS = 120
LOOK_SECONDS = 1.0  # between two looks at whether the worker is to stop

log = structlog.get_logger(__name__)


def id_prefix() -> str:
    """What the ids of all workers on this host begin with."""
    return f"{socket.gethostname()[:150]}:"


def describe(settings: Settings) -> Worker:
    """This process as a worker, under an id that no other has."""
    devices = _devices()
    return Worker(
        id=f"{id_prefix()}{os.getpid()}:{secrets.token_hex(4)}",
        queue=settings.queue,
        devices=devices,
        host_bytes=settings.engine_memory_bytes or total_bytes(),
        device_bytes=devices[0]["memory_bytes"] if devices else 0,
        version=version("espalier"),
    )


def _devices() -> list[dict[str, Any]]:
    """The GPUs as an engine sees them. Told by a process of its own: torch would stay in this one, and CUDA does not survive a fork."""
    if not any(Path(driver).exists() for driver in DRIVERS):
        return []
    try:
        told = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, timeout=DEVICES_SECONDS, check=True).stdout
    except subprocess.SubprocessError as error:
        log.exception("the GPUs could not be told", said=str(getattr(error, "stderr", None))[-1000:])
        return []
    devices: list[dict[str, Any]] = json.loads(told)
    return devices


class Presence:
    """Between `start` and `stop` the worker's row is beaten, and `wake` called where there is work that no message tells of."""

    def __init__(
        self, worker: Worker, settings: Settings, database: Database, *, draining: Callable[[], bool], wake: Callable[[], None], clean_up: Callable[[], None]
    ) -> None:
        self._worker = worker
        self._settings = settings
        self._database = database
        self._draining = draining
        self._wake = wake
        self._clean_up = clean_up
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Take the row back."""
        self._stopping.set()
        self._thread.join(timeout=10)
        try:
            with self._database.writing() as session:
                repository.withdraw(session, self._worker.id)
        except Exception:  # whatever a driver raises, the row is swept in time
            log.exception("the worker's row could not be removed")

    def _run(self) -> None:
        while not self._stopping.is_set():
            draining = self._draining()
            try:
                self._beat(draining)
            except Exception:  # whatever a driver raises, the next beat tries again
                log.exception("the worker could not tell of itself")
            self._pause(draining)

    def _pause(self, told_draining: bool) -> None:
        """Until the next beat, or until there is something to tell."""
        due = time.monotonic() + self._settings.beat_seconds
        while time.monotonic() < due and self._draining() == told_draining:
            if self._stopping.wait(min(LOOK_SECONDS, self._settings.beat_seconds)):
                return

    def _beat(self, draining: bool) -> None:
        self._settings.work_dir.mkdir(parents=True, exist_ok=True)
        with self._database.writing() as session:
            repository.announce(session, self._worker, disk_bytes=shutil.disk_usage(self._settings.work_dir).free, draining=draining)
        self._clean_up()
        if not draining:
            with self._database.reading() as session:
                waits = work_waits(session, self._worker)
            if waits:
                self._wake()
