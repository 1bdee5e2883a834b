"""Two releases on one database: what the old one wrote and sent before this schema still works beside the new one, and no one waits long for the migration.

The old release is that of revision OLD. Its statements are recorded here; where the repository's history has it, its own processes run as well.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.types.json import Jsonb
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from app.database import Database, make_engine
from app.jobs.lease import reap
from app.processes import dies_with
from migrations import is_at_head, migrate
from tests import jobs
from tests.models import make_checkpoint
from tests.servers import free_port

OLD = "f39a13ea9b52e1d687963c7d5f9e70b958b9d1cd"
OLD_SCHEMA = "0001"
ROOT = Path(__file__).parents[2]
LOCK_SECONDS = 3  # for which a migration waits for a lock, and all others behind it

# ------------------------------------------------------------- what OLD executed

OLD_INSERT = """
    INSERT INTO jobs (id, tenant_id, state, model, method, recipe, progress, attempt, max_attempts, lease_token, version, last_event, created_at, updated_at)
    VALUES (%(id)s, %(tenant)s, 'queued', 'tiny', 'magnitude', %(recipe)s, '{}', 0, 3, 0, 1, 1, clock_timestamp(), clock_timestamp())"""
OLD_OUTBOX = "INSERT INTO outbox (job_id, tenant_id, created_at) VALUES (%(id)s, %(tenant)s, clock_timestamp())"
OLD_CLAIM = """
    UPDATE jobs SET state = 'running', phase = NULL, progress = '{}', attempt = attempt + 1, lease_owner = 'old:1', lease_token = lease_token + 1,
        lease_until = clock_timestamp() + interval '45 seconds', started_at = coalesce(started_at, clock_timestamp())
    WHERE id = %(id)s AND state = 'queued' RETURNING lease_token"""
OLD_BEAT = """
    UPDATE jobs SET phase = 'prune', progress = '{"fraction": 0.5}', lease_until = clock_timestamp() + interval '45 seconds',
        version = version + 1, updated_at = clock_timestamp()
    WHERE id = %(id)s AND lease_token = %(token)s AND state IN ('running', 'cancelling') RETURNING state"""
OLD_FINISH = """
    UPDATE jobs SET state = 'succeeded', phase = NULL, progress = '{"fraction": 1.0}', report = '{"old": true}', error = NULL, lease_owner = NULL,
        lease_until = NULL, artifact_prefix = %(prefix)s, finished_at = clock_timestamp()
    WHERE id = %(id)s AND lease_token = %(token)s AND state = 'running' RETURNING state"""
OLD_ARTIFACT = "INSERT INTO artifacts (job_id, path, tenant_id, role, bytes, sha256) VALUES (%(id)s, 'report.json', %(tenant)s, 'report', 3, 'ab')"
OLD_COUNT = """
    UPDATE jobs SET version = version + 1, last_event = last_event + 1, updated_at = clock_timestamp()
    WHERE id = %(id)s AND tenant_id = %(tenant)s RETURNING last_event"""
OLD_EVENT = """
    INSERT INTO job_events (job_id, sequence, tenant_id, kind, message, data, created_at)
    VALUES (%(id)s, %(sequence)s, %(tenant)s, %(kind)s, 'as OLD told it', '{}', clock_timestamp())"""


@dataclass
class OldRelease:
    """Its statements, in its transactions."""

    url: str

    def submit(self) -> str:
        job = {"id": f"job_{time.time_ns():032x}", "tenant": jobs.TENANT}
        recipe = {"model": "tiny", "method": {"name": "magnitude"}, "sparsity": 0.5, "evaluation": None}
        with psycopg.connect(self.url) as connection:
            connection.execute(OLD_INSERT, job | {"recipe": Jsonb(recipe)})
            connection.execute(OLD_EVENT, job | {"sequence": 1, "kind": "queued"})
            connection.execute(OLD_OUTBOX, job)
        return job["id"]

    def claim(self, job_id: str) -> dict[str, Any]:
        """-> the job, its tenant and the token, as the other statements want them."""
        lease = {"id": job_id, "tenant": jobs.TENANT}
        with psycopg.connect(self.url) as connection:
            row = connection.execute(OLD_CLAIM, lease).fetchone()
            assert row is not None
            self._tell(connection, lease, "claimed")
        return lease | {"token": row[0], "prefix": f"{jobs.TENANT}/jobs/{job_id}/a{row[0]}/"}

    def beat(self, lease: dict[str, Any]) -> None:
        with psycopg.connect(self.url) as connection:
            assert connection.execute(OLD_BEAT, lease).fetchone() == ("running",)

    def finish(self, lease: dict[str, Any]) -> None:
        with psycopg.connect(self.url) as connection:
            assert connection.execute(OLD_FINISH, lease).fetchone() == ("succeeded",)
            connection.execute(OLD_ARTIFACT, lease)
            self._tell(connection, lease, "succeeded")

    def _tell(self, connection: psycopg.Connection[Any], lease: dict[str, Any], kind: str) -> None:
        row = connection.execute(OLD_COUNT, lease).fetchone()
        assert row is not None
        connection.execute(OLD_EVENT, lease | {"sequence": row[0], "kind": kind})


@pytest.fixture
def database(postgres_database: str) -> Iterator[Database]:
    opened = jobs.open_database(postgres_database)
    yield opened
    opened.dispose()


def test_the_old_worker_runs_what_the_new_api_submits(database: Database, postgres_database: str) -> None:
    old, job_id = OldRelease(postgres_database), jobs.submit(database)
    lease = old.claim(job_id)
    old.beat(lease)
    with database.writing() as session:
        assert reap(session) == []
    assert jobs.get(database, job_id).state == "running"
    old.finish(lease)
    job = jobs.get(database, job_id)
    assert (job.state, job.attempt, job.report, job.artifact_prefix) == ("succeeded", 1, {"old": True}, lease["prefix"])
    assert jobs.events(database, job_id) == ["queued", "claimed", "succeeded"]


def test_the_new_reaper_takes_back_what_the_old_worker_lost(database: Database, postgres_database: str) -> None:
    job_id = OldRelease(postgres_database).submit()
    OldRelease(postgres_database).claim(job_id)
    with database.writing() as session:
        session.execute(text("UPDATE jobs SET lease_until = clock_timestamp() - interval '1 second'"))
    with database.writing() as session:
        assert reap(session) == [job_id]
    job = jobs.get(database, job_id)
    assert (job.state, job.queue, job.attempt) == ("queued", "default", 1)
    assert OldRelease(postgres_database).claim(job_id)["token"] == 2


# ------------------------------------------------------------------ the migration


@pytest.fixture
def old_database(postgres_database: str) -> str:
    """As OLD left it, with many jobs that ended and one that it works on."""
    migrate(postgres_database, OLD_SCHEMA)
    with psycopg.connect(postgres_database) as connection:
        connection.execute("INSERT INTO tenants (id, name, created_at) VALUES (%s, 'one', clock_timestamp())", [jobs.TENANT])
        connection.execute(
            """
            INSERT INTO jobs (id, tenant_id, state, model, method, recipe, progress, attempt, max_attempts, lease_token, version, last_event,
                created_at, updated_at)
            SELECT 'job_' || n, %s, 'succeeded', 'tiny', 'magnitude', '{"model": "tiny"}', '{}', 1, 3, 1, 9, 9, clock_timestamp(), clock_timestamp()
            FROM generate_series(1, 20000) AS n""",
            [jobs.TENANT],
        )
    return postgres_database


def test_a_worker_that_beats_hardly_notices_the_migration(old_database: str) -> None:
    old = OldRelease(old_database)
    lease = old.claim(old.submit())
    waits: list[float] = []
    migrated = threading.Event()

    def beat() -> None:
        while not migrated.is_set():
            began = time.monotonic()
            old.beat(lease)
            waits.append(time.monotonic() - began)

    worker = threading.Thread(target=beat)
    worker.start()
    try:
        migrate(old_database)
    finally:
        migrated.set()
        worker.join()
    old.finish(lease)
    assert max(waits) < LOCK_SECONDS, f"a beat took {max(waits):.1f} s"


def test_a_migration_that_can_not_have_its_lock_gives_up(old_database: str) -> None:
    """Whoever comes after it waits behind it, so it waits for seconds only; it leaves nothing, and the next try succeeds."""
    old = OldRelease(old_database)
    lease = old.claim(old.submit())
    outcome: list[Exception] = []

    def try_to_migrate() -> None:
        try:
            migrate(old_database)
        except OperationalError as error:
            outcome.append(error)

    with psycopg.connect(old_database) as reader:
        reader.execute("SELECT count(*) FROM jobs")  # a backup, say: it holds its lock to the end of its transaction
        migration = threading.Thread(target=try_to_migrate)
        migration.start()
        jobs.wait_until(lambda: waiting_for_locks(old_database), what="the migration's wait")
        began = time.monotonic()
        old.beat(lease)
        assert time.monotonic() - began < LOCK_SECONDS + 20
        migration.join(120)
    assert "lock timeout" in str(outcome[0])
    with psycopg.connect(old_database) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (OLD_SCHEMA,)
    migrate(old_database)
    old.finish(lease)


def test_an_api_is_ready_on_a_later_schema_and_not_on_an_older_one(old_database: str) -> None:
    engine = make_engine(old_database)
    with engine.connect() as connection:
        assert not is_at_head(connection)
        migrate(old_database)
        assert is_at_head(connection)
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        assert is_at_head(connection)
    engine.dispose()


def waiting_for_locks(url: str) -> bool:
    with psycopg.connect(url) as connection:
        return bool(connection.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchall())


# ------------------------------------------------------------- the old processes


@dataclass
class Release:
    """One release's processes, on servers that it shares with another."""

    tree: Path
    environment: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    url: str = ""

    def run(self, *arguments: str) -> str:
        return subprocess.run([sys.executable, "-m", *arguments], cwd=self.tree, env=self.environment, check=True, capture_output=True, text=True).stdout

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (Path(self.environment["ESPALIER_HOME"]) / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=self.tree,  # found before what is installed
                env=self.environment,
                stdout=log,
                stderr=log,
                preexec_fn=dies_with(os.getpid()),  # noqa: PLW1509  it makes one system call
            )
        self.processes.append(process)
        return process

    def start_api(self) -> None:
        port = free_port()
        self.start("uvicorn", "app.main:create_app", "--factory", "--port", str(port), "--no-access-log", "--timeout-graceful-shutdown", "2")
        self.url = f"http://127.0.0.1:{port}"
        jobs.wait_until(self._answers, 120, "the API")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/livez", timeout=2).is_success
        except httpx.TransportError:
            return False

    def start_worker(self) -> subprocess.Popen[bytes]:
        return self.start("celery", "-A", "tests.faults.worker", "worker", "-Q", "prune", "-c", "1", "-l", "INFO", "--without-mingle", "--without-gossip")

    def submit(self, model: str) -> str:
        body = {"model": model, "method": "magnitude", "sparsity": 0.5, "evaluation": None}
        answer = httpx.post(f"{self.url}/v1/jobs", json=body, headers=self._headers, timeout=60)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def get(self, job_id: str) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/v1/jobs/{job_id}", headers=self._headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait_for(self, job_id: str, state: str) -> dict[str, Any]:
        jobs.wait_until(lambda: self.get(job_id)["state"] in (state, "failed"), 120, state, pause=0.2)
        job = self.get(job_id)
        assert job["state"] == state, job
        return job

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.environment['ESPALIER_API_KEY']}"}


