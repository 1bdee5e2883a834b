"""Readiness with real servers that stop, hang and come back; whether the process lives depends on none of them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi.testclient import TestClient

from app.health import CHECK_SECONDS, KEEP_SECONDS
from app.main import create_app
from app.probing import Probe
from app.settings import Settings
from migrations import migrate, unmigrate
from tests.app.test_bad_input import check_problem
from tests.jobs import wait_until
from tests.servers import Server, fresh_database, postgres, seaweedfs, valkey


@dataclass(frozen=True)
class Production:
    client: TestClient
    servers: dict[str, Server]

    def ready(self) -> dict[str, Any]:
        answer = self.client.get("/readyz")
        return dict(answer.json()) if answer.status_code == 200 else check_problem(answer, 503)

    def wait_for(self, **fields: str) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def there() -> bool:
            found.clear()
            found.update(self.ready())
            return fields.items() <= found.items()

        wait_until(there, 60, str(fields), pause=0.2)
        return found


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    with ExitStack() as stack:
        server_url, database = stack.enter_context(postgres())
        broker_url, broker = stack.enter_context(valkey())
        store = stack.enter_context(seaweedfs())
        url = stack.enter_context(fresh_database(server_url))
        migrate(url)
        from_environment = {name.removeprefix("ESPALIER_").lower(): value for name, value in store.environment.items()}
        home = tmp_path_factory.mktemp("production")
        settings = Settings.model_validate({"home": home, "database_url": url, "broker_url": broker_url, "sweep_seconds": 3600} | from_environment)
        client = stack.enter_context(TestClient(create_app(settings)))
        yield Production(client, {"database": database, "broker": broker, "object store": store.server})


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    server.stop()
    try:
        yield
    finally:
        if server.process is None:
            server.start()


@contextmanager
def hanging(server: Server) -> Iterator[None]:
    """It keeps its connections and takes new ones, and answers nothing."""
    assert server.process is not None
    root = psutil.Process(server.process.pid)
    processes = [root, *root.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def test_without_the_broker_it_is_ready_but_degraded(production: Production) -> None:
    production.wait_for(status="ok")
    with stopped(production.servers["broker"]):
        assert "broker" in production.wait_for(status="degraded")["detail"]
    production.wait_for(status="ok")


def test_without_database_or_store_it_is_not_ready(production: Production) -> None:
    production.wait_for(status="ok")
    with stopped(production.servers["database"]):
        assert production.wait_for(code="database_unavailable")["hint"]
        with stopped(production.servers["object store"]):
            wait_until(lambda: "object store" in production.ready()["detail"], 60, "both faults in one answer", pause=0.2)
            production.servers["database"].start()
            assert "object store" in production.wait_for(code="store_unavailable")["detail"]
            assert production.client.get("/livez").json() == {"status": "ok"}
    production.wait_for(status="ok")


def test_a_database_that_hangs_holds_no_probe_up_and_many_probes_take_one_thread(production: Production) -> None:
    production.wait_for(status="ok")
    with hanging(production.servers["database"]):
        time.sleep(KEEP_SECONDS)
        began = time.monotonic()
        with ThreadPoolExecutor(30) as probes:
            answers = list(probes.map(lambda _: production.ready(), range(30)))
        assert time.monotonic() - began < 20 * CHECK_SECONDS  # one after the other they would take 30
        assert {answer["code"] for answer in answers} == {"database_unavailable"}
        assert f"within {CHECK_SECONDS:g} s" in answers[0]["detail"]
        assert sum(thread.name == "probe" for thread in threading.enumerate()) <= 2
        assert production.client.get("/livez").status_code == 200
    production.wait_for(status="ok")


def test_it_is_not_ready_before_the_migrations(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/espalier.db"
    migrate(url)
    with TestClient(create_app(Settings.model_validate({"home": tmp_path, "sweep_seconds": 3600}))) as client:
        service = Production(client, {})
        assert service.ready() == {"status": "ok"}
        unmigrate(url, "base")
        assert service.wait_for(code="not_migrated")["hint"]
        assert client.get("/livez").json() == {"status": "ok"}
        (tmp_path / "objects").rename(tmp_path / "moved")
        migrate(url)
        service.wait_for(code="store_unavailable")
        (tmp_path / "moved").rename(tmp_path / "objects")
        service.wait_for(status="ok")


@pytest.mark.parametrize("keep", [0.0, 30.0])
def test_an_answer_is_kept_for_a_while(keep: float) -> None:
    asked: list[int] = []
    probe = Probe(lambda: asked.append(1), patience=5, keep=keep)

    async def ask() -> None:
        for _ in range(3):
            await probe.answer()

    asyncio.run(ask())
    assert len(asked) == (1 if keep else 3)
