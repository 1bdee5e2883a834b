"""What the service promises when its processes die: no accepted job is lost, none has two results, each one ends."""

from __future__ import annotations

import json
import signal
import time

import pytest
from sqlalchemy import delete, select

from app import queue
from app.jobs.repository import insert_job
from app.models import Job, JobEvent, OutboxMessage, Worker
from app.recipe import Recipe
from tests import jobs
from tests.faults.conftest import LASTING_LEASE, SERVICES, Service
from tests.models import make_checkpoint, make_text

both_services = pytest.mark.parametrize("servers", SERVICES, indirect=True)
embedded = pytest.mark.parametrize("servers", SERVICES[:1], indirect=True)
on_servers = pytest.mark.parametrize("servers", SERVICES[1:], indirect=True)
# A message that is lost or taken in vain stays so: nothing is published again within a test.
NOTHING_AGAIN = {"ESPALIER_LEASE_SECONDS": "300", "ESPALIER_BEAT_SECONDS": "1", "ESPALIER_SWEEP_SECONDS": "0.2", "ESPALIER_REPUBLISH_SECONDS": "3600"}
nothing_again = pytest.mark.parametrize("lease", [NOTHING_AGAIN], ids=["nothing again"])


@pytest.fixture
def lease() -> dict[str, str]:
    return LASTING_LEASE


def wait_for_progress(service: Service, job_id: str, fraction: float) -> None:
    def far_enough() -> bool:
        job = jobs.get(service.database, job_id)
        assert job.state in ("queued", "running"), job.error
        return bool(job.progress.get("fraction", 0) >= fraction)

    jobs.wait_until(far_enough, 60, f"{fraction:.0%} of the work")


def check_single_result(service: Service, job: Job) -> None:
    """The job's files are those of its last attempt, and nothing else of it is left; other jobs may be at work."""
    assert job.artifact_prefix == f"{jobs.TENANT}/jobs/{job.id}/a{job.lease_token}/"
    jobs.wait_until(lambda: service.stored(job.id) == {f"{job.id}/a{job.lease_token}"} and job.id not in service.work_directories(), 60, "the clean-up")
    assert jobs.events(service.database, job.id).count("succeeded") == 1


@both_services
def test_the_whole_worker_is_killed_and_another_goes_on(service: Service) -> None:
    job_id = service.submit(model=service.model(steps=20, pause=0.15))
    worker = service.start_worker()
    wait_for_progress(service, job_id, 0.3)
    service.kill_tree(worker)
    service.expire(job_id)
    service.start_worker()
    job = jobs.wait_for_state(service.database, job_id, "succeeded")
    assert job.attempt == 2
    assert "lease_expired" in jobs.events(service.database, job_id)
    began = [message for message in jobs.messages(service.database, job_id) if message.startswith("begins at step")]
    assert began[0] == "begins at step 0"
    assert int(began[1].removeprefix("begins at step ")) >= 6  # it goes on where the first one was
    check_single_result(service, job)


@embedded
@pytest.mark.parametrize("lease", [{}], ids=["default lease"])
def test_the_whole_worker_is_killed_in_the_middle_of_pruning(service: Service) -> None:
    make_checkpoint(service.models / "llama", "llama", layers=32, hidden=128, ffn=512)
    job_id = service.submit(model="llama")
    worker = service.start_worker("worker.celery")
    state = service.settings.work_dir / job_id / "work" / "state.json"
    jobs.wait_until(lambda: state.exists() and len(next(iter(json.loads(state.read_bytes())["walks"].values()), [])) >= 2, 60, "two pruned blocks", pause=0.005)
    for engine in service.engines(worker):
        engine.suspend()
    blocks = len(next(iter(json.loads(state.read_bytes())["walks"].values()), []))
    assert blocks < 32
    jobs.wait_until(lambda: jobs.get(service.database, job_id).phase == "prune", 60, "the phase")
    service.kill_tree(worker)
    killed = time.monotonic()
    service.start_worker("worker.celery")
    jobs.wait_until(lambda: jobs.get(service.database, job_id).attempt == 2, 120, "the second attempt")
    assert time.monotonic() - killed > 30
    job = jobs.wait_for_state(service.database, job_id, "succeeded")
    assert job.attempt == 2
    assert job.report is not None
    assert job.report["resumed_at_block"] == blocks, jobs.messages(service.database, job_id)
    check_single_result(service, job)


