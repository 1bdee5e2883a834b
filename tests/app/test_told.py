"""What a poll is told of a job: always as the job is, from what was told before as far as that is still right."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from app.jobs import repository, told
from app.jobs.repository import add_event
from app.jobs.told import Told, ToldJobs
from app.models import Job
from tests.app.conftest import Api, insert_jobs


@pytest.fixture
def tenant(api: Api) -> str:
    with api.database.reading() as session:
        return str(session.query(Job.tenant_id).filter(Job.id == api.submit()).scalar())


@contextmanager
def statements(api: Api) -> Iterator[list[str]]:
    """Those that the database is sent meanwhile."""
    sent: list[str] = []

    def note(connection: object, cursor: object, statement: str, *more: object) -> None:
        sent.append(statement)

    event.listen(api.database.engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(api.database.engine, "before_cursor_execute", note)


def find(jobs: ToldJobs, tenant: str, *job_ids: str) -> list[Told | None]:
    """What is told of each, asked for at the same moment."""

    async def ask() -> list[Told | None]:
        return await asyncio.gather(*(jobs.find(tenant, job_id) for job_id in job_ids))

    return asyncio.run(ask())


def test_a_job_that_did_not_change_costs_a_look_at_its_version(api: Api, tenant: str) -> None:
    jobs, job_id = ToldJobs(api.database), api.submit()
    (first,) = find(jobs, tenant, job_id)
    with statements(api) as sent:
        (second,) = find(jobs, tenant, job_id)
    assert second is first is not None
    assert json.loads(first.body) == api.get(f"/v1/jobs/{job_id}").json()
    (statement,) = [each for each in sent if each.startswith("SELECT")]
    assert "version" in statement
    assert "recipe" not in statement


def test_a_job_that_changed_is_told_anew(api: Api, tenant: str) -> None:
    jobs, job_id = ToldJobs(api.database), api.submit()
    (first,) = find(jobs, tenant, job_id)
    with api.database.writing() as session:
        add_event(session, job_id, tenant, "log", "Something happened.")
    (second,) = find(jobs, tenant, job_id)
    assert first is not None
    assert second is not None
    assert second.version == first.version + 1
    earlier, later = (datetime.fromisoformat(json.loads(told.body)["updated_at"]) for told in (first, second))
    assert later > earlier
    assert not second.finished
    api.fail(job_id)
    (third,) = find(jobs, tenant, job_id)
    assert third is not None
    assert third.finished
    assert json.loads(third.body)["state"] == "failed"


def test_a_job_is_told_to_its_tenant_alone_also_once_it_was_told(api: Api, tenant: str) -> None:
    jobs, job_id = ToldJobs(api.database), api.submit()
    other = insert_jobs(api.database, api.other_tenant().tenant, 1)[0]
    told_to_its_own = find(jobs, tenant, job_id, other)
    assert told_to_its_own[0] is not None
    assert told_to_its_own[1] is None
    assert find(jobs, "another", job_id) == [None]


def test_a_job_that_was_deleted_is_told_no_more(api: Api, tenant: str) -> None:
    jobs, job_id = ToldJobs(api.database), api.submit()
    api.fail(job_id)
    assert find(jobs, tenant, job_id) != [None]
    assert api.request("DELETE", f"/v1/jobs/{job_id}").status_code == 204
    assert find(jobs, tenant, job_id) == [None]


def test_those_who_ask_meanwhile_share_the_next_question(api: Api, tenant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, job_ids = ToldJobs(api.database), insert_jobs(api.database, api.tenant, 5)
    questions: list[int] = []
    began, may_end = threading.Event(), threading.Event()
    read = jobs._read

    def slow(keys: set[tuple[str, str]]) -> dict[tuple[str, str], Told]:
        questions.append(len(keys))
        began.set()
        assert may_end.wait(60)
        return read(keys)

    monkeypatch.setattr(jobs, "_read", slow)

    async def ask() -> list[Told | None]:
        first = asyncio.create_task(jobs.find(tenant, job_ids[0]))
        await asyncio.to_thread(began.wait, 60)
        others = [asyncio.create_task(jobs.find(tenant, job_id)) for job_id in job_ids]
        impatient = asyncio.create_task(jobs.find(tenant, job_ids[1]))
        await asyncio.sleep(0)
        impatient.cancel()  # its client went; the others' answers come all the same
        may_end.set()
        return await asyncio.gather(first, *others)

    answers = asyncio.run(ask())
    assert questions == [1, 5]
    assert [json.loads(answer.body)["id"] for answer in answers if answer] == [job_ids[0], *job_ids]


def test_a_question_that_failed_is_the_fault_of_none_that_come_later(api: Api, tenant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, job_id = ToldJobs(api.database), api.submit()

    def refuse(*arguments: object) -> None:
        raise OperationalError("SELECT", {}, Exception("the server is away"))

    with monkeypatch.context() as patched:
        patched.setattr(repository, "find_jobs", refuse)
        with pytest.raises(OperationalError, match="the server is away"):
            find(jobs, tenant, job_id, job_id)
    assert find(jobs, tenant, job_id) != [None]


def test_what_is_kept_is_bounded(api: Api, tenant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "MOST_KEPT", 3)
    jobs, job_ids = ToldJobs(api.database), insert_jobs(api.database, api.tenant, 5)
    for job_id in job_ids:
        assert find(jobs, tenant, job_id) != [None]
    assert [job_id for _, job_id in jobs._kept] == job_ids[2:]
    monkeypatch.setattr(told, "MOST_KEPT_BYTES", 100)
    assert find(jobs, tenant, job_ids[0]) != [None]
    assert [job_id for _, job_id in jobs._kept] == job_ids[2:]
