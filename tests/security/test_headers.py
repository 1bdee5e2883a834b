"""What every answer carries, and what a page of another origin gets: nothing."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.middleware import HEADERS
from tests.app.conftest import RECIPE, Api, make_settings

ORIGIN = {"Origin": "https://evil.example"}
PREFLIGHT = ORIGIN | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


def answers(api: Api, folder: Path) -> dict[int, httpx2.Response]:
    """One of each status."""
    succeeded = api.succeed(folder, {"checkpoint/config.json": b"{}"})
    artifact = f"/v1/jobs/{succeeded}/artifacts/checkpoint/config.json"
    large = {"content": b" " * (2**20 + 1), "headers": {"Content-Type": "application/json"}}
    return {
        answer.status_code: answer
        for answer in (
            api.get("/v1/jobs"),
            api.post("/v1/checkpoints", json={}),
            api.post("/v1/jobs", json=RECIPE),
            api.get(artifact, headers={"Range": "bytes=0-0"}),
            api.get(artifact, headers={"If-None-Match": "*"}),
            api.get(artifact, headers={"Range": "bytes=9-"}),
            api.get("/v1/jobs", key="esp_none"),
            api.get("/v1/jobs", key=api.new_key(["artifacts:read"])),
            api.get("/nowhere"),
            api.request("PATCH", "/v1/jobs"),
            api.post(f"/v1/jobs/{succeeded}/cancel"),
            api.post("/v1/jobs", **large),
            api.post("/v1/jobs", content=b"{}", headers={"Content-Type": "text/plain"}),
            api.post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"}),
            api.request("DELETE", f"/v1/jobs/{succeeded}"),
        )
    }


def test_every_answer_has_them(api: Api, tmp_path: Path) -> None:
    got = answers(api, tmp_path)
    assert sorted(got) == [200, 202, 204, 206, 304, 400, 401, 403, 404, 405, 409, 413, 415, 416, 422]
    for status, answer in got.items():
        for name, value in HEADERS.items():
            assert answer.headers[name] == value, (status, name)
        assert answer.headers["X-Request-ID"]
        assert "Server" not in answer.headers
        assert "X-Powered-By" not in answer.headers


def test_streams_and_failures_have_them_too(api: Api) -> None:
    job_id = api.submit()
    api.fail(job_id)  # so that the stream ends
    stream = api.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
    assert stream.headers["Content-Type"].startswith("text/event-stream")

    @api.client.app.get("/fails")  # type: ignore[attr-defined, untyped-decorator, unused-ignore]  # of FastAPI
    def fails() -> None:
        raise RuntimeError("a secret of the inside")

    failed = TestClient(api.client.app, raise_server_exceptions=False).get("/fails")
    assert (failed.status_code, failed.json()["code"]) == (500, "internal")
    assert "inside" not in failed.text
    for answer in (stream, failed):
        assert [name for name in HEADERS if name not in answer.headers] == []


def test_405_names_all_that_the_path_takes(api: Api) -> None:
    assert api.request("PATCH", "/v1/jobs").headers["Allow"] == "GET, POST"
    assert api.request("PUT", f"/v1/jobs/{api.submit()}").headers["Allow"] == "GET, DELETE"
    assert api.request("OPTIONS", "/v1/queues").headers["Allow"] == "GET"


def test_other_origins_get_nothing(api: Api, tmp_path: Path) -> None:
    for answer in (api.get("/v1/jobs", headers=ORIGIN), api.client.options("/v1/jobs", headers=PREFLIGHT), api.client.get("/livez", headers=ORIGIN)):
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("origin", ["https://app.example", "https://evil.example", "https://app.example.evil.example", "null"])
def test_an_origin_that_is_allowed_is_the_only_one(roots: Path, tmp_path: Path, origin: str) -> None:
    settings = make_settings(tmp_path, f"sqlite:///{tmp_path}/none.db", roots, cors_origins=("https://app.example",))
    answer = TestClient(create_app(settings)).options("/v1/jobs", headers=PREFLIGHT | {"Origin": origin})  # not started: it needs no database
    assert answer.headers.get("Access-Control-Allow-Origin") == ("https://app.example" if origin == "https://app.example" else None)
    assert "Access-Control-Allow-Credentials" not in answer.headers


def test_the_pages_about_the_service_can_be_left_out(roots: Path, tmp_path: Path) -> None:
    for docs in (True, False):
        client = TestClient(create_app(make_settings(tmp_path, f"sqlite:///{tmp_path}/none.db", roots, docs=docs)))
        assert {client.get(path).status_code for path in ("/docs", "/openapi.json")} == {200 if docs else 404}
        assert client.get("/redoc").status_code == 404