@both_services
def test_the_engine_alone_is_killed_and_the_worker_starts_it_again(service: Service) -> None:
    job_id = service.submit(model=service.model(steps=20, pause=0.2))
    worker = service.start_worker()
    wait_for_progress(service, job_id, 0.3)
    [engine] = service.engines(worker)
    engine.kill()
    job = jobs.wait_for_state(service.database, job_id, "succeeded")
    assert job.attempt == 2
    assert "lease_expired" not in jobs.events(service.database, job_id)  # nobody had to wait for the lease to run out
    check_single_result(service, job)


@both_services
def test_three_copies_of_each_message_make_one_attempt(service: Service) -> None:
    ids = [service.submit(model=service.model(steps=3, pause=0.1)) for _ in range(3)]
    for _ in range(3):
        for job_id in ids:
            queue.publish(service.settings, job_id)
    service.start_worker()
    service.start_worker()
    for job_id in ids:
        job = jobs.wait_for_state(service.database, job_id, "succeeded")
        assert job.attempt == 1
    jobs.wait_until(lambda: queue.depth(service.settings) == 0, 60, "the end of the messages")
    time.sleep(1)
    assert service.stored() == {f"{job_id}/a1" for job_id in ids}
    for job_id in ids:
        assert jobs.get(service.database, job_id).attempt == 1
        assert jobs.events(service.database, job_id).count("claimed") == 1


@embedded
def test_the_process_with_the_lease_is_killed_and_its_worker_goes_on(service: Service) -> None:
    job_id = service.submit(model=service.model(steps=20, pause=0.2))
    worker = service.start_worker()
    wait_for_progress(service, job_id, 0.2)
    [engine] = service.engines(worker)
    supervisor = engine.parent()
    assert supervisor is not None
    supervisor.kill()
    jobs.wait_until(lambda: not engine.is_running(), 60, "the end of the engine")
    service.expire(job_id)
    job = jobs.wait_for_state(service.database, job_id, "succeeded")
    assert job.attempt == 2
    check_single_result(service, job)


@embedded
@pytest.mark.parametrize("attempts", [1, 3])
def test_a_job_that_always_kills_its_engine_ends(service: Service, attempts: int) -> None:
    job_id = service.submit(model=service.model(kill=signal.SIGKILL), limits={"max_attempts": attempts})
    service.start_worker()
    job = jobs.wait_for_state(service.database, job_id, "failed")
    assert job.attempt == attempts
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    told = jobs.events(service.database, job_id)
    assert (told.count("claimed"), told.count("requeued"), told[-1]) == (attempts, attempts - 1, "failed")
    jobs.wait_until(lambda: not service.work_directories(), 60, "the clean-up")


@embedded
def test_a_job_whose_worker_always_dies_ends(service: Service) -> None:
    job_id = service.submit(model=service.model(steps=100, pause=0.2), limits={"max_attempts": 2})
    for attempt in (1, 2):
        worker = service.start_worker()
        jobs.wait_until(lambda attempt=attempt: jobs.get(service.database, job_id).attempt == attempt, 60, f"attempt {attempt}")  # type: ignore[misc]  # bound now
        service.kill_tree(worker)
        service.expire(job_id)
    job = jobs.wait_for_state(service.database, job_id, "failed")
    assert job.attempt == 2
    assert job.error is not None
    assert job.error["code"] == "worker_lost"
    service.start_worker()  # which finds the directory that no worker was left to remove
    jobs.wait_until(lambda: not service.work_directories(), 60, "the clean-up")


@both_services
def test_cancel_of_a_running_job_ends_its_engine(service: Service) -> None:
    job_id = service.submit(model=service.model(steps=1000, pause=0.1, deaf=True))
    worker = service.start_worker()
    wait_for_progress(service, job_id, 0.005)
    [engine] = service.engines(worker)
    assert jobs.cancel(service.database, job_id) == "cancelling"
    assert jobs.wait_until(lambda: not engine.is_running(), 60, "the engine's end") < 30
    jobs.wait_for_state(service.database, job_id, "cancelled")
    jobs.wait_until(lambda: not service.work_directories(), 60, "the clean-up")
    assert service.stored() == set()


