"""Classes of workers: who announces itself, what a class has and does, where a job goes, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, update

from app.database import db_now
from app.jobs import repository as job_rows
from app.jobs.lease import claim_next
from app.models import Job, Tenant, Worker
from app.queues import repository
from app.recipe import LeastSquares, Recipe
from app.settings import Settings
from tests.app.conftest import RECIPE, Api
from tests.models import make_checkpoint

GPU = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 10**9}
_classes = itertools.count(1)


@pytest.fixture
def queue(shared_api: Api) -> Iterator[str]:
    """A class of workers that no other test has; no worker of another lives."""
    yield f"class-{next(_classes)}"
    with shared_api.database.writing() as session:
        session.execute(delete(Worker))


def announce(api: Api, worker_id: str, queue: str, *, host_bytes: int = 10**11, devices: tuple[dict[str, Any], ...] = (), draining: bool = False) -> Worker:
    device_bytes = devices[0]["memory_bytes"] if devices else 0
    worker = Worker(id=worker_id, queue=queue, devices=list(devices), host_bytes=host_bytes, device_bytes=device_bytes, version="0.1.0")
    with api.database.writing() as session:
        repository.announce(session, worker, disk_bytes=10**12, draining=draining)
    return worker


def last_seen(api: Api, worker_id: str, seconds: float) -> None:
    with api.database.writing() as session:
        session.execute(update(Worker).where(Worker.id == worker_id).values(seen_at=db_now(-seconds)))


def shown(api: Api, queue: str) -> dict[str, Any] | None:
    return next((item for item in api.get("/v1/queues").json()["items"] if item["name"] == queue), None)


@pytest.fixture(scope="module")
def model(roots: Path) -> str:
    """A checkpoint that lies here, so that its cost is known."""
    return make_checkpoint(roots / "models" / "placed", "llama", layers=2).name


def test_a_class_is_shown_with_its_live_workers_and_its_jobs(api: Api, queue: str) -> None:
    assert shown(api, queue) is None
    first, second = api.submit(queue=queue), api.submit(queue=queue, priority=3)
    waiting = shown(api, queue)
    assert waiting is not None
    assert (waiting["workers"], waiting["queued"], waiting["running"]) == ([], 2, 0)
    assert waiting["oldest_queued_at"] == api.get(f"/v1/jobs/{first}").json()["created_at"]
    worker = announce(api, "one", queue, devices=(GPU, GPU))
    announce(api, "two", queue, draining=True)
    with api.database.writing() as session:
        lease = claim_next(session, worker, 45)
    assert lease is not None
    assert lease.job_id == second  # of the higher priority
    busy = shown(api, queue)
    assert busy is not None
    assert (busy["queued"], busy["running"]) == (1, 1)
    assert [worker["devices"] for worker in busy["workers"]] == [[GPU, GPU], []]
    assert [worker["draining"] for worker in busy["workers"]] == [False, True]
    assert busy["workers"][0]["host_bytes"] == 10**11
    job = api.get(f"/v1/jobs/{second}").json()
    assert (job["queue"], job["priority"]) == (queue, 3)


def test_a_worker_lives_by_what_was_heard_of_it(api: Api, queue: str) -> None:
    for name in ("silent", "speaking"):
        announce(api, name, queue)
    last_seen(api, "silent", api.settings.lease_seconds + 1)
    last_seen(api, "speaking", api.settings.lease_seconds - 10)
    alive = shown(api, queue)
    assert alive is not None
    assert len(alive["workers"]) == 1
    announce(api, "silent", queue)  # it was stopped, and goes on
    alive = shown(api, queue)
    assert alive is not None
    assert len(alive["workers"]) == 2
    with api.database.writing() as session:
        repository.withdraw(session, "silent")
        repository.forget(session, 3600)
    last_seen(api, "speaking", 3601)
    with api.database.writing() as session:
        repository.forget(session, 3600)
    with api.database.reading() as session:
        assert session.get(Worker, "speaking") is None
    assert shown(api, queue) is None


def test_queues_are_for_readers(api: Api) -> None:
    assert api.get("/v1/queues", key=api.new_key(["jobs:write"])).status_code == 403
    assert api.client.get("/v1/queues").status_code == 401


# ------------------------------------------------------------------ admission


def test_validation_tells_where_a_job_would_go(api: Api, queue: str, model: str) -> None:
    def placement(**changes: Any) -> dict[str, Any]:
        answer = api.post("/v1/jobs?validate_only=true", json=RECIPE | changes)
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = answer.json()["placement"]
        return told

    assert placement(queue=queue, model=model) == {"queue": queue, "live_workers": 0, "fits": None}
    announce(api, "one", queue)
    assert placement(queue=queue, model=model) == {"queue": queue, "live_workers": 1, "fits": True}
    assert placement(queue=queue) == {"queue": queue, "live_workers": 1, "fits": None}  # a model on the hub
    assert placement(queue="auto") == {"queue": "default", "live_workers": 0, "fits": None}
    assert placement(queue="auto", model=model) == {"queue": queue, "live_workers": 1, "fits": True}
    assert api.get("/v1/jobs").json()["items"] == []


def test_memory_that_no_live_worker_has_is_refused(api: Api, queue: str, model: str) -> None:
    announce(api, "small", queue, host_bytes=10**6)
    refused = api.post("/v1/jobs", json=RECIPE | {"queue": queue, "model": model})
    assert (refused.status_code, refused.json()["code"]) == (422, "no_worker_has_memory")
    assert refused.json()["errors"][0]["pointer"] == "/queue"
    assert f"'{queue}'" in refused.json()["detail"]
    assert "GB" in refused.json()["detail"]
    assert api.post("/v1/jobs?validate_only=true", json=RECIPE | {"queue": queue, "model": model}).status_code == 422
    assert api.post("/v1/jobs", json=RECIPE | {"queue": "auto", "model": model}).status_code == 422
    announce(api, "little", queue, devices=({"name": "toy", "memory_bytes": 10**6},))
    assert api.post("/v1/jobs", json=RECIPE | {"queue": queue, "model": model}).status_code == 422  # its GPU is too small
    announce(api, "large", queue)
    assert api.post("/v1/jobs", json=RECIPE | {"queue": queue, "model": model}).status_code == 202


def test_auto_takes_the_least_that_suffices(api: Api, queue: str, model: str) -> None:
    announce(api, "tiny", f"{queue}-tiny", host_bytes=10**6)
    announce(api, "gpu", f"{queue}-gpu", devices=(GPU,))
    announce(api, "cpu", f"{queue}-cpu", host_bytes=10**11)
    announce(api, "more", f"{queue}-more", host_bytes=10**12)
    job = api.get(f"/v1/jobs/{api.submit(queue='auto', model=model)}").json()
    assert job["queue"] == f"{queue}-cpu"
    with api.database.reading() as session:
        row = session.get_one(Job, job["id"])
        assert row.host_bytes is not None
        assert row.device_bytes is not None
        assert row.host_bytes > 10**6


def test_a_class_that_nobody_serves_keeps_its_jobs_and_says_so(api: Api, queue: str) -> None:
    job_id = api.submit(queue=queue)
    [event] = api.get(f"/v1/jobs/{job_id}/events").json()["items"]
    assert f"no worker of the queue '{queue}' lives" in event["message"]
    announce(api, "one", queue)
    [event] = api.get(f"/v1/jobs/{api.submit(queue=queue)}/events").json()["items"]
    assert event["message"] == "Queued."


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"queue": "Default"}, "/queue"),
        ({"queue": ""}, "/queue"),
        ({"queue": "a.b"}, "/queue"),
        ({"queue": "a" * 49}, "/queue"),
        ({"priority": 11}, "/priority"),
        ({"priority": -11}, "/priority"),
        ({"limits": {"max_pending": 0}}, "/limits/max_pending"),
    ],
)
def test_a_bad_wish_is_refused(api: Api, changes: dict[str, Any], pointer: str) -> None:
    refused = api.post("/v1/jobs", json=RECIPE | changes)
    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, pointer)


def test_a_tenant_has_only_so_many_jobs_waiting(api: Api, queue: str) -> None:
    with api.database.writing() as session:
        session.execute(update(Tenant).where(Tenant.name == api.tenant).values(max_queued=2))
    first = api.submit(queue=queue)
    api.submit(queue=queue)
    refused = api.post("/v1/jobs", json=RECIPE)
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_queued")
    assert int(refused.headers["Retry-After"]) > 0
    assert api.other_tenant().submit()
    api.start(first)  # one that runs waits no more
    api.submit()


def test_limits_become_what_workers_and_reapers_go_by(api: Api) -> None:
    job_id = api.submit(limits={"max_pending": 60, "max_runtime": 120})
    with api.database.reading() as session:
        job = session.get_one(Job, job_id)
    assert job.max_runtime == 120
    assert job.start_by is not None
    assert (job.start_by - job.created_at).total_seconds() == pytest.approx(60, abs=30)
    shown = api.get(f"/v1/jobs/{job_id}").json()["recipe"]
    assert shown["limits"]["max_pending"] == 60
    assert "queue" not in shown


def test_what_is_stored_a_worker_of_the_release_before_reads(api: Api) -> None:
    """It refuses fields that it does not know, so a recipe names only those that are used."""
    stored = job_rows._stored(Recipe.model_validate(RECIPE))
    assert stored["limits"].keys() == {"max_attempts", "max_runtime"}
    fields = {"model", "method", "sparsity", "allocation", "restoration", "recovery", "calibration", "evaluation", "output", "limits"}
    assert stored.keys() == fields
    with api.database.reading() as session:
        assert session.get_one(Job, api.submit(queue="default", priority=3)).recipe.keys() == fields
    restored = job_rows._stored(Recipe.model_validate(RECIPE | {"method": "cfsp", "sparsity": 0.2, "restoration": "least_squares"}))
    assert restored["restoration"] == {"name": "least_squares", "drift": 0.5}  # its ridge was a number, now it may be left out; nor was there `reselect`
    assert Recipe.model_validate(restored).restoration == LeastSquares()


def test_no_class_is_named_auto() -> None:
    with pytest.raises(ValueError, match="ESPALIER_QUEUE can't be 'auto'"):
        Settings(queue="auto")
