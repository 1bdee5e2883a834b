"""The rows. A job row is the truth about a job; a message on the broker is only a hint that there may be work."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Float, ForeignKey, ForeignKeyConstraint, Identity, Index, Integer, String, Text, false, text, true
from sqlalchemy.orm import Mapped, mapped_column, relationship

from app.database import Base, Json, UtcDateTime, db_now

STATES = ("queued", "running", "cancelling", "succeeded", "failed", "cancelled")
FINISHED = ("succeeded", "failed", "cancelled")
RETRIED = ("failed", "cancelled")  # states from which a job may begin anew

QUEUED = text("state = 'queued'")
TO_START = text("state = 'queued' AND start_by IS NOT NULL")
TO_SEND = text("state = 'waiting'")
Serial = BigInteger().with_variant(Integer(), "sqlite")  # SQLite counts up only an INTEGER key


class Tenant(Base):
    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    max_queued: Mapped[int | None] = mapped_column(Integer)  # jobs that may wait at once; None: as many as the settings allow
    max_running: Mapped[int | None] = mapped_column(Integer)  # jobs that may run at once; None: no cap
    max_stored_bytes: Mapped[int | None] = mapped_column(BigInteger)  # of results, of which the oldest go first; None: no cap
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())


class ApiKey(Base):
    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    name: Mapped[str] = mapped_column(String(200))
    secret_sha256: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    last_used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # to within a minute


class Job(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("state IN ('queued', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled')", name="state"),
        Index("ix_jobs_tenant_id_created_at_id", "tenant_id", "created_at", "id"),
        Index("ix_jobs_tenant_id_state_created_at_id", "tenant_id", "state", "created_at", "id"),
        Index("ix_jobs_tenant_id_model_created_at_id", "tenant_id", "model", "created_at", "id"),
        Index("ix_jobs_metadata", "metadata", postgresql_using="gin", postgresql_ops={"metadata": "jsonb_path_ops"}),
        Index("ix_jobs_state_lease_until", "state", "lease_until"),
        Index("ix_jobs_start_by", "start_by", postgresql_where=TO_START, sqlite_where=TO_START),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    state: Mapped[str] = mapped_column(String(16), default="queued")
    phase: Mapped[str | None] = mapped_column(String(32))  # what a running engine does now; free text, not a state
    model: Mapped[str] = mapped_column(String(1024))
    method: Mapped[str] = mapped_column(String(64))
    recipe: Mapped[dict[str, Any]] = mapped_column(Json)
    progress: Mapped[dict[str, Any]] = mapped_column(Json, default=dict)
    report: Mapped[dict[str, Any] | None] = mapped_column(Json)
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    labels: Mapped[dict[str, str]] = mapped_column("metadata", Json, default=dict, server_default="{}")  # the user's own; `metadata` is SQLAlchemy's name
    webhook_id: Mapped[str | None] = mapped_column(String(64))  # that hears of this job beside those that hear of all

    queue: Mapped[str] = mapped_column(String(64), default="default", server_default="default")  # the class of workers that may have it
    priority: Mapped[int] = mapped_column(Integer, default=0, server_default="0")  # higher ones first
    host_bytes: Mapped[int | None] = mapped_column(BigInteger)  # memory that it is expected to need; None: not known
    device_bytes: Mapped[int | None] = mapped_column(BigInteger)  # of one device; None: not known
    max_runtime: Mapped[int | None] = mapped_column(Integer)  # seconds of all attempts together; None: as the recipe says
    ran_seconds: Mapped[float] = mapped_column(Float, default=0.0, server_default="0")  # of the attempts that are over
    claimed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # when the attempt that goes on began
    start_by: Mapped[datetime | None] = mapped_column(UtcDateTime)  # when it is given up if no attempt has begun
    trace_parent: Mapped[str | None] = mapped_column(String(64))  # W3C traceparent of the request that made it

    attempt: Mapped[int] = mapped_column(Integer, default=0)  # counted up at claim
    max_attempts: Mapped[int] = mapped_column(Integer)
    lease_owner: Mapped[str | None] = mapped_column(String(200))
    lease_token: Mapped[int] = mapped_column(BigInteger, default=0)  # every write of a worker is conditional on it
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    published_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # when its message was written anew; None: not since it was queued
    cancel_requested_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    artifact_prefix: Mapped[str | None] = mapped_column(String(200))  # the attempt whose files are the result
    stored_bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")  # of its files, as long as they are kept

    version: Mapped[int] = mapped_column(BigInteger, default=1)  # counted up by every change; the ETag
    last_event: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    sinks: Mapped[list[SinkRun]] = relationship(order_by="SinkRun.number", lazy="selectin", viewonly=True)


Index("ix_jobs_claim", Job.tenant_id, Job.queue, Job.priority.desc(), Job.created_at, Job.id, postgresql_where=QUEUED, sqlite_where=QUEUED)


class JobEvent(Base):
    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True)  # 1, 2, … within the job, without gaps
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    kind: Mapped[str] = mapped_column(String(32))
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any]] = mapped_column(Json, default=dict)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())


class OutboxMessage(Base):
    """A message that is to be published, written in the transaction that made it necessary; deleted once published."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(Serial, Identity(), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())


