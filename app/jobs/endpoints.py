"""`/v1/jobs`: submit, list, watch, cancel, retry, delete, and fetch what came out."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Annotated, Any

import structlog
from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from fastapi.sse import EventSourceResponse
from pydantic import TypeAdapter, ValidationError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app import audit, models
from app.auth import ArtifactReader, Caller, JobReader, JobWriter, OpenKeys
from app.checkpoints.skeleton import source_of
from app.database import Database
from app.dependencies import Configuration, OpenDatabase, OpenStore
from app.dispatcher import wake
from app.exceptions import AuthenticationError, UnavailableError
from app.files import File, not_modified, serve
from app.idempotency import REPLAYED, Answer, MayBeAsked, answer_once, find_answer
from app.jobs import repository, service
from app.jobs.archive import checkpoint_tar
from app.jobs.news import News, Watched, stream
from app.jobs.repository import JobFilter, Standing
from app.jobs.schemas import ArtifactFile, Event, EventPage, Job, JobPage, Labels, Manifest, State, Submission, Validation
from app.jobs.told import Told, ToldJobs
from app.logging import bind_request
from app.models import FINISHED
from app.problems import declared
from app.recipe import MethodName
from app.report import Report
from app.settings import QUEUE, Settings
from app.storage import Store
from app.strict import Time

POLL_SECONDS = 2
MAX_WAIT_SECONDS = 60
MAX_SEQUENCE = 2**31 - 1
JOB_ID = re.compile(r"job_[0-9a-f]{32}")
EVENT_STREAM = "text/event-stream"

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1/jobs", tags=["jobs"], responses=declared(401, 403, 422))


async def _job_id(job_id: Annotated[str, Path(description="The job's id.", examples=["job_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])]) -> str:
    if not JOB_ID.fullmatch(job_id):
        raise service.no_job(job_id)
    bind_request(job_id=job_id)
    return job_id


JobId = Annotated[str, Depends(_job_id)]


async def _news(request: Request) -> News:
    news: News = request.app.state.news
    return news


OpenNews = Annotated[News, Depends(_news)]
Wait = Annotated[
    int,
    Query(
        ge=0,
        le=MAX_WAIT_SECONDS,
        description="Seconds to wait for the job to change from what If-None-Match names or, without that header, to finish. Then, or once they are over, "
        "the answer is how it stands.",
        examples=[30],
    ),
]


async def _streamed_job(request: Request, job_id: JobId, caller: JobReader, news: OpenNews) -> AsyncIterator[Watched | None]:
    """The job, watched until the answer is sent, if the request asks for a stream."""
    if EVENT_STREAM not in request.headers.get("accept", ""):
        yield None
        return
    with news.watch(job_id) as watched:
        yield watched


LABELS: TypeAdapter[dict[str, str]] = TypeAdapter(Labels)
LABELS_PARAMETER = {
    "name": "metadata",
    "in": "query",
    "required": False,
    "description": "Only jobs with these pairs among their metadata, each as `metadata[name]=value`.",
    "style": "deepObject",
    "explode": True,
    "schema": LABELS.json_schema(),
    "example": {"run": "42"},
}


def _labels(request: Request) -> tuple[tuple[str, str], ...]:
    """What the query's `metadata[name]=value` say, in the order of the names."""
    faults: list[Any] = []
    labels: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name.partition("[")[0] != "metadata":
            continue
        label = name.removeprefix("metadata[").removesuffix("]")
        if name != f"metadata[{label}]" or label in labels:
            faults.append({"type": "value_error", "loc": ("query", name), "msg": "it must be given as metadata[name]=value, each name once"})
        labels[label] = value
    try:
        LABELS.validate_python(labels)
    except ValidationError as error:
        faults += [{**fault, "loc": ("query", "metadata", *fault["loc"][:1])} for fault in error.errors()]
    if faults:
        raise RequestValidationError(faults)
    return tuple(sorted(labels.items()))


