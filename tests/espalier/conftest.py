"""A real API on a socket, over SQLite and a local directory, and the rows and objects behind it."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from app.auth import create_key
from app.database import Database
from app.jobs.lease import Event, Lease, StoredFile, beat, claim, finish
from app.main import create_app
from app.settings import Settings
from app.storage import Store, open_store
from espalier.client import AsyncClient, Client
from migrations import migrate

MODEL = "owner/model"
_tenants = itertools.count(1)


@dataclass
class Service:
    """The service as one tenant sees it; what a worker would do is done by hand."""

    url: str
    database: Database
    store: Store
    home: Path
    tenant: str = field(default_factory=lambda: f"tenant {next(_tenants)}")

    def __post_init__(self) -> None:
        with self.database.writing() as session:
            self.key = create_key(session, self.tenant)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self, url: str | None = None) -> Client:
        return Client(url or self.url, self.key)

    def async_client(self, url: str | None = None) -> AsyncClient:
        return AsyncClient(url or self.url, self.key)

    def submit(self, **more: Any) -> str:
        with self.client() as client:
            return client.submit(MODEL, "cfsp", 0.2, **more)["id"]

    def start(self, job_id: str) -> Lease:
        with self.database.writing() as session:
            lease = claim(session, job_id, "test", 600)
        assert lease is not None
        return lease

    def tell(self, lease: Lease, phase: str, fraction: float) -> None:
        with self.database.writing() as session:
            beat(session, lease, 600, phase=phase, progress={"fraction": fraction}, events=[Event("phase", f"{phase}.", {"phase": phase})])

    def succeed(self, lease: Lease, files: dict[str, bytes] | None = None, report: dict[str, Any] | None = None) -> None:
        stored = []
        for name, content in (files or {}).items():
            upload = self.home / "upload"
            upload.write_bytes(content)
            stored.append(
                StoredFile(name, "report" if name == "report.json" else name.partition("/")[0], *self.store.put_file(lease.artifact_prefix + name, upload))
            )
        with self.database.writing() as session:
            finish(session, lease, "succeeded", report=report or {}, files=stored)

    def fail(self, lease: Lease) -> None:
        with self.database.writing() as session:
            finish(session, lease, "failed", error={"code": "disk_full", "message": "The disk is full.", "hint": "Free some space."})

    def job_with(self, files: dict[str, bytes], report: dict[str, Any] | None = None) -> str:
        """A succeeded job with these files."""
        job_id = self.submit()
        self.succeed(self.start(job_id), files, report)
        return job_id


@contextmanager
def running_service(home: Path, **settings: Any) -> Iterator[Service]:
    made = Settings.model_validate({"home": home, "sweep_seconds": 3600, **settings})
    url = made.database_url.get_secret_value()
    migrate(url)
    server = uvicorn.Server(uvicorn.Config(create_app(made), log_config=None, timeout_graceful_shutdown=1))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    database = Database(url)
    try:
        while not server.started:
            assert thread.is_alive(), "the API did not start"
            time.sleep(0.05)
        yield Service(f"http://127.0.0.1:{listener.getsockname()[1]}", database, open_store(made), home)
    finally:
        server.should_exit = True
        thread.join()
        database.dispose()
        listener.close()


@pytest.fixture(scope="session")
def shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("service")
    with running_service(home, model_roots=(home / "models",)) as service:
        yield service


@pytest.fixture
def service(shared_service: Service) -> Service:
    """The shared service with a tenant of its own for the test."""
    return Service(shared_service.url, shared_service.database, shared_service.store, shared_service.home)