class Artifact(Base):
    """A file of a finished job. The bytes lie in the object store under the job's `artifact_prefix`."""

    __tablename__ = "artifacts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    path: Mapped[str] = mapped_column(String(512), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    role: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))


class Worker(Base):
    """A worker process as it told of itself. Whether it lives is told by `seen_at` alone."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(200), primary_key=True)  # as in Job.lease_owner
    queue: Mapped[str] = mapped_column(String(64), index=True)
    devices: Mapped[list[dict[str, Any]]] = mapped_column(Json)  # of each its `name` and `memory_bytes`; empty: it computes on the CPU
    host_bytes: Mapped[int] = mapped_column(BigInteger)  # memory that an engine may take
    device_bytes: Mapped[int] = mapped_column(BigInteger)  # of the device that it uses; 0: none
    disk_bytes: Mapped[int] = mapped_column(BigInteger)  # free in its work directory
    version: Mapped[str] = mapped_column(String(64))
    draining: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    started_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())


class Total(Base):
    """A share of a count that only grows, see `app.totals`."""

    __tablename__ = "totals"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    labels: Mapped[str] = mapped_column(String(300), primary_key=True)  # a JSON object, its keys in order
    shard: Mapped[int] = mapped_column(Integer, primary_key=True)
    value: Mapped[float] = mapped_column(Float)


class IdempotencyKey(Base):
    """What a request with this key was answered; written in the transaction of what it made."""

    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_sha256: Mapped[str] = mapped_column(String(64))  # of operation and body
    answer: Mapped[dict[str, Any]] = mapped_column(Json)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now(), index=True)


class AuditEntry(Base):
    """A call that changed something, written in the transaction of the change."""

    __tablename__ = "audit_log"
    __table_args__ = (Index("ix_audit_log_tenant_id_id", "tenant_id", "id"),)

    id: Mapped[int] = mapped_column(Serial, Identity(), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    key_id: Mapped[str] = mapped_column(String(64))  # who called; outlives the key
    action: Mapped[str] = mapped_column(String(64))  # e.g. `job.submit`
    target: Mapped[str] = mapped_column(String(200))  # the id of what was changed
    request_id: Mapped[str] = mapped_column(String(64))
    data: Mapped[dict[str, Any]] = mapped_column(Json, default=dict)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())


class Webhook(Base):
    """An address that hears of jobs."""

    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), index=True)
    url: Mapped[str] = mapped_column(String(2000))
    description: Mapped[str] = mapped_column(String(200), default="")
    kinds: Mapped[list[str]] = mapped_column(Json)  # of events that it hears of
    every_job: Mapped[bool] = mapped_column(Boolean, default=True, server_default=true())  # False: only of jobs that name it
    secrets: Mapped[str] = mapped_column(Text)  # encrypted, see `app.vault`
    disabled_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    disabled_reason: Mapped[str | None] = mapped_column(String(500))
    failing_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())


class Delivery(Base):
    """News of a job for a webhook, written in the transaction of the event; sent until it is taken or given up."""

    __tablename__ = "deliveries"
    __table_args__ = (
        Index("ix_deliveries_webhook_id_next_at", "webhook_id", "next_at", postgresql_where=TO_SEND, sqlite_where=TO_SEND),
        Index("ix_deliveries_webhook_id_created_at_id", "webhook_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)  # the `webhook-id`, the same at every try
    webhook_id: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    job_id: Mapped[str | None] = mapped_column(String(64), index=True)  # outlives the job; None: a ping
    kind: Mapped[str] = mapped_column(String(64))
    payload: Mapped[dict[str, Any]] = mapped_column(Json)
    state: Mapped[str] = mapped_column(String(16), default="waiting")  # waiting | delivered | failed
    tries: Mapped[int] = mapped_column(Integer, default=0)
    next_at: Mapped[datetime | None] = mapped_column(UtcDateTime, default=db_now())  # of the next try, or when the one that goes on counts as lost
    last_status: Mapped[int | None] = mapped_column(Integer)
    last_error: Mapped[str | None] = mapped_column(String(500))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    delivered_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Checkpoint(Base):
    """A model that a tenant uploads to have it pruned. The bytes lie in the object store below `tenant/checkpoints/id/`."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        CheckConstraint("state IN ('uploading', 'verifying', 'ready', 'failed')", name="state"),
        Index("ix_checkpoints_tenant_id_id", "tenant_id", "id"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(200))
    state: Mapped[str] = mapped_column(String(16), default="uploading")
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    bytes: Mapped[int] = mapped_column(BigInteger)
    part_bytes: Mapped[int] = mapped_column(BigInteger)  # of every part of a file but its last
    sha256: Mapped[str | None] = mapped_column(String(64))  # of the manifest, once it is ready
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)  # of the process that verifies it
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())  # an upload that rests too long is given up
    completed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class CheckpointFile(Base):
    """A file of an uploaded checkpoint, as it was declared."""

    __tablename__ = "checkpoint_files"

    checkpoint_id: Mapped[str] = mapped_column(ForeignKey("checkpoints.id", ondelete="CASCADE"), primary_key=True)
    path: Mapped[str] = mapped_column(String(200), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))


