"""Servers that go away and come back while jobs run."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from app import queue
from tests import jobs
from tests.faults.conftest import LASTING_LEASE, Service
from tests.servers import Server, postgres, valkey


@pytest.fixture
def database_server() -> Iterator[tuple[str, Server]]:
    with postgres() as running:
        yield running


@pytest.fixture
def broker_server() -> Iterator[tuple[str, Server]]:
    with valkey() as running:
        yield running


@pytest.fixture
def servers(database_server: tuple[str, Server], broker_server: tuple[str, Server]) -> dict[str, str]:
    return {"ESPALIER_DATABASE_URL": database_server[0], "ESPALIER_BROKER_URL": broker_server[0]}


@pytest.mark.parametrize("lease", [LASTING_LEASE], ids=["lasting lease"])
def test_a_job_survives_the_loss_of_database_and_broker(service: Service, database_server: tuple[str, Server], broker_server: tuple[str, Server]) -> None:
    job_id = service.submit(model=service.model(steps=20, pause=0.3))
    service.start_worker()
    jobs.wait_until(lambda: jobs.get(service.database, job_id).progress.get("fraction", 0) > 0, 60, "the first step")

    # For less than the lease: the engine works on, and what it says meanwhile arrives later.
    database_server[1].stop()
    broker_server[1].stop()
    time.sleep(1)
    database_server[1].start()
    broker_server[1].start()
    job = jobs.wait_for_state(service.database, job_id, "succeeded")
    assert job.attempt == 1

    # The broker forgets a queue; the jobs in it are published again, to a worker that came back by itself.
    ids = [service.submit(model=service.model(steps=2)) for _ in range(3)]
    jobs.wait_until(lambda: jobs.outbox(service.database) == 0, 60, "the messages")
    broker_server[1].stop()
    broker_server[1].start()
    for job_id in ids:
        assert jobs.wait_for_state(service.database, job_id, "succeeded").attempt == 1
    jobs.wait_until(lambda: queue.depth(service.settings) == 0, 60, "the end of the messages")


@pytest.mark.parametrize("lease", [LASTING_LEASE | {"ESPALIER_LEASE_SECONDS": "10"}], ids=["lease of 10 s"])
def test_a_worker_stops_when_the_database_is_away_for_longer_than_the_lease(service: Service, database_server: tuple[str, Server]) -> None:
    model = service.model(steps=1000, pause=0.3)
    job_id = service.submit(model=model)
    worker = service.start_worker()
    jobs.wait_until(lambda: jobs.get(service.database, job_id).progress.get("fraction", 0) > 0, 60, "the first step")
    [engine] = service.engines(worker)
    database_server[1].stop()
    jobs.wait_until(lambda: not engine.is_running(), 90, "the end of the engine")
    (service.models / model / "behaviour.json").write_text('{"steps": 3}')
    database_server[1].start()
    job = jobs.wait_for_state(service.database, job_id, "succeeded")
    assert job.attempt == 2
    jobs.wait_until(lambda: not service.work_directories(), 60, "the clean-up")