@pytest.fixture
def releases(tmp_path: Path, postgres_database: str, redis_database: str) -> Iterator[tuple[Release, Release]]:
    """The old one, migrated, and the new one; nothing runs yet."""
    history = subprocess.run(["git", "archive", OLD], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(history)) as archive:
        archive.extractall(tmp_path / "old", filter="data")
    (tmp_path / "home").mkdir()
    for name, steps in {"short": 2, "long": 30, "longer": 80}.items():
        make_checkpoint(tmp_path / "models" / name, "llama")
        (tmp_path / "models" / name / "behaviour.json").write_text(json.dumps({"steps": steps, "pause": 0.1}))
    environment = {
        "ESPALIER_DATABASE_URL": postgres_database,
        "ESPALIER_BROKER_URL": redis_database,
        "ESPALIER_HOME": str(tmp_path / "home"),
        "ESPALIER_MODEL_ROOTS": json.dumps([str(tmp_path / "models")]),
        "ESPALIER_HUB": "false",
        "ESPALIER_SWEEP_SECONDS": "0.2",
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
    }
    migrate(postgres_database, OLD_SCHEMA)
    old = Release(tmp_path / "old", environment)
    environment["ESPALIER_API_KEY"] = old.run("app.auth", "create-key", "--tenant", "one").strip()
    new = Release(ROOT, environment)
    try:
        yield old, new
    finally:
        processes = (*old.processes, *new.processes)
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        sys.stdout.write((tmp_path / "home" / "log").read_text(errors="replace")[-8000:])