class CheckpointPart(Base):
    """A part of such a file that has been received."""

    __tablename__ = "checkpoint_parts"
    __table_args__ = (ForeignKeyConstraint(["checkpoint_id", "path"], ["checkpoint_files.checkpoint_id", "checkpoint_files.path"], ondelete="CASCADE"),)

    checkpoint_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    path: Mapped[str] = mapped_column(String(200), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)  # 0, 1, …; all but the last have the checkpoint's `part_bytes`
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))


class SinkRun(Base):
    """What is to be done with a job's result elsewhere, once it has succeeded; its failure is not the job's."""

    __tablename__ = "sink_runs"
    __table_args__ = (Index("ix_sink_runs_next_at", "next_at", postgresql_where=TO_SEND, sqlite_where=TO_SEND),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)  # 0, 1, … within the job
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str] = mapped_column(String(16))  # hub | mlflow | s3
    target: Mapped[dict[str, Any]] = mapped_column(Json)  # as submitted, without secrets
    secrets: Mapped[str | None] = mapped_column(Text)  # encrypted, see `app.vault`; dropped at the end
    state: Mapped[str] = mapped_column(String(16), default="pending")  # pending (the job has not succeeded) | waiting | succeeded | failed | skipped
    tries: Mapped[int] = mapped_column(Integer, default=0)
    token: Mapped[int] = mapped_column(BigInteger, default=0)  # every write of who runs it is conditional on it
    next_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # of the next try, or when the one that goes on counts as lost
    result: Mapped[dict[str, Any] | None] = mapped_column(Json)  # where it lies now
    error: Mapped[dict[str, Any] | None] = mapped_column(Json)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
