"""Workers, queues, priorities, caps of tenants, what a job needs and what its results take, and counts for the metrics.

An old worker or an old API goes on with this schema: what is new is nullable or has a default.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

Json = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
Time = sa.DateTime(timezone=True)
QUEUED = sa.text("state = 'queued'")
TO_START = sa.text("state = 'queued' AND start_by IS NOT NULL")


def of_tenants() -> list[sa.Column[object]]:
    return [sa.Column("max_queued", sa.Integer()), sa.Column("max_running", sa.Integer()), sa.Column("max_stored_bytes", sa.BigInteger())]


def of_jobs() -> list[sa.Column[object]]:
    return [
        sa.Column("queue", sa.String(64), nullable=False, server_default="default"),
        sa.Column("priority", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("host_bytes", sa.BigInteger()),
        sa.Column("device_bytes", sa.BigInteger()),
        sa.Column("max_runtime", sa.Integer()),
        sa.Column("ran_seconds", sa.Float(), nullable=False, server_default="0"),
        sa.Column("claimed_at", Time),
        sa.Column("start_by", Time),
        sa.Column("trace_parent", sa.String(64)),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False, server_default="0"),
    ]


def upgrade() -> None:
    for column in of_tenants():
        op.add_column("tenants", column)
    for column in of_jobs():
        op.add_column("jobs", column)
    claim: list[str | sa.TextClause] = ["tenant_id", "queue", sa.text("priority DESC"), "created_at", "id"]
    op.create_index("ix_jobs_claim", "jobs", claim, postgresql_where=QUEUED, sqlite_where=QUEUED)
    op.create_index("ix_jobs_start_by", "jobs", ["start_by"], postgresql_where=TO_START, sqlite_where=TO_START)
    op.create_table(
        "workers",
        sa.Column("id", sa.String(200), primary_key=True),
        sa.Column("queue", sa.String(64), nullable=False, index=True),
        sa.Column("devices", Json, nullable=False),
        sa.Column("host_bytes", sa.BigInteger(), nullable=False),
        sa.Column("device_bytes", sa.BigInteger(), nullable=False),
        sa.Column("disk_bytes", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("draining", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("started_at", Time, nullable=False),
        sa.Column("seen_at", Time, nullable=False),
    )
    op.create_table(
        "totals",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("labels", sa.String(300), primary_key=True),
        sa.Column("shard", sa.Integer(), primary_key=True),
        sa.Column("value", sa.Float(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("totals")
    op.drop_table("workers")
    op.drop_index("ix_jobs_start_by", "jobs")
    op.drop_index("ix_jobs_claim", "jobs")
    for column in reversed(of_jobs()):
        op.drop_column("jobs", column.name)
    for column in reversed(of_tenants()):
        op.drop_column("tenants", column.name)
