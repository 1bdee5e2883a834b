"""A job that failed or was cancelled and is tried again goes on where it was, for as long as its work is kept."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from sqlalchemy import select, update

from app.database import Database, db_now
from app.jobs.lease import seconds_over
from app.jobs.service import cancel, retry
from app.models import Artifact, Job
from app.recipe import Recipe
from app.settings import Settings
from tests import jobs
from tests.faults.conftest import LASTING_LEASE, Service
from tests.worker.test_durable import inputs, kill_engine_after, write_undisturbed
from worker.announce import describe
from worker.locks import take
from worker.state import sha256_of
from worker.tasks import clean_up, run_next
from worker.workspace import sweep

__all__ = ["inputs"]  # a fixture
DAY = 24 * 3600


def try_again(database: Database, settings: Settings, job_id: str) -> None:
    with database.writing() as session:
        retry(session, jobs.TENANT, job_id, settings)


def test_a_job_whose_engine_was_killed_goes_on_at_its_block(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a worker that has only what was stored."""
    chosen = {"ESPALIER_HOME": str(tmp_path / "home"), "ESPALIER_RESUME_PUSH_SECONDS": "0"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    settings = Settings().model_copy(update={"model_roots": (inputs,), "text_roots": (inputs,), "lease_seconds": 60, "beat_seconds": 1})
    recipe: dict[str, Any] = {
        "method": "cfsp",
        "sparsity": 0.4,
        "restoration": "least_squares",
        "calibration": {"source": "mine.txt", "samples": 32, "sequence_length": 128},
        "limits": {"max_attempts": 1, "resume": "durable"},
    }
    database = jobs.open_database(settings.database_url.get_secret_value())
    worker = describe(settings)
    job_id = jobs.submit(database, **recipe)
    killing = threading.Thread(target=kill_engine_after, args=(5, settings.work_dir / job_id / "work"))
    killing.start()
    run_next(worker, settings, database)
    killing.join()
    failed = jobs.get(database, job_id)
    assert (failed.state, (failed.error or {})["code"], failed.attempt) == ("failed", "worker_lost", 1), jobs.messages(database, job_id)
    assert (settings.work_dir / job_id / "work" / "state.json").exists()
    shutil.rmtree(settings.work_dir)
    try_again(database, settings, job_id)
    run_next(worker, settings, database)
    job = jobs.get(database, job_id)
    assert (job.state, job.attempt, job.max_attempts) == ("succeeded", 2, 2), job.error
    assert job.report is not None
    assert (job.report["resumed_at_block"] or 0) >= 5, "\n".join(jobs.messages(database, job_id))
    assert not list(settings.work_dir.glob("*"))
    kinds = [kind for kind in jobs.events(database, job_id) if kind in ("queued", "claimed", "failed", "retried", "succeeded")]
    assert kinds == ["queued", "claimed", "failed", "retried", "claimed", "succeeded"]

    with database.reading() as session:
        stored = {row.path: row.sha256 for row in session.execute(select(Artifact).where(Artifact.job_id == job_id)).scalars()}
    database.dispose()
    (tmp_path / "recipe.json").write_text(Recipe.model_validate(job.recipe).model_dump_json())
    checkpoint = write_undisturbed(tmp_path / "recipe.json", inputs, tmp_path / "out")
    undisturbed = {f"checkpoint/{path.name}": sha256_of(path) for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".json")}
    assert undisturbed.items() <= stored.items()
    assert len(undisturbed) > 9


@pytest.mark.parametrize("servers", ["sqlite and files"], indirect=True)
@pytest.mark.parametrize("lease", [LASTING_LEASE], ids=["lasting lease"])
def test_failed_and_cancelled_jobs_go_on_at_a_real_worker(service: Service) -> None:
    service.start_worker(keep_work_seconds="3600")
    lost, slow = service.model(steps=6, at=3, kill=signal.SIGKILL), service.model(steps=100, pause=0.1)
    failed = service.submit(model=lost, limits={"max_attempts": 1})
    jobs.wait_for_state(service.database, failed, "failed")
    cancelled = service.submit(model=slow)
    jobs.wait_until((service.settings.work_dir / cancelled / "work" / "state").exists, 60, "a step")
    with service.database.writing() as session:
        cancel(session, jobs.TENANT, cancelled)
    jobs.wait_for_state(service.database, cancelled, "cancelled")
    assert service.work_directories() == sorted([failed, cancelled])

    for model in (lost, slow):
        (service.models / model / "behaviour.json").write_text('{"steps": 6, "pause": 0.01}')
    for job_id in (failed, cancelled):
        try_again(service.database, service.settings, job_id)
    for job_id in (failed, cancelled):
        jobs.wait_for_state(service.database, job_id, "succeeded")
        first, second = (int(message.split()[-1]) for message in jobs.messages(service.database, job_id) if message.startswith("begins at step"))
        assert first == 0
        assert second == 3 if job_id == failed else second >= 1
    jobs.wait_until(lambda: not service.work_directories(), 60, "the clean-up")


# ------------------------------------------------------------- what is kept


class Kept(NamedTuple):
    database: Database
    settings: Settings
    queued: str
    young: str
    old: str
    done: str

    @property
    def folders(self) -> set[str]:
        return {path.name for path in self.settings.work_dir.iterdir()}


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    """Work directories of jobs in all states, and one of a job that is gone."""
    settings = Settings(home=tmp_path)
    database = jobs.open_database(settings.database_url.get_secret_value())
    ids = [jobs.submit(database) for _ in range(4)]
    with database.writing() as session:
        for job_id, state, seconds in zip(ids[1:], ("failed", "cancelled", "succeeded"), (100, 200, 0), strict=True):
            session.execute(update(Job).where(Job.id == job_id).values(state=state, finished_at=db_now(-seconds)))
    for name in (*ids, f"{ids[1]}.2", "job_00"):
        (settings.work_dir / name / "work").mkdir(parents=True)
    return Kept(database, settings, *ids)


def test_work_is_kept_for_its_time(kept: Kept) -> None:
    for seconds, left in (
        (1000, {kept.queued, kept.young, f"{kept.young}.2", kept.old}),
        (150, {kept.queued, kept.young, f"{kept.young}.2"}),
        (0, {kept.queued}),
    ):
        clean_up(kept.settings.model_copy(update={"keep_work_seconds": seconds}), kept.database)
        assert kept.folders == left


def test_the_oldest_work_goes_while_the_disk_is_short(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    def over(job_ids: Any) -> dict[str, float]:
        with kept.database.reading() as session:
            return seconds_over(session, job_ids)

    for bound, left in ((4, {kept.queued, kept.young, f"{kept.young}.2", kept.old}), (3, {kept.queued, kept.young, f"{kept.young}.2"}), (1, {kept.queued})):
        monkeypatch.setattr("worker.workspace._short", lambda root, bound=bound: len(list(root.iterdir())) > bound)
        sweep(kept.settings.work_dir, over, DAY)
        assert kept.folders == left


def test_work_that_a_process_has_is_left_alone(kept: Kept) -> None:
    lock = take(kept.settings.work_dir / kept.done)
    assert lock is not None
    settings = kept.settings.model_copy(update={"keep_work_seconds": 0})
    clean_up(settings, kept.database)
    assert kept.folders == {kept.queued, kept.done}
    os.close(lock)
    clean_up(settings, kept.database)
    assert kept.folders == {kept.queued}
