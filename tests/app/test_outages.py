"""What does not answer is told as 503, what fails as 500, and neither tells how the service is built."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.auth import create_key
from app.database import Database
from app.jobs import repository
from app.logging import configure
from app.main import create_app
from migrations import migrate
from tests.app.conftest import RECIPE, Api, make_settings
from tests.app.test_bad_input import check_problem
from tests.servers import Server, fresh_database, postgres


@pytest.fixture
def embedded(tmp_path: Path, roots: Path) -> Iterator[Api]:
    """A service of its own on SQLite, which a test may break."""
    url = f"sqlite:///{tmp_path}/espalier.db"
    migrate(url)
    settings = make_settings(tmp_path, url, roots)
    database = Database(url)
    with TestClient(create_app(settings)) as client:
        yield Api(client, database, client.app.state.store, settings)  # type: ignore[attr-defined]
    database.dispose()


def test_a_lost_object_is_an_error_before_the_response_begins(embedded: Api, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    job_id = embedded.succeed(tmp_path / "files", {"checkpoint/config.json": b"{}"})
    for file in (tmp_path / "objects").rglob("config.json"):
        file.unlink()
    problem = check_problem(embedded.get(f"/v1/jobs/{job_id}/artifacts/checkpoint/config.json"), 500)
    assert problem["code"] == "internal"
    assert str(tmp_path) not in json.dumps(problem)


def test_an_error_of_ours_tells_nothing_of_the_inside(embedded: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the inside")

    monkeypatch.setattr(repository, "find_jobs", fail)
    answer = embedded.get("/v1/jobs/job_" + "0" * 32)
    problem = check_problem(answer, 500)
    assert (problem["code"], problem["hint"]) == ("internal", "Tell the operator the request_id.")
    assert "inside" not in answer.text
    assert "Traceback" not in answer.text


@pytest.fixture(scope="module")
def stoppable(roots: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, Server]]:
    with postgres() as (server_url, server), fresh_database(server_url) as url:
        migrate(url)
        settings = make_settings(tmp_path_factory.mktemp("stoppable"), url, roots)
        database = Database(url)
        with TestClient(create_app(settings)) as client:
            yield Api(client, database, client.app.state.store, settings), server  # type: ignore[attr-defined]
        database.dispose()


def test_a_database_that_is_down_is_503_until_it_is_back(stoppable: tuple[Api, Server]) -> None:
    api, server = stoppable
    job_id = api.submit()
    server.stop()
    try:
        for answer in (api.get(f"/v1/jobs/{job_id}"), api.get("/v1/jobs"), api.post("/v1/jobs", json=RECIPE)):
            problem = check_problem(answer, 503)
            assert problem["code"] == "database_unavailable"
            assert int(answer.headers["Retry-After"]) > 0
            assert "psycopg" not in answer.text
        assert api.client.get("/livez").status_code == 200
    finally:
        server.start()
    assert api.get(f"/v1/jobs/{job_id}").json()["state"] == "queued"
    assert api.submit()


# ---------------------------------------------------------------------- logs


def test_logs_are_json_and_name_the_request(embedded: Api, capsys: pytest.CaptureFixture[str]) -> None:
    configure()
    answer = embedded.get("/v1/jobs", headers={"X-Request-ID": "mine"})
    line = next(line for line in map(json.loads, capsys.readouterr().err.splitlines()) if line["event"] == "request")
    assert answer.headers["X-Request-ID"] == "mine"
    assert (line["request_id"], line["method"], line["path"], line["status"], line["level"]) == ("mine", "GET", "/v1/jobs", 200, "info")


def test_security_headers(embedded: Api) -> None:
    for path in ("/v1/jobs", "/nope", "/docs"):
        headers = embedded.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "cdn.jsdelivr.net" in embedded.get("/docs").headers["Content-Security-Policy"]
    assert "server" not in embedded.get("/v1/jobs").headers


def test_the_service_never_loads_the_gpu_stack(tmp_path: Path) -> None:
    program = """
import sys
from fastapi.testclient import TestClient
from app.main import create_app
with TestClient(create_app()) as client:
    assert client.get("/livez").status_code == 200
    assert client.get("/openapi.json").status_code == 200
print([name for name in ("torch", "transformers", "safetensors", "accelerate", "worker", "numpy") if name in sys.modules])
"""
    environment = {"ESPALIER_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_keys_of_an_unmigrated_database_are_an_outage(tmp_path: Path, roots: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/other.db")
    migrate(f"sqlite:///{tmp_path}/other.db")
    with database.writing() as session:
        key = create_key(session, "elsewhere")
    database.dispose()
    settings = make_settings(tmp_path, f"sqlite:///{tmp_path}/empty.db", roots)
    with TestClient(create_app(settings)) as client:
        check_problem(client.get("/v1/jobs", headers={"Authorization": f"Bearer {key}"}), 503)
