"""Leases: every step is one conditional UPDATE, on both databases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import update

from app.database import Database, db_now
from app.jobs import lease as leases
from app.jobs.lease import Event, Lease, LeaseLost, StoredFile
from app.models import Artifact, Job
from tests import jobs


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path}/jobs.db" if request.param == "sqlite" else request.getfixturevalue("postgres_database")
    opened = jobs.open_database(url)
    yield opened
    opened.dispose()


def claim(database: Database, job_id: str, seconds: float = 30) -> Lease:
    with database.writing() as session:
        lease = leases.claim(session, job_id, "worker", seconds)
    assert lease is not None
    return lease


def reap(database: Database) -> list[str]:
    with database.writing() as session:
        return leases.reap(session)


def expire(database: Database, job_id: str) -> None:
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=db_now(-0.001)))


def test_a_job_is_claimed_once(database: Database) -> None:
    job_id = jobs.submit(database)
    version = jobs.get(database, job_id).version
    lease = claim(database, job_id)
    with database.writing() as session:
        assert leases.claim(session, job_id, "other", 30) is None
        assert leases.claim(session, "job_that_is_not_there", "other", 30) is None
    job = jobs.get(database, job_id)
    assert (job.state, job.attempt, job.lease_token, job.lease_owner) == ("running", 1, 1, "worker")
    assert job.started_at is not None
    assert job.version > version
    assert (lease.attempt, lease.max_attempts, lease.token) == (1, 3, 1)
    assert lease.recipe["method"]["name"] == "magnitude"
    assert jobs.events(database, job_id) == ["queued", "claimed"]


def test_of_many_claims_at_once_one_succeeds(database: Database) -> None:
    job_id = jobs.submit(database)

    def try_to_claim(number: int) -> Lease | None:
        with database.writing() as session:
            return leases.claim(session, job_id, f"worker {number}", 30)

    with ThreadPoolExecutor(8) as pool:
        claimed = [lease for lease in pool.map(try_to_claim, range(16)) if lease is not None]
    assert len(claimed) == 1
    assert jobs.get(database, job_id).attempt == 1


def test_a_beat_holds_the_lease_and_carries_news(database: Database) -> None:
    job_id = jobs.submit(database)
    lease = claim(database, job_id, seconds=1)
    before = jobs.get(database, job_id)
    with database.writing() as session:
        assert leases.beat(session, lease, 30) is False
    silent = jobs.get(database, job_id)
    assert silent.version == before.version  # a beat without news changes nothing that a reader sees
    assert before.lease_until is not None
    assert silent.lease_until is not None
    assert (silent.lease_until - before.lease_until).total_seconds() > 28
    with database.writing() as session:
        leases.beat(session, lease, 30, phase="prune", progress={"fraction": 0.5}, events=[Event("log", "half")])
    job = jobs.get(database, job_id)
    assert (job.phase, job.progress) == ("prune", {"fraction": 0.5})
    assert job.version > silent.version
    assert jobs.events(database, job_id) == ["queued", "claimed", "log"]


def test_success_commits_report_files_and_state_together(database: Database) -> None:
    job_id = jobs.submit(database)
    lease = claim(database, job_id)
    with database.writing() as session:
        leases.finish(session, lease, "succeeded", report={"a": 1}, files=[StoredFile("checkpoint/model.safetensors", "checkpoint", 7, "ab")])
    job = jobs.get(database, job_id)
    assert (job.state, job.report, job.artifact_prefix) == ("succeeded", {"a": 1}, f"{jobs.TENANT}/jobs/{job_id}/a1/")
    assert job.finished_at is not None
    assert job.lease_until is None
    with database.reading() as session:
        artifact = session.get_one(Artifact, (job_id, "checkpoint/model.safetensors"))
        assert (artifact.tenant_id, artifact.role, artifact.bytes, artifact.sha256) == (jobs.TENANT, "checkpoint", 7, "ab")
    assert jobs.events(database, job_id)[-1] == "succeeded"


def test_a_finished_job_takes_no_more_writes(database: Database) -> None:
    job_id = jobs.submit(database)
    lease = claim(database, job_id)
    with database.writing() as session:
        leases.finish(session, lease, "failed", error={"code": "c", "message": "m", "hint": "h"})
    refused(database, lease)
    job = jobs.get(database, job_id)
    assert (job.state, job.error) == ("failed", {"code": "c", "message": "m", "hint": "h"})


def refused(database: Database, lease: Lease) -> None:
    """Every write under this lease is refused and leaves the job as it is."""
    before, told = jobs.get(database, lease.job_id), jobs.events(database, lease.job_id)
    for write in (
        lambda session: leases.beat(session, lease, 30, phase="x", progress={"fraction": 1}, events=[Event("log", "late")]),
        lambda session: leases.finish(session, lease, "succeeded", report={}, files=[StoredFile("late", "checkpoint", 1, "")]),
        lambda session: leases.finish(session, lease, "failed", error={"code": "late", "message": "", "hint": ""}),
        lambda session: leases.finish(session, lease, "cancelled"),
        lambda session: leases.release(session, lease, "late", charged=True),
    ):
        with pytest.raises(LeaseLost), database.writing() as session:
            write(session)
    after = jobs.get(database, lease.job_id)
    assert (after.version, after.state, after.phase, after.attempt) == (before.version, before.state, before.phase, before.attempt)
    assert jobs.events(database, lease.job_id) == told


@pytest.mark.parametrize(("charged", "attempt"), [(True, 2), (False, 1)])
def test_a_released_job_is_claimed_again_and_the_old_lease_is_dead(database: Database, charged: bool, attempt: int) -> None:
    job_id = jobs.submit(database)
    lease = claim(database, job_id)
    waiting = jobs.outbox(database)
    with database.writing() as session:
        leases.release(session, lease, "why", charged=charged)
    assert jobs.get(database, job_id).state == "queued"
    assert jobs.outbox(database) == waiting + 1
    refused(database, lease)
    again = claim(database, job_id)
    assert (again.attempt, again.token) == (attempt, 2)
    refused(database, lease)
    assert again.artifact_prefix != lease.artifact_prefix


def test_cancel_of_a_running_job_is_told_by_the_next_beat_and_wins_over_its_end(database: Database) -> None:
    job_id = jobs.submit(database)
    lease = claim(database, job_id)
    assert jobs.cancel(database, job_id) == "cancelling"
    with database.writing() as session:
        assert leases.beat(session, lease, 30) is True
    with pytest.raises(LeaseLost), database.writing() as session:
        leases.finish(session, lease, "succeeded", report={})
    with pytest.raises(LeaseLost), database.writing() as session:
        leases.release(session, lease, "why", charged=True)
    with database.writing() as session:
        leases.finish(session, lease, "cancelled")
    assert jobs.get(database, job_id).state == "cancelled"
    assert jobs.get(database, job_id).artifact_prefix is None


def test_a_running_job_does_not_end_as_cancelled_unasked(database: Database) -> None:
    lease = claim(database, jobs.submit(database))
    with pytest.raises(LeaseLost), database.writing() as session:
        leases.finish(session, lease, "cancelled")


def test_reaping_leaves_live_leases_alone(database: Database) -> None:
    queued, running = jobs.submit(database), jobs.submit(database)
    claim(database, running)
    assert reap(database) == []
    assert (jobs.get(database, queued).state, jobs.get(database, running).state) == ("queued", "running")


def test_an_expired_job_runs_again_until_its_attempts_are_used_up(database: Database) -> None:
    job_id = jobs.submit(database, limits={"max_attempts": 2})
    first = claim(database, job_id)
    expire(database, job_id)
    waiting = jobs.outbox(database)
    assert reap(database) == [job_id]
    assert jobs.get(database, job_id).state == "queued"
    assert jobs.outbox(database) == waiting + 1
    refused(database, first)
    second = claim(database, job_id)
    assert second.last_attempt
    expire(database, job_id)
    assert reap(database) == [job_id]
    job = jobs.get(database, job_id)
    assert (job.state, job.attempt) == ("failed", 2)
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    assert jobs.events(database, job_id) == ["queued", "claimed", "lease_expired", "requeued", "claimed", "lease_expired", "failed"]


def test_an_expired_cancelling_job_is_cancelled(database: Database) -> None:
    job_id = jobs.submit(database)
    claim(database, job_id)
    jobs.cancel(database, job_id)
    expire(database, job_id)
    assert reap(database) == [job_id]
    assert jobs.get(database, job_id).state == "cancelled"


def test_the_lease_runs_in_the_database_s_clock(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = jobs.submit(database)
    claim(database, job_id, seconds=30)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert reap(database) == []


def test_many_reapers_at_once_requeue_each_job_once(database: Database) -> None:
    ids = [jobs.submit(database) for _ in range(12)]
    for job_id in ids:
        claim(database, job_id)
        expire(database, job_id)
    with ThreadPoolExecutor(4) as pool:
        reaped = [job_id for found in pool.map(lambda _: reap(database), range(8)) for job_id in found]
    assert sorted(reaped) == sorted(ids)
    assert all(jobs.events(database, job_id).count("requeued") == 1 for job_id in ids)


def test_a_reaper_takes_a_bounded_batch(database: Database) -> None:
    ids = [jobs.submit(database) for _ in range(5)]
    for job_id in ids:
        claim(database, job_id)
        expire(database, job_id)
    with database.writing() as session:
        assert len(leases.reap(session, limit=2)) == 2
    assert len(reap(database)) == 3


def test_stale_means_published_long_ago_and_not_in_the_outbox(database: Database) -> None:
    waiting, published = jobs.submit(database), jobs.submit(database)
    with database.writing() as session:
        messages = [message for message in leases.take_outbox(session, 10) if message[1] == published]
        leases.mark_published(session, messages)
    with database.writing() as session:
        assert leases.publish_stale(session, 30, 10) == 0
        session.execute(update(Job).values(published_at=db_now(-31)))
    with database.writing() as session:
        assert leases.publish_stale(session, 30, 10) == 1
        assert leases.publish_stale(session, 30, 10) == 0
        assert sorted(job_id for _, job_id in leases.take_outbox(session, 10)) == sorted([waiting, published])


def test_which_jobs_are_over(database: Database) -> None:
    queued, ended = jobs.submit(database), jobs.submit(database)
    jobs.cancel(database, ended)
    with database.reading() as session:
        assert leases.finished_jobs(session, [queued, ended, "job_0"]) == {ended, "job_0"}
