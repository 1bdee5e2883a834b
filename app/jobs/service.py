"""What can be done with jobs, apart from HTTP. Raises the errors of `app.exceptions`; the caller commits."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from datetime import datetime

from sqlalchemy.orm import Session

from app.counting import count_parameters, fraction_of
from app.estimate import estimate
from app.exceptions import ConflictError, CursorError, NotFoundError, RecipeError
from app.jobs import repository
from app.jobs.repository import JobFilter
from app.jobs.schemas import Submission, Validation
from app.models import FINISHED, Artifact, Job
from app.recipe import MODEL_ID, Budget, Recipe
from app.settings import Settings
from app.source import Source, check_recipe, find_local, find_text, read_source


def check_submission(recipe: Submission, settings: Settings) -> Source | None:
    """Refuse what can never run, as far as it can be seen from here: model and text outside the allowed roots, a checkpoint that can't be pruned.

    -> the checkpoint, where it lies here.
    """
    for pointer, name in recipe.texts.items():
        find_text(name, settings.text_roots, pointer)
    folder = find_local(recipe.model, settings.model_roots)
    if folder is not None:
        if folder.is_dir() or any(root.is_dir() for root in settings.model_roots):  # else the roots are only on the workers
            source = read_source(folder)
            check_recipe(recipe, source)
            if not isinstance(recipe.sparsity, Budget):
                fraction_of(recipe, count_parameters(source, []))
            return source
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


def validate(recipe: Submission, settings: Settings) -> Validation:
    """Every check of a submission, and what the job would cost."""
    source = check_submission(recipe, settings)
    return Validation(recipe=recipe, estimate=None if source is None else estimate(recipe, source))


def submit(session: Session, tenant_id: str, recipe: Recipe) -> Job:
    return repository.insert_job(session, tenant_id, recipe)


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
    before = None if cursor is None else _read_cursor(cursor, wanted)
    jobs = list(repository.list_jobs(session, tenant_id, wanted, before, limit + 1))
    more = len(jobs) > limit
    return jobs[:limit], _make_cursor(jobs[limit - 1], wanted) if more else None


def get_artifact(session: Session, job: Job, path: str) -> Artifact:
    artifact = None if "\0" in path else repository.find_artifact(session, job.tenant_id, job.id, path)
    if artifact is None:
        raise NotFoundError(f"The job has no file '{path[:200]}'.", code="artifact_not_found", hint=f"Its files are in /v1/jobs/{job.id}/artifacts.")
    return artifact


def _make_cursor(job: Job, wanted: JobFilter) -> str:
    return base64.urlsafe_b64encode(json.dumps([_fingerprint(wanted), job.created_at.isoformat(), job.id]).encode()).decode().rstrip("=")


def _read_cursor(cursor: str, wanted: JobFilter) -> tuple[datetime, str]:
    try:
        fingerprint, created_at, job_id = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
        position = datetime.fromisoformat(created_at), str(job_id)
        valid = position[0].tzinfo is not None and "\0" not in position[1]
    except (ValueError, TypeError, binascii.Error):
        valid = False
    if not valid:
        raise CursorError("The cursor is not one that this list gave.", code="cursor_invalid", hint="Give `next` of the page before, or no cursor.")
    if fingerprint != _fingerprint(wanted):
        raise CursorError("The cursor belongs to a list with other filters.", code="cursor_of_other_filters", hint="Keep the filters, or start anew.")
    return position


def _fingerprint(wanted: JobFilter) -> str:
    return hashlib.sha256(repr(wanted).encode()).hexdigest()[:16]
