"""One attempt at a job: claim ▸ fetch the model ▸ run the engine ▸ upload ▸ finish. Each long step is a child process under the attempt's lease."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import telemetry, totals
from app.database import Database
from app.exceptions import EspalierError
from app.jobs.lease import Lease, LeaseLost, StoredFile, claim_next, finish, is_result, release, seconds_over, worker_lost
from app.models import Worker
from app.recipe import Recipe
from app.settings import Settings
from app.source import CHECKPOINT_ID, find_local, find_stored, find_text
from app.storage import open_store
from worker import cache, durable
from worker.heartbeat import Heartbeat, never
from worker.supervisor import Outcome, Phase, supervise
from worker.workspace import Workspace, sweep, workspace

ENGINE = (sys.executable, "-m", "worker.pipeline")
PULL = (sys.executable, "-m", "worker.durable", "pull")
FETCH = (sys.executable, "-m", "worker.fetch")
UPLOAD = (sys.executable, "-m", "worker.upload")
UPLOAD_TRIES = 2  # of one attempt; the second sends what the first has not stored
SETTLE_PAUSE = 1.0  # seconds between two tries to write how the attempt ended
DISK_FULL = {"code": "disk_full", "message": "The worker's disk is full.", "hint": "Free space in the worker's work directory, or prune a smaller model."}

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Result:
    report: dict[str, Any]
    files: list[StoredFile]


class Ended(Exception):  # noqa: N818  a step that did not succeed ends the attempt, for whatever reason
    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.kind)
        self.outcome = outcome


def run_next(worker: Worker, settings: Settings, database: Database, *, engine: Sequence[str] = ENGINE, draining: Callable[[], bool] = never) -> None:
    """Claim the job that is this worker's turn and make one attempt at it; does nothing where there is nothing to claim."""
    claimed_at, began = time.monotonic(), time.time_ns()
    with database.writing() as session:
        lease = claim_next(session, worker, settings.lease_seconds)
    if lease is None:
        log.info("nothing to claim")
        return
    ids: dict[str, str | int] = {"job_id": lease.job_id, "attempt": lease.attempt, "tenant_id": lease.tenant_id}
    with structlog.contextvars.bound_contextvars(**ids), telemetry.attempt(lease.trace_parent, began, **ids, queue=lease.queue) as span:
        telemetry.record("claim", began, time.time_ns())
        log.info("claimed", token=lease.token)
        beating = {"claimed_at": claimed_at, "lease_seconds": settings.lease_seconds, "beat_seconds": settings.beat_seconds}
        with Heartbeat(database, lease, **beating, draining=draining) as heart:
            attempt = Attempt(settings, lease, heart, engine)
            outcome, result = attempt.run()
            heart.stop()
            log.info("ended", outcome=outcome.kind, error=outcome.error)
            for phase in attempt.phases:
                telemetry.record(phase.name, phase.began, phase.ended)
            span.set_attributes({"outcome": outcome.kind, "error": (outcome.error or {}).get("code", "")})
            finishing = time.time_ns()

            def write(session: Session) -> None:
                _conclude(session, heart, outcome, result)
                _count(session, lease, attempt.phases, result)

            _settle(database, heart, write)
            telemetry.record("finish", finishing, time.time_ns())
        clean_up(settings, database, lease)


