"""One trace from the request to the end of the attempt, in real processes, as a collector gets it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from app.models import Job
from tests.app.conftest import Api
from tests.app.running import RECIPE, running
from tests.jobs import wait_until

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes spans by OTLP over HTTP: (service, span)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                exported = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                for group in exported.resource_spans:
                    service = next(pair.value.string_value for pair in group.resource.attributes if pair.key == "service.name")
                    collector.spans += [(service, span) for scope in group.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def of_trace(self, trace: str) -> dict[str, tuple[str, Span]]:
        return {span.name: (service, span) for service, span in self.spans if span.trace_id.hex() == trace}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collecting = Collector()
    yield collecting
    collecting.close()


def attributes(span: Span) -> dict[str, str]:
    return {pair.key: pair.value.string_value for pair in span.attributes}


def test_one_trace_from_the_request_to_the_end(tmp_path: Path, collector: Collector) -> None:
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "600000"}  # so that it is their ends that send them
    with running(tmp_path, {"steps": 8, "pause": 0.25}, settings) as service:
        answer = service.client.post("/v1/jobs", json=RECIPE, headers={"traceparent": f"00-{TRACE}-{CALLER}-01"})
        assert answer.status_code == 202, answer.text
        job_id = answer.json()["id"]
        told: dict[str, str] = {}

        def engine_runs() -> bool:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(service.workers[0].pid).children(recursive=True):
                    if "tests.faults.engine" in child.cmdline():
                        told.update(child.environ())
            return bool(told)

        wait_until(engine_runs, 60, "the engine")
        assert service.wait_for_end(job_id)["state"] == "succeeded"
        assert service.client.get("/livez").is_success
    logged = service.lines("worker")
    spans = collector.of_trace(TRACE)
    assert {name: service for name, (service, _) in spans.items()} == {
        "POST /v1/jobs": "espalier-api",
        **dict.fromkeys(("attempt", "claim", "prune", "upload", "finish"), "espalier-worker"),
    }
    request, attempt = spans["POST /v1/jobs"][1], spans["attempt"][1]
    assert request.parent_span_id.hex() == CALLER
    assert attempt.parent_span_id == request.span_id
    steps = [spans[name][1] for name in ("claim", "prune", "upload", "finish")]
    assert {step.parent_span_id for step in steps} == {attempt.span_id}
    moments = [moment for step in steps for moment in (step.start_time_unix_nano, step.end_time_unix_nano)]
    assert moments == sorted(moments)
    assert attempt.start_time_unix_nano <= moments[0] < moments[-1] <= attempt.end_time_unix_nano
    assert 2 <= (steps[1].end_time_unix_nano - steps[1].start_time_unix_nano) / 1e9 < 120
    assert attributes(attempt) == {"job_id": job_id, "tenant_id": attributes(attempt)["tenant_id"], "queue": "default", "outcome": "succeeded", "error": ""} | {
        "attempt": ""  # a number
    }
    assert told["TRACEPARENT"] == f"00-{TRACE}-{attempt.span_id.hex()}-01"
    assert {line.get("trace_id") for line in logged if line.get("job_id") == job_id} == {TRACE}
    assert not [span.name for _, span in collector.spans if "livez" in span.name]


def test_without_a_collector_nothing_is_traced(api: Api) -> None:
    job_id = api.submit()
    with api.database.reading() as session:
        assert session.get_one(Job, job_id).trace_parent is None