def in_history(revision: str) -> bool:
    if shutil.which("git") is None:
        return False
    return subprocess.run(["git", "cat-file", "-e", f"{revision}^{{commit}}"], cwd=ROOT, check=False, stderr=subprocess.DEVNULL).returncode == 0


if in_history(OLD):  # a clone may have none; what the statements above show holds there too

    @pytest.mark.timeout(600)
    def test_an_upgrade_under_load(releases: tuple[Release, Release], postgres_database: str) -> None:
        """Old API and old worker, then the migration, the new API, the new worker: each job ends in its first attempt, whoever submitted and whoever ran it."""
        old, new = releases
        old.start_api()
        old_worker = old.start_worker()
        before = old.submit("long")
        old.wait_for(before, "running")

        migrate(postgres_database)
        new.start_api()
        from_new = new.submit("short")
        drained = old.submit("longer")
        assert new.wait_for(before, "succeeded")["attempt"] == 1
        assert new.wait_for(from_new, "succeeded")["attempt"] == 1
        assert old.get(from_new)["state"] == "succeeded"

        new.wait_for(drained, "running")
        old_worker.send_signal(signal.SIGTERM)
        assert old_worker.wait(60) == 0
        assert new.wait_for(drained, "queued")["attempt"] == 0
        from_old = old.submit("short")
        new.start_worker()
        for job_id in (drained, from_old):
            assert new.wait_for(job_id, "succeeded")["attempt"] == 1
            assert old.get(job_id)["state"] == "succeeded"
        new.run("worker.health")
