"""A database of Postgres that looks as after years: many jobs of ten tenants, most of them over, with their events and deliveries."""

from __future__ import annotations

from sqlalchemy import text

from app.database import Database

TENANTS = 10
STATEMENTS = (
    "INSERT INTO tenants (id, name, created_at) SELECT 'tenant_' || n, 'tenant ' || n, now() FROM generate_series(0, :tenants - 1) n",
    """INSERT INTO webhooks (id, tenant_id, url, description, kinds, secrets, created_at)
       SELECT 'wh_' || n, 'tenant_' || n, 'https://example.com/', '', '[]', '', now() FROM generate_series(0, :tenants - 1) n""",
    """INSERT INTO jobs (id, tenant_id, state, model, method, recipe, progress, metadata, queue, priority, attempt, max_attempts, lease_token, lease_until, version,
                         last_event, created_at, updated_at, started_at, finished_at)
       SELECT 'job_' || lpad(to_hex(n), 32, '0'), 'tenant_' || n % :tenants, state, 'owner/model-' || n / 10 % 50, (ARRAY['cfsp', 'wanda', 'flap', 'bonsai'])[1 + n / 10 % 4],
              CAST(:recipe AS jsonb), '{}', jsonb_build_object('run', CAST(n AS text)), CASE WHEN n / 10 % 5 = 0 THEN 'large' ELSE 'default' END, 0, 1, 3, 1,
              CASE WHEN state = 'running' THEN now() + interval '1 hour' END, 3, 3, moment, moment, moment, CASE WHEN state NOT IN ('queued', 'running') THEN moment END
       FROM (SELECT n, now() - (:jobs - n) * interval '1 second' AS moment,
                    CASE WHEN n / 10 % 100 = 0 THEN 'queued' WHEN n / 10 % 1000 = 1 THEN 'running' WHEN n / 10 % 20 = 2 THEN 'failed' ELSE 'succeeded' END AS state
             FROM generate_series(1, :jobs) n) made""",
    """INSERT INTO job_events (job_id, sequence, tenant_id, kind, message, data, created_at)
       SELECT id, sequence, tenant_id, 'log', 'A line.', '{}', created_at FROM jobs, generate_series(1, 3) sequence WHERE right(id, 1) = '0'""",
    """INSERT INTO artifacts (job_id, path, tenant_id, role, bytes, sha256)
       SELECT id, 'checkpoint/model.safetensors', tenant_id, 'checkpoint', 1, repeat('0', 64) FROM jobs WHERE right(id, 1) = '0'""",
    """INSERT INTO outbox (job_id, tenant_id, created_at) SELECT id, tenant_id, now() FROM jobs WHERE right(id, 1) = '0'""",
    """INSERT INTO audit_log (tenant_id, key_id, action, target, request_id, data, created_at)
       SELECT tenant_id, 'key', 'job.submit', id, '', '{}', created_at FROM jobs WHERE right(id, 1) = '0'""",
    """INSERT INTO deliveries (id, webhook_id, tenant_id, job_id, kind, payload, state, tries, next_at, created_at)
       SELECT 'dlv_' || id, 'wh_' || right(tenant_id, 1), tenant_id, id, 'job.succeeded', '{}', CASE WHEN right(id, 3) = '100' THEN 'waiting' ELSE 'delivered' END, 0, now(), now()
       FROM jobs WHERE right(id, 1) = '0'""",
)
RECIPE = '{"model": "owner/model", "method": {"name": "cfsp"}, "sparsity": 0.3, "limits": {"max_attempts": 3, "max_runtime": 86400}}'


def fill(database: Database, jobs: int) -> None:
    """Jobs of `tenant_0` to `tenant_9`, one submitted each second."""
    with database.writing() as session:
        for statement in STATEMENTS:
            session.execute(text(statement), {"tenants": TENANTS, "jobs": jobs, "recipe": RECIPE})
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
