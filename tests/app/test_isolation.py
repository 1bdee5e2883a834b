"""No endpoint tells one tenant anything of another's, and none works without a key that has the scope."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import update

from app.auth import SCOPES, Scope, create_key, main, revoke_key, verify_key
from app.database import Database, db_now
from app.exceptions import AuthenticationError, NotFoundError
from app.models import ApiKey
from tests.app.conftest import RECIPE, Api

NEEDS: dict[tuple[str, str], Scope] = {
    ("POST", "/v1/jobs"): "jobs:write",
    ("GET", "/v1/jobs"): "jobs:read",
    ("GET", "/v1/jobs/{job_id}"): "jobs:read",
    ("GET", "/v1/jobs/{job_id}/events"): "jobs:read",
    ("POST", "/v1/jobs/{job_id}/cancel"): "jobs:write",
    ("GET", "/v1/jobs/{job_id}/report"): "jobs:read",
    ("GET", "/v1/jobs/{job_id}/artifacts"): "artifacts:read",
    ("GET", "/v1/jobs/{job_id}/artifacts/{path}"): "artifacts:read",
    ("GET", "/v1/jobs/{job_id}/checkpoint"): "artifacts:read",
    ("GET", "/v1/methods"): "jobs:read",
    ("GET", "/v1/recoveries"): "jobs:read",
    ("GET", "/v1/queues"): "jobs:read",
}
OF_A_JOB = [(method, path) for method, path in NEEDS if "{job_id}" in path]
OPEN = {("GET", "/livez"), ("GET", "/readyz")}


def test_these_are_all_endpoints(shared_api: Api) -> None:
    paths = shared_api.client.get("/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, operations in paths.items() for method in operations} == {*NEEDS, *OPEN}


@pytest.fixture
def theirs(api: Api, tmp_path: Path) -> tuple[Api, str]:
    """Another tenant with a job that has succeeded."""
    other = api.other_tenant()
    return other, other.succeed(tmp_path, {"checkpoint/config.json": b"{}", "report.json": b"{}"})


@pytest.mark.parametrize(("method", "path"), OF_A_JOB)
def test_another_tenants_job_is_not_there(api: Api, theirs: tuple[Api, str], method: str, path: str) -> None:
    other, job_id = theirs
    path = path.format(job_id=job_id, path="checkpoint/config.json")
    before = other.get(f"/v1/jobs/{job_id}").json()
    refused = api.request(method, path)
    nowhere = api.request(method, path.replace(job_id, "job_" + "0" * 32))
    assert refused.status_code == nowhere.status_code == 404
    assert refused.json()["code"] == nowhere.json()["code"] == "job_not_found"
    if method == "GET":
        assert api.request("HEAD", path).status_code in (404, 405)
        etag = other.get(path).headers.get("ETag", '"1"')
        assert api.get(path, headers={"If-None-Match": etag}).status_code == 404
    assert other.get(f"/v1/jobs/{job_id}").json() == before


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


@pytest.mark.parametrize(("method", "path"), NEEDS)
def test_a_key_with_the_scope_is_needed(api: Api, method: str, path: str, tmp_path: Path) -> None:
    job_id = api.succeed(tmp_path, {"checkpoint/config.json": b"{}"})
    path, needed = path.format(job_id=job_id, path="checkpoint/config.json"), NEEDS[method, path]
    none = api.client.request(method, path)
    assert (none.status_code, none.json()["code"], none.headers["WWW-Authenticate"]) == (401, "key_missing", "Bearer")
    others = api.new_key([scope for scope in SCOPES if scope not in (needed, "admin")])
    lacking = api.request(method, path, key=others)
    assert (lacking.status_code, lacking.json()["code"]) == (403, "scope_missing")
    assert needed in lacking.json()["detail"]
    for scope in (needed, "admin"):
        assert api.request(method, path, key=api.new_key([scope])).status_code not in (401, 403)


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


def test_a_key_ends_at_once(api: Api) -> None:
    key_id = "key_" + api.key.split("_")[1]
    for ending in ({"expires_at": db_now(-1)}, {"expires_at": None, "revoked_at": db_now()}):
        with api.database.writing() as session:
            session.execute(update(ApiKey).where(ApiKey.id == key_id).values(ending))
        answer = api.get("/v1/jobs")
        assert (answer.status_code, answer.json()["code"]) == (401, "key_ended")
    with api.database.writing() as session:
        session.execute(update(ApiKey).where(ApiKey.id == key_id).values(expires_at=db_now(60), revoked_at=None))
    assert api.get("/v1/jobs").status_code == 200


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
        assert verify_key(session, key).scopes == {"jobs:read"}
    assert main(["create-key", "--tenant", "by hand"]) == 0
    second = capsys.readouterr().out.strip()
    with shared_api.database.reading() as session:
        assert verify_key(session, second).tenant_id == verify_key(session, key).tenant_id
        assert verify_key(session, second).scopes == {*SCOPES} - {"admin"}
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
