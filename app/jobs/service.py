"""What can be done with jobs, apart from HTTP. Raises the errors of `app.exceptions`; the caller commits."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy.orm import Session

from app.checkpoints.service import get_ready
from app.counting import count_parameters, fraction_of
from app.database import db_now
from app.estimate import Estimate, estimate
from app.exceptions import ConflictError, GoneError, NotFoundError, QuotaError, RecipeError
from app.jobs import repository
from app.jobs.repository import Admission, JobFilter
from app.jobs.schemas import Submission, Validation
from app.models import FINISHED, RETRIED, Artifact, Job
from app.paging import make_cursor, no_cursor, read_cursor
from app.queues.service import AUTO, place
from app.recipe import MODEL_ID, Budget
from app.settings import Settings
from app.sinks import reach
from app.sinks.repository import insert_runs
from app.source import CHECKPOINT_ID, Source, check_recipe, find_local, find_stored, find_text, read_source
from app.vault import Vault
from app.webhooks.service import check_named

RETRY_SECONDS = 30  # after a submission that was one too many


def check_submission(recipe: Submission, settings: Settings, uploaded: Source | None = None) -> Source | None:
    """Refuse what can never run, as far as it can be seen from here: model and text outside the allowed roots, a checkpoint that can't be pruned.

    -> the checkpoint, where it lies here.
    """
    for pointer, name in recipe.texts.items():
        find_text(name, settings.text_roots, pointer)
    if uploaded is not None:
        return _checked(recipe, uploaded)
    folder = find_local(recipe.model, settings.model_roots)
    if folder is not None:
        if folder.is_dir() or any(root.is_dir() for root in settings.model_roots):  # else the roots are only on the workers
            return _checked(recipe, read_source(folder))
    elif find_stored(recipe.model, settings.model_urls) is not None:
        return None  # the worker looks at it
    elif not MODEL_ID.fullmatch(recipe.model):
        raise RecipeError(
            f"'{recipe.model[:100]}' is neither a hub id nor a folder below an allowed root.",
            code="model_id_invalid",
            hint="Give a hub id such as 'owner/name', or a folder below a root that the operator allows.",
            pointer="/model",
        )
    elif not settings.hub:
        raise RecipeError(
            f"There is no model '{recipe.model}' below the allowed roots, and this service fetches none from the hub.",
            code="model_not_found",
            hint="Name a folder below an allowed root.",
            pointer="/model",
        )
    return None


def _checked(recipe: Submission, source: Source) -> Source:
    check_recipe(recipe, source)
    if not isinstance(recipe.sparsity, Budget):
        fraction_of(recipe, count_parameters(source, []))
    return source


def cost_of(recipe: Submission, settings: Settings, uploaded: Source | None = None) -> Estimate | None:
    """What a submission costs; None where that is not known before it runs. Raises RecipeError for one that can never run.

    uploaded: the model, where it is an uploaded checkpoint.
    """
    for number, sink in enumerate(recipe.sinks):
        reach.check(sink, settings, f"/sinks/{number}")
    source = check_submission(recipe, settings, uploaded)
    if source is None:
        return None
    texts = {name: find_text(name, settings.text_roots, pointer) for pointer, name in recipe.texts.items()}
    return estimate(recipe, source, {name: path.stat().st_size for name, path in texts.items() if path is not None and path.is_file()})


def validate(session: Session, recipe: Submission, cost: Estimate | None, settings: Settings) -> Validation:
    """What is known of a submission that could be made."""
    return Validation(recipe=recipe, estimate=cost, placement=place(session, recipe.queue, cost, settings.lease_seconds))


def is_written_at_once(recipe: Submission) -> bool:
    """Whether `submit` needs no transaction on Postgres: all that it writes is one statement, and nothing else is to stay as it is meanwhile."""
    return not recipe.sinks and not CHECKPOINT_ID.fullmatch(recipe.model)


def submit(session: Session, tenant_id: str, key_id: str, recipe: Submission, cost: Estimate | None, settings: Settings) -> Job:
    """A queued job, with its entry in the audit log under the key that was used.

    Raises QuotaError where the tenant has as many waiting jobs as it may; requests at the same moment may exceed that by their number.
    """
    _hold_model(session, tenant_id, recipe.model)
    check_named(session, tenant_id, recipe.webhook)
    queue = recipe.queue
    if cost is not None or queue == AUTO:
        queue = place(session, queue, cost, settings.lease_seconds).queue
    met, job = repository.admit_job(
        session,
        tenant_id,
        recipe,
        settings.lease_seconds,
        settings.max_queued,
        (_queued("Queued", queue, served=True), _queued("Queued", queue, served=False)),
        queue=queue,
        priority=recipe.priority,
        labels=recipe.metadata,
        webhook_id=recipe.webhook,
        host_bytes=None if cost is None else cost.host_bytes,
        device_bytes=None if cost is None else cost.device_bytes,
        key_id=key_id,
    )
    if job is None:
        raise _too_many(met)
    if recipe.sinks:
        insert_runs(session, tenant_id, job.id, recipe.sinks, Vault(settings), "pending")
        return get_job(session, tenant_id, job.id)
    return job


def _hold_model(session: Session, tenant_id: str, model: str) -> None:
    """Keep an uploaded checkpoint from being deleted before the job that needs it is there."""
    if CHECKPOINT_ID.fullmatch(model):
        get_ready(session, tenant_id, model)


def retry(session: Session, tenant_id: str, job_id: str, settings: Settings) -> Job:
    """Queue a job anew that failed or was cancelled. Raises ConflictError for any other, QuotaError as `submit` does."""
    job = get_job(session, tenant_id, job_id)
    if job.state not in RETRIED:
        raise _not_retried(job)
    _hold_model(session, tenant_id, job.model)
    met = repository.find_admission(session, tenant_id, job.queue, settings.lease_seconds, settings.max_queued)
    if met.waiting >= met.bound:
        raise _too_many(met)
    max_pending = job.recipe["limits"].get("max_pending")
    if repository.queue_again(session, job, None if max_pending is None else db_now(max_pending)):
        repository.add_event(session, job_id, tenant_id, "retried", _queued("Queued again", job.queue, met.served), {"attempt": job.attempt})
        session.expire(job)
        return get_job(session, tenant_id, job_id)
    session.expire(job)
    raise _not_retried(get_job(session, tenant_id, job_id))  # another request was faster


def _not_retried(job: Job) -> ConflictError:
    return ConflictError(f"The job is {job.state}.", code="job_not_retryable", hint="A job can be retried once it has failed or was cancelled.")


def delete(session: Session, tenant_id: str, job_id: str) -> None:
    """Delete a job that has finished, with all that is known of it; its files are the caller's to delete. Raises ConflictError while it goes on."""
    if not repository.delete_job(session, tenant_id, job_id):
        job = get_job(session, tenant_id, job_id)
        raise ConflictError(f"The job is {job.state}.", code="job_not_finished", hint=f"Cancel it with POST /v1/jobs/{job_id}/cancel, and wait for its end.")


