"""`/v1/jobs/{job_id}/sinks`: where the result of a job that has succeeded is to go, too."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Path

from app.auth import JobWriter
from app.dependencies import Configuration, OpenDatabase
from app.jobs.endpoints import JobId
from app.jobs.schemas import Job
from app.problems import declared
from app.sinks import reach, service
from app.sinks.schemas import Sink, SinkSecrets

LINK_TO_FIRST = {"retry_sink": {"operationId": "retry_sink", "parameters": {"job_id": "$response.body#/id", "number": "$response.body#/sinks/0/number"}}}
router = APIRouter(prefix="/v1/jobs/{job_id}/sinks", tags=["jobs"], responses=declared(400, 401, 403, 404, 409, 410, 413, 415, 422, 429))


@router.post("", status_code=202, responses={202: {"links": LINK_TO_FIRST}})
def add_sink(caller: JobWriter, job_id: JobId, sink: Annotated[Sink, Body()], database: OpenDatabase, settings: Configuration) -> Job:
    """Bring the result of a job that has succeeded to one more place. The job's `sinks` tell when it is there."""
    reach.check(sink, settings, "")
    with database.writing() as session:
        return Job.of(service.add(session, caller, job_id, sink, settings))


@router.post("/{number}/retry", status_code=202)
def retry_sink(
    caller: JobWriter,
    job_id: JobId,
    number: Annotated[int, Path(ge=0, le=2**31 - 1, description="The sink's number within the job.", examples=[0])],
    database: OpenDatabase,
    settings: Configuration,
    secrets: Annotated[SinkSecrets, Body()] = SinkSecrets(),  # noqa: B008  it is frozen
) -> Job:
    """Try a sink again that has failed. Its secrets were forgotten then: give them again."""
    with database.writing() as session:
        return Job.of(service.retry(session, caller, job_id, number, secrets, settings))