def _wanted(
    labels: Annotated[tuple[tuple[str, str], ...], Depends(_labels)],
    state: Annotated[list[State] | None, Query(description="Only jobs in this state; may be given again.")] = None,
    method: Annotated[MethodName | None, Query(description="Only jobs with this method.")] = None,
    model: Annotated[str | None, Query(max_length=1024, pattern=r"^[^\x00]*$", description="Only jobs on this model, named as submitted.")] = None,
    queue: Annotated[str | None, Query(pattern=QUEUE, description="Only jobs of this class of workers.")] = None,
    created_after: Annotated[Time | None, Query(description="Only jobs that were submitted after this time.", examples=["2026-11-22T00:00:00Z"])] = None,
    created_before: Annotated[Time | None, Query(description="Only jobs that were submitted before this time.", examples=["2026-11-23T00:00:00Z"])] = None,
) -> JobFilter:
    return JobFilter(tuple(sorted(set(state or ()))), method, model, queue, created_after, created_before, labels)


Limit = Annotated[int, Query(ge=1, le=100, description="Most items of a page.")]
RETRY_AFTER = {"description": "Seconds after which to look again, while the job has not finished.", "schema": {"type": "integer"}}
ETAG = {"description": "Changes with every change of the job.", "schema": {"type": "string"}}
LOCATION = {"description": "The job's path.", "schema": {"type": "string"}}
STREAM_EXAMPLE = 'event: phase\ndata: {"sequence": 3, "kind": "phase", …}\nid: 3\n\nevent: end\ndata: {"state": "succeeded"}\n\n'
OF_JOB = ("get_job", "list_events", "cancel_job", "retry_job", "delete_job", "get_report", "list_artifacts", "get_checkpoint")
LINKS = {name: {"operationId": name, "parameters": {"job_id": "$response.body#/id"}} for name in OF_JOB}
LINKS_OF_FIRST = {name: {"operationId": name, "parameters": {"job_id": "$response.body#/items/0/id"}} for name in OF_JOB}
LINK_TO_FIRST_FILE = {"get_artifact": {"operationId": "get_artifact", "parameters": {"job_id": "$request.path.job_id", "path": "$response.body#/items/0/path"}}}
ACCEPTED_HEADERS = {"Location": LOCATION, "Retry-After": RETRY_AFTER, "Idempotency-Replayed": REPLAYED}
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
    content: dict[str, Any] = {media_type: {}}  # bytes have no schema, in OpenAPI 3.1
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
        202: {"headers": ACCEPTED_HEADERS, "links": LINKS},
        **declared(400, 409, 413, 415, 429),
    },
    response_model=Job,
)
def submit_job(
    recipe: Submission,
    caller: JobWriter,
    request: Request,
    asked: MayBeAsked,
    validate_only: Annotated[bool, Query(description="Only check the recipe, and tell what the job would cost; an Idempotency-Key is not looked at.")] = False,
) -> Response:
    """Submit a pruning job. `model`, `method` and `sparsity` suffice; everything else has a default."""
    database: Database = request.app.state.database  # each of them as a dependency would cost more than most of what is done with it
    store: Store = request.app.state.store
    settings: Settings = request.app.state.settings
    known = None if validate_only else find_answer(database, caller.tenant_id, asked)
    if known is not None:
        return known
    with source_of(recipe.model, caller.tenant_id, database, store) as uploaded:
        cost = service.cost_of(recipe, settings, uploaded)
    if validate_only:
        with database.reading() as session:
            return Response(service.validate(session, recipe, cost, settings).model_dump_json(), media_type="application/json")

    def submit(session: Session) -> Answer:
        return _accepted(service.submit(session, caller.tenant_id, caller.key_id, recipe, cost, settings))

    answer = answer_once(database, caller.tenant_id, asked, submit, at_once=service.is_written_at_once(recipe))
    wake()
    return answer


def _accepted(job: models.Job) -> Answer:
    bind_request(job_id=job.id)
    return Answer(202, Job.of(job).model_dump_json(), {"Location": f"/v1/jobs/{job.id}", "Retry-After": str(POLL_SECONDS)})


