"""News reaches its receiver at least once, under one id, whoever dies in between."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from app.database import Database, db_now
from app.models import Delivery
from app.processes import dies_with
from app.settings import Settings
from app.vault import Vault
from app.webhooks import service as webhooks
from app.webhooks.schemas import NewWebhook
from tests import jobs
from tests.faults.conftest import Service
from tests.receiver import NETWORKS, Receiver, receiving, wait_for_messages
from tests.servers import postgres

FAST = {
    "SWEEP_SECONDS": "0.1",
    "WEBHOOK_NETWORKS": json.dumps(NETWORKS),
    "WEBHOOK_TIMEOUT_SECONDS": "60",
    "WEBHOOK_RETRY_SECONDS": json.dumps([0.5] * 2 + [5] * 20),
}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as there:
        yield there


@pytest.fixture
def lease() -> dict[str, str]:
    return {f"ESPALIER_{name}": value for name, value in FAST.items()} | {"ESPALIER_LEASE_SECONDS": "4", "ESPALIER_BEAT_SECONDS": "0.5"}


def listen(database: Database, settings: Settings, receiver: Receiver, *kinds: Any) -> tuple[str, str]:
    """A webhook, its id and its secret."""
    with database.writing() as session:
        new = NewWebhook(url=receiver.url, kinds=kinds) if kinds else NewWebhook(url=receiver.url)
        webhook, secret = webhooks.create(session, jobs.TENANT, new, Vault(settings))
    return webhook.id, secret


def send_pings(database: Database, webhook_id: str, count: int = 1) -> list[str]:
    with database.writing() as session:
        return [webhooks.send_ping(session, jobs.TENANT, webhook_id).id for _ in range(count)]


def states(database: Database) -> set[tuple[str, int]]:
    with database.reading() as session:
        return {(state, tries) for state, tries in session.execute(select(Delivery.state, Delivery.tries))}


def end_tries(database: Database) -> None:
    """As if the time were over that a try may last whose process is gone."""
    with database.writing() as session:
        session.execute(update(Delivery).where(Delivery.state == "waiting").values(next_at=db_now(-1)))


@contextmanager
def dispatcher(home: Path, database_url: str, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {"ESPALIER_HOME": str(home), "ESPALIER_DATABASE_URL": database_url} | {f"ESPALIER_{name}": value for name, value in (FAST | settings).items()}
    with (home / "dispatcher.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.dispatcher"],
            env=os.environ | environment,
            stderr=log,
            preexec_fn=dies_with(os.getpid()),  # noqa: PLW1509  it makes one system call
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_what_a_killed_process_was_sending_another_sends(tmp_path: Path, receiver: Receiver) -> None:
    settings = Settings(home=tmp_path)
    database = jobs.open_database(settings.database_url.get_secret_value())
    webhook_id, secret = listen(database, settings, receiver)
    [ping] = send_pings(database, webhook_id)
    receiver.pause = 60
    with dispatcher(tmp_path, settings.database_url.get_secret_value()) as first:
        wait_for_messages(receiver, 1, 60)
        first.kill()
        first.wait()
    assert states(database) == {("waiting", 1)}
    receiver.pause = 0
    end_tries(database)
    with dispatcher(tmp_path, settings.database_url.get_secret_value()):
        wait_for_messages(receiver, 2, 60)
        jobs.wait_until(lambda: states(database) == {("delivered", 2)}, 60, "the record")
    assert [message.id for message in receiver.messages] == [ping, ping]
    assert [message.verified(secret)["type"] for message in receiver.messages] == ["ping", "ping"]
    database.dispose()


def test_processes_share_the_work_and_none_is_done_twice(postgres_database: str, tmp_path: Path, receiver: Receiver) -> None:
    settings = Settings(home=tmp_path)
    database = jobs.open_database(postgres_database)
    ids = [ping for _ in range(8) for ping in send_pings(database, listen(database, settings, receiver)[0], 5)]
    with dispatcher(tmp_path, postgres_database), dispatcher(tmp_path, postgres_database):
        wait_for_messages(receiver, len(ids), 60)
        jobs.wait_until(lambda: states(database) == {("delivered", 1)}, 60, "the records")
    assert sorted(message.id for message in receiver.messages) == sorted(ids)
    database.dispose()


def test_the_end_of_a_job_is_told_though_its_worker_was_killed(service: Service, receiver: Receiver) -> None:
    _, secret = listen(service.database, service.settings, receiver, "job.succeeded")
    receiver.status = 503  # so that nothing is taken before the worker is dead
    job_id = service.submit(model=service.model(steps=1))
    worker = service.start_worker()
    jobs.wait_for_state(service.database, job_id, "succeeded")
    service.kill_tree(worker)
    receiver.status = 204
    jobs.wait_until(lambda: {state for state, _ in states(service.database)} == {"delivered"}, 60, "the delivery")
    assert {message.id for message in receiver.messages} == {receiver.messages[0].id}
    news = receiver.messages[-1].verified(secret)
    assert (news["type"], news["data"]["job_id"], news["data"]["state"]) == ("job.succeeded", job_id, "succeeded")


def test_a_database_outage_delays_news(tmp_path: Path, receiver: Receiver) -> None:
    with postgres() as (url, server):
        settings = Settings(home=tmp_path)
        database = jobs.open_database(url)
        webhook_id, _ = listen(database, settings, receiver)
        ids = send_pings(database, webhook_id, 2)
        receiver.pause = 60
        with dispatcher(tmp_path, url) as process:
            wait_for_messages(receiver, 1, 60)
            server.stop()
            receiver.pause = 0
            jobs.wait_until(lambda: "a delivery can't be recorded" in (tmp_path / "dispatcher.log").read_text(), 60, "what the receiver took")
            server.start()
            end_tries(database)
            jobs.wait_until(lambda: {state for state, _ in states(database)} == {"delivered"}, 60, "the deliveries")
            assert process.poll() is None
        assert {message.id for message in receiver.messages} == set(ids)
        assert receiver.messages[0].id in [message.id for message in receiver.messages[1:]]
        database.dispose()
