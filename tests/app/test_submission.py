"""A submission is stored whole or not at all, on SQLite and on Postgres. No service runs here: its dispatcher would take the messages that are counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import DataError

from app.database import Database
from app.exceptions import QuotaError
from app.jobs import service
from app.jobs.schemas import Submission
from app.models import AuditEntry, Job, JobEvent, OutboxMessage, Tenant
from app.settings import Settings
from tests.app.conftest import RECIPE, make_settings

MOST_OF_A_KEY = 64  # characters of a key's id that the audit log takes


@pytest.fixture
def database(migrated_url: str) -> Iterator[Database]:
    made = Database(migrated_url)
    yield made
    made.dispose()


@pytest.fixture
def settings(migrated_url: str, roots: Path, tmp_path: Path) -> Settings:
    return make_settings(tmp_path, migrated_url, roots)


@pytest.fixture
def tenant_of_none(database: Database) -> str:
    """The id of a tenant without jobs."""
    tenant = f"tenant_{uuid4().hex}"
    with database.writing() as session:
        session.add(Tenant(id=tenant, name=tenant))
    return tenant


def rows_of(database: Database, tenant: str) -> list[int | None]:
    """How many jobs, events, messages and entries of the audit log a tenant has."""
    with database.reading() as session:
        return [session.scalar(select(func.count()).where(table.tenant_id == tenant)) for table in (Job, JobEvent, OutboxMessage, AuditEntry)]


def test_all_of_a_job_is_one_transaction(database: Database, settings: Settings, tenant_of_none: str) -> None:
    submission = Submission.model_validate(RECIPE)

    def submit_and_fail() -> None:
        with database.writing() as session:
            service.submit(session, tenant_of_none, "key_1", submission, None, settings)
            raise RuntimeError("the process is killed before the commit")

    with pytest.raises(RuntimeError):
        submit_and_fail()
    assert rows_of(database, tenant_of_none) == [0, 0, 0, 0]
    with database.writing() as session:
        service.submit(session, tenant_of_none, "key_1", submission, None, settings)
    assert rows_of(database, tenant_of_none) == [1, 1, 1, 1]


def test_what_is_written_at_once_is_whole_or_not_there(database: Database, settings: Settings, tenant_of_none: str) -> None:
    """On Postgres there is no transaction around it: what fails is its last part, the entry of the audit log."""
    submission = Submission.model_validate(RECIPE)
    assert service.is_written_at_once(submission)

    def submit_by(key_id: str) -> None:
        with database.writing_at_once() as session:
            service.submit(session, tenant_of_none, key_id, submission, None, settings)
            if len(key_id) > MOST_OF_A_KEY:
                raise RuntimeError("SQLite does not mind the length")

    with pytest.raises((RuntimeError, DataError)):
        submit_by("k" * (MOST_OF_A_KEY + 1))
    assert rows_of(database, tenant_of_none) == [0, 0, 0, 0]
    submit_by("k" * MOST_OF_A_KEY)
    assert rows_of(database, tenant_of_none) == [1, 1, 1, 1]

    def submit_one_too_many() -> None:
        with database.writing_at_once() as session:
            service.submit(session, tenant_of_none, "key_1", submission, None, settings.model_copy(update={"max_queued": 1}))

    with pytest.raises(QuotaError, match="1 jobs wait, and this tenant may have 1 waiting"):
        submit_one_too_many()
    assert rows_of(database, tenant_of_none) == [1, 1, 1, 1]