def files_of(tenant_id: str, job_id: str) -> str:
    """Where everything lies that attempts at a job have stored."""
    return f"{tenant_id}/jobs/{job_id}/"


def _too_many(met: Admission) -> QuotaError:
    error = QuotaError(
        f"{met.waiting} jobs wait, and this tenant may have {met.bound} waiting.",
        code="too_many_queued",
        hint="Submit again when some have begun, or cancel some.",
    )
    error.headers = {"Retry-After": str(RETRY_SECONDS)}
    return error


def _queued(done: str, queue: str, served: bool) -> str:
    return f"{done}." if served else f"{done}; no worker of the queue '{queue}' lives now, so it waits for one."


def get_job(session: Session, tenant_id: str, job_id: str) -> Job:
    job = repository.find_job(session, tenant_id, job_id)
    if job is None:
        raise no_job(job_id)
    return job


def no_job(job_id: str) -> NotFoundError:
    return NotFoundError(f"There is no job {job_id[:100]}.", code="job_not_found", hint="List jobs with GET /v1/jobs.")


def get_succeeded(session: Session, tenant_id: str, job_id: str) -> Job:
    """A job that has a result."""
    job = get_job(session, tenant_id, job_id)
    if job.state in ("failed", "cancelled"):
        raise ConflictError(f"The job {job.state}, so it has no result.", code="job_without_result", hint="Its error and its events say why.")
    if job.state != "succeeded":
        raise ConflictError(f"The job is {job.state}.", code="job_not_finished", hint="Wait until its state is succeeded.")
    return job


def get_stored(session: Session, tenant_id: str, job_id: str) -> Job:
    """A job whose result's files are kept."""
    job = get_succeeded(session, tenant_id, job_id)
    if job.artifact_prefix is None:
        raise GoneError(
            "The files of this result were deleted.",
            code="artifacts_expired",
            hint="The job's last event says why. Its report is kept; submit its recipe again to have the files again.",
        )
    return job


def cancel(session: Session, tenant_id: str, job_id: str) -> Job:
    """Cancel a job that has not finished; asking again changes nothing."""
    state = repository.request_cancel(session, tenant_id, job_id)
    if state == "cancelled":
        repository.add_event(session, job_id, tenant_id, "cancelled", "Cancelled while queued.")
    elif state == "cancelling":
        repository.add_event(session, job_id, tenant_id, "cancel_requested", "Cancel requested.")
    job = get_job(session, tenant_id, job_id)
    if state is None and job.state in FINISHED:
        raise ConflictError(f"The job has already {job.state}." if job.state != "cancelled" else "The job is already cancelled.", code="job_finished")
    return job


def list_jobs(session: Session, tenant_id: str, wanted: JobFilter, cursor: str | None, limit: int) -> tuple[list[Job], str | None]:
    """A page of jobs, newest first, and the cursor of the next page."""
    before = None if cursor is None else _read_position(cursor, wanted)
    jobs = list(repository.list_jobs(session, tenant_id, wanted, before, limit + 1))
    if len(jobs) <= limit:
        return jobs, None
    last = jobs[limit - 1]
    return jobs[:limit], make_cursor(f"{last.created_at.isoformat()} {last.id}", wanted)


def get_artifact(session: Session, job: Job, path: str) -> Artifact:
    artifact = None if "\0" in path else repository.find_artifact(session, job.tenant_id, job.id, path)
    if artifact is None:
        raise NotFoundError(f"The job has no file '{path[:200]}'.", code="artifact_not_found", hint=f"Its files are in /v1/jobs/{job.id}/artifacts.")
    return artifact


def _read_position(cursor: str, wanted: JobFilter) -> tuple[datetime, str]:
    created_at, _, job_id = read_cursor(cursor, wanted).partition(" ")
    try:
        position = datetime.fromisoformat(created_at), job_id
    except ValueError:
        raise no_cursor() from None
    if position[0].tzinfo is None:
        raise no_cursor()
    return position
