"""Many jobs over three workers, while whatever runs is killed and the broker forgets, doubles and shuffles: nothing accepted is lost, each job has one result.

`make soak` makes it longer: ESPALIER_STORM_JOBS, _SECONDS (for which faults are injected) and _SEED; it prints what was injected.
"""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
import redis
from sqlalchemy import func, select

from app.auth import create_key
from app.models import FINISHED, Artifact, Job, OutboxMessage
from app.processes import dies_with
from app.queue import QUEUE
from tests import jobs
from tests.faults.conftest import Service
from tests.servers import Server, free_port, valkey

JOBS = int(os.environ.get("ESPALIER_STORM_JOBS", "20"))
SECONDS = float(os.environ.get("ESPALIER_STORM_SECONDS", "8"))
SEED = int(os.environ.get("ESPALIER_STORM_SEED") or random.SystemRandom().randrange(10**6))
WORKERS = 3
MAX_ATTEMPTS = 10
CONTENT = b"weights"  # that the stand-in engine writes
SUBMISSION = {"method": "magnitude", "sparsity": 0.5, "evaluation": None, "limits": {"max_attempts": MAX_ATTEMPTS}}


@pytest.fixture
def broker_server() -> Iterator[tuple[str, Server]]:
    with valkey() as running:
        yield running


@pytest.fixture
def servers(postgres_database: str, broker_server: tuple[str, Server]) -> dict[str, str]:
    return {"ESPALIER_DATABASE_URL": postgres_database, "ESPALIER_BROKER_URL": broker_server[0]}


