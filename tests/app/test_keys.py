"""Keys are made, shown once, listed without their secret, rotated and revoked; and what is remembered of them ends in time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, update

from app.auth import KnownKeys
from app.database import Database, db_now
from app.models import ApiKey
from tests.app.conftest import Api, serving
from tests.app.running import running
from tests.jobs import wait_until

KEY: dict[str, Any] = {"name": "nightly", "scopes": ["jobs:read", "jobs:write"]}


def id_of(key: str) -> str:
    return f"key_{key.split('_')[1]}"


def make(api: Api, **changes: Any) -> dict[str, Any]:
    answer = api.post("/v1/keys", json=KEY | changes)
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    return made


def works(api: Api, key: str) -> bool:
    answer = api.get("/v1/jobs", key=key)
    assert answer.status_code in (200, 401)
    return answer.status_code == 200


def test_a_key_is_made_and_shown_once(api: Api) -> None:
    answer = api.post("/v1/keys", json=KEY | {"lifetime": 3600})
    made = answer.json()
    assert answer.status_code == 201
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Location"] == f"/v1/keys/{made['id']}"
    assert works(api, made["key"])
    assert made["id"] == id_of(made["key"])
    told = api.get(answer.headers["Location"])
    assert told.json() == {name: value for name, value in made.items() if name != "key"}
    assert made["key"].split("_", 2)[2] not in told.text + api.get("/v1/keys").text
    assert (made["name"], made["scopes"]) == (KEY["name"], KEY["scopes"])
    assert made["expires_at"] > made["created_at"]


def test_a_key_has_only_its_scopes(api: Api) -> None:
    made = make(api, scopes=["jobs:read"])
    assert api.request("POST", "/v1/jobs", key=made["key"], json={}).status_code == 403
    assert api.post("/v1/keys", key=made["key"], json=KEY).status_code == 403


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"scopes": []}, "/scopes"),
        ({"scopes": ["jobs:read", "jobs:read"]}, "/scopes"),
        ({"scopes": ["jobs:delete"]}, "/scopes/0"),
        ({"name": ""}, "/name"),
        ({"name": "a\0b"}, "/name"),
        ({"name": "\ud800"}, "/name"),
        ({"name": "x" * 201}, "/name"),
        ({"lifetime": 59}, "/lifetime"),
        ({"lifetime": "3600"}, "/lifetime"),
        ({"lifetime": 10**12}, "/lifetime"),
        ({"tenant": "another"}, "/tenant"),
    ],
)
def test_what_is_no_key_request(api: Api, change: dict[str, Any], pointer: str) -> None:
    answer = api.post("/v1/keys", content=json.dumps(KEY | change), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer)


def test_keys_are_listed_by_pages_newest_first(api: Api) -> None:
    made = [make(api, name=f"number {number}")["id"] for number in range(4)]
    first = api.get("/v1/keys?limit=2").json()
    make(api)
    second = api.get(f"/v1/keys?limit=2&cursor={first['next']}").json()
    last = api.get(f"/v1/keys?limit=2&cursor={second['next']}").json()
    assert [key["id"] for page in (first, second, last) for key in page["items"]] == [*reversed(made), id_of(api.key)]
    assert last["next"] is None
    for cursor in ("x", "bm8", first["next"][:-3]):
        assert api.get(f"/v1/keys?cursor={cursor}").json()["code"] == "cursor_invalid"


def test_a_revoked_key_is_gone(api: Api) -> None:
    made = make(api)
    assert works(api, made["key"])
    assert api.request("DELETE", f"/v1/keys/{made['id']}").status_code == 204
    assert not works(api, made["key"])
    assert made["id"] not in api.get("/v1/keys").text
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/rotate")):
        answer = api.request(method, f"/v1/keys/{made['id']}{path}", json={})
        assert (answer.status_code, answer.json()["code"]) == (404, "key_not_found")


def test_a_key_is_rotated_with_an_overlap(patient: Api) -> None:
    api = patient.other_tenant()
    old = make(api, lifetime=7200)
    answer = api.post(f"/v1/keys/{old['id']}/rotate", json={"overlap": 4})
    new = answer.json()
    assert (answer.status_code, answer.headers["Cache-Control"]) == (201, "no-store")
    assert (new["name"], new["scopes"]) == (old["name"], old["scopes"])
    assert new["key"] != old["key"]
    assert new["expires_at"] > old["expires_at"]
    assert works(api, new["key"])
    assert works(api, old["key"])
    wait_until(lambda: not works(api, old["key"]), 60, "the old key's end")  # sooner than a verified key is asked for again
    assert works(api, new["key"])
    answer = api.post(f"/v1/keys/{old['id']}/rotate", json={})
    assert (answer.status_code, answer.json()["code"]) == (409, "key_ended")


def test_an_overlap_makes_no_key_last_longer(api: Api) -> None:
    old = make(api, lifetime=60)
    api.post(f"/v1/keys/{old['id']}/rotate", json={"overlap": 600})
    assert api.get(f"/v1/keys/{old['id']}").json()["expires_at"] == old["expires_at"]


def test_a_rotation_without_overlap_ends_the_old_key(api: Api) -> None:
    old = api.key
    new = api.post(f"/v1/keys/{id_of(old)}/rotate", json={"overlap": 0}).json()
    assert not works(api, old)
    api.key = new["key"]
    assert [key["id"] for key in api.get("/v1/keys").json()["items"]] == [new["id"]]


def test_the_last_admin_key_stays(api: Api) -> None:
    mine = id_of(api.key)
    make(api)
    ending = make(api, scopes=["admin"], lifetime=3600)
    other_tenants = api.other_tenant()
    assert works(other_tenants, other_tenants.key)
    answer = api.request("DELETE", f"/v1/keys/{mine}")
    assert (answer.status_code, answer.json()["code"]) == (409, "last_admin_key")
    assert api.request("DELETE", f"/v1/keys/{ending['id']}").status_code == 204
    lasting = make(api, scopes=["admin"])
    assert api.request("DELETE", f"/v1/keys/{mine}").status_code == 204
    assert not works(api, api.key)
    assert works(api, lasting["key"])


def test_two_admins_cannot_revoke_each_other(api: Api) -> None:
    for _ in range(5):
        keys = [api.key, make(api, scopes=["admin"])["key"]]
        start = threading.Barrier(2)
        statuses: dict[str, int] = {}

        def revoke(mine: str, other: str, start: threading.Barrier = start, statuses: dict[str, int] = statuses) -> None:
            start.wait()
            statuses[mine] = api.request("DELETE", f"/v1/keys/{id_of(other)}", key=mine).status_code

        threads = [threading.Thread(target=revoke, args=pair) for pair in (keys, keys[::-1])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert list(statuses.values()).count(204) == 1
        (api.key,) = [key for key in keys if works(api, key)]


# ------------------------------------------------------------- what is remembered


@pytest.fixture(scope="module")
def patient(migrated_url: str, roots: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A service that does not look at a key again before a test is over."""
    with serving(tmp_path_factory.mktemp("home"), migrated_url, roots, key_cache_seconds=300) as made:
        yield made