class Attempt:
    """What the steps of one attempt share."""

    def __init__(self, settings: Settings, lease: Lease, heart: Heartbeat, engine: Sequence[str]) -> None:
        self._settings = settings
        self._lease = lease
        self._heart = heart
        self._engine = engine
        self._recipe = Recipe.model_validate(lease.recipe)
        self._durable = self._recipe.limits.resume == "durable"
        self.phases: list[Phase] = []  # of the steps that are over
        self._deadline = time.monotonic() + lease.seconds_to_run

    def run(self) -> tuple[Outcome, Result | None]:
        try:
            with workspace(self._settings.work_dir, self._lease) as space:
                if not (space.folder / "engine-finished").exists():
                    if self._durable and durable.worked_elsewhere(space.folder, self._lease.token):
                        self._pull(space)
                    with self._source(space) as (source, locks):
                        self._run_engine(space, source, locks)
                return Outcome("succeeded"), self._upload(space)
        except Ended as ended:
            return ended.outcome, None
        except EspalierError as error:
            return Outcome("failed", {"code": error.code, "message": error.message, "hint": error.hint}), None
        except Exception as error:  # whatever goes wrong in an attempt is told in its row
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                return Outcome("failed", DISK_FULL), None
            log.exception("attempt failed")
            internal = {
                "code": "internal_error",
                "message": "The worker failed in an unexpected way.",
                "hint": "The operator finds the reason in the worker's log.",
            }
            return Outcome("crashed", internal), None

    @contextmanager
    def _source(self, space: Workspace) -> Iterator[tuple[Path, list[int]]]:
        """The folder of the model that the recipe names, and the locks under which it stays where it is."""
        model = self._recipe.model
        assert model is not None
        uploaded = CHECKPOINT_ID.fullmatch(model) is not None
        folder = None if uploaded else find_local(model, self._settings.model_roots)
        if folder is not None:
            yield folder, []
            return
        if not uploaded and find_stored(model, self._settings.model_urls) is None and not self._settings.hub:
            raise EspalierError(f"There is no model '{model}' below the worker's roots.", code="model_not_found", hint="Name a folder below an allowed root.")
        folder, lock = self._fetch(space, model)
        try:
            yield folder, [] if lock is None else [lock]
        finally:
            if lock is not None:
                os.close(lock)

    def _pull(self, space: Workspace) -> None:
        """Bring what attempts on other machines have finished."""
        outcome = self._step(space, *PULL, space.folder, self._lease.resume_prefix)
        if outcome.kind == "crashed":
            log.error("pull failed", said=outcome.said)
            hint = "Try again in a while."
            outcome = Outcome("crashed", {"code": "store_unavailable", "message": "What an earlier attempt stored could not be fetched.", "hint": hint})
        _must_succeed(outcome)

    def _fetch(self, space: Workspace, model: str) -> tuple[Path, int | None]:
        """The folder of a model that lies elsewhere, and the lock that keeps it in the cache, if it lies there."""
        answer = space.folder / "model.json"
        while True:
            outcome = self._step(space, *FETCH, model, answer, self._lease.tenant_id)
            if outcome.kind == "crashed":
                log.error("fetch failed", said=outcome.said)
                code = "store_unavailable" if model.startswith(("ckpt_", "s3://")) else "hub_unavailable"
                outcome = Outcome("crashed", {"code": code, "message": f"'{model}' could not be fetched.", "hint": "Try again in a while."})
            _must_succeed(outcome)
            fetched = json.loads(answer.read_text(encoding="utf-8"))
            folder = Path(fetched["folder"])
            if not fetched["cached"]:
                return folder, None
            lock = cache.hold(folder)
            if lock is not None:  # else it was removed since, to make room for another
                return folder, lock

    def _run_engine(self, space: Workspace, source: Path, locks: Sequence[int]) -> None:
        recipe = space.folder / "recipe.json"
        recipe.write_text(self._recipe.model_dump_json(), encoding="utf-8")
        texts = [part for name, path in _texts(self._recipe, self._settings).items() for part in ("--text", name, path)]
        memory = self._settings.engine_memory_bytes
        bound = ("--memory", str(memory)) if memory else ()
        command = (*self._engine, recipe, source, space.out, "--work", space.state, *texts, *bound)
        with durable.pushing(space.folder, self._lease.resume_prefix, self._lease.token) if self._durable else nullcontext() as last_push:
            outcome = self._step(space, *command, locks=locks, memory_bytes=memory, secrets=False)
            if last_push is not None and outcome.kind in ("crashed", "draining"):
                last_push()
        if outcome.said and outcome.kind == "crashed":
            self._heart.tell("log", f"The engine's last words:\n{outcome.said}")
        _must_succeed(outcome)
        (space.folder / "engine-finished").touch()

    def _upload(self, space: Workspace) -> Result:
        manifest = space.folder / "manifest.json"
        for _ in range(UPLOAD_TRIES):
            outcome = self._step(space, *UPLOAD, space.out, self._lease.artifact_prefix, manifest)
            if outcome.kind != "crashed":
                break
            log.error("upload failed", said=outcome.said)
        if outcome.kind == "crashed":
            outcome = Outcome("crashed", {"code": "store_unavailable", "message": "The result could not be stored.", "hint": "Try again in a while."})
        _must_succeed(outcome)
        report = json.loads((space.out / "report.json").read_text(encoding="utf-8"))
        return Result(report, [StoredFile(**entry) for entry in json.loads(manifest.read_text(encoding="utf-8"))])

    def _step(self, space: Workspace, *command: str | Path, locks: Sequence[int] = (), memory_bytes: int = 0, secrets: bool = True) -> Outcome:
        environment = {name: value for name, value in os.environ.items() if secrets or not name.startswith(("ESPALIER_", "HF_TOKEN"))}
        outcome = supervise(
            [str(part) for part in command],
            self._heart,
            deadline=self._deadline,
            grace_seconds=self._settings.cancel_grace_seconds,
            memory_bytes=memory_bytes,
            environment=environment | telemetry.environment(),
            keep_open=(space.lock, *locks),
        )
        self.phases += outcome.phases
        return outcome


