"""The rows. A job row is the truth about a job; a message on the broker is only a hint that there may be work."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Float, ForeignKey, Identity, Index, Integer, String, Text, false, text
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Base, Json, UtcDateTime, db_now

STATES = ("queued", "running", "cancelling", "succeeded", "failed", "cancelled")
FINISHED = ("succeeded", "failed", "cancelled")

QUEUED = text("state = 'queued'")
TO_START = text("state = 'queued' AND start_by IS NOT NULL")
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


class Job(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("state IN ('queued', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled')", name="state"),
        Index("ix_jobs_tenant_id_created_at_id", "tenant_id", "created_at", "id"),
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
    published_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    cancel_requested_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    artifact_prefix: Mapped[str | None] = mapped_column(String(200))  # the attempt whose files are the result
    stored_bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")  # of its files, as long as they are kept

    version: Mapped[int] = mapped_column(BigInteger, default=1)  # counted up by every change; the ETag
    last_event: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


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
