"""What happens to every request: an id, a log line, security headers, a body limit, and no exception that leaves the service bare."""

from __future__ import annotations

import re
import time

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uuid_utils import uuid7

from app import metrics, problems
from app.logging import request_logs
from app.settings import MAX_PART_BYTES

MAX_BODY_BYTES = 1024 * 1024
PART = re.compile(r"/v1/checkpoints/.+/parts/[0-9]+")  # whose endpoint has a limit of its own
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "private, no-cache",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
PROBES = ("/livez", "/readyz", "/metrics")  # called every few seconds for ever
DOCS_POLICY = "default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src https://cdn.jsdelivr.net; img-src data: https://fastapi.tiangolo.com; connect-src 'self'; frame-ancestors 'none'"

logger = structlog.get_logger(__name__)


class RequestContext:
    """Pure ASGI, so that responses stream through it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        request = Headers(scope=scope)
        given = request.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid7().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers.update(scope["state"].get("headers", {}))  # what is told of the caller, whatever the answer is
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if scope["path"] == "/docs":
                    headers["Content-Security-Policy"] = DOCS_POLICY
            await send(message)

        metrics.request_began()
        with request_logs(request_id=request_id):
            try:
                length = request.get("content-length", "0")  # a body that tells none is counted where it is read
                most = MAX_PART_BYTES if PART.fullmatch(scope["path"]) else MAX_BODY_BYTES
                if length.isdecimal() and int(length[:20]) > most:
                    too_large = problems.respond(scope, 413, "body_too_large", "Body too large", f"A body may have {most} bytes.")
                    await too_large(scope, receive, send_with_headers)
                else:
                    await self.app(scope, receive, send_with_headers)
            except Exception:  # whatever a handler raises, the caller gets problem+json
                logger.exception("request_failed", method=scope["method"], path=scope["path"])
                if status:  # the response has begun: only the cut connection can tell
                    raise
                await problems.internal(scope)(scope, receive, send_with_headers)
            finally:
                seconds = time.perf_counter() - began
                metrics.request_ended(scope, status, seconds)
                log = logger.debug if scope["path"] in PROBES and status == 200 else logger.info
                log("request", method=scope["method"], path=scope["path"], status=status, milliseconds=round(seconds * 1000, 2))
