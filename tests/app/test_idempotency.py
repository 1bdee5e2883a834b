"""`Idempotency-Key`: a request that is sent again makes nothing again, however many are sent at once."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select, update

from app import idempotency
from app.database import db_now
from app.exceptions import ConflictError
from app.idempotency import Answer, Asked, answer_once
from app.models import IdempotencyKey, Job, Tenant
from app.retention import tidy
from tests.app.conftest import RECIPE, Api
from tests.app.serving import serving
from tests.jobs import TENANT, open_database


def submit(api: Api, key: str, **changes: object) -> tuple[int, dict[str, str], str]:
    answer = api.post("/v1/jobs", content=json.dumps(RECIPE | changes), headers={"Idempotency-Key": key, "Content-Type": "application/json"})
    return answer.status_code, dict(answer.headers), answer.text


def count(api: Api) -> int:
    return len(api.get("/v1/jobs?limit=100").json()["items"])


def test_a_request_that_is_sent_again_gets_the_same_answer(api: Api) -> None:
    status, headers, body = submit(api, "one")
    assert status == 202
    assert "idempotency-replayed" not in headers
    assert json.loads(body) == api.get(headers["location"]).json()
    api.start(json.loads(body)["id"])
    for _ in range(2):
        again, headers_again, body_again = submit(api, "one")
        assert (again, body_again, headers_again["location"]) == (status, body, headers["location"])
        assert headers_again["idempotency-replayed"] == "true"
        assert headers_again["retry-after"] == headers["retry-after"]
        assert headers_again["content-type"] == "application/json"
    assert submit(api, "two")[2] != body
    assert count(api) == 2


def test_a_key_belongs_to_one_request_of_one_tenant(api: Api) -> None:
    _, _, body = submit(api, "one")
    status, _, refused = submit(api, "one", sparsity=0.4)
    assert (status, json.loads(refused)["code"]) == (422, "idempotency_key_reused")
    job_id = json.loads(body)["id"]
    api.fail(job_id)
    other = api.post(f"/v1/jobs/{job_id}/retry", headers={"Idempotency-Key": "one"})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    status, headers, other_body = submit(api.other_tenant(), "one", sparsity=0.4)
    assert (status, "idempotency-replayed" in headers) == (202, False)
    assert other_body != body
    assert count(api) == 1


def test_a_retry_that_is_sent_again_gets_the_same_answer(api: Api) -> None:
    job_id = api.submit()
    api.fail(job_id)
    first, second = (api.post(f"/v1/jobs/{job_id}/retry", headers={"Idempotency-Key": "again"}) for _ in range(2))
    assert first.status_code == second.status_code == 202
    assert first.content == second.content
    assert second.headers["Idempotency-Replayed"] == "true"


def test_a_refused_request_is_not_kept(api: Api) -> None:
    assert submit(api, "one", sparsity=7)[0] == 422
    assert submit(api, "one", model="no model id")[0] == 422
    with api.database.writing() as session:
        session.execute(update(Tenant).where(Tenant.name == api.tenant).values(max_queued=0))
    assert submit(api, "one")[0] == 429
    with api.database.writing() as session:
        session.execute(update(Tenant).where(Tenant.name == api.tenant).values(max_queued=None))
    status, headers, _ = submit(api, "one")
    assert (status, "idempotency-replayed" in headers) == (202, False)
    assert count(api) == 1


def test_a_validation_has_no_use_for_a_key(api: Api) -> None:
    for sparsity in (0.3, 0.4):
        answer = api.post("/v1/jobs?validate_only=true", json=RECIPE | {"sparsity": sparsity}, headers={"Idempotency-Key": "one"})
        assert (answer.status_code, answer.json()["recipe"]["sparsity"]["fraction"]) == (200, sparsity)
    assert "idempotency-replayed" not in submit(api, "one")[1]


@pytest.mark.parametrize("key", ["", "a b", "a" * 256, "\x7f", "ü".encode("latin-1")])
def test_a_key_is_up_to_255_visible_ascii_characters(api: Api, key: str | bytes) -> None:
    answer = api.post("/v1/jobs", json=RECIPE, headers={"Idempotency-Key": key})
    assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, "Idempotency-Key")


def test_a_key_is_forgotten_after_a_day(api: Api) -> None:
    _, _, old = submit(api, "old")
    _, _, new = submit(api, "new")
    with api.database.writing() as session:
        session.execute(update(IdempotencyKey).where(IdempotencyKey.key == "old").values(created_at=db_now(-24 * 3600 - 1)))
        session.execute(update(IdempotencyKey).where(IdempotencyKey.key == "new").values(created_at=db_now(-24 * 3600 + 60)))
    tidy(api.database, api.store, api.settings, threading.Event())
    assert submit(api, "new")[2] == new
    assert submit(api, "old")[2] != old


def test_one_that_waits_too_long_is_told_to_come_again(postgres_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "WAIT_SECONDS", 1)
    database = open_database(postgres_database)
    asked = Asked("one", "0" * 64)
    begun, go_on = threading.Event(), threading.Event()

    def slow(session: object) -> Answer:
        begun.set()
        assert go_on.wait(30)
        return Answer(202, "{}")

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(answer_once, database, TENANT, asked, slow)
        assert begun.wait(30)
        with pytest.raises(ConflictError) as refused:
            answer_once(database, TENANT, asked, slow)
        go_on.set()
        assert first.result().body == b"{}"
    assert refused.value.code == "idempotency_key_in_flight"
    assert int(refused.value.headers["Retry-After"]) > 0
    assert answer_once(database, TENANT, asked, slow).headers["Idempotency-Replayed"] == "true"
    database.dispose()


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_of_a_hundred_at_once_one_makes_the_job(database: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/espalier.db" if database == "sqlite" else request.getfixturevalue("postgres_database")
    start = threading.Barrier(100)
    with serving(url, tmp_path) as server, server.client(**{"Idempotency-Key": "one"}) as client:

        def post(_: int) -> httpx.Response:
            start.wait(30)
            return client.post("/v1/jobs", json=RECIPE)

        with ThreadPoolExecutor(100) as pool:
            answers = list(pool.map(post, range(100)))
        with server.database.reading() as session:
            assert session.scalar(select(func.count()).select_from(Job)) == 1
            assert session.scalar(select(func.count()).select_from(IdempotencyKey)) == 1
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.content for answer in answers}) == 1
    assert sorted(answer.headers.get("Idempotency-Replayed", "") for answer in answers) == ["", *["true"] * 99]
