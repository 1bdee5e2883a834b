"""Bytes over HTTP: conditional requests, a single range, HEAD (RFC 9110), for anything that can read a span of itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from app.exceptions import RangeError

RANGE = re.compile(r"bytes\s*=\s*(?:(\d{1,19})-(\d{1,19})?|-(\d{1,19}))\s*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class File:
    """What is served. `sha256` is of the bytes, or of whatever determines them."""

    name: str
    size: int  # bytes
    sha256: str
    media_type: str
    read: Callable[[int, int], Iterator[bytes]]  # from start up to, without, end

    @property
    def etag(self) -> str:
        return f'"{self.sha256}"'


def serve(request: Request, file: File) -> Response:
    """The whole file or the range asked for. Raises RangeError."""
    headers = {
        "ETag": file.etag,
        "Accept-Ranges": "bytes",
        "Content-Type": file.media_type,
        "Content-Disposition": f'attachment; filename="{file.name}"',
    }
    if not_modified(request.headers, file.etag):
        return Response(status_code=304, headers={"ETag": file.etag})
    span = None
    if "range" in request.headers and request.headers.get("if-range", file.etag) == file.etag:
        span = parse_range(request.headers["range"], file.size)
    start, end = span or (0, file.size)
    headers["Content-Length"] = str(end - start)
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    status = 200 if span is None else 206
    if request.method == "HEAD" or start == end:
        return Response(status_code=status, headers=headers)
    chunks = file.read(start, end)
    first = next(chunks)  # a store that does not answer is told as an error, before the response begins
    return StreamingResponse(chain([first], chunks), status, headers)


def not_modified(headers: Mapping[str, str], etag: str) -> bool:
    """Whether If-None-Match names what the client has already (a weak comparison)."""
    wanted = headers.get("if-none-match")
    return wanted is not None and (wanted.strip() == "*" or etag in {each.strip().removeprefix("W/") for each in wanted.split(",")})


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """Start and end (exclusive) of a single byte range; None where the header is to be ignored: another unit, several ranges, not well-formed.

    Raises RangeError where nothing of the file lies in the range.
    """
    parts = RANGE.fullmatch(header)
    if parts is None:
        return None
    first, last, suffix = parts.groups()
    if suffix is not None:
        start, end = max(size - int(suffix), 0), size
    else:
        start, end = int(first), size if last is None else min(int(last) + 1, size)
        if last is not None and int(last) < start:
            return None
    if start >= size:
        error = RangeError(f"The file has {size} bytes.", code="range_not_satisfiable", hint="Ask for a range within it.")
        error.headers = {"Content-Range": f"bytes */{size}"}
        raise error
    return start, end
