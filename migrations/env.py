"""Run by Alembic, with the connection that `migrations.migrate` opened."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, text

from app.models import Job

MIGRATION_LOCK = 4711_2001  # of all processes that migrate the same Postgres database, one at a time

connection: Connection = context.config.attributes["connection"]
if connection.dialect.name == "postgresql":
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
    connection.execute(text("SET LOCAL lock_timeout = '3s'"))  # all others wait behind it; who runs the migration tries again

context.configure(connection=connection, target_metadata=Job.metadata, render_as_batch=connection.dialect.name == "sqlite", transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