@dataclass
class Storm:
    """The processes, and what is done to them."""

    service: Service
    broker: Server
    broker_url: str
    random: random.Random
    port: int = field(default_factory=free_port)
    coming: list[Callable[[], str]] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    others: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def keep_running(self) -> None:
        """Start what does not run."""
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while len(self.workers) < WORKERS:
            self.workers.append(self.service.start_worker())
        commands = {"API": ("uvicorn", "app.main:create_app", "--factory", "--no-access-log", "--port", str(self.port)), "dispatcher": ("app.dispatcher",)}
        for name, command in commands.items():
            if name not in self.others or self.others[name].poll() is not None:
                self.others[name] = subprocess.Popen(
                    [sys.executable, "-m", *command],
                    env=os.environ | {"ESPALIER_MODEL_ROOTS": "[]", "ESPALIER_HUB": "true"},  # to them the model is one of the hub
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    preexec_fn=dies_with(os.getpid()),  # noqa: PLW1509  it makes one system call
                )

    def close(self) -> None:
        for process in self.others.values():
            process.kill()
            process.wait()

    def inject(self) -> None:
        """One fault; all of them come before any comes again."""
        if not self.coming:
            self.coming = [
                self.kill_worker,
                self.kill_engine,
                self.kill_engine,
                self.kill_other,
                self.lose_broker,
                self.double_messages,
                self.drop_messages,
                self.shuffle_messages,
            ]
            self.random.shuffle(self.coming)
        self.injected[self.coming.pop()()] += 1

    def kill_worker(self) -> str:
        worker = self.random.choice(self.workers)
        if worker.poll() is None:
            self.service.kill_tree(worker)
        return "worker killed"

    def kill_engine(self) -> str:
        engines = [engine for worker in self.workers if worker.poll() is None for engine in self.service.engines(worker)]
        if not engines:
            return "no engine to kill"
        try:
            self.random.choice(engines).kill()
        except psutil.NoSuchProcess:
            return "no engine to kill"
        return "engine killed"

    def kill_other(self) -> str:
        name = self.random.choice(sorted(self.others))
        self.others[name].kill()
        self.others[name].wait()
        return f"{name} killed"

    def lose_broker(self) -> str:
        self.broker.stop()
        time.sleep(self.random.random())
        self.broker.start()
        return "broker restarted empty"

    def double_messages(self) -> str:
        with redis.Redis.from_url(self.broker_url) as client:
            for message in client.lrange(QUEUE, 0, -1):
                client.lpush(QUEUE, message)
        return "messages doubled"

    def drop_messages(self) -> str:
        with redis.Redis.from_url(self.broker_url) as client:
            client.ltrim(QUEUE, 0, int(client.llen(QUEUE)) // 2 - 1)
        return "half of the messages dropped"

    def shuffle_messages(self) -> str:
        with redis.Redis.from_url(self.broker_url) as client:
            messages = list(client.lrange(QUEUE, 0, -1))
            self.random.shuffle(messages)
            if messages:
                client.delete(QUEUE)
                client.rpush(QUEUE, *messages)
        return "messages shuffled"


def test_whatever_dies_each_accepted_job_ends_with_one_result(service: Service, broker_server: tuple[str, Server]) -> None:
    sys.stdout.write(f"seed {SEED}\n")
    storm = Storm(service, broker_server[1], broker_server[0], random.Random(SEED))
    with service.database.writing() as session:
        key = create_key(session, "one")
    model = service.model(steps=3, pause=0.1)
    accepted: list[str] = []
    try:
        storm.keep_running()
        jobs.wait_until(lambda: len(service.workers()) == WORKERS, 60, "the workers")
        with httpx.Client(base_url=f"http://127.0.0.1:{storm.port}", headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=10) as client:
            while not accepted:  # the API starts
                submit(client, model, accepted)
            began = next_fault = time.monotonic()
            while len(accepted) < JOBS or time.monotonic() - began < SECONDS:
                if len(accepted) < JOBS:
                    submit(client, model, accepted)
                else:
                    time.sleep(0.1)
                if next_fault < time.monotonic() < began + SECONDS:
                    storm.inject()
                    storm.keep_running()
                    next_fault = time.monotonic() + storm.random.uniform(0.2, 1.5)
        storm.keep_running()
        jobs.wait_until(lambda: not unfinished(service), 60 + 2 * JOBS, "the end of all jobs", pause=0.5)
        jobs.wait_until(lambda: not service.work_directories(), 60, "the clean-up", pause=0.5)
    finally:
        storm.close()
        sys.stdout.write(f"injected {dict(storm.injected)}, jobs {len(accepted)}, seed {SEED}\n")
    check(service, accepted)


def submit(client: httpx.Client, model: str, accepted: list[str]) -> None:
    """A job with a key of its own, sent until it is answered, as a client does."""
    headers = {"Idempotency-Key": f"job-{len(accepted)}"}
    try:
        answer = client.post("/v1/jobs", json=SUBMISSION | {"model": model}, headers=headers)
    except httpx.TransportError:
        time.sleep(0.2)
        return
    if answer.status_code in (429, 503):
        time.sleep(0.2)
        return
    assert answer.status_code == 202, answer.text
    accepted.append(answer.json()["id"])


def unfinished(service: Service) -> int:
    with service.database.reading() as session:
        return session.scalar(select(func.count()).where(Job.state.not_in(FINISHED))) or 0


def check(service: Service, accepted: list[str]) -> None:
    """The promise, over all that was written down."""
    with service.database.reading() as session:
        rows = {job.id: job for job in session.scalars(select(Job))}
        assert sorted(rows) == sorted(accepted)  # none is lost, and none is there twice
        for job_id, job in rows.items():
            kinds = jobs.events(service.database, job_id)  # numbered without a gap
            assert len(kinds) == job.last_event
            assert job.attempt <= MAX_ATTEMPTS
            assert kinds.count("claimed") == job.lease_token
            assert sum(kinds.count(state) for state in FINISHED) == 1
            assert kinds[-1] == job.state
            files = session.scalars(select(Artifact).where(Artifact.job_id == job_id)).all()
            if job.state == "failed":  # by as many deaths as it may have
                assert (job.attempt, job.error["code"] if job.error else None) == (MAX_ATTEMPTS, "worker_lost")
                assert not files
                continue
            assert job.state == "succeeded"
            assert job.artifact_prefix == f"{job.tenant_id}/jobs/{job_id}/a{job.lease_token}/"
            assert {file.path for file in files} == {"checkpoint/model.safetensors", "report.json"}
            for file in files:
                content = (service.settings.home / "objects" / job.artifact_prefix / file.path).read_bytes()
                assert (len(content), hashlib.sha256(content).hexdigest()) == (file.bytes, file.sha256)
            assert (service.settings.home / "objects" / job.artifact_prefix / "checkpoint/model.safetensors").read_bytes() == CONTENT
        assert not session.scalar(select(func.count()).select_from(OutboxMessage))


def test_a_worker_that_could_not_acknowledge_a_message_takes_the_next(service: Service, broker_server: tuple[str, Server]) -> None:
    job_id = service.submit(model=service.model(steps=4, pause=0.5))
    service.start_worker("tests.faults.worker", "--without-heartbeat")  # which would wait for the broker before the acknowledgement is tried
    jobs.wait_until(lambda: jobs.get(service.database, job_id).progress.get("fraction", 0) > 0, 60, "the first step")
    broker_server[1].stop()
    jobs.wait_for_state(service.database, job_id, "succeeded")
    log = service.settings.home / "worker.log"
    jobs.wait_until(lambda: "Couldn't ack" in log.read_text(errors="replace"), 30, "the acknowledgement that fails")
    broker_server[1].start()
    for _ in range(2):
        job_id = service.submit(model=service.model())
        assert jobs.wait_for_state(service.database, job_id, "succeeded").attempt == 1


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_worker_whose_clock_is_wrong_works_as_any_other(service: Service, hours: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "skewed"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CLOCK.format(seconds=3600 * hours))
    service._environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(Path.cwd())])
    ids = [service.submit(model=service.model(steps=12, pause=0.5)), service.submit(model=service.model())]
    skewed = service.start_worker()
    jobs.wait_until(lambda: jobs.get(service.database, ids[0]).progress.get("fraction", 0) > 0, 60, "the first step")
    assert str(folder) in psutil.Process(skewed.pid).environ()["PYTHONPATH"]
    del service._environment["PYTHONPATH"]
    service.start_worker()  # whose clock is right
    for job_id in ids:
        job = jobs.wait_for_state(service.database, job_id, "succeeded")
        assert (job.attempt, job.lease_token) == (1, 1)  # six seconds are longer than a lease, which was held all the time
        assert job.started_at is not None
        assert job.finished_at is not None
        assert 0 <= (job.finished_at - job.created_at).total_seconds() < 120
        assert job.ran_seconds < 120
    assert len(service.workers()) == 2
    service.kill_tree(skewed)


CLOCK = """
import datetime, time
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + {seconds}
time.time_ns = lambda: _time_ns() + {seconds} * 10**9
"""
