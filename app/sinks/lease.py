"""Who may run a sink: each step is one conditional UPDATE, in the database's clock, as for jobs (`app/jobs/lease.py`).

A `waiting` sink whose `next_at` has come is due. Who claims it counts the try and the token up and holds it until `next_at`, which each beat moves on.

claim    due → held; one that was lost at its last try ends
beat     held for longer
finish   held → succeeded | failed; its secrets are forgotten, and an event tells of it
retry    held → due after a while

LeaseLost means that another has it now, or that it was deleted. The functions take part in the caller's transaction and don't commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, select, update
from sqlalchemy.orm import Session

from app import totals
from app.database import db_now
from app.jobs.lease import LeaseLost
from app.jobs.repository import insert_event
from app.models import Job, SinkRun

OUTCOMES = ("succeeded", "retried", "failed")
UNSYNCHRONIZED = {"synchronize_session": False}
SKIPPED_SECONDS = 7 * 24 * 3600  # for which the secrets of a skipped sink are kept
LOST = {
    "code": "exporter_lost",
    "message": "Nothing was heard of the process that did it, at the last try.",
    "hint": "Most often memory or disk ran out, or it was stopped by force. Its log says more; then try the sink again.",
}


@dataclass(frozen=True)
class Turn:
    """One try's right to write a sink's row."""

    job_id: str
    number: int
    tenant_id: str
    name: str
    target: dict[str, Any]
    secrets: str  # sealed
    token: int
    tries: int


def claim(session: Session, lease_seconds: float, most_tries: int) -> Turn | None:
    """Take the sink that has been due for longest; None where none is, or another was faster."""
    due = select(SinkRun).where(SinkRun.state == "waiting", SinkRun.next_at <= db_now()).order_by(SinkRun.next_at).limit(1)
    run = session.scalar(due)
    if run is None:
        return None
    turn = Turn(run.job_id, run.number, run.tenant_id, run.name, run.target, run.secrets or "", run.token, run.tries)
    if run.tries >= most_tries:
        finish(session, turn, "failed", error=LOST)
        return None
    values = {"tries": SinkRun.tries + 1, "token": SinkRun.token + 1, "next_at": db_now(lease_seconds)}
    _write(session, turn, values, None, SinkRun.next_at <= db_now())
    return Turn(run.job_id, run.number, run.tenant_id, run.name, run.target, run.secrets or "", run.token + 1, run.tries + 1)


def beat(session: Session, turn: Turn, lease_seconds: float) -> None:
    held = update(SinkRun).where(*_is(turn)).values(next_at=db_now(lease_seconds))
    if session.scalar(held.returning(SinkRun.number), execution_options=UNSYNCHRONIZED) is None:
        raise LeaseLost(turn.job_id)


def finish(
    session: Session, turn: Turn, state: Literal["succeeded", "failed"], *, result: dict[str, Any] | None = None, error: dict[str, str] | None = None
) -> None:
    data = {"number": turn.number, "sink": turn.name}
    message = f"Sink {turn.number} ({turn.name}) {state}."
    if error is not None:
        data, message = data | {"code": error["code"]}, f"Sink {turn.number} ({turn.name}) failed: {error['message']}"
    _write(session, turn, {"state": state, "result": result, "error": error, "secrets": None, "next_at": None}, (f"sink_{state}", message, data))
    totals.count(session, totals.SINK_TRIES, sink=turn.name, outcome=state)


def retry(session: Session, turn: Turn, after_seconds: float, error: dict[str, str] | None, *, charged: bool = True) -> None:
    """Let go of it for a while; a try that isn't `charged` doesn't count."""
    values: dict[str, Any] = {"next_at": db_now(after_seconds), "error": error, "tries": SinkRun.tries - (0 if charged else 1)}
    _write(session, turn, values, None)
    if charged:
        totals.count(session, totals.SINK_TRIES, sink=turn.name, outcome="retried")


def forget_skipped(session: Session) -> None:
    """Drop the secrets of sinks whose job ended otherwise long ago; until then it may be retried."""
    skipped = update(SinkRun).where(SinkRun.state == "skipped", SinkRun.secrets.is_not(None), SinkRun.updated_at < db_now(-SKIPPED_SECONDS))
    session.execute(skipped.values(secrets=None), execution_options=UNSYNCHRONIZED)


def _is(turn: Turn) -> tuple[ColumnElement[bool], ...]:
    return (SinkRun.job_id == turn.job_id, SinkRun.number == turn.number, SinkRun.state == "waiting", SinkRun.token == turn.token)


def _write(session: Session, turn: Turn, values: dict[str, Any], event: tuple[str, str, dict[str, Any]] | None, *conditions: ColumnElement[bool]) -> None:
    """The conditional UPDATE, and the job's part in it: a new version, since its readers see its sinks, and the event."""
    # The job's row first, as whoever deletes the job locks it first.
    told = (
        update(Job).where(Job.id == turn.job_id).values(version=Job.version + 1, last_event=Job.last_event + (0 if event is None else 1), updated_at=db_now())
    )
    job = session.execute(told.returning(Job.queue, Job.last_event), execution_options=UNSYNCHRONIZED).one_or_none()
    written = update(SinkRun).where(*_is(turn), *conditions).values(**values, updated_at=db_now())
    if job is None or session.scalar(written.returning(SinkRun.number), execution_options=UNSYNCHRONIZED) is None:
        raise LeaseLost(turn.job_id)
    if event is not None:
        insert_event(session, turn.job_id, turn.tenant_id, job.queue, job.last_event, *event)