@embedded
@pytest.mark.parametrize("lease", [{}], ids=["default lease"])
def test_cancel_in_the_middle_of_a_round_takes_less_than_ten_seconds(service: Service) -> None:
    """Of the real engine, between sub-models that take seconds each."""
    make_checkpoint(service.models / "llama", "llama", layers=24, hidden=512, ffn=2048)
    text = make_text(service.settings.home / "texts", words=20_000)
    calibration = {"source": str(text), "samples": 4, "sequence_length": 512}
    job_id = service.submit(model="llama", method={"name": "bonsai", "masks": 40}, sparsity=0.2, calibration=calibration)
    worker = service.start_worker("worker.celery", text_roots=json.dumps([str(text.parent)]))

    def evaluates_sub_models() -> bool:
        job = jobs.get(service.database, job_id)
        assert job.state in ("queued", "running"), job.error
        return bool(job.progress.get("masks_done"))

    jobs.wait_until(evaluates_sub_models, 240, "a sub-model")
    [engine] = service.engines(worker)
    assert jobs.cancel(service.database, job_id) == "cancelling"
    asked = time.monotonic()
    jobs.wait_for_state(service.database, job_id, "cancelled")
    assert time.monotonic() - asked < 10
    assert not engine.is_running()
    jobs.wait_until(lambda: not service.work_directories(), 60, "the clean-up")
    assert service.stored() == set()


@embedded
def test_cancel_of_an_upload_leaves_nothing_behind(service: Service) -> None:
    job_id = service.submit(model=service.model(stuck=True))
    service.start_worker()
    jobs.wait_until(lambda: jobs.get(service.database, job_id).phase == "upload" and service.stored(), 60, "the upload")
    jobs.cancel(service.database, job_id)
    jobs.wait_for_state(service.database, job_id, "cancelled")
    jobs.wait_until(lambda: not service.work_directories() and not service.stored(), 60, "the clean-up")


@embedded
def test_cancel_of_a_queued_job_is_at_once_and_final(service: Service) -> None:
    job_id = service.submit(model=service.model())
    assert jobs.cancel(service.database, job_id) == "cancelled"
    other = service.submit(model=service.model())
    service.start_worker()
    jobs.wait_for_state(service.database, other, "succeeded")
    assert jobs.get(service.database, job_id).state == "cancelled"
    assert jobs.get(service.database, job_id).attempt == 0
    assert jobs.cancel(service.database, other) is None  # it has finished


@embedded
def test_cancel_of_a_job_whose_worker_is_gone(service: Service) -> None:
    job_id = service.submit(model=service.model(steps=1000, pause=0.1))
    worker = service.start_worker()
    wait_for_progress(service, job_id, 0.001)
    service.kill_tree(worker)
    assert jobs.cancel(service.database, job_id) == "cancelling"
    service.expire(job_id)
    jobs.wait_for_state(service.database, job_id, "cancelled")


@both_services
def test_a_worker_that_slept_past_its_lease_writes_nothing_more(service: Service) -> None:
    job_id = service.submit(model=service.model(steps=12, pause=0.5))
    sleeper = service.start_worker()
    wait_for_progress(service, job_id, 0.2)
    asleep = service.put_to_sleep(sleeper)
    service.expire(job_id)
    service.start_worker()
    jobs.wait_until(lambda: jobs.get(service.database, job_id).attempt == 2, 60, "the second attempt")
    jobs.wait_until(lambda: len(service.work_directories()) == 2, 60, "a directory beside the one that the sleeper still has")
    wait_for_progress(service, job_id, 0.1)
    for process in reversed(asleep):
        process.resume()
    job = jobs.wait_for_state(service.database, job_id, "succeeded")
    assert (job.attempt, job.lease_token) == (2, 2)
    told = jobs.events(service.database, job_id)
    assert (told.count("claimed"), told.count("succeeded"), told[-1]) == (2, 1, "succeeded")
    jobs.wait_until(lambda: not service.engines(sleeper), 60, "the end of the sleeper's engine")
    assert service.stored() == {f"{job_id}/a2"}
    assert jobs.get(service.database, job_id).version == job.version
    # The sleeper is a whole worker again: the next jobs are done by both, and the first directory goes too.
    for other in [service.submit(model=service.model()) for _ in range(2)]:
        jobs.wait_for_state(service.database, other, "succeeded")
    jobs.wait_until(lambda: not service.work_directories(), 60, "the clean-up")


@both_services
def test_sigterm_hands_the_job_over_without_counting_the_attempt(service: Service) -> None:
    job_id = service.submit(model=service.model(steps=20, pause=0.15), limits={"max_attempts": 1})
    worker = service.start_worker()
    wait_for_progress(service, job_id, 0.2)
    waiting = service.submit(model=service.model())
    worker.terminate()
    assert worker.wait(60) == 0
    assert service.workers() == []
    job = jobs.get(service.database, job_id)
    assert (job.state, job.attempt) == ("queued", 0)
    assert 0.5 < job.ran_seconds < 120  # its time is charged, the attempt is not
    assert jobs.get(service.database, waiting).started_at is None
    service.start_worker()
    job = jobs.wait_for_state(service.database, job_id, "succeeded")
    assert job.attempt == 1
    check_single_result(service, job)


