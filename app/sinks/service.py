"""What can be done with the sinks of a job that has succeeded, apart from HTTP. Raises the errors of `app.exceptions`; the caller commits."""

from __future__ import annotations

from pydantic import ValidationError
from sqlalchemy.orm import Session

from app import audit
from app.auth import Caller
from app.exceptions import ConflictError, NotFoundError, RecipeError
from app.jobs.repository import add_event
from app.jobs.service import get_stored
from app.models import Job
from app.settings import Settings
from app.sinks import repository
from app.sinks.schemas import S3, SINK, Hub, Mlflow, SinkSecrets, secrets_of
from app.vault import Vault

MAX_OF_JOB = 32


def add(session: Session, caller: Caller, job_id: str, sink: Hub | Mlflow | S3, settings: Settings) -> Job:
    """Bring the result of a job that has succeeded to one more sink."""
    job = get_stored(session, caller.tenant_id, job_id)
    # The event first: it locks the job's row, so that sinks are counted one at a time.
    add_event(session, job_id, caller.tenant_id, "sink_added", f"The result is to go to {sink.name}, too.", {"sink": sink.name})
    if repository.count_runs(session, caller.tenant_id, job_id) >= MAX_OF_JOB:
        raise ConflictError(f"The job has {MAX_OF_JOB} sinks, and may have no more.", code="too_many_sinks", hint="Try one again that has failed.")
    repository.insert_runs(session, caller.tenant_id, job_id, [sink], Vault(settings), "waiting")
    audit.record(session, caller, "sink.add", job_id, sink=sink.name)
    session.refresh(job)
    return job


def retry(session: Session, caller: Caller, job_id: str, number: int, secrets: SinkSecrets, settings: Settings) -> Job:
    """Try a sink again that has failed; all its tries begin anew. Raises ConflictError for any other."""
    job = get_stored(session, caller.tenant_id, job_id)
    run = repository.find_run(session, caller.tenant_id, job_id, number)
    if run is None:
        raise NotFoundError(f"The job has no sink {number}.", code="sink_not_found", hint="The job's `sinks` have their numbers.")
    sealed = Vault(settings).seal(_checked(run.target, secrets))
    add_event(session, job_id, caller.tenant_id, "sink_retried", f"Sink {number} ({run.name}) is to be tried again.", {"number": number, "sink": run.name})
    if not repository.begin_anew(session, caller.tenant_id, job_id, number, sealed):
        raise ConflictError(f"The sink is {run.state}.", code="sink_not_failed", hint="Only a sink that has failed can be tried again.")
    audit.record(session, caller, "sink.retry", job_id, number=number)
    session.refresh(job)
    return job


def _checked(target: dict[str, object], secrets: SinkSecrets) -> dict[str, str]:
    """The secrets, if they are the ones that the sink needs. Raises RecipeError."""
    given = secrets_of(secrets)
    try:
        SINK.validate_python(target | given)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        field = str(fault["loc"][-1]) if len(fault["loc"]) > 1 else ""
        hint = "A sink's secrets are forgotten when it ends: give all of them again."
        raise RecipeError(f"{field} {fault['msg']}".strip(), code="sink_secrets_invalid", hint=hint, pointer=f"/{field}".rstrip("/")) from error
    return given
