"""Text is text: whatever stands in it, it reaches no SQL, forges no log line and comes back as it was sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import func, select

from app.models import Job
from tests.app.conftest import RECIPE, Api
from tests.app.test_logging import Lines

HOSTILE = {
    "sql quote": "'; DROP TABLE jobs; --",
    "sql tautology": "' OR '1'='1",
    "sql double quote": '" OR ""="',
    "sql wildcards": "%_\\",
    "sql dollar": "$$; SELECT pg_sleep(5); $$",
    "json path": "$.run' OR 1=1 --",
    "log line": 'x\n{"event": "forged", "level": "info"}',
    "log line of windows": "x\r\nforged: 1",
    "ansi": "\x1b[2J\x1b[31mred",
    "line separator": "x\u2028forged\u2029\u0085",
    "format": "%s %n {0} {event} ${jndi:ldap://127.0.0.1/x} {{7*7}}",
    "markup": "<script>alert(1)</script>",
    "right to left": "\u202efdp.exe",
}
HEADER_SAFE = [text for text in HOSTILE.values() if text.isascii() and text.isprintable()]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_text_that_is_taken_comes_back(api: Api, text: str, logged: Lines) -> None:
    mine = api.submit(metadata={"run": text})
    api.submit(metadata={"run": "another"})
    other = api.other_tenant()
    other.submit(metadata={"run": text})
    assert api.get(f"/v1/jobs/{mine}").json()["metadata"] == {"run": text}
    assert [job["id"] for job in api.get("/v1/jobs", params={"metadata[run]": text}).json()["items"]] == [mine]
    key = api.post("/v1/keys", json={"name": text, "scopes": ["jobs:read"]}).json()
    assert api.get(f"/v1/keys/{key['id']}").json()["name"] == text
    said = {line["event"] for line in logged()}  # each line is one JSON object, or this fails
    assert said == {"request"}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_text_that_names_something_finds_nothing(api: Api, text: str, logged: Lines) -> None:
    api.submit()
    for path, name in [
        *(("/v1/jobs", name) for name in ("model", "queue", "method", "state", "cursor", "created_after", "metadata[run]", "metadata[' OR 1=1 --]")),
        *(("/v1/audit", name) for name in ("action", "target", "key_id", "cursor", "created_after")),
        *(("/v1/checkpoints", name) for name in ("name", "state", "cursor")),
        ("/v1/keys", "cursor"),
    ]:
        answer = api.get(path, params={name: text})
        assert answer.status_code in (200, 400, 422), (path, name, answer.text)
        assert answer.status_code != 200 or answer.json()["items"] == [], (path, name)
    for body in (
        RECIPE | {"model": text},
        RECIPE | {"method": text},
        RECIPE | {"queue": text},
        RECIPE | {"calibration": {"source": text}},
        RECIPE | {"webhook": text},
        RECIPE | {"metadata": {text: "x"}},
        RECIPE | {"sinks": [{"name": "hub", "repository": text, "token": "x"}]},
        RECIPE | {"sinks": [{"name": "s3", "url": text, "access_key": "x", "secret_key": "x"}]},
        RECIPE | {text: 1},
    ):
        assert api.post("/v1/jobs", json=body).status_code == 422, body
    assert api.post("/v1/webhooks", json={"url": text}).status_code == 422
    assert api.post("/v1/checkpoints", json={"name": text, "files": []}).status_code == 422
    with api.database.reading() as session:
        assert session.scalars(select(func.count()).select_from(Job)).one() >= 1
    assert len(api.get("/v1/jobs").json()["items"]) == 1
    assert {line["event"] for line in logged()} == {"request"}


@pytest.mark.parametrize("text", HEADER_SAFE)
def test_text_in_headers(api: Api, text: str, logged: Lines) -> None:
    answer = api.get("/v1/jobs", headers={"X-Request-ID": text, "User-Agent": text, "X-Forwarded-For": text, "Cookie": text})
    assert (answer.status_code, answer.headers["X-Request-ID"] == text) == (200, False)
    assert text not in json.dumps(logged())
    submitted: Any = [api.post("/v1/jobs", json=RECIPE, headers={"Idempotency-Key": text}) for _ in range(2)]
    assert submitted[0].status_code in (202, 422)
    assert submitted[0].status_code != 202 or submitted[0].json() == submitted[1].json()
