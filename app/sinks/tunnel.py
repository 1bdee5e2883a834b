"""A proxy on this machine that leads to one server, whatever it is asked for: for a client that looks names up by itself and follows redirects.

What it passes on over https it can't read: the client verifies the server's certificate for the name.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from socketserver import BaseRequestHandler, ThreadingTCPServer
from threading import Thread

CONNECT_SECONDS = 5.0  # to one of several addresses
MAX_HEAD_BYTES = 2**16  # of the request that opens a connection
CHUNK_BYTES = 2**18
OPENED = b"HTTP/1.1 200 OK\r\n\r\n"
UNREACHABLE = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@contextmanager
def tunnel(ips: Sequence[str], port: int) -> Iterator[str]:
    """The URL of a proxy that connects to the first of these IP addresses that answers, and to nothing else."""

    class Passage(BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):  # either side may go
                _pass(self.request, ips, port)

    with ThreadingTCPServer(("127.0.0.1", 0), Passage) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, name="tunnel", daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def _pass(client: socket.socket, ips: Sequence[str], port: int) -> None:
    head = _head(client)
    server = _connect(ips, port)
    if server is None:
        client.sendall(UNREACHABLE)
        return
    with server:
        if head.startswith(b"CONNECT "):
            client.sendall(OPENED)
        else:  # http, whose request names the server, which takes it as it is
            server.sendall(head)
        back = Thread(target=_copy, args=(server, client), daemon=True)
        back.start()
        _copy(client, server)
        back.join()


def _head(client: socket.socket) -> bytes:
    """The client's first request, with what of its body came along."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < MAX_HEAD_BYTES and (more := client.recv(MAX_HEAD_BYTES)):
        head += more
    return head


def _connect(ips: Sequence[str], port: int) -> socket.socket | None:
    for ip in ips:
        with suppress(OSError):
            server = socket.create_connection((ip, port), timeout=CONNECT_SECONDS)
            server.settimeout(None)
            return server
    return None


def _copy(source: socket.socket, target: socket.socket) -> None:
    """All that comes, and that no more comes."""
    with suppress(OSError):
        while chunk := source.recv(CHUNK_BYTES):
            target.sendall(chunk)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