def _must_succeed(outcome: Outcome) -> None:
    if outcome.kind != "succeeded":
        raise Ended(outcome)


def _texts(recipe: Recipe, settings: Settings) -> dict[str, Path]:
    """Where the texts lie that the recipe names by a path; they may be read only below the allowed roots."""
    found = {name: find_text(name, settings.text_roots, pointer) for pointer, name in recipe.texts.items()}
    return {name: path for name, path in found.items() if path is not None}


# ------------------------------------------------------------------ how it ends


def _conclude(session: Session, heart: Heartbeat, outcome: Outcome, result: Result | None) -> None:
    lease = heart.lease
    match outcome.kind:
        case "succeeded":
            assert result is not None
            progress = heart.last_progress | {"fraction": 1.0, "eta_seconds": 0}
            finish(session, lease, "succeeded", progress=progress, report=result.report, files=result.files)
        case "cancelled":
            finish(session, lease, "cancelled")
        case "draining":
            release(session, lease, "The worker shuts down; another one will go on.", charged=False)
        case "crashed" if not lease.last_attempt:
            assert outcome.error is not None
            release(session, lease, f"{outcome.error['message']} Attempt {lease.attempt + 1} of {lease.max_attempts} follows.", charged=True)
        case "failed" | "crashed":
            lost = outcome.error is None or outcome.error["code"] == "worker_lost"
            finish(session, lease, "failed", error=worker_lost(lease.attempt) if lost else outcome.error)
        case "lost":
            raise LeaseLost(lease.job_id)


def _count(session: Session, lease: Lease, phases: Sequence[Phase], result: Result | None) -> None:
    for phase in phases:
        totals.observe(session, totals.PHASE_SECONDS, phase.seconds, totals.PHASE_BOUNDS, queue=lease.queue, phase=phase.name)
    if result is not None:
        for name, field in ((totals.ENGINE_BYTES, "peak_memory_bytes"), (totals.DEVICE_BYTES, "peak_device_bytes")):
            if result.report.get(field) is not None:
                totals.observe(session, name, result.report[field], totals.BYTES_BOUNDS, queue=lease.queue)


def _settle(database: Database, heart: Heartbeat, write: Callable[[Session], None]) -> None:
    """Write how the attempt ended, for as long as the lease is held; after that the reaper does."""
    while True:
        try:
            with database.writing() as session:
                write(session)
        except SQLAlchemyError:
            log.exception("the attempt's end could not be written")
            if heart.seconds_left() < SETTLE_PAUSE:
                return
            time.sleep(SETTLE_PAUSE)
        except LeaseLost:
            try:  # a cancel may have come after the last beat
                with database.writing() as session:
                    finish(session, heart.lease, "cancelled")
            except (LeaseLost, SQLAlchemyError):
                log.warning("lease lost")
            return
        else:
            return


def clean_up(settings: Settings, database: Database, lease: Lease | None = None) -> None:
    """Remove what no job goes on from: work directories and, of the lease's job, stored files that are not its result. What fails now is tried after the next job."""

    def over(job_ids: Sequence[str]) -> dict[str, float]:
        with database.reading() as session:
            return seconds_over(session, job_ids)

    try:
        sweep(settings.work_dir, over, settings.keep_work_seconds)
        if lease is not None:
            store = open_store(settings)
            for token in range(1, lease.token + 1):
                prefix = lease.prefix_of(token)
                with database.reading() as session:
                    keep = is_result(session, lease.job_id, prefix)
                if not keep:
                    store.delete_prefix(prefix)
            if over([lease.job_id]).get(lease.job_id, -1) >= settings.keep_work_seconds:
                store.delete_prefix(lease.resume_prefix)
    except (SQLAlchemyError, EspalierError, OSError):
        log.exception("clean-up failed")
