"""No query that is made all the time reads a whole table, on a database of Postgres that has grown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import combinations
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from app.audit.repository import AuditFilter, forget, list_entries
from app.database import Database
from app.jobs import lease, repository
from app.jobs.repository import JobFilter
from app.models import Job, Worker
from app.recipe import Recipe
from app.webhooks import deliveries
from app.webhooks import repository as webhooks
from migrations import migrate
from tests.filling import fill
from tests.servers import fresh_database

JOBS = 20_000
GROWING = {"jobs", "job_events", "outbox", "artifacts", "deliveries", "audit_log", "idempotency_keys"}
TENANT = "tenant_3"
JOB = f"job_{3:032x}"
WORKER = Worker(id="worker", queue="default", host_bytes=10**9, device_bytes=0)
RECIPE = Recipe.model_validate({"model": "owner/model", "method": "cfsp", "sparsity": 0.3})
FILTERS: dict[str, Any] = {
    "states": ("running",),
    "method": "wanda",
    "model": "no/such",
    "queue": "large",
    "created_after": datetime(2020, 1, 1, tzinfo=UTC),
    "labels": (("run", "3"),),
}
CHOICES = [dict(chosen) for number in range(3) for chosen in combinations(FILTERS.items(), number)]
Query = Callable[[Session], Any]


def of_lease(token: int = 1) -> lease.Lease:
    return lease.Lease(JOB, TENANT, "default", token, 1, 3, capped=True)


QUERIES: dict[str, Query] = {
    "get": lambda session: repository.find_job(session, TENANT, JOB),
    "poll": lambda session: (repository.find_versions(session, [(TENANT, JOB)]), repository.find_jobs(session, [(TENANT, JOB), (TENANT, JOB)])),
    "report": lambda session: repository.find_report(session, TENANT, JOB),
    "submit": lambda session: repository.admit_job(session, TENANT, RECIPE, 45, 10**6, ("Queued.", "Queued."), key_id="key"),
    "cancel": lambda session: repository.request_cancel(session, TENANT, JOB),
    "events": lambda session: repository.list_events(session, TENANT, JOB, 1, 100),
    "news": lambda session: (repository.find_standings(session, [JOB]), repository.find_events(session, [(JOB, 1), (JOB, 2)])),
    "artifacts": lambda session: repository.list_artifacts(session, TENANT, JOB),
    "claim": lambda session: lease.claim_next(session, WORKER, 45),
    "pass on": lambda session: lease._pass_on(session, of_lease()),
    "work waits": lambda session: lease.work_waits(session, WORKER),
    "reap": lease.reap,
    "give up": lease.give_up,
    "outbox": lambda session: lease.delete_messages(session, lease.take_outbox(session, 100)),
    "deliveries": lambda session: deliveries.take(session, [], 10, 60),
    "news of a job": lambda session: webhooks.list_deliveries(session, TENANT, "wh_1", JOB, None, 20),
    "audit": lambda session: list_entries(session, TENANT, AuditFilter(), None, 20),
    "old entries": lambda session: forget(session, 0, 100),
}


@pytest.fixture(scope="module")
def grown(postgres_url: str) -> Iterator[Database]:
    with fresh_database(postgres_url) as url:
        migrate(url)
        database = Database(url)
        fill(database, JOBS)
        yield database
        database.dispose()


def whole_tables(database: Database, query: Query) -> set[str]:
    """The growing tables that the statements of a query read from end to end."""
    statements: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        statements.append((statement, parameters))

    with database.writing() as session:
        connection = session.connection()
        event.listen(connection, "before_cursor_execute", note)
        query(session)
        event.remove(connection, "before_cursor_execute", note)
        asked = [(statement, parameters) for statement, parameters in statements if not statement.startswith(("SET", "SAVEPOINT"))]
        assert asked
        plans = [connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", parameters).scalar_one() for statement, parameters in asked]
        session.rollback()
    return {table for plan in plans for table in read_whole(plan[0]["Plan"])} & GROWING


def read_whole(plan: Mapping[str, Any]) -> Iterator[str]:
    if plan["Node Type"] == "Seq Scan":
        yield plan["Relation Name"]
    for part in plan.get("Plans", ()):
        yield from read_whole(part)


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_reads_along_an_index(grown: Database, name: str) -> None:
    assert not whole_tables(grown, QUERIES[name])


@pytest.mark.parametrize("chosen", CHOICES, ids=lambda chosen: "+".join(chosen) or "all")
def test_a_list_reads_along_an_index(grown: Database, chosen: dict[str, Any]) -> None:
    before = (datetime(2100, 1, 1, tzinfo=UTC), JOB)
    assert not whole_tables(grown, lambda session: repository.list_jobs(session, TENANT, JobFilter(**chosen), before, 21))


def test_reading_a_whole_table_is_noticed(grown: Database) -> None:
    assert whole_tables(grown, lambda session: session.query(Job).filter_by(phase="prune").all()) == {"jobs"}
