"""Every call that changes something is told of in the audit log, in its own transaction; and the log is a tenant's own."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from app.auth import main, set_caps
from app.exceptions import NotFoundError
from app.models import AuditEntry, Tenant
from tests.app.calls import CALLS, NETWORKS, operations, prepare
from tests.app.conftest import Api, serving

CHANGES = [endpoint for endpoint in CALLS if not endpoint.startswith("GET ")]


@pytest.fixture(scope="module")
def shared_api(migrated_url: str, roots: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving(tmp_path_factory.mktemp("home"), migrated_url, roots, webhook_networks=NETWORKS) as made:
        yield made


def entries(api: Api, **filters: Any) -> list[dict[str, Any]]:
    answer = api.get("/v1/audit", params={"limit": 100} | filters)
    assert answer.status_code == 200, answer.text
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


def actions(api: Api, **filters: Any) -> list[str]:
    return [entry["action"] for entry in entries(api, **filters)]


def test_all_calls_that_change_something_are_walked(shared_api: Api) -> None:
    assert {f"{method} {path}" for method, path, _ in operations(shared_api) if method != "GET"} == set(CHANGES)


@pytest.mark.parametrize("endpoint", CHANGES)
def test_a_call_that_changes_something_is_told(api: Api, endpoint: str, tmp_path: Path) -> None:
    call = prepare(api, endpoint, tmp_path)
    answer = call.send(api)
    assert answer.is_success, answer.text
    newest = entries(api)[0]
    assert newest["request_id"] == answer.headers["X-Request-ID"]
    assert newest["key_id"] == "key_" + api.key.split("_")[1]
    assert newest["target"]
    assert newest["target"] in call.path + answer.text
    assert entries(api.other_tenant(), target=newest["target"]) == []


def test_a_call_that_changes_nothing_is_not_told(api: Api) -> None:
    before = entries(api)
    for path, body in {"/v1/jobs": {}, "/v1/jobs/job_0/cancel": None, "/v1/keys": {"name": ""}}.items():
        assert not api.post(path, json=body).is_success
    assert not api.post("/v1/keys", key=api.new_key(["jobs:read"]), json={"name": "x", "scopes": ["admin"]}).is_success
    api.post("/v1/jobs?validate_only=true", json={"model": "owner/model", "method": "cfsp", "sparsity": 0.3})
    assert entries(api)[1:] == before  # the new one is the operator's, of the key with one scope


def test_the_log_is_filtered_and_read_by_pages(api: Api) -> None:
    job_id = api.submit()
    second = api.new_key()
    api.post(f"/v1/jobs/{job_id}/cancel", key=second)
    api.submit()
    assert actions(api) == ["job.submit", "job.cancel", "key.create", "job.submit", "key.create"]
    assert actions(api, target=job_id) == ["job.cancel", "job.submit"]
    assert actions(api, action="job.submit", target=job_id) == ["job.submit"]
    assert actions(api, key_id="key_" + second.split("_")[1]) == ["job.cancel"]
    assert actions(api, key_id="operator") == ["key.create", "key.create"]
    moments = [entry["created_at"] for entry in entries(api)]
    assert moments == sorted(moments, key=datetime.fromisoformat, reverse=True)  # a whole second is told without a fraction
    assert actions(api, created_after=moments[1]) == ["job.submit", "job.cancel"]
    assert actions(api, created_after=moments[3], created_before=moments[1]) == ["key.create", "job.submit"]
    seen: list[int] = []
    cursor = None
    while not seen or cursor:
        page = api.get("/v1/audit", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [entry["id"] for entry in page["items"]]
        cursor = page["next"]
        api.submit()
    assert seen == [entry["id"] for entry in entries(api)][-5:]
    cursor = api.get("/v1/audit?limit=1").json()["next"]
    assert api.get("/v1/audit", params={"cursor": cursor, "action": "job.submit"}).json()["code"] == "cursor_of_other_filters"
    for wrong in ({"created_after": "yesterday"}, {"created_after": "2026-11-22T01:02:03"}, {"limit": 0}, {"action": "\0"}):
        assert api.get("/v1/audit", params=wrong).status_code == 422
    assert api.get("/v1/audit", params={"cursor": "W10"}).status_code == 400


def test_a_change_that_fails_leaves_no_entry(api: Api) -> None:
    key_id = "key_" + api.key.split("_")[1]
    assert api.request("DELETE", f"/v1/keys/{key_id}").json()["code"] == "last_admin_key"
    assert "key.revoke" not in actions(api)


def test_what_operators_do_by_hand_is_told(api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("app.auth.get_settings", lambda: api.settings)
    assert main(["create-key", "--tenant", api.tenant, "--scope", "jobs:read", "--name", "CI"]) == 0
    key_id = "key_" + capsys.readouterr().out.split("_")[1]
    assert main(["revoke-key", key_id]) == 0
    assert main(["set-caps", "--tenant", api.tenant, "--max-queued", "7", "--max-stored-bytes", "none"]) == 0
    caps, revoked, created, _ = entries(api)
    assert (created["action"], created["target"], created["data"]) == ("key.create", key_id, {"name": "CI", "scopes": ["jobs:read"]})
    assert (revoked["action"], revoked["target"]) == ("key.revoke", key_id)
    assert (caps["action"], caps["data"]) == ("tenant.set_caps", {"max_queued": 7, "max_stored_bytes": None})
    assert {entry["key_id"] for entry in (caps, revoked, created)} == {"operator"}


# ----------------------------------------------------------------------- usage


def test_caps_are_set_and_told(api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert api.get("/v1/usage").json() == {
        "queued": {"used": 0, "cap": 10_000},
        "running": {"used": 0, "cap": None},
        "stored_bytes": {"used": 0, "cap": None},
        "checkpoint_bytes": {"used": 0, "cap": None},
    }
    monkeypatch.setattr("app.auth.get_settings", lambda: api.settings)
    assert main(["set-caps", "--tenant", api.tenant, "--max-queued", "2", "--max-running", "1", "--max-stored-bytes", "1000"]) == 0
    api.succeed(tmp_path, {"checkpoint/config.json": b"{}", "report.json": b"{}"})
    api.start(api.submit())
    api.submit()
    api.submit()
    prepare(api, "GET /v1/checkpoints/{checkpoint_id}", tmp_path)
    assert api.get("/v1/usage").json() == {
        "queued": {"used": 2, "cap": 2},
        "running": {"used": 1, "cap": 1},
        "stored_bytes": {"used": 4, "cap": 1000},
        "checkpoint_bytes": {"used": 6, "cap": 1000},
    }
    assert api.post("/v1/jobs", json={"model": "owner/model", "method": "cfsp", "sparsity": 0.3}).json()["code"] == "too_many_queued"
    assert api.other_tenant().get("/v1/usage").json()["queued"] == {"used": 0, "cap": 10_000}
    assert main(["set-caps", "--tenant", "nobody", "--max-queued", "2"]) == 1
    assert "no tenant 'nobody'" in capsys.readouterr().err
    for wrong in ("0", "-1", "many"):
        with pytest.raises(SystemExit):
            main(["set-caps", "--tenant", api.tenant, "--max-queued", wrong])


def test_an_unknown_tenant_has_no_caps(api: Api) -> None:
    with pytest.raises(NotFoundError), api.database.writing() as session:
        set_caps(session, "nobody", {"max_queued": 1})
    with api.database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Tenant).where(Tenant.name == "nobody")) == 0
        assert session.scalar(select(func.count()).select_from(AuditEntry).where(AuditEntry.target == "nobody")) == 0
