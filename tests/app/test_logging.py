"""Every line is one JSON object that names the request or the attempt it belongs to, and none holds a secret."""

from __future__ import annotations

import contextvars
import io
import json
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.logging import bind_request, configure, request_logs
from tests.app.running import RECIPE, running

KEY = "esp_" + "0" * 32 + "_" + "Ab-_" * 10 + "xyz"
PRESIGNED = "https://s3:9000/b/k?X-Amz-Algorithm=A&X-Amz-Credential=AKIA%2F2026&X-Amz-Security-Token=FwoG%2B&X-Amz-Signature=5f3a9c&y=1"

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Lines:
    """What was logged since the last call."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure()

    def lines() -> list[dict[str, Any]]:
        text = stream.getvalue()
        stream.seek(0)
        stream.truncate()
        return [json.loads(line) for line in text.splitlines()]

    return lines


@pytest.mark.parametrize(
    ("fields", "hidden"),
    [
        ({"header": f"Bearer {KEY}"}, "Ab-_Ab"),
        ({"key": KEY}, "Ab-_Ab"),
        ({"headers": {"Authorization": "Basic dXNlcjpwYXNz", "Accept": "*/*"}}, "dXNlcjpwYXNz"),
        ({"Authorization": "Digest hunter2"}, "hunter2"),
        ({"said": repr({"Authorization": "token hunter2"})}, "hunter2"),
        ({"said": json.dumps({"password": "hunter2", "user": "me"})}, "hunter2"),
        ({"body": {"s3_secret_key": "hunter2"}}, "hunter2"),
        ({"url": "postgresql://user:hunter2@db/x"}, "hunter2"),
        ({"urls": ["redis://:hunter2@broker:6379/0"]}, "hunter2"),
        ({"url": PRESIGNED}, "5f3a9c"),
        ({"url": PRESIGNED}, "AKIA"),
        ({"url": PRESIGNED}, "FwoG"),
        ({"error": ValueError(f"can't get {PRESIGNED}")}, "5f3a9c"),
        ({"environment": "HF_TOKEN=hunter2 ESPALIER_HOME=/x"}, "hunter2"),
        ({"token": "hf_AbCdEfGh"}, "AbCdEfGh"),
        ({"said": "401 for hf_AbCdEfGh"}, "AbCdEfGh"),
        ({"said": "whsec_AbCdEfGh"}, "AbCdEfGh"),
    ],
)
def test_no_secret_reaches_a_log(logged: Lines, fields: dict[str, Any], hidden: str) -> None:
    structlog.get_logger("ours").warning("told", **fields)  # no word that is looked for itself
    logging.getLogger("theirs").warning("with %s", fields)
    try:
        raise RuntimeError(str(fields))
    except RuntimeError:
        logging.getLogger("theirs").exception("failed")
    lines = logged()
    assert [line["logger"] for line in lines] == ["ours", "theirs", "theirs"]
    assert "RuntimeError" in lines[2]["exception"]
    assert hidden not in json.dumps(lines)


def test_what_is_no_secret_is_kept(logged: Lines) -> None:
    kept = {"token": 3, "url": "https://s3:9000/b/k?X-Amz-Algorithm=A&y=1", "at": "http://host:8000/a", "who": "me@example.org", "code": "key_missing"}
    structlog.get_logger("ours").info("claimed", **kept)
    assert kept.items() <= logged()[0].items()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.text(), after=st.text())
def test_a_line_stays_one_json_object(logged: Lines, before: str, after: str) -> None:
    structlog.get_logger("ours").info(f"{before} Bearer hunter2", password=after, url=f"redis://:{before}@{after}")
    line = logged()[0]
    assert "hunter2" not in line["event"]
    assert line["password"] == ("***" if after else "")


def test_ids_of_a_request_reach_all_its_threads(logged: Lines) -> None:
    log = structlog.get_logger("ours")
    with request_logs(request_id="r1"):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(lambda: bind_request(tenant_id="t1"),))
        thread.start()
        thread.join()
        log.info("within")
    log.info("after")
    within, after = logged()
    assert (within["request_id"], within["tenant_id"]) == ("r1", "t1")
    assert "request_id" not in after


def test_what_real_processes_write(tmp_path: Path) -> None:
    with running(tmp_path, {"steps": 2}, {}) as service:
        answer = service.client.post("/v1/jobs", json=RECIPE, headers={"X-Request-ID": "mine"})
        job_id = answer.json()["id"]
        assert service.wait_for_end(job_id)["state"] == "succeeded"
    api, worker = service.lines("api"), service.lines("worker")
    assert "uvicorn.error" in {line["logger"] for line in api}
    assert any(line["logger"].startswith("celery.") for line in worker)
    for line in (*api, *worker):
        assert {"event", "level", "logger", "timestamp"} <= line.keys()
    request = next(line for line in api if line.get("request_id") == "mine")
    assert (request["event"], request["job_id"], request["status"]) == ("request", job_id, 202)
    of_attempt = [line for line in worker if line.get("job_id") == job_id]
    assert {"claimed", "ended"} <= {line["event"] for line in of_attempt}
    assert {(line["tenant_id"], line["attempt"]) for line in of_attempt} == {(request["tenant_id"], 1)}
    assert service.key.split("_", 2)[2] not in json.dumps([api, worker])
