"""The embedded service: this process brings the database up to date and keeps the API, one worker and one exporter running as its children.

The children read the same environment. They die with this process, whatever ends it; one that ends by itself is started again.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import httpx

from app.auth import create_key, has_keys
from app.database import Database
from app.processes import dies_with
from app.settings import Settings
from migrations import migrate

TENANT = "default"
API = ("uvicorn", "app.main:create_app", "--factory", "--http", "app.protocol:BoundedProtocol", "--no-access-log", "--timeout-graceful-shutdown", "5", "--fd")
EXPORTER = ("app.exporter",)
# What workers tell each other is read by no one here; the heartbeat would block a worker while its broker is away.
QUIET = ("--without-mingle", "--without-gossip", "--without-heartbeat")
WORKER = ("celery", "--quiet", "-A", "worker.celery", "worker", "-c", "1", "--loglevel", "warning", *QUIET)
START_SECONDS = 120.0
STOP_SECONDS = 20.0
MAX_PAUSE_SECONDS = 30.0


@dataclass
class Child:
    """A process of the tree."""

    name: str
    arguments: tuple[str, ...]
    descriptors: tuple[int, ...]
    process: subprocess.Popen[bytes]
    started_at: float
    pause: float = 0.0  # seconds from a start to the next one; doubles while the child dies young

    @classmethod
    def start(cls, name: str, arguments: tuple[str, ...], *descriptors: int) -> Child:
        return cls(name, arguments, descriptors, _spawn(arguments, descriptors), time.monotonic())

    def keep_running(self) -> None:
        code = self.process.poll()
        age = time.monotonic() - self.started_at
        if code is None or age < self.pause:
            return
        _say(f"the {self.name} ended with {code} and is started again")
        self.pause = 0.0 if age > 2 * MAX_PAUSE_SECONDS else min(max(1.0, 2 * self.pause), MAX_PAUSE_SECONDS)
        self.process, self.started_at = _spawn(self.arguments, self.descriptors), time.monotonic()


def serve(settings: Settings, *, as_json: bool = False) -> int:
    """Run the service until SIGTERM or SIGINT, on a free port where the settings say 0; returns the exit code.

    Once it answers, its address and, the first time, a new API key are printed.
    """
    signals: SimpleQueue[int] = SimpleQueue()  # its put may run inside a signal handler
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.put(number))
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        _say(f"can't listen on {settings.host}, port {settings.port}: {error.strerror}. Choose another port, or 0 for a free one.")
        return 1
    with listener:
        migrate(settings.database_url.get_secret_value())
        api = Child.start("API", (*API, str(listener.fileno())), listener.fileno())
        worker = Child.start("worker", WORKER)
        exporter = Child.start("exporter", EXPORTER)
        try:
            url = _url(listener)
            if not _ready(url, api, signals):
                return 1
            _announce(url, _first_key(settings), as_json)
            while not _signalled(signals, 0.5):
                api.keep_running()
                worker.keep_running()
                exporter.keep_running()
        finally:
            _stop(worker, exporter, api)
    return 0


def _spawn(arguments: tuple[str, ...], descriptors: tuple[int, ...]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        (sys.executable, "-m", *arguments),
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,  # stdout is for the address and the key
        process_group=0,  # Ctrl-C in a terminal reaches this process alone, which then ends its children in order
        preexec_fn=dies_with(os.getpid()),  # noqa: PLW1509  this process has one thread
    )


def _ready(url: str, api: Child, signals: SimpleQueue[int]) -> bool:
    """Wait until the API is ready; False if it ends, a signal comes, or it takes too long."""
    give_up = time.monotonic() + START_SECONDS
    answer = "it did not answer"
    with httpx.Client(trust_env=False, timeout=5) as client:
        while time.monotonic() < give_up:
            if api.process.poll() is not None:
                _say(f"the API ended with {api.process.returncode} while starting; what it printed above says why")
                return False
            try:
                response = client.get(f"{url}/readyz")
            except httpx.TransportError:
                pass
            else:
                if response.is_success:
                    return True
                answer = response.text
            if _signalled(signals, 0.2):
                return False
    _say(f"the API was not ready after {START_SECONDS:g} seconds: {answer}")
    return False


def _signalled(signals: SimpleQueue[int], seconds: float) -> bool:
    try:
        signals.get(timeout=seconds)
    except Empty:
        return False
    return True


def _stop(*children: Child) -> None:
    for child in children:
        if child.process.poll() is None:
            child.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


def _first_key(settings: Settings) -> str | None:
    """A new key if there is none at all."""
    database = Database(settings.database_url.get_secret_value())
    try:
        with database.writing() as session:
            return None if has_keys(session) else create_key(session, TENANT, name="first key")
    finally:
        database.dispose()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(url: str, key: str | None, as_json: bool) -> None:
    if as_json:
        text = json.dumps({"url": url, "api_key": key})
    elif key is not None:
        text = f"Ready. The API key is shown this once:\n\n  export ESPALIER_URL={url}\n  export ESPALIER_API_KEY={key}\n\nDocumentation: {url}/docs"
    else:
        text = f"Ready at {url}. An API key exists; `python -m app.auth create-key --tenant {TENANT}` makes another.\nDocumentation: {url}/docs"
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _say(sentence: str) -> None:
    sys.stderr.write(f"espalier serve: {sentence}\n")
