"""Results past their bounds, and stored files that no job has use for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import select, text, update

from app.database import Database, db_now
from app.exceptions import UnavailableError
from app.jobs.lease import Lease, StoredFile, claim, finish, reap, release
from app.models import Artifact, AuditEntry, Job, Tenant
from app.retention import DAY, keep_tidy, tidy
from app.settings import Settings
from app.storage import CHUNK_BYTES, Store, open_store
from tests import jobs
from tests.app.conftest import Api
from tests.servers import S3


@dataclass
class Service:
    database: Database
    store: Store
    settings: Settings

    def start(self, tenant: str = jobs.TENANT) -> Lease:
        return self.start_again(jobs.submit(self.database, tenant=tenant))

    def start_again(self, job_id: str) -> Lease:
        with self.database.writing() as session:
            lease = claim(session, job_id, "test", 600)
        assert lease is not None
        return lease

    def put(self, key: str, content: bytes = b"x") -> None:
        path = self.settings.home / "content"
        path.write_bytes(content)
        self.store.put_file(key, path)

    def succeed(self, lease: Lease, content: bytes = b"x") -> None:
        self.put(f"{lease.artifact_prefix}report.json", content)
        with self.database.writing() as session:
            finish(session, lease, "succeeded", report={"a": 1}, files=[StoredFile("report.json", "report", len(content), "00")])

    def result(self, size: int = 1, *, days_old: float = 0, tenant: str = jobs.TENANT) -> str:
        lease = self.start(tenant)
        self.succeed(lease, b"x" * size)
        if days_old:
            with self.database.writing() as session:
                session.execute(update(Job).where(Job.id == lease.job_id).values(finished_at=db_now(-days_old * DAY)))
        return lease.job_id

    def expire_lease(self, lease: Lease) -> None:
        with self.database.writing() as session:
            session.execute(update(Job).where(Job.id == lease.job_id).values(lease_until=db_now(-1)))
        with self.database.writing() as session:
            assert reap(session) == [lease.job_id]

    def bound(self, tenant: str, most: int) -> None:
        with self.database.writing() as session:
            session.execute(update(Tenant).where(Tenant.id == tenant).values(max_stored_bytes=most))

    def tidy(self, **settings: Any) -> None:
        tidy(self.database, self.store, self.settings.model_copy(update={"orphan_seconds": 0} | settings), threading.Event())

    def stored(self, tenant: str = jobs.TENANT) -> set[str]:
        """Keys without the tenant."""
        return {entry.key.removeprefix(f"{tenant}/jobs/") for page in self.store.pages(f"{tenant}/jobs") for entry in page}

    def kept(self) -> set[str]:
        """The jobs that have files."""
        return {key.partition("/")[0] for key in self.stored()}


@pytest.fixture(params=["sqlite and files", "postgres and s3"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    settings = Settings(home=tmp_path)
    if request.param == "postgres and s3":
        s3: S3 = request.getfixturevalue("s3")
        values = {name.removeprefix("ESPALIER_").lower(): value for name, value in s3.environment.items()}
        values |= {"store_url": f"{s3.url}/{tmp_path.name}", "database_url": request.getfixturevalue("postgres_database")}
        settings = Settings.model_validate({"home": tmp_path, **values})
    database = jobs.open_database(settings.database_url.get_secret_value())
    store = open_store(settings)
    yield Service(database, store, settings)
    store.delete_prefix(f"{jobs.TENANT}/")
    database.dispose()


@contextmanager
def start(service: Service, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process with the service's settings, killed at the end."""
    names = ("home", "database_url", "store_url", "s3_endpoint", "s3_region", "s3_access_key", "s3_secret_key")
    values = {name: getattr(service.settings, name) for name in names}
    chosen = {f"ESPALIER_{name.upper()}": value.get_secret_value() if isinstance(value, SecretStr) else str(value) for name, value in values.items()}
    process = subprocess.Popen([sys.executable, *arguments], env={**os.environ, **chosen, **environment}, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


# ------------------------------------------------------------------- entries


def test_old_entries_of_the_audit_log_are_deleted(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.retention.BATCH", 2)
    with service.database.writing() as session:
        for days in (400, 370, 366, 364, 30, 0):
            who = {"tenant_id": jobs.TENANT, "key_id": "key_test", "target": "job_1", "request_id": ""}
            session.add(AuditEntry(action=f"{days} days ago", **who, created_at=datetime.now(UTC) - timedelta(days=days)))
            session.flush()  # in their order

    def left() -> list[str]:
        with service.database.reading() as session:
            return list(session.scalars(select(AuditEntry.action).order_by(AuditEntry.id)))

    service.tidy(audit_days=0)
    assert len(left()) == 6
    service.tidy()
    assert left() == ["364 days ago", "30 days ago", "0 days ago"]
    service.tidy(audit_days=7)
    assert left() == ["0 days ago"]


# ------------------------------------------------------------------- results


def test_old_results_lose_their_files_and_keep_their_row(service: Service) -> None:
    old, new = service.result(5, days_old=31), service.result(7, days_old=29)
    service.tidy()
    assert service.kept() == {old, new}, "there is no bound by default"
    service.tidy(retention_days=30)
    assert service.kept() == {new}
    job = jobs.get(service.database, old)
    assert (job.state, job.report, job.artifact_prefix, job.stored_bytes) == ("succeeded", {"a": 1}, None, 0)
    assert jobs.events(service.database, old)[-1] == "artifacts_deleted"
    assert jobs.messages(service.database, old)[-1] == "The files of the result were deleted: it is older than 30 days."
    service.tidy(retention_days=30)
    assert jobs.events(service.database, old).count("artifacts_deleted") == 1
    assert jobs.get(service.database, new).stored_bytes == 7


def test_the_oldest_results_go_when_a_tenant_has_too_many_bytes(service: Service) -> None:
    other = jobs.add_tenant(service.database, "other")
    ages = [5, 4, 3, 2, 1]
    mine = [service.result(100, days_old=age) for age in ages]
    service.result(1000, tenant=other)
    service.tidy(max_stored_bytes=500)
    assert service.kept() == set(mine)
    service.tidy(max_stored_bytes=499)
    assert service.kept() == set(mine[1:])
    service.bound(jobs.TENANT, 250)
    service.tidy(max_stored_bytes=499)
    assert service.kept() == set(mine[3:])
    service.bound(jobs.TENANT, 10)
    service.tidy()
    assert service.kept() == {mine[4]}, "the newest result stays"
    assert len(service.stored(other)) == 1
    service.store.delete_prefix(f"{other}/")


def test_many_results_are_given_up_in_batches(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.retention.BATCH", 2)
    for age in (5, 4, 3, 2, 1):
        service.result(days_old=age)
    service.tidy(retention_days=1)
    assert service.kept() == set()


def test_a_result_that_is_given_up_loses_its_files_whatever_fails_in_between(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = service.result(days_old=2)

    def fail(*_: object) -> None:
        raise UnavailableError("The object store does not answer.", code="store_unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(service.store, "delete_prefix", fail)
        with pytest.raises(UnavailableError):
            service.tidy(retention_days=1)
    assert jobs.get(service.database, job_id).artifact_prefix is None
    assert service.kept() == {job_id}
    service.tidy(retention_days=1)
    assert service.kept() == set()


def test_results_of_an_earlier_release_are_counted(service: Service) -> None:
    old, new = service.result(100, days_old=1), service.result(100)
    with service.database.writing() as session:
        session.execute(update(Job).values(stored_bytes=0))
    service.tidy(max_stored_bytes=150)
    assert service.kept() == {new}
    assert jobs.get(service.database, new).stored_bytes == 100
    assert jobs.get(service.database, old).stored_bytes == 0


def test_the_api_says_that_the_files_are_gone(api: Api, tmp_path: Path) -> None:
    job_id = api.succeed(tmp_path, {"report.json": b"{}", "checkpoint/config.json": b"{}"})
    with api.database.writing() as session:
        session.execute(update(Job).where(Job.id == job_id).values(finished_at=db_now(-2 * DAY)))
    assert api.get(f"/v1/jobs/{job_id}/artifacts").status_code == 200
    tidy(api.database, api.store, api.settings.model_copy(update={"retention_days": 1}), threading.Event())
    for path in ("artifacts", "artifacts/checkpoint/config.json", "checkpoint"):
        answer = api.get(f"/v1/jobs/{job_id}/{path}")
        assert (answer.status_code, answer.json()["code"]) == (410, "artifacts_expired")
        assert answer.headers["content-type"] == "application/problem+json"
    job = api.get(f"/v1/jobs/{job_id}").json()
    assert job["state"] == "succeeded"
    assert (job["links"]["artifacts"], job["links"]["checkpoint"]) == (None, None)
    assert job["links"]["report"] is not None
    with api.database.reading() as session:
        assert session.query(Artifact).filter(Artifact.job_id == job_id).count() == 2


# ------------------------------------------------------------------- orphans


def test_only_what_no_job_has_use_for_is_deleted(service: Service) -> None:
    """Every state a job may be in when the worker of one of its attempts is lost."""
    succeeded = service.start()
    service.put(f"{succeeded.prefix_of(1)}report.json")
    with service.database.writing() as session:
        release(session, succeeded, "why", charged=True)
    succeeded = service.start_again(succeeded.job_id)
    service.succeed(succeeded)
    service.put(f"{succeeded.prefix_of(3)}written-by-a-zombie")
    service.put(f"{jobs.TENANT}/jobs/{succeeded.job_id}/resume/state.json")

    failed = service.start()
    service.put(f"{failed.artifact_prefix}checkpoint/x")
    with service.database.writing() as session:
        finish(session, failed, "failed", error={"code": "x", "message": "x", "hint": ""})

    queued = service.start()
    service.put(f"{queued.artifact_prefix}checkpoint/x")
    service.put(f"{jobs.TENANT}/jobs/{queued.job_id}/resume/state.json")
    service.expire_lease(queued)

    running = service.start()
    service.put(f"{running.prefix_of(1)}checkpoint/x")
    service.expire_lease(running)
    running = service.start_again(running.job_id)
    service.put(f"{running.prefix_of(2)}checkpoint/x")
    service.put(f"{jobs.TENANT}/jobs/{running.job_id}/resume/state.json")

    service.put(f"{jobs.TENANT}/jobs/job_gone/a1/report.json")
    service.put("tenant_of_another_service/jobs/job_1/a1/report.json")
    service.put(f"{jobs.TENANT}/other/file")

    everything = service.stored()
    service.tidy(orphan_seconds=3600)
    assert service.stored() == everything, "young files are left alone"
    service.tidy()
    assert service.stored() == {
        f"{succeeded.job_id}/a2/report.json",
        f"{queued.job_id}/resume/state.json",
        f"{running.job_id}/a2/checkpoint/x",
        f"{running.job_id}/resume/state.json",
    }
    assert service.stored("tenant_of_another_service") == {"job_1/a1/report.json"}
    assert service.store.size(f"{jobs.TENANT}/other/file") == 1
    service.store.delete_prefix("tenant_of_another_service/")


def test_what_a_retry_goes_on_from_is_kept_for_its_time(service: Service) -> None:
    failed = service.start()
    service.put(f"{failed.resume_prefix}1/manifest.json")
    service.put(f"{failed.artifact_prefix}checkpoint/x")
    with service.database.writing() as session:
        finish(session, failed, "failed", error={"code": "x", "message": "x", "hint": ""})
        session.execute(update(Job).values(finished_at=db_now(-100)))
    service.tidy(keep_work_seconds=1000)
    assert service.stored() == {f"{failed.job_id}/resume/1/manifest.json"}
    service.tidy(keep_work_seconds=50)
    assert service.stored() == set()


def test_an_upload_that_was_killed_is_cleaned_up(service: Service) -> None:
    lease = service.start()
    out = service.settings.home / "out"
    (out / "checkpoint").mkdir(parents=True)
    (out / "report.json").write_text("{}")
    with (out / "checkpoint" / "model.safetensors").open("wb") as file:
        file.truncate(100 * CHUNK_BYTES)
    reached = "model.safetensors#" if service.settings.store_url.startswith("file:") else "report.json"
    with start(service, "-m", "worker.upload", str(out), lease.artifact_prefix, str(out / "manifest.json")):
        jobs.wait_until(lambda: any(reached in key for key in service.stored()), what="a part of the upload", pause=0.01)
    assert service.stored() != set()
    service.tidy()
    assert service.stored() != set(), "the lease may still be held"

    service.expire_lease(lease)
    again = service.start_again(lease.job_id)
    service.succeed(again)
    service.tidy()
    assert service.stored() == {f"{lease.job_id}/a2/report.json"}


def test_a_large_store_is_swept_page_by_page(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.storage.PAGE", 2)
    kept = [service.result() for _ in range(3)]
    for number in range(7):
        service.put(f"{jobs.TENANT}/jobs/job_gone_{number}/a1/report.json")
    service.tidy()
    assert service.kept() == set(kept)


# -------------------------------------------------------------------- leader


LOOP = """
import sys, threading
from app.database import Database
from app.retention import keep_tidy
from app.settings import get_settings
keep_tidy(Database(get_settings().database_url.get_secret_value()), get_settings(), threading.Event())
"""


def test_one_process_tidies_up_and_another_goes_on_when_it_is_killed(postgres_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"ESPALIER_HOME": str(tmp_path), "ESPALIER_DATABASE_URL": postgres_database, "ESPALIER_RETENTION_SECONDS": "0.2", "ESPALIER_ORPHAN_SECONDS": "0"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    made = Settings()
    service = Service(jobs.open_database(postgres_database), open_store(made), made)
    by_name = text(
        "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE datname = current_database() AND locktype = 'advisory' AND granted"
    )

    def leader() -> str | None:
        with service.database.reading() as session:
            name: str | None = session.scalar(by_name)
        return name

    with start(service, "-c", LOOP, PGAPPNAME="first") as first, start(service, "-c", LOOP, PGAPPNAME="second") as second:
        jobs.wait_until(leader, what="a leader")
        before = leader()
        service.put(f"{jobs.TENANT}/jobs/job_gone/a1/x")
        jobs.wait_until(lambda: not service.stored(), what="the sweep")
        assert leader() == before
        (first if before == "first" else second).kill()
        jobs.wait_until(lambda: leader() not in (None, before), what="the other leader")
        service.put(f"{jobs.TENANT}/jobs/job_gone/a2/x")
        jobs.wait_until(lambda: not service.stored(), what="its sweep")
    service.database.dispose()


def test_tidying_up_stops_when_it_is_told(service: Service) -> None:
    stopping = threading.Event()
    thread = threading.Thread(target=keep_tidy, args=(service.database, service.settings, stopping))
    thread.start()
    time.sleep(0.5)
    stopping.set()
    thread.join(60)
    assert not thread.is_alive()
