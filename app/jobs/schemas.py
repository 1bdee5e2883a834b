"""What the job endpoints take and give."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator

from app import models
from app.estimate import Estimate
from app.models import FINISHED, RETRIED
from app.queues.schemas import Out, Placement
from app.recipe import MethodName, Recipe
from app.settings import QUEUE
from app.sinks.schemas import MAX_SINKS, Sink, SinkRun
from app.webhooks.schemas import WEBHOOK_ID

MAX_LABELS = 16
MAX_MODEL_BYTES = 1024  # in UTF-8
LabelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
LabelValue = Annotated[str, StringConstraints(max_length=512, pattern=r"^[^\x00]*$")]
Labels = Annotated[dict[LabelName, LabelValue], Field(max_length=MAX_LABELS, json_schema_extra={"additionalProperties": False})]
State = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]


class Submission(Recipe):
    """A recipe with its model named."""

    model: str = Field(
        min_length=1,
        max_length=1024,
        description="A hub id, the id of an uploaded checkpoint (`ckpt_…`), or the path of a local one below a root that the operator allows.",
        examples=["HuggingFaceTB/SmolLM2-135M"],
    )

    @field_validator("model")
    @classmethod
    def _fits_an_index(cls, model: str) -> str:
        if len(model.encode()) > MAX_MODEL_BYTES:
            raise ValueError(f"the model's name is longer than {MAX_MODEL_BYTES} bytes")
        return model

    queue: str = Field(
        "default",
        pattern=QUEUE,
        description="The class of workers that is to run it, of those that GET /v1/queues lists; one without live workers keeps it waiting. `auto`: the class with "
        "the least memory that suffices, or `default` where the job's need is not known beforehand.",
        examples=["default", "auto"],
    )
    priority: int = Field(0, ge=-10, le=10, description="Jobs of higher priority are begun first.", examples=[0])
    webhook: str | None = Field(
        None,
        pattern=WEBHOOK_ID,
        description="A webhook that is to hear of this job, beside those that hear of every job.",
        examples=["wh_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"],
    )
    sinks: tuple[Sink, ...] = Field(
        (), max_length=MAX_SINKS, strict=False, description="Where the result is to go once the job has succeeded: at most 4. Their failure is not the job's."
    )
    metadata: Labels = Field(
        {}, description="Up to 16 pairs of your own, by which jobs can be listed; names of up to 64 characters, values of up to 512.", examples=[{"run": "42"}]
    )


class Validation(Out):
    """What is known of a job before it is submitted."""

    recipe: Recipe = Field(description="As it would be run, with all defaults.")
    estimate: Estimate | None = Field(description="What it would cost; null where the checkpoint lies on the hub, whose headers are read when the job runs.")
    placement: Placement = Field(description="Which class of workers would get it, and whether it fits there.")


class Progress(Out):
    """How far a job is."""

    fraction: float = Field(0, description="Of the whole job, 0 to 1.", examples=[0.42])
    blocks_done: int | None = Field(None, description="Decoder blocks pruned so far.", examples=[12])
    blocks_total: int | None = Field(None, description="Decoder blocks of the model.", examples=[30])
    round: int | None = Field(None, description="The round that it is in, of a method that prunes in rounds.", examples=[2])
    rounds: int | None = Field(None, description="Rounds in all.", examples=[4])
    masks_done: int | None = Field(None, description="Sub-models evaluated in this round.", examples=[17])
    masks_total: int | None = Field(None, description="Sub-models that a round evaluates at most.", examples=[100])
    steps_done: int | None = Field(None, description="Steps of the recovery's training so far.", examples=[120])
    steps_total: int | None = Field(None, description="Its steps at most.", examples=[200])
    loss: float | None = Field(None, description="Its loss in the last step.", examples=[2.71])
    tokens_per_second: float | None = Field(None, description="Tokens that it trains on a second.", examples=[310.5])
    bytes_done: int | None = Field(None, description="Bytes of the result's files stored so far.", examples=[134217728])
    bytes_total: int | None = Field(None, description="Their bytes in all.", examples=[269060552])
    eta_seconds: float | None = Field(None, description="Seconds to go, as far as can be told.", examples=[40])


class JobError(Out):
    """Why a job failed."""

    code: str = Field(description="A stable name for programs.", examples=["calibration_text_too_short"])
    message: str = Field(description="What was wrong.", examples=["The text has 100 tokens; one sequence takes 512."])
    hint: str = Field("", description="What to do about it.", examples=["Give a longer text, or a smaller calibration.sequence_length."])


class Links(Out):
    """Where the parts of a job are; null where there is nothing."""

    self: str = Field(description="The job.", examples=["/v1/jobs/job_0193d5f0"])
    events: str = Field(description="What happened to it.", examples=["/v1/jobs/job_0193d5f0/events"])
    cancel: str | None = Field(description="POST here to cancel it; null once it has finished.", examples=["/v1/jobs/job_0193d5f0/cancel"])
    retry: str | None = Field(description="POST here to have it tried again, once it has failed or was cancelled.", examples=["/v1/jobs/job_0193d5f0/retry"])
    report: str | None = Field(description="Everything measured, once it has succeeded.", examples=["/v1/jobs/job_0193d5f0/report"])
    artifacts: str | None = Field(
        description="The manifest of its files, once it has succeeded and while they are kept.", examples=["/v1/jobs/job_0193d5f0/artifacts"]
    )
    checkpoint: str | None = Field(
        description="The pruned model as a tar, once it has succeeded and while it is kept.", examples=["/v1/jobs/job_0193d5f0/checkpoint"]
    )


class Job(Out):
    """A pruning job."""

    id: str = Field(description="Its id.", examples=["job_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])
    state: State = Field(description="`queued` → `running` → `succeeded`, `failed` or `cancelled`; `cancelling` until a running engine has ended.")
    phase: str | None = Field(description="What a running job does now, e.g. `load`, `calibrate`, `prune`, `write`, `evaluate`.", examples=["prune"])
    progress: Progress = Field(description="How far it is.")
    attempt: int = Field(description="How often it was started; 0 while it waits for the first time.", examples=[1])
    max_attempts: int = Field(description="How often it may be started when its worker dies.", examples=[3])
    model: str = Field(description="The model to prune, as submitted.", examples=["HuggingFaceTB/SmolLM2-135M"])
    method: MethodName = Field(description="The pruning method.", examples=["cfsp"])
    queue: str = Field(description="The class of workers that may run it.", examples=["default"])
    priority: int = Field(description="Jobs of higher priority are begun first.", examples=[0])
    metadata: dict[str, str] = Field(description="The submitter's own pairs.", examples=[{"run": "42"}])
    recipe: Recipe = Field(description="The whole recipe, with every default filled in.")
    error: JobError | None = Field(description="Why it failed; null otherwise.")
    webhook: str | None = Field(
        description="The webhook that it named, beside those that hear of every job. What was sent there: GET /v1/webhooks/{webhook}/deliveries?job_id={id}.",
        examples=["wh_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"],
    )
    sinks: list[SinkRun] = Field(description="Where the result goes once it has succeeded, and what became of that.")
    links: Links = Field(description="Where its parts are.")
    created_at: datetime = Field(description="When it was submitted (UTC).", examples=["2026-11-22T01:02:03.456Z"])
    started_at: datetime | None = Field(description="When its latest attempt started (UTC).", examples=["2026-11-22T01:02:04.123Z"])
    updated_at: datetime = Field(description="When anything of it last changed (UTC).", examples=["2026-11-22T01:03:03.456Z"])
    finished_at: datetime | None = Field(description="When it ended (UTC).", examples=[None])

    @classmethod
    def of(cls, job: models.Job) -> Self:
        path = f"/v1/jobs/{job.id}"
        succeeded = job.state == "succeeded"
        stored = succeeded and job.artifact_prefix is not None
        links = Links(
            self=path,
            events=f"{path}/events",
            cancel=None if job.state in FINISHED else f"{path}/cancel",
            retry=f"{path}/retry" if job.state in RETRIED else None,
            report=f"{path}/report" if succeeded else None,
            artifacts=f"{path}/artifacts" if stored else None,
            checkpoint=f"{path}/checkpoint" if stored else None,
        )
        of_row = {name: getattr(job, name) for name in cls.model_fields.keys() - {"links", "metadata", "webhook"}}
        return cls.model_validate({**of_row, "links": links, "metadata": job.labels, "webhook": job.webhook_id})


class JobPage(Out):
    """Jobs, newest first."""

    items: list[Job] = Field(description="The jobs of this page.")
    next: str | None = Field(description="Give it as `cursor`, with the same filters, for the next page; null on the last one.")


class Event(Out):
    """Something that happened to a job."""

    sequence: int = Field(description="1, 2, … within the job, without gaps.", examples=[3])
    kind: str = Field(
        description="`queued`, `claimed`, `phase`, `progress`, `log`, `cancel_requested`, `cancelled`, `requeued`, `succeeded`, `failed`, `retried`, `lease_expired`, "
        "`artifacts_deleted`, `sink_succeeded`, `sink_failed`, `sink_added` or `sink_retried`.",
        examples=["phase"],
    )
    message: str = Field(description="For people.", examples=["Pruning."])
    data: dict[str, Any] = Field(description="For programs; its fields depend on the kind.", examples=[{"phase": "prune"}])
    created_at: datetime = Field(description="When it happened (UTC).", examples=["2026-11-22T01:02:04.123Z"])


class EventPage(Out):
    """Events in their order."""

    items: list[Event] = Field(description="The events of this page.")
    next: int = Field(description="Give it as `after` for what comes next.", examples=[3])
    finished: bool = Field(description="Whether the job has finished and this page ends with its last event.")


class ArtifactFile(Out):
    """A file of a finished job."""

    path: str = Field(description="Get it at `/v1/jobs/{id}/artifacts/{path}`.", examples=["checkpoint/model.safetensors"])
    role: str = Field(description="`checkpoint` (the pruned model), `padded` (its copy with padded layers) or `report`.", examples=["checkpoint"])
    bytes: int = Field(description="Its size.", examples=[269060552])
    sha256: str = Field(description="Of its bytes, in hex; also its ETag.", examples=["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"])


class Manifest(Out):
    """All files of a finished job."""

    items: list[ArtifactFile] = Field(description="The files, by path.")
