"""Relay, re-publisher and reaper against real brokers and databases, with and without them there."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty

import pytest
from sqlalchemy import update

from app import dispatcher, queue
from app.database import Database, db_now
from app.dispatcher import Dispatcher
from app.jobs import lease as leases
from app.models import Job, Worker
from app.queues import repository as workers
from app.settings import Settings
from tests import jobs
from tests.servers import free_port, postgres, valkey


@pytest.fixture(params=["sqlite and files", "postgres and valkey"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "sqlite and files":
        return Settings(home=tmp_path)
    return Settings(home=tmp_path, database_url=request.getfixturevalue("postgres_database"), broker_url=request.getfixturevalue("redis_database"))


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    opened = jobs.open_database(settings.database_url.get_secret_value())
    yield opened
    opened.dispose()


def received(settings: Settings, name: str = queue.QUEUE) -> list[str]:
    """Take all messages from a queue of the broker; the job ids."""
    ids = []
    with queue.make_celery(settings).connection_for_read() as connection:
        channel = connection.default_channel
        while (message := channel.basic_get(name, no_ack=True)) is not None:
            assert message.headers["task"] == queue.TASK
            assert message.content_type == "application/json"
            ids.append(json.loads(message.body)[0][0])
    return ids


def test_the_outbox_is_published_once(settings: Settings, database: Database) -> None:
    ids = [jobs.submit(database) for _ in range(3)]
    dispatching = Dispatcher(database, settings)
    assert dispatching.sweep()
    assert dispatching.sweep()
    assert queue.depth(settings) == 3
    assert received(settings) == ids
    assert jobs.outbox(database) == 0


def test_what_the_broker_lost_is_published_again_and_what_it_holds_is_not(settings: Settings, database: Database) -> None:
    job_id = jobs.submit(database)
    dispatching = Dispatcher(database, settings)
    dispatching.sweep()
    with database.writing() as session:
        session.execute(update(Job).values(published_at=db_now(-settings.republish_seconds - 1)))
    dispatching.sweep()
    assert queue.depth(settings) == 1  # still there
    assert received(settings) == [job_id]
    dispatching.sweep()
    assert received(settings) == [job_id]
    dispatching.sweep()
    assert received(settings) == []  # just published


def test_each_class_has_its_queue(settings: Settings, database: Database) -> None:
    ids = {name: jobs.submit(database, queue=name) for name in ("default", "large", "prune")}
    names = {"default": "prune", "large": "prune-large", "prune": "prune-prune"}
    dispatching = Dispatcher(database, settings)
    assert dispatching.sweep()
    assert {name: queue.depth(settings, queue.of_class(name)) for name in ids} == dict.fromkeys(ids, 1)
    assert received(settings, names["large"]) == [ids["large"]]  # which is lost
    with database.writing() as session:
        session.execute(update(Job).values(published_at=db_now(-settings.republish_seconds - 1)))
    assert dispatching.sweep()
    assert {name: received(settings, names[name]) for name in ids} == {name: [job_id] for name, job_id in ids.items()}


def test_late_jobs_are_given_up_and_lost_workers_forgotten(settings: Settings, database: Database) -> None:
    job_id = jobs.submit(database, limits={"max_pending": 1})
    with database.writing() as session:
        worker = Worker(id="lost", queue="default", devices=[], host_bytes=1, device_bytes=0, version="0")
        workers.announce(session, worker, disk_bytes=1, draining=False)
        session.execute(update(Worker).values(seen_at=db_now(-dispatcher.FORGOTTEN_AFTER_SECONDS - 1)))
        session.execute(update(Job).values(start_by=db_now(-1)))
    assert Dispatcher(database, settings).sweep()
    assert jobs.get(database, job_id).state == "failed"
    with database.reading() as session:
        assert session.get(Worker, "lost") is None


def test_an_expired_lease_is_reaped_and_published(settings: Settings, database: Database) -> None:
    job_id = jobs.submit(database)
    dispatching = Dispatcher(database, settings)
    dispatching.sweep()
    received(settings)
    with database.writing() as session:
        leases.claim(session, job_id, "worker", 0.001)
    time.sleep(0.01)
    dispatching.sweep()
    assert received(settings) == [job_id]


def test_a_wake_up_publishes_at_once(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, sweep_seconds=60)
    database = jobs.open_database(settings.database_url.get_secret_value())
    dispatching = Dispatcher(database, settings)
    dispatching.start()
    try:
        time.sleep(0.3)
        jobs.submit(database)
        dispatcher.wake()
        assert jobs.wait_until(lambda: jobs.outbox(database) == 0) < settings.sweep_seconds / 2
    finally:
        dispatching.stop()
        database.dispose()
    assert [thread.name for thread in dispatching._threads if thread.is_alive()] == []


def test_a_broker_outage_delays_messages_and_keeps_no_lease_from_being_reaped(tmp_path: Path) -> None:
    with valkey() as (url, server):
        settings = Settings(home=tmp_path, broker_url=url, sweep_seconds=0.1)
        database = jobs.open_database(settings.database_url.get_secret_value())
        expired = jobs.submit(database, limits={"max_attempts": 1})
        dispatching = Dispatcher(database, settings)
        assert dispatching.sweep()
        with database.writing() as session:
            leases.claim(session, expired, "worker", 0.001)
        server.stop()
        dispatching.start()
        try:
            waiting = jobs.submit(database)
            jobs.wait_for_state(database, expired, "failed")
            assert jobs.outbox(database) == 1
            server.start()
            jobs.wait_until(lambda: jobs.outbox(database) == 0, 120, "the message")  # the pauses between tries grow to half a minute
        finally:
            dispatching.stop()
        assert waiting in received(settings)
        database.dispose()


def test_a_broker_that_does_not_answer_is_given_up_soon(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", free_port()), backlog=1) as silent:
        settings = Settings(home=tmp_path, broker_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        began = time.monotonic()
        with pytest.raises(Exception, match=r"(?i)timeout|timed out"):
            queue.publish(settings, "job_1")
        assert time.monotonic() - began < 60


def test_a_broker_that_hangs_keeps_no_lease_from_being_reaped(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", free_port()), backlog=1) as silent:
        settings = Settings(home=tmp_path, broker_url=f"redis://127.0.0.1:{silent.getsockname()[1]}/0", sweep_seconds=0.1)
        database = jobs.open_database(settings.database_url.get_secret_value())
        ids = [jobs.submit(database, limits={"max_attempts": 1}) for _ in range(2)]
        dispatching = Dispatcher(database, settings)
        dispatching.start()
        try:
            for job_id in ids:
                with database.writing() as session:
                    leases.claim(session, job_id, "worker", 0.001)
                jobs.wait_for_state(database, job_id, "failed", seconds=10)  # less than one try at the broker takes
        finally:
            dispatching.stop()
            database.dispose()


def test_a_database_outage_is_survived(tmp_path: Path) -> None:
    with postgres() as (url, server):
        settings = Settings(home=tmp_path, database_url=url, sweep_seconds=0.1)
        database = jobs.open_database(url)
        dispatching = Dispatcher(database, settings)
        dispatching.start()
        try:
            server.stop()
            time.sleep(1)
            server.start()
            job_id = jobs.submit(database)
            jobs.wait_until(lambda: jobs.outbox(database) == 0, 120, "the message")  # the pauses between tries grow to half a minute
        finally:
            dispatching.stop()
            database.dispose()
        assert received(settings) == [job_id]


def test_alone_it_publishes_and_ends_on_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_HOME", str(tmp_path))
    settings = Settings()
    database = jobs.open_database(settings.database_url.get_secret_value())
    job_id = jobs.submit(database)
    with subprocess.Popen([sys.executable, "-m", "app.dispatcher"]) as process:
        try:
            jobs.wait_until(lambda: jobs.outbox(database) == 0, 120, "the message")  # the pauses between tries grow to half a minute
        finally:
            process.terminate()
        assert process.wait(60) == 0
    database.dispose()
    assert received(settings) == [job_id]


def test_in_a_directory_each_message_goes_to_one_reader(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    for number in range(50):
        queue.publish(settings, f"job_{number}")
    with queue.make_celery(settings).connection_for_read() as connection:
        channels = [connection.channel() for _ in range(4)]
        taken: list[str] = []

        def take(channel: queue.Channel) -> None:
            try:
                while True:
                    taken.append(channel._get(queue.QUEUE)["headers"]["id"])
            except Empty:
                return

        threads = [threading.Thread(target=take, args=(channel,)) for channel in channels]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(taken) == len(set(taken)) == 50
