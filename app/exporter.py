"""Brings results to their sinks: `python -m app.exporter`, in as many processes as there is work for.

Each try is a child process, so that one that hangs, or takes too much memory, ends alone. It is held by a lease, as a job is: if this process dies, its child dies with
it, and another process tries again once the lease has run out. All that a sink does may be done twice and leaves the same.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from typing import Any

import structlog
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import totals
from app.background import run
from app.database import Database
from app.jobs.lease import LeaseLost
from app.jobs.repository import list_artifacts
from app.models import Job
from app.processes import dies_with
from app.settings import Settings
from app.sinks import lease
from app.sinks.lease import Turn
from app.vault import Vault

CHILD = (sys.executable, "-m", "app.sinks.export")
POLL_SECONDS = 0.5
FORGET_SECONDS = 3600.0  # between two rounds in which secrets that wait for nothing are dropped
EXPIRED = {
    "code": "artifacts_expired",
    "message": "The files of the result were deleted before they were brought here.",
    "hint": "Submit the job's recipe again to have the files again.",
}
FORGOTTEN = {
    "code": "secrets_forgotten",
    "message": "The sink's secrets were dropped before the job succeeded.",
    "hint": "Try the sink again with its secrets.",
}
CRASHED = {"code": "sink_crashed", "message": "The process that did it ended without a word.", "hint": "Its log says more, if memory or disk ran out for one."}
TOO_LONG = {"code": "sink_too_slow", "message": "It took longer than a try may take.", "hint": "An operator may raise ESPALIER_SINK_MAX_SECONDS."}

log = structlog.get_logger(__name__)


class Exporter:
    """Tries as many sinks at once as the settings allow, each in a thread that watches over its child."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        self._vault = Vault(settings)
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._keep_trying, name="exporter", daemon=True) for _ in range(settings.sinks_at_once)]
        self._threads.append(threading.Thread(target=self._keep_forgetting, name="forgetting", daemon=True))

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the children and give their sinks back, uncounted."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(timeout=15)

    def _keep_trying(self) -> None:
        while not self._stopping.is_set():
            try:
                busy = self._try_next()
            except Exception:  # whatever a driver raises, the next round tries again
                log.exception("exporter step failed")
                busy = False
            if not busy:
                self._stopping.wait(self._settings.sweep_seconds)

    def _keep_forgetting(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._database.writing() as session:
                    lease.forget_skipped(session)
            except Exception:  # likewise
                log.exception("secrets were not dropped")
            self._stopping.wait(FORGET_SECONDS)

    def _try_next(self) -> bool:
        """Make one try at the sink that has been due for longest; whether there may be more."""
        try:
            with self._database.writing() as session:
                turn = lease.claim(session, self._settings.lease_seconds, self._settings.sink_tries)
        except LeaseLost:  # another process was faster
            return True
        if turn is None:
            return False
        with structlog.contextvars.bound_contextvars(job_id=turn.job_id, tenant_id=turn.tenant_id, sink=turn.number, attempt=turn.tries):
            began = time.monotonic()
            try:
                self._settle(turn, self._make_try(turn), began)
            except LeaseLost:
                log.warning("sink lost")
        return True

    def _make_try(self, turn: Turn) -> dict[str, Any] | None:
        """What the child answered; None where this process is to end."""
        with self._database.reading() as session:
            request = _request(session, turn, self._settings)
        if request is None:
            return {"error": EXPIRED, "final": True}
        if not turn.secrets:
            return {"error": FORGOTTEN, "final": True}
        request["sink"] = turn.target | self._vault.open(turn.secrets)
        child = subprocess.Popen(
            CHILD,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if not name.startswith("HF_TOKEN")},  # the operator's own
            process_group=0,
            preexec_fn=dies_with(os.getpid()),  # noqa: PLW1509  it makes one system call
        )
        with child:
            try:
                return self._watch(child, turn, json.dumps(request).encode())
            finally:
                child.kill()

    def _watch(self, child: subprocess.Popen[bytes], turn: Turn, request: bytes) -> dict[str, Any] | None:
        began = beaten = tried = time.monotonic()
        asked: bytes | None = request
        while True:
            try:
                said, _ = child.communicate(asked, timeout=POLL_SECONDS)
            except subprocess.TimeoutExpired:
                asked = None  # it can be given once
            else:
                return _answer(said)
            now = time.monotonic()
            if self._stopping.is_set():
                return None
            if now - began > self._settings.sink_max_seconds:
                return {"error": TOO_LONG, "final": False}
            if now - tried > self._settings.beat_seconds:
                tried = now
                if self._beat(turn):
                    beaten = now
                elif now - beaten > self._settings.lease_seconds:
                    raise LeaseLost(turn.job_id)

    def _beat(self, turn: Turn) -> bool:
        """Whether the database was there. Raises LeaseLost."""
        try:
            with self._database.writing() as session:
                lease.beat(session, turn, self._settings.lease_seconds)
        except SQLAlchemyError:
            log.warning("no beat: the database does not answer")
            return False
        return True

    def _settle(self, turn: Turn, answer: dict[str, Any] | None, began: float) -> None:
        error = (answer or {}).get("error")
        with self._database.writing() as session:
            if answer is None:
                outcome = "given back"
                lease.retry(session, turn, 0, None, charged=False)
            elif error is None:
                outcome = "succeeded"
                lease.finish(session, turn, "succeeded", result=answer["done"])
            elif answer["final"] or turn.tries >= self._settings.sink_tries:
                outcome = "failed"
                lease.finish(session, turn, "failed", error=error)
            else:
                outcome = "to be tried again"
                pause = self._settings.sink_retry_seconds * 2 ** (turn.tries - 1) * random.uniform(0.9, 1.1)  # noqa: S311  it only spreads the load
                lease.retry(session, turn, pause, error)
            if answer is not None:
                totals.observe(session, totals.SINK_SECONDS, time.monotonic() - began, totals.SINK_BOUNDS, sink=turn.name)
        log.info("sink tried", name=turn.name, outcome=outcome, code=error and error["code"])


def _request(session: Session, turn: Turn, settings: Settings) -> dict[str, Any] | None:
    """What the child is told, but for the sink; None where the result's files are gone."""
    columns = (Job.model, Job.method, Job.recipe, Job.report, Job.artifact_prefix, Job.finished_at)
    job = session.execute(select(*columns).where(Job.id == turn.job_id, Job.tenant_id == turn.tenant_id)).one_or_none()
    if job is None or job.artifact_prefix is None or job.finished_at is None:
        return None
    files = [
        {"path": file.path, "role": file.role, "bytes": file.bytes, "sha256": file.sha256} for file in list_artifacts(session, turn.tenant_id, turn.job_id)
    ]
    stored = f"{settings.store_url.rstrip('/')}/{job.artifact_prefix}checkpoint"
    result = {
        "job_id": turn.job_id,
        "model": job.model,
        "method": job.method,
        "finished_ms": int(job.finished_at.timestamp() * 1000),
        "prefix": job.artifact_prefix,
        "url": stored if stored.startswith("s3://") else f"{settings.public_url}/v1/jobs/{turn.job_id}/checkpoint",
        "files": files,
        "recipe": job.recipe,
        "report": job.report,
    }
    return {"number": turn.number, "result": result}


def _answer(said: bytes) -> dict[str, Any]:
    lines = said.splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {"error": CRASHED, "final": False}


if __name__ == "__main__":
    run(Exporter)