@router.get("", responses={200: {"links": LINKS_OF_FIRST}, **declared(400)}, openapi_extra={"parameters": [LABELS_PARAMETER]})
def list_jobs(
    caller: JobReader,
    database: OpenDatabase,
    wanted: Annotated[JobFilter, Depends(_wanted)],
    cursor: Annotated[str | None, Query(max_length=1024, description="`next` of the page before.")] = None,
    limit: Limit = 20,
) -> JobPage:
    """List jobs, newest first. What is submitted meanwhile changes no later page."""
    with database.reading() as session:
        jobs, following = service.list_jobs(session, caller.tenant_id, wanted, cursor, limit)
    return JobPage(items=[Job.of(job) for job in jobs], next=following)


@router.get(
    "/{job_id}",
    response_model=Job,
    responses={200: {"headers": {"ETag": ETAG, "Retry-After": RETRY_AFTER}, "links": LINKS}, 304: NOT_MODIFIED, **declared(404)},
)
async def get_job(
    caller: JobReader,
    job_id: JobId,
    request: Request,
    wait: Wait = 0,
) -> Response:
    """One job. With `If-None-Match` the answer is 304 until anything has changed; with `wait` it comes as soon as there is something to tell."""
    if wait:
        news: News = request.app.state.news
        with news.watch(job_id) as watched:
            job = await _tell(request, caller, job_id)
            if not _worth_telling(request.headers, job):
                await watched.until(partial(_worth_telling, request.headers), wait)
                job = await _tell(request, caller, job_id)
    else:
        job = await _tell(request, caller, job_id)
    headers = {"ETag": f'"{job.version}"'} | ({} if job.finished else {"Retry-After": str(POLL_SECONDS)})
    if not_modified(request.headers, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(job.body, headers=headers, media_type="application/json")


async def _tell(request: Request, caller: Caller, job_id: str) -> Told:
    told: ToldJobs = request.app.state.told  # a dependency would cost more than the question
    job = await told.find(caller.tenant_id, job_id)
    if job is None:
        raise service.no_job(job_id)
    return job


def _worth_telling(headers: Mapping[str, str], job: Told | Standing) -> bool:
    """Whether a request that waits is to be answered now."""
    return not not_modified(headers, f'"{job.version}"') if "if-none-match" in headers else job.finished


@router.delete("/{job_id}", status_code=204, responses=declared(404, 409))
def delete_job(caller: JobWriter, job_id: JobId, database: OpenDatabase, store: OpenStore) -> None:
    """Delete a job that has finished, with its events, its report and its files."""
    with database.writing() as session:
        service.delete(session, caller.tenant_id, job_id)
        audit.record(session, caller, "job.delete", job_id)
    try:
        store.delete_prefix(service.files_of(caller.tenant_id, job_id))
    except (UnavailableError, OSError):
        log.warning("files of a deleted job are left to the sweep", exc_info=True)


@router.get(
    "/{job_id}/events",
    response_model=EventPage,
    responses={200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}, "example": STREAM_EXAMPLE}}}, **declared(404)},
)
async def list_events(
    caller: JobReader,
    job_id: JobId,
    database: OpenDatabase,
    news: OpenNews,
    keys: OpenKeys,
    watched: Annotated[Watched | None, Depends(_streamed_job)],
    request: Request,
    after: Annotated[int, Query(ge=0, le=MAX_SEQUENCE, description="Only events with a higher sequence number.")] = 0,
    last_event_id: Annotated[
        int | None,
        Header(
            alias="Last-Event-ID", ge=0, le=MAX_SEQUENCE, description="The same for a stream that goes on where one broke off; browsers send it.", examples=[7]
        ),
    ] = None,
    limit: Limit = 100,
) -> EventPage | Response:
    """What happened to a job, in order.

    With `Accept: text/event-stream` it is a stream (server-sent events): all events so far, then each as it happens. `id` is the sequence number, `event` the
    kind, `data` the event as JSON. After the last event of a job that has finished comes one of kind `end`, without an id, whose data names the job's state;
    then the stream closes, and a client must not connect again. A stream that closes without it goes on at another request with `Last-Event-ID`.
    """
    if watched is None:
        return await run_sync(_read_events, database, caller.tenant_id, job_id, after, limit)
    await _tell(request, caller, job_id)
    key = request.headers["authorization"].partition(" ")[2]

    def read(number: int) -> Sequence[models.JobEvent]:
        with database.reading() as session:
            return repository.list_events(session, caller.tenant_id, job_id, number, limit)

    def authorized() -> bool:
        try:
            keys.verify(key)
        except AuthenticationError:
            return False
        except SQLAlchemyError:
            log.warning("the reader of a stream was not checked", exc_info=True)
        return True

    events = stream(news, watched, read, authorized, after if last_event_id is None else last_event_id)
    return EventSourceResponse(events, headers={"X-Accel-Buffering": "no"})


