"""Idempotency keys, an audit log, webhooks with their deliveries, uploaded checkpoints, sinks of results, a job's own metadata.

An old worker or an old API goes on with this schema: what is new is nullable or has a default.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

Json = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
Time = sa.DateTime(timezone=True)
Serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TO_SEND = sa.text("state = 'waiting'")


def tenant() -> sa.Column[str]:
    return sa.Column("tenant_id", sa.String(64), sa.ForeignKey("tenants.id"), nullable=False)


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("last_used_at", Time))
    op.add_column("jobs", sa.Column("metadata", Json, nullable=False, server_default="{}"))
    op.add_column("jobs", sa.Column("webhook_id", sa.String(64)))
    for column in ("state", "model"):
        op.create_index(f"ix_jobs_tenant_id_{column}_created_at_id", "jobs", ["tenant_id", column, "created_at", "id"])
    op.create_index("ix_jobs_metadata", "jobs", ["metadata"], postgresql_using="gin", postgresql_ops={"metadata": "jsonb_path_ops"})
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant_id", sa.String(64), sa.ForeignKey("tenants.id"), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("answer", Json, nullable=False),
        sa.Column("created_at", Time, nullable=False, index=True),
    )
    op.create_table(
        "audit_log",
        sa.Column("id", Serial, sa.Identity(), primary_key=True),
        tenant(),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("target", sa.String(200), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("data", Json, nullable=False),
        sa.Column("created_at", Time, nullable=False),
        sa.Index("ix_audit_log_tenant_id_id", "tenant_id", "id"),
    )
    op.create_table(
        "webhooks",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("tenant_id", sa.String(64), sa.ForeignKey("tenants.id"), nullable=False, index=True),
        sa.Column("url", sa.String(2000), nullable=False),
        sa.Column("description", sa.String(200), nullable=False),
        sa.Column("kinds", Json, nullable=False),
        sa.Column("every_job", sa.Boolean(), nullable=False, server_default=sa.true()),
        sa.Column("secrets", sa.Text(), nullable=False),
        sa.Column("disabled_at", Time),
        sa.Column("disabled_reason", sa.String(500)),
        sa.Column("failing_since", Time),
        sa.Column("created_at", Time, nullable=False),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("webhook_id", sa.String(64), sa.ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
        tenant(),
        sa.Column("job_id", sa.String(64), index=True),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("payload", Json, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("next_at", Time),
        sa.Column("last_status", sa.Integer()),
        sa.Column("last_error", sa.String(500)),
        sa.Column("created_at", Time, nullable=False),
        sa.Column("delivered_at", Time),
        sa.Index("ix_deliveries_webhook_id_next_at", "webhook_id", "next_at", postgresql_where=TO_SEND, sqlite_where=TO_SEND),
        sa.Index("ix_deliveries_webhook_id_created_at_id", "webhook_id", "created_at", "id"),
    )
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.String(64), primary_key=True),
        tenant(),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("error", Json),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("part_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64)),
        sa.Column("lease_until", Time),
        sa.Column("created_at", Time, nullable=False),
        sa.Column("updated_at", Time, nullable=False),
        sa.Column("completed_at", Time),
        sa.CheckConstraint("state IN ('uploading', 'verifying', 'ready', 'failed')", name="state"),
        sa.Index("ix_checkpoints_tenant_id_id", "tenant_id", "id"),
    )
    op.create_table(
        "checkpoint_files",
        sa.Column("checkpoint_id", sa.String(64), sa.ForeignKey("checkpoints.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("path", sa.String(200), primary_key=True),
        tenant(),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
    )
    op.create_table(
        "checkpoint_parts",
        sa.Column("checkpoint_id", sa.String(64), primary_key=True),
        sa.Column("path", sa.String(200), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        tenant(),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(["checkpoint_id", "path"], ["checkpoint_files.checkpoint_id", "checkpoint_files.path"], ondelete="CASCADE"),
    )
    op.create_table(
        "sink_runs",
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        tenant(),
        sa.Column("name", sa.String(16), nullable=False),
        sa.Column("target", Json, nullable=False),
        sa.Column("secrets", sa.Text()),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("next_at", Time),
        sa.Column("result", Json),
        sa.Column("error", Json),
        sa.Column("updated_at", Time, nullable=False),
        sa.Index("ix_sink_runs_next_at", "next_at", postgresql_where=TO_SEND, sqlite_where=TO_SEND),
    )


def downgrade() -> None:
    for table in ("sink_runs", "checkpoint_parts", "checkpoint_files", "checkpoints", "deliveries", "webhooks", "audit_log", "idempotency_keys"):
        op.drop_table(table)
    op.drop_index("ix_jobs_metadata", "jobs")
    for column in ("model", "state"):
        op.drop_index(f"ix_jobs_tenant_id_{column}_created_at_id", "jobs")
    op.drop_column("jobs", "webhook_id")
    op.drop_column("jobs", "metadata")
    op.drop_column("api_keys", "last_used_at")
