"""A process of the service beside its API: it works until SIGTERM or SIGINT."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Protocol

from app.database import Database
from app.logging import configure
from app.settings import Settings, get_settings


class Background(Protocol):
    def start(self) -> None: ...
    def stop(self) -> None: ...


def run(make: Callable[[Database, Settings], Background]) -> None:
    """Start it, wait to be told to stop, and stop it."""
    configure()
    settings = get_settings()
    database = Database(settings.database_url.get_secret_value())
    background = make(database, settings)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    background.start()
    stopped.wait()
    background.stop()
    database.dispose()
