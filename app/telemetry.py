"""Traces by OpenTelemetry: one from the request through the job's row to the worker, the engine's phases and the end of the attempt.

Off, and free of cost, unless OTEL_EXPORTER_OTLP_ENDPOINT names a collector that speaks OTLP over HTTP. The other OTEL_… variables hold as well.
The engine knows no HTTP: its spans are recorded by the worker from what it says on stdout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.trace import ProxyTracerProvider, Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
UNTRACED = ("/livez", "/readyz", "/metrics")  # called every few seconds for ever

_w3c = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("espalier")


def configure(service: str) -> None:
    """Export this process's spans, if the environment says where to; safe to call again."""
    if not any(os.environ.get(name) for name in ENDPOINTS) or not isinstance(trace.get_tracer_provider(), ProxyTracerProvider):
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # half a second that only a traced process pays
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME") or service
    provider = TracerProvider(resource=Resource.create({"service.name": name, "service.version": version("espalier")}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


def flush() -> None:
    """Send what has not been sent, as before an end that runs no exit handlers."""
    provider: Any = trace.get_tracer_provider()
    if not isinstance(provider, ProxyTracerProvider):
        provider.force_flush()


def _is_probe(scope: MutableMapping[str, Any]) -> bool:
    return scope.get("path") in UNTRACED


# FastAPI's own telemetry makes a span of each request; metrics are Prometheus' (`app.metrics`) and logs are lines (`app.logging`).
OF_REQUESTS: TelemetryConfig = {"metrics": False, "logs": False, "operation_spans": False, "auto_configure": False, "exclude": _is_probe}


def trace_parent() -> str | None:
    """The current span as a W3C traceparent, to be carried to where it goes on."""
    carrier: dict[str, str] = {}
    _w3c.inject(carrier)
    return carrier.get("traceparent")


def environment() -> dict[str, str]:
    """What tells a child process the current span."""
    parent = trace_parent()
    return {} if parent is None else {"TRACEPARENT": parent}


@contextmanager
def attempt(parent: str | None, began: int, **attributes: AttributeValue) -> Iterator[Span]:
    """The span of one attempt at a job, which goes on in the trace of the request that made the job. began: in nanoseconds since the epoch."""
    context = None if parent is None else _w3c.extract({"traceparent": parent})
    with _tracer.start_as_current_span("attempt", context, SpanKind.CONSUMER, attributes, start_time=began) as span:
        yield span


def record(name: str, began: int, ended: int, **attributes: AttributeValue) -> None:
    """A span below the current one, of what is over; times in nanoseconds since the epoch."""
    _tracer.start_span(name, attributes=attributes, start_time=began).end(ended)