@contextmanager
def queries(database: Database) -> Iterator[list[str]]:
    seen: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        seen.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(database.engine, "before_cursor_execute", note)


def test_a_key_costs_no_query_each_time(patient: Api) -> None:
    api = patient.other_tenant()
    database: Database = patient.client.app.state.database  # type: ignore[attr-defined]  # httpx says nothing of the app
    with queries(database) as seen:
        for _ in range(10):
            assert api.get("/v1/methods").status_code == 200
    assert len([statement for statement in seen if "api_keys" in statement]) == 1


def test_a_remembered_key_does_not_open_to_another_secret(api: Api) -> None:
    assert works(api, api.key)
    assert not works(api, api.key[:-2] + ("AA" if api.key[-2:] != "AA" else "BB"))
    assert works(api, api.key)


def test_a_remembered_key_expires_at_its_own_time(patient: Api) -> None:
    api = patient.other_tenant()
    with api.database.writing() as session:
        session.execute(update(ApiKey).where(ApiKey.id == id_of(api.key)).values(expires_at=db_now(4)))
    assert works(api, api.key)
    wait_until(lambda: not works(api, api.key), 60, "the key's end")


def test_few_keys_are_remembered_and_no_secret_is(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.auth.MAX_KNOWN_KEYS", 3)
    known = KnownKeys(api.database, 60)
    keys = [api.new_key(["jobs:read"]) for _ in range(5)]
    for key in keys:
        known.verify(key)
    assert [known.recall(key) is not None for key in keys] == [False, False, True, True, True]
    assert not any(key.split("_", 2)[2] in repr(vars(known)) for key in keys)
    known.forget(id_of(keys[-1]))
    assert known.recall(keys[-1]) is None


def test_when_a_key_was_used_is_noted(api: Api) -> None:
    made = make(api)
    keys: KnownKeys = api.client.app.state.keys  # type: ignore[attr-defined]
    keys.note_use()
    assert api.get(f"/v1/keys/{made['id']}").json()["last_used_at"] is None
    with queries(api.client.app.state.database) as seen:  # type: ignore[attr-defined]
        for _ in range(3):
            assert works(api, made["key"])
        assert not [statement for statement in seen if statement.startswith("UPDATE")]
        keys.note_use()
        keys.note_use()
        assert len([statement for statement in seen if "last_used_at" in statement and statement.startswith("UPDATE")]) == 1
    assert datetime.fromisoformat(api.get(f"/v1/keys/{made['id']}").json()["last_used_at"]) >= datetime.fromisoformat(made["created_at"])


def test_a_key_revoked_in_another_process_ends_in_time(roots: Path, tmp_path: Path) -> None:
    seconds = 2.0
    environment = {"ESPALIER_KEY_CACHE_SECONDS": str(seconds)}
    with running(tmp_path, {}, environment, worker=False) as there, serving(tmp_path, f"sqlite:///{tmp_path}/espalier.db", roots) as here:
        here.tenant, here.key = "running", there.key
        made = make(here)
        headers = {"Authorization": f"Bearer {made['key']}"}
        assert there.client.get("/v1/jobs", headers=headers).status_code == 200
        asked_at = time.monotonic()
        assert here.request("DELETE", f"/v1/keys/{made['id']}").status_code == 204
        assert not works(here, made["key"])
        wait_until(lambda: there.client.get("/v1/jobs", headers=headers).status_code == 401, 60, "the key's end elsewhere")
        assert time.monotonic() - asked_at < seconds + 20