def _read_events(database: Database, tenant_id: str, job_id: str, after: int, limit: int) -> EventPage:
    with database.reading() as session:
        job = service.get_job(session, tenant_id, job_id)
        events = repository.list_events(session, tenant_id, job_id, after, limit)
    reached = events[-1].sequence if events else after
    return EventPage(items=[Event.model_validate(event) for event in events], next=reached, finished=job.state in FINISHED and reached >= job.last_event)


@router.post("/{job_id}/retry", status_code=202, response_model=Job, responses={202: {"headers": ACCEPTED_HEADERS, "links": LINKS}, **declared(404, 409, 429)})
def retry_job(caller: JobWriter, job_id: JobId, database: OpenDatabase, settings: Configuration, asked: MayBeAsked) -> Response:
    """Try a job again that has failed or was cancelled, with as many attempts and as much time as a new one. It goes on from its last verified block.

    What it goes on from is kept for a while on the worker that had it or, with `limits.resume` = `durable`, where every worker finds it; else it begins anew.
    """

    def retry(session: Session) -> Answer:
        job = service.retry(session, caller.tenant_id, job_id, settings)
        audit.record(session, caller, "job.retry", job_id)
        return _accepted(job)

    answer = answer_once(database, caller.tenant_id, asked, retry)
    wake()
    return answer


@router.post("/{job_id}/cancel", status_code=202, responses={202: {"links": LINKS}, **declared(404, 409)})
def cancel_job(caller: JobWriter, job_id: JobId, database: OpenDatabase) -> Job:
    """Cancel a job: at once while it is queued, within seconds while it runs. Asking again changes nothing; a finished job can't be cancelled."""
    with database.writing() as session:
        job = service.cancel(session, caller.tenant_id, job_id)
        audit.record(session, caller, "job.cancel", job_id)
    return Job.of(job)


@router.get("/{job_id}/report", responses=declared(404, 409))
def get_report(caller: JobReader, job_id: JobId, database: OpenDatabase) -> Report:
    """Everything that was measured: before and after, by every denominator, with where the text came from."""
    with database.reading() as session:
        service.get_succeeded(session, caller.tenant_id, job_id)
        return Report.model_validate(repository.find_report(session, caller.tenant_id, job_id))


@router.get("/{job_id}/artifacts", responses={200: {"links": LINK_TO_FIRST_FILE}, **declared(404, 409, 410)})
def list_artifacts(caller: ArtifactReader, job_id: JobId, database: OpenDatabase) -> Manifest:
    """The files of a job that has succeeded, each with its size and sha256."""
    with database.reading() as session:
        service.get_stored(session, caller.tenant_id, job_id)
        artifacts = repository.list_artifacts(session, caller.tenant_id, job_id)
    return Manifest(items=[ArtifactFile.model_validate(artifact) for artifact in artifacts])


@router.head("/{job_id}/artifacts/{path:path}", include_in_schema=False)
@router.get(
    "/{job_id}/artifacts/{path:path}",
    response_class=Response,
    responses={**_file_responses("*/*"), 307: {"description": "The file is at the Location, for a while, without a key."}},
    openapi_extra={"parameters": RANGE_PARAMETERS},
)
def get_artifact(
    caller: ArtifactReader,
    job_id: JobId,
    path: Annotated[str, Path(description="Its path in the manifest.", examples=["checkpoint/config.json"])],
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
def get_checkpoint(caller: ArtifactReader, job_id: JobId, database: OpenDatabase, store: OpenStore, request: Request) -> Response:
    """The pruned model as one uncompressed tar. The same bytes every time, so a download can go on with Range where it broke off."""
    with database.reading() as session:
        job = service.get_stored(session, caller.tenant_id, job_id)
        artifacts = repository.list_artifacts(session, caller.tenant_id, job_id)
    return serve(request, checkpoint_tar(job, artifacts, store))
