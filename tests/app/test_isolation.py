"""No endpoint tells one tenant anything of another's, and none works without a key that has the scope."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update

from app.auth import SCOPES, create_key, main, revoke_key, verify_key
from app.database import Database, db_now
from app.exceptions import AuthenticationError, NotFoundError
from app.models import ApiKey
from tests.app.calls import CALLS, NETWORKS, operations, prepare
from tests.app.conftest import RECIPE, Api, serving

PREFIXES = {"job": "job", "key": "key", "webhook": "wh", "delivery": "dlv", "checkpoint": "ckpt"}

OPEN = ("/livez", "/readyz")
OF_A_THING = [endpoint for endpoint in CALLS if "{" in endpoint]
NOWHERE = {"number": "0", "path": "config.json"} | {f"{name}_id": f"{prefix}_{'0' * 32}" for name, prefix in PREFIXES.items()}


@pytest.fixture(scope="module")
def shared_api(migrated_url: str, roots: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home"), migrated_url, roots, webhook_networks=NETWORKS) as made:
        yield made


def test_these_are_all_endpoints(shared_api: Api) -> None:
    assert {f"{method} {path}" for method, path, _ in operations(shared_api) if path not in OPEN} == set(CALLS)


@pytest.mark.parametrize("endpoint", OF_A_THING)
def test_another_tenants_thing_is_not_there(api: Api, endpoint: str, tmp_path: Path) -> None:
    other = api.other_tenant()
    theirs = prepare(other, endpoint, tmp_path)
    method, path = endpoint.split()
    nowhere = replace(theirs, path=path.format(**NOWHERE)).send(api)
    refused = theirs.send(api)
    assert refused.status_code == nowhere.status_code == 404, refused.text
    assert refused.json()["code"] == nowhere.json()["code"]
    if method == "GET":
        assert replace(theirs, method="HEAD").send(api).status_code in (404, 405)
        assert api.get(theirs.path, headers={"If-None-Match": '"1", *'}).status_code == 404
    assert theirs.send(other).status_code < 400  # it was there, and nothing has happened to it


def test_a_running_job_of_another_tenant_is_not_cancelled(api: Api) -> None:
    other = api.other_tenant()
    job_id = other.submit()
    assert api.post(f"/v1/jobs/{job_id}/cancel").status_code == 404
    assert other.get(f"/v1/jobs/{job_id}").json()["state"] == "queued"


def test_lists_hold_only_ones_own_jobs(api: Api) -> None:
    other = api.other_tenant()
    theirs = [other.submit() for _ in range(3)]
    mine = api.submit()
    assert [job["id"] for job in api.get("/v1/jobs").json()["items"]] == [mine]
    cursor = other.get("/v1/jobs?limit=1").json()["next"]
    seen = [job["id"] for job in api.get(f"/v1/jobs?cursor={cursor}").json()["items"]]
    assert not set(seen) & set(theirs)


# ---------------------------------------------------------------------- keys


@pytest.mark.parametrize("endpoint", CALLS)
def test_a_key_with_the_scope_is_needed(api: Api, endpoint: str, tmp_path: Path) -> None:
    (needed,) = [security["API key"] for method, path, operation in operations(api) if f"{method} {path}" == endpoint for security in operation["security"]]
    call = prepare(api, endpoint, tmp_path)
    none = api.client.request(call.method, call.path, **call.options)
    assert (none.status_code, none.json()["code"], none.headers["WWW-Authenticate"]) == (401, "key_missing", "Bearer")
    for scope in SCOPES:
        if scope not in (*needed, "admin"):
            lacking = call.send(api, key=api.new_key([scope]))
            assert (lacking.status_code, lacking.json()["code"]) == (403, "scope_missing"), scope
            assert needed[0] in lacking.json()["detail"]
    for sufficient in (needed, ["admin"]):
        assert prepare(api, endpoint, tmp_path).send(api, key=api.new_key(sufficient)).status_code < 400


def test_without_a_key_no_path_is_judged(api: Api) -> None:
    for method, path, _ in operations(api):
        if path not in OPEN:
            assert api.client.request(method, path.format_map(defaultdict(lambda: "x"))).status_code == 401, path


def test_an_unauthorised_body_is_not_judged(api: Api) -> None:
    answer = api.request("POST", "/v1/jobs", key=api.new_key(["jobs:read"]), json=RECIPE)
    assert answer.status_code == 403
    assert api.get("/v1/jobs").json()["items"] == []


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer x",
        "Basic eDp5",
        "Bearer esp_1_2",
        "esp_",
        "Bearer esp_" + "0" * 32 + "_" + "A" * 43,
        "Bearer " + "x" * 10_000,
        "Bearer \xe9",
    ],
)
def test_what_is_no_key(api: Api, header: str) -> None:
    answer = api.client.get("/v1/jobs", headers={b"Authorization": header.encode("latin-1")})
    assert answer.status_code == 401
    assert answer.json()["code"] in ("key_missing", "key_malformed", "key_unknown")


def test_another_secret_is_refused(api: Api) -> None:
    wrong = api.key[:-1] + ("A" if api.key[-1] != "A" else "B")
    answer = api.get("/v1/jobs", key=wrong)
    assert (answer.status_code, answer.json()["code"]) == (401, "key_unknown")
    swapped = api.key[:37] + api.other_tenant().key[37:]
    assert api.get("/v1/jobs", key=swapped).status_code == 401


def test_a_key_that_has_ended_is_refused(api: Api) -> None:
    for ending in ({"expires_at": db_now(-1)}, {"revoked_at": db_now()}):
        key = api.new_key()
        with api.database.writing() as session:
            session.execute(update(ApiKey).where(ApiKey.id == "key_" + key.split("_")[1]).values(ending))
        answer = api.get("/v1/jobs", key=key)
        assert (answer.status_code, answer.json()["code"]) == (401, "key_ended")


def test_only_the_hash_of_a_secret_is_stored(api: Api) -> None:
    with api.database.reading() as session:
        row = session.get_one(ApiKey, "key_" + api.key.split("_")[1])
        stored = repr({column.name: getattr(row, column.name) for column in ApiKey.__table__.columns})
    assert api.key.split("_", 2)[2] not in stored
    assert row.secret_sha256 in stored


def test_unknown_scopes_are_refused(api: Api) -> None:
    for scopes in (["jobs:delete"], []):
        with pytest.raises(ValueError, match="choose from"):
            api.new_key(scopes)


def test_operators_make_and_end_keys(shared_api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("app.auth.get_settings", lambda: shared_api.settings)
    assert main(["create-key", "--tenant", "by hand", "--scope", "jobs:read", "--days", "1"]) == 0
    key = capsys.readouterr().out.strip()
    with shared_api.database.reading() as session:
        assert verify_key(session, key).caller.scopes == {"jobs:read"}
    assert main(["create-key", "--tenant", "by hand"]) == 0
    second = capsys.readouterr().out.strip()
    with shared_api.database.reading() as session:
        assert verify_key(session, second).caller.tenant_id == verify_key(session, key).caller.tenant_id
        assert verify_key(session, second).caller.scopes == {*SCOPES} - {"admin"}
    assert main(["revoke-key", key.split("_")[1]]) == 0
    with shared_api.database.reading() as session, pytest.raises(AuthenticationError):
        verify_key(session, key)
    assert main(["revoke-key", "key_0"]) == 1
    assert "no key key_0" in capsys.readouterr().err


def test_a_key_that_is_not_committed_is_none(sqlite_template: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.db").write_bytes(sqlite_template.read_bytes())
    database = Database(f"sqlite:///{tmp_path}/copy.db")
    with database.reading() as session:
        key = create_key(session, "nobody")
    with database.reading() as session, pytest.raises(AuthenticationError):
        verify_key(session, key)
    with pytest.raises(NotFoundError), database.writing() as session:
        revoke_key(session, "key_" + key.split("_")[1])
    database.dispose()
