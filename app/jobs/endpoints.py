"""`/v1/jobs`: submit, list, watch, cancel, and fetch what came out."""

from __future__ import annotations

import mimetypes
import re
from functools import partial
from pathlib import PurePosixPath
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import RedirectResponse

from app.auth import ArtifactReader, JobReader, JobWriter
from app.dependencies import Configuration, OpenDatabase, OpenStore
from app.dispatcher import wake
from app.files import File, not_modified, serve
from app.jobs import repository, service
from app.jobs.archive import checkpoint_tar
from app.jobs.repository import JobFilter
from app.jobs.schemas import ArtifactFile, Event, EventPage, Job, JobPage, Manifest, State, Submission, Validation
from app.logging import bind_request
from app.models import FINISHED
from app.problems import declared
from app.recipe import MethodName
from app.report import Report

POLL_SECONDS = 2
MAX_SEQUENCE = 2**31 - 1
JOB_ID = re.compile(r"job_[0-9a-f]{32}")

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=declared(401, 403, 422))


async def _job_id(job_id: Annotated[str, Path(description="The job's id.", examples=["job_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])]) -> str:
    if not JOB_ID.fullmatch(job_id):
        raise service.no_job(job_id)
    bind_request(job_id=job_id)
    return job_id


JobId = Annotated[str, Depends(_job_id)]
Limit = Annotated[int, Query(ge=1, le=100, description="Most items of a page.")]
RETRY_AFTER = {"description": "Seconds after which to look again, while the job has not finished.", "schema": {"type": "integer"}}
ETAG = {"description": "Changes with every change of the job.", "schema": {"type": "string"}}
LOCATION = {"description": "The job's path.", "schema": {"type": "string"}}
FILE_HEADERS = {
    "ETag": {"description": "The sha256 of the bytes, in quotes.", "schema": {"type": "string"}},
    "Accept-Ranges": {"description": "`bytes`: a single range is served.", "schema": {"type": "string"}},
    "Content-Disposition": {"description": "The file's name.", "schema": {"type": "string"}},
}
RANGE_HEADERS = {**FILE_HEADERS, "Content-Range": {"description": "First and last byte, and the size.", "schema": {"type": "string"}}}
NOT_MODIFIED: dict[str, Any] = {"description": "What the client has is the current state."}
RANGE_PARAMETERS = [
    {"name": name, "in": "header", "required": False, "description": description, "schema": {"type": "string"}}
    for name, description in {
        "Range": "A single range, e.g. `bytes=0-1023` or `bytes=-512`.",
        "If-Range": "The ETag that the range belongs to; if the file has another one, all of it comes.",
        "If-None-Match": "ETags that the client has; 304 if one is current.",
    }.items()
]


def _file_responses(media_type: str) -> dict[int | str, dict[str, Any]]:
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    return {
        200: {"description": "The bytes.", "content": content, "headers": FILE_HEADERS},
        206: {"description": "The range asked for.", "content": content, "headers": RANGE_HEADERS},
        304: NOT_MODIFIED,
        **declared(404, 409, 410, 416),
    }


@router.post(
    "",
    status_code=202,
    responses={
        200: {"model": Validation, "description": "With `validate_only`: the job was not submitted."},
        202: {"headers": {"Location": LOCATION, "Retry-After": RETRY_AFTER}},
        **declared(400, 413, 415, 429),
    },
)
def submit_job(
    recipe: Submission,
    caller: JobWriter,
    database: OpenDatabase,
    settings: Configuration,
    response: Response,
    validate_only: Annotated[bool, Query(description="Only check the recipe, and tell what the job would cost.")] = False,
) -> Job | Validation:
    """Submit a pruning job. `model`, `method` and `sparsity` suffice; everything else has a default."""
    cost = service.cost_of(recipe, settings)
    if validate_only:
        response.status_code = 200
        with database.reading() as session:
            return service.validate(session, recipe, cost, settings)
    with database.writing() as session:
        job = service.submit(session, caller.tenant_id, recipe, cost, settings)
    wake()
    bind_request(job_id=job.id)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    response.headers["Retry-After"] = str(POLL_SECONDS)
    return Job.of(job)


@router.get("", responses=declared(400))
def list_jobs(
    caller: JobReader,
    database: OpenDatabase,
    state: Annotated[list[State] | None, Query(description="Only jobs in this state; may be given again.")] = None,
    method: Annotated[MethodName | None, Query(description="Only jobs with this method.")] = None,
    model: Annotated[str | None, Query(max_length=1024, pattern=r"^[^\x00]*$", description="Only jobs on this model, named as submitted.")] = None,
    cursor: Annotated[str | None, Query(max_length=1024, description="`next` of the page before.")] = None,
    limit: Limit = 20,
) -> JobPage:
    """List jobs, newest first. What is submitted meanwhile changes no later page."""
    wanted = JobFilter(tuple(sorted(set(state or ()))), method, model)
    with database.reading() as session:
        jobs, following = service.list_jobs(session, caller.tenant_id, wanted, cursor, limit)
    return JobPage(items=[Job.of(job) for job in jobs], next=following)


@router.get(
    "/{job_id}",
    response_model=Job,
    responses={200: {"headers": {"ETag": ETAG, "Retry-After": RETRY_AFTER}}, 304: NOT_MODIFIED, **declared(404)},
)
def get_job(job_id: JobId, caller: JobReader, database: OpenDatabase, request: Request, response: Response) -> Job | Response:
    """One job. With `If-None-Match` the answer is 304 until anything has changed."""
    with database.reading() as session:
        job = service.get_job(session, caller.tenant_id, job_id)
    headers = {"ETag": f'"{job.version}"'} | ({} if job.state in FINISHED else {"Retry-After": str(POLL_SECONDS)})
    if not_modified(request.headers, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    response.headers.update(headers)
    return Job.of(job)


@router.get("/{job_id}/events", responses=declared(404))
def list_events(
    job_id: JobId,
    caller: JobReader,
    database: OpenDatabase,
    after: Annotated[int, Query(ge=0, le=MAX_SEQUENCE, description="Only events with a higher sequence number.")] = 0,
    limit: Limit = 100,
) -> EventPage:
    """What happened to a job, in order."""
    with database.reading() as session:
        job = service.get_job(session, caller.tenant_id, job_id)
        events = repository.list_events(session, caller.tenant_id, job_id, after, limit)
    reached = events[-1].sequence if events else after
    return EventPage(items=[Event.model_validate(event) for event in events], next=reached, finished=job.state in FINISHED and reached >= job.last_event)


@router.post("/{job_id}/cancel", status_code=202, responses=declared(404, 409))
def cancel_job(job_id: JobId, caller: JobWriter, database: OpenDatabase) -> Job:
    """Cancel a job: at once while it is queued, within seconds while it runs. Asking again changes nothing; a finished job can't be cancelled."""
    with database.writing() as session:
        job = service.cancel(session, caller.tenant_id, job_id)
    return Job.of(job)


@router.get("/{job_id}/report", responses=declared(404, 409))
def get_report(job_id: JobId, caller: JobReader, database: OpenDatabase) -> Report:
    """Everything that was measured: before and after, by every denominator, with where the text came from."""
    with database.reading() as session:
        service.get_succeeded(session, caller.tenant_id, job_id)
        return Report.model_validate(repository.find_report(session, caller.tenant_id, job_id))


@router.get("/{job_id}/artifacts", responses=declared(404, 409, 410))
def list_artifacts(job_id: JobId, caller: ArtifactReader, database: OpenDatabase) -> Manifest:
    """The files of a job that has succeeded, each with its size and sha256."""
    with database.reading() as session:
        service.get_stored(session, caller.tenant_id, job_id)
        artifacts = repository.list_artifacts(session, caller.tenant_id, job_id)
    return Manifest(items=[ArtifactFile.model_validate(artifact) for artifact in artifacts])


@router.head("/{job_id}/artifacts/{path:path}", include_in_schema=False)
@router.get(
    "/{job_id}/artifacts/{path:path}",
    response_class=Response,
    responses={**_file_responses("application/octet-stream"), 307: {"description": "The file is at the Location, for a while, without a key."}},
    openapi_extra={"parameters": RANGE_PARAMETERS},
)
def get_artifact(
    job_id: JobId,
    path: Annotated[str, Path(description="Its path in the manifest.", examples=["checkpoint/config.json"])],
    caller: ArtifactReader,
    database: OpenDatabase,
    store: OpenStore,
    settings: Configuration,
    request: Request,
) -> Response:
    """One file. From S3 it comes by a redirect, which a Range header survives; a request with If-Range is answered here, where the ETag is the sha256."""
    with database.reading() as session:
        job = service.get_stored(session, caller.tenant_id, job_id)
        artifact = service.get_artifact(session, job, path)
    key = f"{job.artifact_prefix}{artifact.path}"
    media_type = mimetypes.guess_type(artifact.path)[0] or "application/octet-stream"
    file = File(PurePosixPath(artifact.path).name, artifact.bytes, artifact.sha256, media_type, partial(store.get_range, key))
    if request.method == "GET" and "if-range" not in request.headers and not not_modified(request.headers, file.etag):
        url = store.presign(key, settings.presign_seconds)
        if url is not None:
            return RedirectResponse(url, 307, {"ETag": file.etag})
    return serve(request, file)


@router.head("/{job_id}/checkpoint", include_in_schema=False)
@router.get("/{job_id}/checkpoint", response_class=Response, responses=_file_responses("application/x-tar"), openapi_extra={"parameters": RANGE_PARAMETERS})
def get_checkpoint(job_id: JobId, caller: ArtifactReader, database: OpenDatabase, store: OpenStore, request: Request) -> Response:
    """The pruned model as one uncompressed tar. The same bytes every time, so a download can go on with Range where it broke off."""
    with database.reading() as session:
        job = service.get_stored(session, caller.tenant_id, job_id)
        artifacts = repository.list_artifacts(session, caller.tenant_id, job_id)
    return serve(request, checkpoint_tar(job, artifacts, store))
