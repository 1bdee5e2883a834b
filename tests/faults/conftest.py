"""A service of real processes: the API's dispatcher in this process, Celery workers as subprocesses, SQLite and files or Postgres and Valkey."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select, update

from app.database import Database, db_now
from app.dispatcher import Dispatcher
from app.models import Job, Worker
from app.processes import dies_with
from app.queues.repository import live_workers
from app.settings import Settings
from tests import jobs

SERVICES = ["sqlite and files", "postgres and valkey"]
# For tests in which no lease may run out by itself: a machine may stall for longer than a short one.
LASTING_LEASE = {"ESPALIER_LEASE_SECONDS": "120", "ESPALIER_BEAT_SECONDS": "0.5", "ESPALIER_SWEEP_SECONDS": "0.2", "ESPALIER_REPUBLISH_SECONDS": "3"}


class Service:
    """Starts workers, knows their processes, and ends what is left of them."""

    def __init__(self, settings: Settings, environment: dict[str, str], database: Database, models: Path) -> None:
        self.settings = settings
        self.database = database
        self.models = models
        self._environment = environment
        self._workers: list[subprocess.Popen[bytes]] = []

    def model(self, **behaviour: Any) -> str:
        """A model on which the stand-in engine behaves so."""
        name = f"model-{len(list(self.models.iterdir()))}"
        (self.models / name).mkdir()
        (self.models / name / "behaviour.json").write_text(json.dumps(behaviour))
        return name

    def submit(self, **recipe: Any) -> str:
        return jobs.submit(self.database, **recipe)

    def start_worker(self, app: str = "tests.faults.worker", *options: str, **settings: str) -> subprocess.Popen[bytes]:
        with (self.settings.home / "worker.log").open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", app, "worker", *options, "-c", "1", "-l", "INFO", "--without-mingle", "--without-gossip"],
                env=self._environment | {f"ESPALIER_{name.upper()}": value for name, value in settings.items()},
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=dies_with(os.getpid()),  # noqa: PLW1509  it makes one system call
            )
        self._workers.append(worker)
        return worker

    def engines(self, worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """The engines, real or stand-in, that run below a worker."""
        return [process for process in family(worker) if any(part in ("tests.faults.engine", "worker.pipeline") for part in command(process))]

    def kill_tree(self, worker: subprocess.Popen[bytes]) -> None:
        """The whole of it at once, as when the machine is lost."""
        processes = family(worker)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.suspend()  # none may notice the end of another
        for process in [*processes, *family(worker)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        worker.wait()

    def put_to_sleep(self, worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Stop all of its processes, none in the middle of a SQLite transaction: that would keep all others from writing until it wakes."""
        processes = family(worker)
        with self.database.writing() as session:
            session.execute(select(1))
            for process in processes:
                process.suspend()
            jobs.wait_until(lambda: {process.status() for process in processes} == {psutil.STATUS_STOPPED}, 60, "the stop", pause=0.01)
        return processes

    def workers(self) -> list[Worker]:
        """The live ones, in the order of their start."""
        with self.database.reading() as session:
            return list(live_workers(session, self.settings.lease_seconds))

    def work_directories(self) -> list[str]:
        return sorted(path.name for path in self.settings.work_dir.glob("*"))

    def stored(self, job_id: str = "*") -> set[str]:
        """The attempts (job/token) of a job, or of all, under which the local store holds files."""
        objects = self.settings.home / "objects"
        folders = [Path(folder).relative_to(objects).parts for folder, _, files in os.walk(objects) if files]  # a glob fails where a folder goes meanwhile
        return {"/".join(parts[2:4]) for parts in folders if parts[1:2] == ("jobs",) and job_id in ("*", parts[2])}

    def expire(self, job_id: str) -> None:
        """Let the lease of a lost worker run out now."""
        with self.database.writing() as session:
            session.execute(update(Job).where(Job.id == job_id).values(lease_until=db_now(-1)))

    def close(self) -> None:
        for worker in self._workers:
            if worker.poll() is None:
                self.kill_tree(worker)


def family(worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
    process = psutil.Process(worker.pid)
    return [process, *process.children(recursive=True)]


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(params=SERVICES)
def servers(request: pytest.FixtureRequest) -> dict[str, str]:
    """The URLs of the database and the broker, as settings in the environment."""
    if request.param == SERVICES[0]:
        return {}
    database, broker = request.getfixturevalue("postgres_database"), request.getfixturevalue("redis_database")
    return {"ESPALIER_DATABASE_URL": database, "ESPALIER_BROKER_URL": broker}


@pytest.fixture
def lease() -> dict[str, str]:
    """Short leases; a test that needs the defaults overrides this fixture by a parameter."""
    return {"ESPALIER_LEASE_SECONDS": "4", "ESPALIER_BEAT_SECONDS": "0.5", "ESPALIER_SWEEP_SECONDS": "0.2", "ESPALIER_REPUBLISH_SECONDS": "3"}


@pytest.fixture
def service(tmp_path: Path, servers: dict[str, str], lease: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    models, home = tmp_path / "models", tmp_path / "home"
    models.mkdir()
    home.mkdir()
    chosen = {"ESPALIER_HOME": str(home), "ESPALIER_MODEL_ROOTS": json.dumps([str(models)]), "ESPALIER_HUB": "false", "ESPALIER_CANCEL_GRACE_SECONDS": "2"}
    chosen |= {"ESPALIER_KEEP_WORK_SECONDS": "0"}
    chosen |= servers | lease | {"OMP_NUM_THREADS": "1"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    database = jobs.open_database(settings.database_url.get_secret_value())
    dispatcher = Dispatcher(database, settings)
    dispatcher.start()
    running = Service(settings, dict(os.environ), database, models)
    try:
        yield running
    finally:
        running.close()
        dispatcher.stop()
        database.dispose()
        log = home / "worker.log"
        if log.exists():
            sys.stdout.write(log.read_text(errors="replace")[-8000:])
