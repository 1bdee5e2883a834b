"""Logs as one JSON object a line on stderr, structlog's and the standard library's alike, each with the ids of the request or the attempt that it belongs to."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import structlog
from opentelemetry import trace

# Searched in the finished line, so that nothing hides in a nested value, an exception or an object's own representation.
HIDDEN = r"(?:[a-z0-9_-]*(?:authorization|cookie|password|secret|secret_key|api_key|private_key|hf_token)|token)"
SECRET_FIELD = re.compile(  # in JSON, in the JSON that a string holds, in what Python shows of a dict
    rf"""("{HIDDEN}": ")(?:[^"\\]|\\.)+|(\\"{HIDDEN}\\": \\")(?:[^"\\]|\\[^"])+|('{HIDDEN}': ')(?:[^'"\\]|\\.)+""", re.IGNORECASE
)
SECRET_TEXT = re.compile(
    r"(\besp_[0-9a-f]{32}_|\bhf_|\bwhsec_|\b(?:Bearer|Basic) |[?&](?:X-Amz-|X-Goog-)(?:Signature|Credential|Security-Token)=|[?&](?:Signature|AWSAccessKeyId|sig)=|HF_TOKEN[=:] ?)"
    r"[\w~+/=.%-]+|(://[^/:@\s\"\\]*:)[^/@\s\"\\]+(?=@)"
)
MARKS = (  # in small letters; a line without any of them holds nothing that these two find, and is not searched, which takes longer than all else of it
    *("authorization", "cookie", "password", "secret", "_key", "token"),
    *("esp_", "hf_", "whsec_", "bearer ", "basic ", "signature", "credential", "awsaccesskeyid", "sig=", "://"),
)

_of_request: ContextVar[dict[str, str]] = ContextVar("of_request")  # one dict for all threads of a request, each of which has a context of its own


def configure(level: int = logging.INFO) -> None:
    """Set up logging of this process; safe to call again."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        _add_request,
        _add_trace,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.name = "espalier"
    render: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer(), _hide_secrets]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=render))
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.name == handler.name]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # the middleware logs requests
    for name in ("alembic", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def request_logs(**ids: str) -> Iterator[dict[str, str]]:
    """Have every line that this request writes, in whichever thread, name these ids and those that are added to the dict meanwhile."""
    of_request = dict(ids)
    before = _of_request.set(of_request)
    try:
        yield of_request
    finally:
        _of_request.reset(before)


def bind_request(**ids: str) -> None:
    """Add ids to the current request's lines."""
    _of_request.get({}).update(ids)


def id_of_request() -> str:
    """The current request's id; empty outside of one."""
    return _of_request.get({}).get("request_id", "")


def _add_request(logger: Any, method: str, event: Any) -> Any:
    return {**_of_request.get({}), **event}


def _add_trace(logger: Any, method: str, event: Any) -> Any:
    span = trace.get_current_span().get_span_context()
    return {**event, "trace_id": f"{span.trace_id:032x}"} if span.is_valid else event


def _hide_secrets(logger: Any, method: str, line: Any) -> Any:
    """Keys, passwords in URLs and signatures never reach a log, whichever library wrote the line."""
    small = line.lower()
    if not any(mark in small for mark in MARKS):
        return line
    return SECRET_TEXT.sub(r"\1\2***", SECRET_FIELD.sub(r"\1\2\3***", line))
