"""The client against a real API."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from app.jobs.lease import Lease
from espalier.answers import Job
from espalier.client import Client
from espalier.errors import ApiError, ClientError, UnreachableError
from tests.espalier.conftest import MODEL, Service
from tests.espalier.proxy import proxy


def test_submit_get_cancel(service: Service) -> None:
    with service.client() as client:
        job = client.submit(MODEL, {"name": "wanda", "variant": True}, "2:4", evaluation=None)
        assert (job["state"], job["model"], job["method"]) == ("queued", MODEL, "wanda")
        assert job["recipe"]["sparsity"] == {"n": 2, "m": 4}
        assert job["recipe"]["evaluation"] is None
        assert client.get(job["id"]) == job
        assert client.cancel(job["id"])["state"] == "cancelled"


def test_list_goes_through_all_pages(service: Service) -> None:
    submitted = [service.submit() for _ in range(5)]
    with service.client() as client:
        client.cancel(submitted[2])
        assert [job["id"] for job in client.jobs(page_size=2)] == submitted[::-1]
        assert [job["id"] for job in client.jobs(state="cancelled")] == [submitted[2]]
        assert list(client.jobs(method="wanda")) == []


def test_every_filter_of_the_list(service: Service) -> None:
    first = service.submit(queue="big", metadata={"run": "41"})
    between = datetime.now(UTC)
    second = service.submit(metadata={"run": "42", "by": "CI"})
    with service.client() as client:

        def found(**filters: Any) -> list[str]:
            return [job["id"] for job in client.jobs(**filters)]

        assert found(queue="big") == found(metadata={"run": "41"}) == found(created_before=between) == [first]
        assert found(metadata={"run": "42", "by": "CI"}) == found(created_after=between.isoformat()) == [second]
        assert found(state=["queued", "failed"], model=MODEL, method="cfsp") == [second, first]
        assert found(state="failed") == found(metadata={"run": "42", "by": "me"}) == []


def test_events_go_through_all_pages(service: Service) -> None:
    job_id = service.submit()
    lease = service.start(job_id)
    for number in range(120):
        service.tell(lease, f"phase {number}", number / 120)
    with service.client() as client:
        running = [event["sequence"] for event in client.events(job_id)]
        assert running == list(range(1, 123))
        service.fail(lease)
        assert [event["kind"] for event in client.events(job_id, after=running[-1])] == ["failed"]


def test_methods(service: Service) -> None:
    with service.client() as client:
        methods = {method["name"]: method for method in client.methods()}
    assert methods["cfsp"]["structured"]
    assert "mode" in methods["cfsp"]["parameters"]["properties"]


def test_a_refusal_carries_the_problem(service: Service) -> None:
    with service.client() as client, pytest.raises(ApiError) as refused:
        client.submit(MODEL, "cfsp", 1.5)
    error = refused.value
    assert (error.status, error.code) == (422, "invalid_request")
    assert error.errors[0]["pointer"].startswith("/sparsity")
    assert error.request_id
    assert "sparsity" in str(error)


@pytest.mark.parametrize(("key", "code"), [("esp_nonsense", "key_malformed"), (f"esp_{'0' * 32}_{'a' * 43}", "key_unknown")])
def test_a_wrong_key_is_refused(service: Service, key: str, code: str) -> None:
    with Client(service.url, key) as client, pytest.raises(ApiError) as refused:
        list(client.jobs())
    assert (refused.value.status, refused.value.code) == (401, code)


def test_address_and_key_come_from_the_environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_URL", service.url + "/")
    monkeypatch.setenv("ESPALIER_API_KEY", service.key)
    with Client() as client:
        assert list(client.jobs()) == []


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "ftp://host", "http://a b"])
def test_an_address_that_is_none_is_told(url: str) -> None:
    with pytest.raises(ClientError, match="ESPALIER_URL"):
        Client(url)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with service.client() as client:
        assert list(client.jobs()) == []


def test_no_answer_is_told() -> None:
    with proxy(9) as network:
        network.close()
        with Client(network.url, patience=0) as client, pytest.raises(UnreachableError, match="ESPALIER_URL"):
            client.get("job_x")


def test_an_answer_that_is_no_problem_document_is_told(service: Service) -> None:
    with Client(service.url + "/docs", service.key) as client, pytest.raises(ApiError, match="/docs/v1/jobs") as refused:
        client.get("job_x")
    assert refused.value.status == 404


def test_wait_follows_a_job(service: Service) -> None:
    job_id = service.submit()
    leases: list[Lease] = []
    seen: list[Job] = []

    def on_progress(job: Job) -> None:
        seen.append(job)
        if job["state"] == "queued":
            leases.append(service.start(job_id))
        elif job["state"] == "running":
            service.fail(leases[0])

    with proxy(service.port) as network, service.client(network.url) as client:
        job = client.wait(job_id, on_progress=on_progress)
    assert [step["state"] for step in seen] == ["queued", "running", "failed"]
    assert job == seen[-1]
    assert job["error"] == {"code": "disk_full", "message": "The disk is full.", "hint": "Free some space."}
    assert len(network.requests) == 3  # each is answered when there is something to tell


def test_wait_ends_after_its_time(service: Service) -> None:
    job_id = service.submit()
    started = time.monotonic()
    with service.client() as client, pytest.raises(TimeoutError, match=f"{job_id} is still queued after 0.3 seconds"):
        client.wait(job_id, timeout=0.3)
    assert time.monotonic() - started < 20


def test_wait_survives_an_outage(service: Service) -> None:
    job_id = service.submit()
    seen: list[str] = []
    with proxy(service.port) as network, service.client(network.url) as client:

        def on_progress(job: Job) -> None:
            seen.append(job["state"])
            if len(seen) == 1:
                network.close()
                network.cut_after = 0
                service.fail(service.start(job_id))
                threading.Timer(4, reopen).start()

        def reopen() -> None:
            network.cut_after = None
            network.open()

        job = client.wait(job_id, on_progress=on_progress)
    assert seen == ["queued", "failed"]
    assert job["state"] == "failed"


def test_wait_gives_up_on_a_long_outage(service: Service) -> None:
    job_id = service.submit()
    with proxy(service.port) as network, service.client(network.url) as client:

        def go_away(job: Job) -> None:
            network.close()
            network.cut_after = 0
            service.start(job_id)  # an answer to be cut

        with pytest.raises(UnreachableError):
            client.wait(job_id, on_progress=go_away, patience=0.5)


def test_client_and_command_line_are_light() -> None:
    code = "import sys, espalier.client, espalier.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())
    assert "httpx" in loaded
    assert not loaded & {"torch", "transformers", "fastapi", "pydantic", "sqlalchemy", "celery", "app", "worker"}
