"""The lease protocol under any order of events: messages lost, doubled and late, workers that die or wake long after, cancels at any moment.

Hypothesis draws the events; the steps are the service's own, on a real database. Beside it runs a model of a few lines, which says what each step may do.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import update

from app.database import Database, db_now
from app.exceptions import ConflictError
from app.jobs import lease as leases
from app.jobs import service
from app.jobs.lease import Event, Lease, LeaseLost, StoredFile
from app.models import FINISHED, Artifact, Job, Worker
from tests import jobs

MAX_ATTEMPTS = 3
MOST_JOBS = 3
CHOICE = st.integers(min_value=0, max_value=10**6)
WORKER = Worker(id="worker", queue="default", host_bytes=10**9, device_bytes=0)


@dataclass
class Expected:
    """What a job must be."""

    state: str = "queued"
    attempt: int = 0
    holder: int | None = None  # the token of the only lease that may write
    result: int | None = None  # the token whose files are the result
    expired: bool = False

    def requeue(self) -> None:
        self.state, self.holder, self.expired = "queued", None, False

    def end(self, state: str) -> None:
        self.state, self.holder, self.expired = state, None, False


@lru_cache(maxsize=1)
def migrated() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        jobs.open_database(f"sqlite:///{folder}/jobs.db").dispose()
        return Path(folder, "jobs.db").read_bytes()


class Protocol(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        (self.folder / "jobs.db").write_bytes(migrated())
        self.database = Database(f"sqlite:///{self.folder}/jobs.db")
        self.expected: dict[str, Expected] = {}
        self.leases: list[Lease] = []  # that any worker ever had; a worker may act on one at any time
        self.messages = 0  # on the broker, where all look alike
        self.submit()

    def teardown(self) -> None:
        if hasattr(self, "database"):
            try:
                self.all_ends_well()
            finally:
                self.database.dispose()
                shutil.rmtree(self.folder)

    # ------------------------------------------------------------------ the API

    @precondition(lambda self: len(self.expected) < MOST_JOBS)
    @rule()
    def submit(self) -> None:
        self.expected[jobs.submit(self.database, limits={"max_attempts": MAX_ATTEMPTS})] = Expected()

    @precondition(lambda self: self.expected)
    @rule(choice=CHOICE)
    def cancel(self, choice: int) -> None:
        job_id, job = self.pick(choice)
        try:
            with self.database.writing() as session:
                service.cancel(session, jobs.TENANT, job_id)
        except ConflictError:
            assert job.state in FINISHED
        else:
            assert job.state not in FINISHED
            if job.state == "queued":
                job.end("cancelled")
            else:
                job.state = "cancelling"

    # ----------------------------------------------------- the relay and the broker

    @rule(dies=st.booleans())
    def publish(self, dies: bool) -> None:
        """A relay may die between the broker's answer and its commit; then the same goes out again."""
        try:
            with self.database.writing() as session:
                taken = leases.take_outbox(session, 3)
                self.messages += len(taken)
                if dies:
                    raise KeyboardInterrupt
                leases.delete_messages(session, taken)
        except KeyboardInterrupt:
            pass

    @rule(count=st.integers(0, 3))
    def the_broker_loses_or_doubles(self, count: int) -> None:
        self.messages = 0 if count == 0 else self.messages * count

    @rule()
    def publish_again(self) -> None:
        with self.database.writing() as session:
            leases.publish_stale(session, "default", 0, 100)

    # ---------------------------------------------------------------- the workers

    @rule()
    def a_message_goes_straight_through(self) -> None:
        self.publish(dies=False)
        if self.messages:
            self.a_message_comes(redelivered=False)

    @precondition(lambda self: self.messages)
    @rule(redelivered=st.booleans())
    def a_message_comes(self, redelivered: bool) -> None:
        self.messages -= not redelivered
        with self.database.writing() as session:
            lease = leases.claim_next(session, WORKER, 1000)
        waiting = [job_id for job_id, job in self.expected.items() if job.state == "queued"]
        if lease is None:
            assert not waiting
            return
        assert lease.job_id == min(waiting)  # ids are in the order of submission
        job = self.expected[lease.job_id]
        job.state, job.attempt, job.holder = "running", job.attempt + 1, lease.token
        assert (lease.attempt, lease.token > max([each.token for each in self.leases if each.job_id == lease.job_id], default=0)) == (job.attempt, True)
        self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(choice=CHOICE)
    def a_worker_beats(self, choice: int) -> None:
        lease = self.leases[choice % len(self.leases)]
        job = self.expected[lease.job_id]
        with self.allowed(job.holder == lease.token) as session:
            cancelled = leases.beat(session, lease, 1000, phase="prune", progress={"fraction": 0.5}, events=[Event("log", "still here")])
            assert cancelled == (job.state == "cancelling")
            job.expired = False

    @precondition(lambda self: self.leases)
    @rule(choice=CHOICE, state=st.sampled_from(["succeeded", "failed", "cancelled"]))
    def a_worker_finishes(self, choice: int, state: Literal["succeeded", "failed", "cancelled"]) -> None:
        lease = self.leases[choice % len(self.leases)]
        job = self.expected[lease.job_id]
        wanted = "cancelling" if state == "cancelled" else "running"
        files = [StoredFile(f"of-{lease.token}", "report", 1, "0" * 64)] if state == "succeeded" else []
        error = {"code": "c", "message": "m", "hint": "h"} if state == "failed" else None
        with self.allowed(job.holder == lease.token and job.state == wanted) as session:
            leases.finish(session, lease, state, error=error, files=files)
            job.end(state)
            job.result = lease.token if state == "succeeded" else None

    @precondition(lambda self: self.leases)
    @rule(choice=CHOICE, charged=st.booleans())
    def a_worker_gives_back(self, choice: int, charged: bool) -> None:
        lease = self.leases[choice % len(self.leases)]
        job = self.expected[lease.job_id]
        if charged and lease.last_attempt:
            return  # a worker then says that the job failed
        with self.allowed(job.holder == lease.token and job.state == "running") as session:
            leases.release(session, lease, "why", charged=charged)
            job.requeue()
            job.attempt -= not charged

    @precondition(lambda self: any(job.holder for job in self.expected.values()))
    @rule(choice=CHOICE)
    def a_lease_runs_out(self, choice: int) -> None:
        """Its worker died, hangs, or is cut off."""
        held = [(job_id, job) for job_id, job in self.expected.items() if job.holder]
        self.expire(*held[choice % len(held)])

    # ----------------------------------------------------------------- the reaper

    @precondition(lambda self: any(job.holder for job in self.expected.values()))
    @rule(choice=CHOICE)
    def a_worker_is_lost(self, choice: int) -> None:
        self.a_lease_runs_out(choice)
        self.reap()

    @rule()
    def reap(self) -> None:
        with self.database.writing() as session:
            reaped = leases.reap(session)
        assert set(reaped) == {job_id for job_id, job in self.expected.items() if job.expired}
        for job in (self.expected[job_id] for job_id in reaped):
            if job.state == "cancelling":
                job.end("cancelled")
            elif job.attempt >= MAX_ATTEMPTS:
                job.end("failed")
            else:
                job.requeue()

    # -------------------------------------------------------------- what always holds

    @invariant()
    def the_rows_are_as_expected(self) -> None:
        for job_id, job in getattr(self, "expected", {}).items():
            row = jobs.get(self.database, job_id)
            assert (row.state, row.attempt) == (job.state, job.attempt)
            assert 0 <= row.attempt <= MAX_ATTEMPTS
            assert (row.lease_until is not None) == (job.holder is not None)
            assert row.artifact_prefix == (None if job.result is None else f"{jobs.TENANT}/jobs/{job_id}/a{job.result}/")
            kinds = jobs.events(self.database, job_id)  # numbered without gaps
            assert sum(kinds.count(state) for state in FINISHED) == (row.state in FINISHED)
            assert self.files(job_id) == ([] if job.result is None else [f"of-{job.result}"])

    def all_ends_well(self) -> None:
        """Whatever happened: once workers live and messages pass, every job ends, and none has more than one result."""
        for _ in range(2 * MAX_ATTEMPTS + 1):
            for job_id, job in self.expected.items():
                if job.holder:
                    self.expire(job_id, job)
            self.reap()
            self.publish_again()
            while sum(job.state == "queued" for job in self.expected.values()) > self.messages:
                before = self.messages
                self.publish(dies=False)
                assert self.messages > before, "a queued job has no message and gets none"
            while self.messages and any(job.state == "queued" for job in self.expected.values()):
                self.a_message_comes(redelivered=False)
                self.a_worker_finishes(len(self.leases) - 1, "succeeded")
        self.the_rows_are_as_expected()
        assert all(job.state in FINISHED for job in self.expected.values())

    # ------------------------------------------------------------------- helpers

    def pick(self, choice: int) -> tuple[str, Expected]:
        return list(self.expected.items())[choice % len(self.expected)]

    def expire(self, job_id: str, job: Expected) -> None:
        with self.database.writing() as session:
            session.execute(update(Job).where(Job.id == job_id).values(lease_until=db_now(-1)))
        job.expired = True

    def files(self, job_id: str) -> list[str]:
        with self.database.reading() as session:
            return [file.path for file in session.query(Artifact).where(Artifact.job_id == job_id)]

    @contextmanager
    def allowed(self, may: bool) -> Iterator[Any]:
        """A worker's write: either it may and does, or the lease is lost and nothing is written."""
        try:
            with self.database.writing() as session:
                yield session
        except LeaseLost:
            assert not may
        else:
            assert may


# A failure is told as it was found: to make it shorter may take minutes.
Protocol.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLeaseProtocol = Protocol.TestCase
