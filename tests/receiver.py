"""A receiver of webhooks: an HTTP server in a thread that keeps what it is sent and answers as it is told."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from standardwebhooks.webhooks import Webhook

NETWORKS = ["127.0.0.0/8"]


@dataclass(frozen=True)
class Message:
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    def verified(self, secret: str) -> dict[str, Any]:
        """What it says; raises where the signature, checked by Standard Webhooks' own library, is wrong or old."""
        said: dict[str, Any] = Webhook(secret).verify(self.body, self.headers)
        return said


@dataclass
class Receiver:
    url: str = ""
    messages: list[Message] = field(default_factory=list)
    status: int = 204
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0  # seconds before the answer; may be made shorter meanwhile
    dripping: bool = False  # an answer whose head never ends
    endless: bool = False  # an answer whose body never ends

    def said(self, secret: str) -> list[dict[str, Any]]:
        return [message.verified(secret) for message in self.messages]


@contextmanager
def receiving(tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    receiver = Receiver()
    stopping = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.messages.append(Message(self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            came = time.monotonic()
            while time.monotonic() - came < receiver.pause and not stopping.wait(0.02):
                pass
            with suppress(OSError):  # who asked may have gone
                self._answer()

        def _answer(self) -> None:
            self.send_response(receiver.status)
            for name, value in receiver.headers.items():
                self.send_header(name, value)
            while receiver.dripping and not stopping.wait(0.1):
                self.send_header("X-More", "x")
                self.flush_headers()
            self.end_headers()
            while receiver.endless and not stopping.is_set():
                self.wfile.write(b"x" * 65536)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  named so by the library
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # such as a handshake that was broken off

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    scheme = "http" if tls is None else "https"
    receiver.url = f"{scheme}://127.0.0.1:{server.server_port}/hook?from=espalier"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()


def wait_for_messages(receiver: Receiver, count: int, seconds: float = 60) -> list[Message]:
    """The messages, once there are so many."""
    deadline = time.monotonic() + seconds
    while len(receiver.messages) < count:
        assert time.monotonic() < deadline, f"{len(receiver.messages)} messages of {count} came within {seconds} s"
        time.sleep(0.02)
    return receiver.messages
