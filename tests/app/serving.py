"""The API as a process of its own, on either database, for tests that need a real server; nothing runs its jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from app.auth import create_key
from app.database import Database
from app.processes import dies_with
from migrations import migrate
from tests.jobs import wait_until
from tests.servers import free_port


@dataclass(frozen=True)
class Server:
    port: int
    key: str
    database: Database
    process: subprocess.Popen[bytes]

    def client(self, **headers: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} | headers
        limits = httpx.Limits(max_connections=100)
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, trust_env=False, timeout=60, limits=limits)


@contextmanager
def serving(database_url: str, home: Path, **settings: str) -> Iterator[Server]:
    """One process of uvicorn, and a key of its one tenant."""
    migrate(database_url)
    database = Database(database_url)
    with database.writing() as session:
        key = create_key(session, "one")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "app.main:create_app", "--factory", "--no-access-log", "--port", str(port)],
        env={**os.environ, "ESPALIER_HOME": str(home), "ESPALIER_DATABASE_URL": database_url}
        | {f"ESPALIER_{name.upper()}": value for name, value in settings.items()},
        stderr=subprocess.DEVNULL,
        preexec_fn=dies_with(os.getpid()),  # noqa: PLW1509  it makes one system call
    )
    server = Server(port, key, database, process)
    try:
        with server.client() as client:
            wait_until(lambda: _lives(client), 120, "the server")
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            database.dispose()


def _lives(client: httpx.Client) -> bool:
    try:
        return client.get("/livez").is_success
    except httpx.TransportError:
        return False
