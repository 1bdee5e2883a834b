"""HTTP as uvicorn speaks it, with bounds that it lacks: how long the head of a request is, and how long a client takes to send it and its body.

`uvicorn --http app.protocol:BoundedProtocol`. Without it a client holds a connection for ever by a byte now and then, and fills the memory by a head without end.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.settings import get_settings

MAX_HEAD_BYTES = 64 * 1024


class BoundedProtocol(HttpToolsProtocol):
    _deadline: asyncio.TimerHandle | None = None  # of the head or the body that is being received
    _unparsed = 0  # bytes since the last that belonged to a body or ended something

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._set_deadline(get_settings().header_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._drop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline is None:
            self._set_deadline(get_settings().header_seconds)
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > MAX_HEAD_BYTES:
            self._refuse(431)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._deadline is None:
            self._set_deadline(get_settings().header_seconds)

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refuse(431)
            raise ValueError("the head of the request is too long")  # ends the parsing
        super().on_headers_complete()
        self._unparsed = 0
        self._set_deadline(get_settings().body_seconds)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._unparsed = 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._unparsed = 0
        self._drop_deadline()

    def send_400_response(self, msg: str) -> None:
        if not self.transport.is_closing():
            super().send_400_response(msg)

    def _set_deadline(self, seconds: float) -> None:
        self._drop_deadline()
        self._deadline = self.loop.call_later(seconds, self._refuse, 408)

    def _drop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: int) -> None:
        """Close the connection, with this answer unless another has begun."""
        if self.transport.is_closing():
            return
        answering = self.pipeline or (self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete)
        if not answering:
            self.transport.write(STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()