@embedded
@pytest.mark.parametrize(
    ("behaviour", "recipe", "code"),
    [
        ({"error": {"code": "calibration_text_too_short", "message": "short", "hint": "longer"}}, {}, "calibration_text_too_short"),
        ({"exit": 3}, {"limits": {"max_attempts": 2}}, "engine_failed"),
        ({"pause": 60}, {"limits": {"max_runtime": 2}}, "max_runtime_exceeded"),
        ({}, {"model": "../model-0"}, "model_outside_roots"),
        ({}, {"model": "no/such-model"}, "model_not_found"),
        ({}, {"calibration": {"source": "/etc/hostname"}}, "text_outside_roots"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_not_be_done_fails_with_its_reason(service: Service, behaviour: dict[str, object], recipe: dict[str, object], code: str) -> None:
    job_id = service.submit(**{"model": service.model(**behaviour)} | recipe)
    service.start_worker()
    job = jobs.wait_for_state(service.database, job_id, "failed")
    assert job.error is not None
    assert job.error["code"] == code
    assert job.error["message"]
    assert job.error["hint"]
    assert job.attempt == (2 if code == "engine_failed" else 1)
    if code == "engine_failed":
        assert any("the last words" in message for message in jobs.messages(service.database, job_id))
    jobs.wait_until(lambda: not service.work_directories(), 60, "the clean-up")
    assert service.stored() == set()


@embedded
@pytest.mark.parametrize("lease", [{"ESPALIER_ENGINE_MEMORY_BYTES": "200000000"}], ids=["memory limit"])
def test_an_engine_that_takes_too_much_memory_fails(service: Service) -> None:
    job_id = service.submit(model=service.model(allocate=400_000_000))
    service.start_worker()
    job = jobs.wait_for_state(service.database, job_id, "failed")
    assert job.error is not None
    assert job.error["code"] == "out_of_memory"
    assert job.attempt == 1


@embedded
@pytest.mark.parametrize("file", ["recipe.json", "manifest.json"], ids=["before the engine", "while storing"])
def test_a_full_disk_fails_the_job_and_is_freed(service: Service, file: str) -> None:
    job_id = service.submit(model=service.model())
    folder = service.settings.work_dir / job_id
    folder.mkdir(parents=True)
    (folder / file).symlink_to("/dev/full")
    service.start_worker()
    job = jobs.wait_for_state(service.database, job_id, "failed")
    assert job.error is not None
    assert job.error["code"] == "disk_full"
    jobs.wait_until(lambda: not service.work_directories() and not service.stored(), 60, "the clean-up")


# ------------------------------------------------------------ workers and classes


@on_servers
@pytest.mark.parametrize("lease", [{"ESPALIER_LEASE_SECONDS": "4", "ESPALIER_BEAT_SECONDS": "0.5"}], ids=["short lease"])
def test_a_worker_is_known_from_its_start_to_its_end(service: Service) -> None:
    ended, killed = service.start_worker(engine_memory_bytes="5000000000"), service.start_worker(queue="large")
    known: list[Worker] = []

    def both_known() -> bool:
        known[:] = sorted(service.workers(), key=lambda worker: worker.queue)
        return len(known) == 2

    jobs.wait_until(both_known, 60, "both workers")
    one, other = known
    assert (one.queue, other.queue) == ("default", "large")
    assert one.host_bytes == 5_000_000_000
    assert other.host_bytes > 0
    assert one.disk_bytes > 0
    assert (one.draining, one.version) == (False, other.version)
    seen = one.seen_at
    jobs.wait_until(lambda: any(worker.queue == "default" and worker.seen_at > seen for worker in service.workers()), 60, "a beat without a job")
    ended.terminate()
    assert ended.wait(60) == 0
    jobs.wait_until(lambda: [worker.queue for worker in service.workers()] == ["large"], 60, "the other one")  # both were late where the machine stalled
    service.kill_tree(killed)
    jobs.wait_until(lambda: not service.workers(), 60, "the end of what was heard of it")


@on_servers
def test_each_class_does_its_own_jobs(service: Service) -> None:
    """Of the default class also by the command of the release before; a class of its own has no place at the default queue."""
    mistaken = service.start_worker("tests.faults.worker", "-Q", "prune", queue="large")
    of_class = {name: [service.submit(model=service.model(steps=2), queue=name) for _ in range(2)] for name in ("default", "large")}
    service.start_worker("tests.faults.worker", "-Q", "prune")
    service.start_worker(queue="large")
    done_by: dict[str, set[str]] = {}
    for name, ids in of_class.items():
        for job_id in ids:
            assert jobs.wait_for_state(service.database, job_id, "succeeded").attempt == 1
        with service.database.reading() as session:
            claims = session.scalars(select(JobEvent.data).where(JobEvent.job_id.in_(ids), JobEvent.kind == "claimed")).all()
        done_by[name] = {claim["worker"] for claim in claims}
    assert {worker.queue: {worker.id} for worker in service.workers()} == done_by
    assert mistaken.wait(60) != 0


@embedded
@nothing_again
def test_a_job_that_most_workers_have_no_room_for_is_not_stranded(service: Service) -> None:
    service.start_worker(engine_memory_bytes="500000000")
    jobs.wait_until(service.workers, 60, "the small worker")
    job_id = service.submit(model=service.model(), host_bytes=10**9)
    small = service.submit(model=service.model())
    jobs.wait_for_state(service.database, small, "succeeded")
    jobs.wait_until(lambda: queue.depth(service.settings) == 0, 60, "the end of the messages")  # the small worker took them all
    assert jobs.get(service.database, job_id).state == "queued"
    service.start_worker(engine_memory_bytes="2000000000")
    jobs.wait_for_state(service.database, job_id, "succeeded")
    later = service.submit(model=service.model(), host_bytes=10**9)
    jobs.wait_for_state(service.database, later, "succeeded")


@on_servers
@nothing_again
def test_a_tenant_s_cap_holds_and_strands_nothing(service: Service) -> None:
    capped = jobs.add_tenant(service.database, "capped", max_running=1)
    for _ in range(2):
        service.start_worker(beat_seconds="10")
    jobs.wait_until(lambda: len(service.workers()) == 2, 60, "both workers")
    ids = [service.submit(tenant=capped, model=service.model(steps=3, pause=0.1)) for _ in range(4)]
    most = 0

    def done() -> bool:
        nonlocal most
        states = [jobs.get(service.database, job_id).state for job_id in ids]
        most = max(most, states.count("running"))
        return states.count("succeeded") == len(ids)

    jobs.wait_until(done, 120, "the end of the jobs")
    assert most == 1


@embedded
@nothing_again
def test_whatever_a_message_says_it_is_a_hint(service: Service) -> None:
    service.start_worker(beat_seconds="120")
    jobs.wait_until(service.workers, 60, "the worker")
    time.sleep(1)  # its first beat is over
    with service.database.writing() as session:  # no message of its own
        job = insert_job(session, jobs.TENANT, Recipe.model_validate({"model": service.model(), "method": "magnitude", "sparsity": 0.5}))
        session.execute(delete(OutboxMessage))
    celery = queue.make_celery(service.settings)
    celery.send_task(queue.TASK, args=[{"version": 9}], kwargs={"unknown": "part"}, ignore_result=True)
    assert jobs.wait_for_state(service.database, job.id, "succeeded", seconds=60).attempt == 1


@embedded
def test_an_idle_worker_removes_what_a_lost_one_left(service: Service) -> None:
    job_id = service.submit(model=service.model(steps=1000, pause=0.1), limits={"max_attempts": 1})
    worker = service.start_worker()
    wait_for_progress(service, job_id, 0.001)
    service.start_worker()
    jobs.wait_until(lambda: len(service.workers()) == 2, 60, "the other worker")
    service.kill_tree(worker)
    service.expire(job_id)
    jobs.wait_for_state(service.database, job_id, "failed")
    jobs.wait_until(lambda: not service.work_directories(), 60, "the clean-up")


@embedded
def test_the_time_of_all_attempts_is_bounded(service: Service) -> None:
    job_id = service.submit(model=service.model(steps=1000, pause=0.1), limits={"max_runtime": 15, "max_attempts": 9})
    worker = service.start_worker()
    wait_for_progress(service, job_id, 0.005)
    [engine] = service.engines(worker)
    engine.kill()
    job = jobs.wait_for_state(service.database, job_id, "failed")
    assert job.error is not None
    assert job.error["code"] == "max_runtime_exceeded"
    assert job.attempt == 2
    assert job.ran_seconds < 2 * 15
