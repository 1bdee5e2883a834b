"""Leases: every step is one conditional UPDATE, on both databases."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app.database import Database, db_now
from app.jobs import lease as leases
from app.jobs.lease import Event, Lease, LeaseLost, StoredFile
from app.models import Artifact, Job, OutboxMessage, Tenant, Worker
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


def worker(queue: str = "default", host_bytes: int = 10**9, device_bytes: int = 0) -> Worker:
    return Worker(id="worker", queue=queue, host_bytes=host_bytes, device_bytes=device_bytes)


def claim_next(database: Database, by: Worker) -> Lease | None:
    with database.writing() as session:
        return leases.claim_next(session, by, 30)


def end(database: Database, lease: Lease) -> None:
    with database.writing() as session:
        leases.finish(session, lease, "failed", error={"code": "c", "message": "m", "hint": "h"})


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
    lease = claim(database, job_id, seconds=10)
    before = jobs.get(database, job_id)
    with database.writing() as session:
        assert leases.beat(session, lease, 30) is False
    silent = jobs.get(database, job_id)
    assert silent.version == before.version  # a beat without news changes nothing that a reader sees
    assert before.lease_until is not None
    assert silent.lease_until is not None
    assert (silent.lease_until - before.lease_until).total_seconds() > 15
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
        messages = [message for message in leases.take_outbox(session, 10) if message.job_id == published]
        leases.delete_messages(session, messages)
    with database.writing() as session:
        assert leases.publish_stale(session, "default", 30, 10) == 0
        session.execute(update(Job).values(published_at=db_now(-31)))
    with database.writing() as session:
        assert leases.publish_stale(session, "other", 30, 10) == 0
        assert leases.publish_stale(session, "default", 30, 10) == 1
        assert leases.publish_stale(session, "default", 30, 10) == 0
        assert sorted(message.job_id for message in leases.take_outbox(session, 10)) == sorted([waiting, published])


def test_for_how_long_jobs_are_over(database: Database) -> None:
    queued, ended, done = jobs.submit(database), jobs.submit(database), jobs.submit(database)
    jobs.cancel(database, ended)
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == ended).values(finished_at=db_now(-100)))
        session.execute(update(Job).where(Job.id == done).values(state="succeeded", finished_at=db_now()))
    with database.reading() as session:
        over = leases.seconds_over(session, [queued, ended, done, "job_0"])
    assert over == {ended: pytest.approx(100, abs=60), done: math.inf, "job_0": math.inf}


# --------------------------------------------------------------- whose turn it is


@pytest.mark.parametrize("seed", range(3))
def test_jobs_are_claimed_by_priority_then_fairness_then_age(database: Database, seed: int) -> None:
    """Random jobs of several tenants with and without caps, claimed and ended in a random order: each claim is the one that the rule names."""
    draw = random.Random(seed)
    caps: dict[str, int | None] = {jobs.add_tenant(database, name, cap): cap for name, cap in (("a", None), ("b", None), ("c", 1), ("d", 2), ("e", 0))}
    waiting: list[tuple[int, str, int]] = []  # number of submission, tenant, priority
    ids: list[str] = []
    running: dict[str, Lease] = {}

    def expected() -> str | None:
        busy = Counter(lease.tenant_id for lease in running.values())
        allowed = [job for job in waiting if (cap := caps[job[1]]) is None or busy[job[1]] < cap]
        if not allowed:
            return None
        number, _, _ = job = min(allowed, key=lambda job: (-job[2], busy[job[1]], job[0]))
        waiting.remove(job)
        return ids[number]

    for _ in range(70):
        match draw.choice(["submit", "submit", "claim", "claim", "end"]):
            case "submit":
                tenant, priority = draw.choice(list(caps)), draw.choice([-10, 0, 0, 10])
                waiting.append((len(ids), tenant, priority))
                ids.append(jobs.submit(database, tenant=tenant, priority=priority))
            case "claim":
                lease = claim_next(database, worker())
                assert (lease and lease.job_id) == expected()
                if lease is not None:
                    running[lease.job_id] = lease
            case "end" if running:
                end(database, running.pop(draw.choice(list(running))))
    while (job_id := expected()) is not None:
        lease = claim_next(database, worker())
        assert lease is not None
        assert lease.job_id == job_id
        end(database, lease)
    assert claim_next(database, worker()) is None


def test_a_tenant_with_many_jobs_starves_no_other(database: Database) -> None:
    many, one = jobs.add_tenant(database, "with many"), jobs.add_tenant(database, "with few")
    for _ in range(30):
        jobs.submit(database, tenant=many)
    late = [jobs.submit(database, tenant=one) for _ in range(3)]
    claimed = [claim_next(database, worker()) for _ in range(6)]
    assert [lease.job_id for lease in claimed if lease is not None and lease.tenant_id == one] == late
    assert [lease.tenant_id for lease in claimed if lease is not None] == [many, one] * 3


def test_a_worker_claims_only_what_its_class_and_memory_allow(database: Database) -> None:
    elsewhere = jobs.submit(database, queue="large")
    big = jobs.submit(database, host_bytes=10**9 + 1)
    on_device = jobs.submit(database, host_bytes=10, device_bytes=100, priority=-1)
    small, plain = worker(device_bytes=99), worker()
    assert claim_next(database, small) is None
    with database.reading() as session:
        assert not leases.work_waits(session, small)
        assert leases.work_waits(session, plain)
    lease = claim_next(database, plain)  # without a GPU, what a job needs of one says nothing
    assert lease is not None
    assert lease.job_id == on_device
    with database.reading() as session:
        assert not leases.work_waits(session, worker(host_bytes=2 * 10**9))  # it has a job
    for by, job_id in ((worker(host_bytes=2 * 10**9), big), (worker("large"), elsewhere)):
        lease = claim_next(database, by)
        assert lease is not None
        assert lease.job_id == job_id


def test_simultaneous_claims_keep_the_cap_and_leave_nothing_behind(database: Database) -> None:
    capped, free = jobs.add_tenant(database, "capped", 2), jobs.add_tenant(database, "free")
    for _ in range(6):
        jobs.submit(database, tenant=capped)
        jobs.submit(database, tenant=free)
    with ThreadPoolExecutor(8) as pool:
        claimed = [lease for lease in pool.map(lambda _: claim_next(database, worker()), range(12)) if lease is not None]
    assert Counter(lease.tenant_id for lease in claimed) == {capped: 2, free: 6}
    assert len({lease.job_id for lease in claimed}) == 8


@pytest.mark.parametrize("served", [True, False])
def test_the_next_job_may_be_of_another_class_that_has_workers(database: Database, served: bool) -> None:
    capped = jobs.add_tenant(database, "capped", 1)
    first, own, other = (
        jobs.submit(database, tenant=capped, queue=queue, priority=priority) for queue, priority in (("default", 2), ("default", 0), ("large", 1))
    )
    with database.writing() as session:
        leases.delete_messages(session, leases.take_outbox(session, 10))
        if served:
            session.add(Worker(id="other", queue="large", devices=[], host_bytes=10**9, device_bytes=0, disk_bytes=0, version="0"))
    lease = claim_next(database, worker())
    assert lease is not None
    assert lease.job_id == first
    end(database, lease)
    with database.reading() as session:
        assert session.scalars(select(OutboxMessage.job_id)).all() == [other if served else own]


def test_the_end_of_a_capped_tenant_s_job_publishes_its_next(database: Database) -> None:
    capped = jobs.add_tenant(database, "capped", 1)
    first, second, third = (jobs.submit(database, tenant=capped, priority=priority) for priority in (2, 0, 1))
    lease = claim_next(database, worker())
    assert lease is not None
    assert lease.job_id == first
    with database.writing() as session:
        leases.delete_messages(session, leases.take_outbox(session, 10))
        session.execute(update(Job).values(published_at=db_now(-60)))
    with database.writing() as session:
        assert leases.publish_stale(session, "default", 30, 10) == 0  # in vain, as long as the first one runs
    end(database, lease)
    with database.reading() as session:
        assert session.scalars(select(OutboxMessage.job_id)).all() == [third]
        assert session.get_one(Job, second).state == "queued"
    assert claim_next(database, worker()) is not None
    with database.writing() as session:
        leases.delete_messages(session, leases.take_outbox(session, 10))
        session.execute(update(Job).where(Job.id == third).values(max_attempts=1, lease_until=db_now(-1)))
    assert reap(database) == [third]
    with database.reading() as session:
        assert session.scalars(select(OutboxMessage.job_id)).all() == [second]


def test_the_time_of_all_attempts_counts(database: Database) -> None:
    job_id = jobs.submit(database, limits={"max_runtime": 100})

    def lasted(seconds: float) -> None:
        with database.writing() as session:
            session.execute(update(Job).where(Job.id == job_id).values(claimed_at=db_now(-seconds)))

    first = claim(database, job_id)
    assert first.seconds_to_run == 100
    lasted(20)
    with database.writing() as session:
        leases.release(session, first, "drained", charged=False)
    assert jobs.get(database, job_id).ran_seconds == pytest.approx(20, abs=15)
    second = claim(database, job_id)
    assert second.attempt == 1
    assert second.seconds_to_run == pytest.approx(80, abs=15)
    lasted(50)
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=db_now(-20)))  # the last 20 seconds, nobody may have worked
    assert reap(database) == [job_id]
    third = claim(database, job_id)
    assert third.seconds_to_run == pytest.approx(50, abs=15)
    lasted(1000)
    end(database, third)
    assert jobs.get(database, job_id).ran_seconds == pytest.approx(1050, abs=30)


def test_an_attempt_of_a_release_that_kept_no_time_costs_none(database: Database) -> None:
    job_id = jobs.submit(database, limits={"max_runtime": 100})
    lease = claim(database, job_id)
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == job_id).values(claimed_at=None, max_runtime=None))
    with database.writing() as session:
        leases.release(session, lease, "why", charged=True)
    assert claim(database, job_id).seconds_to_run == 100


def test_a_job_that_begins_too_late_is_given_up(database: Database) -> None:
    late, begun, patient = (jobs.submit(database, limits={"max_pending": 60}) for _ in range(3))
    with database.writing() as session:
        leases.release(session, claim_as(session, begun), "drained", charged=False)
        session.execute(update(Job).where(Job.id.in_([late, begun])).values(start_by=db_now(-1)))
    with database.writing() as session:
        session.execute(update(Tenant).values(max_running=1))
        assert leases.give_up(session) == [late]
        assert leases.give_up(session) == []
    job = jobs.get(database, late)
    assert (job.state, job.attempt, job.finished_at is not None) == ("failed", 0, True)
    assert job.error is not None
    assert job.error["code"] == "max_pending_exceeded"
    assert jobs.events(database, late) == ["queued", "failed"]
    assert {jobs.get(database, job_id).state for job_id in (begun, patient)} == {"queued"}


def test_a_job_whose_time_to_begin_has_passed_is_not_claimed(database: Database) -> None:
    job_id = jobs.submit(database, limits={"max_pending": 60})
    with database.writing() as session:
        session.execute(update(Job).where(Job.id == job_id).values(start_by=db_now(-1)))
    assert claim_next(database, worker()) is None


def claim_as(session: Session, job_id: str) -> Lease:
    lease = leases.claim(session, job_id, "worker", 30)
    assert lease is not None
    return lease
