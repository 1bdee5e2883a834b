"""Logs as one JSON object a line on stderr, structlog's and the standard library's alike, with the request id or job id that they belong to."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import structlog

SECRETS = re.compile(r"(esp_[0-9a-f]{32}_|\bhf_|X-Amz-Signature=|Bearer )[\w~+/=.-]+|(://[^/:@\s]*:)[^/@\s]+(?=@)")


def configure(level: int = logging.INFO) -> None:
    """Set up logging of this process; safe to call again."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _hide_secrets,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.name = "espalier"
    render: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()]
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=render))
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.name == handler.name]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # the middleware logs requests
    for name in ("alembic", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _hide_secrets(logger: Any, method: str, event: Any) -> Any:
    """Keys, passwords in URLs and signatures never reach a log, whichever library wrote the line."""
    return {name: SECRETS.sub(r"\1\2***", value) if isinstance(value, str) else value for name, value in event.items()}
