"""A TCP proxy that behaves as a bad network does: it cuts a connection after some bytes, or refuses for a while."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Proxy:
    """Forwards to `target`; while `cut_after` is set, each connection ends after so many bytes of answer."""

    target: tuple[str, int]
    cut_after: int | None = None
    requests: list[bytes] = field(default_factory=list)
    _listener: socket.socket | None = None
    _port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        """Refuse connections from now on."""
        if self._listener is not None:
            # A thread that waits in accept() keeps a closed socket listening; a shutdown wakes it.
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        with client, socket.create_connection(self.target) as server:
            threading.Thread(target=self._upwards, args=(client, server), daemon=True).start()
            sent = 0
            with contextlib.suppress(OSError):
                while piece := server.recv(65536):
                    if self.cut_after is not None:
                        piece = piece[: self.cut_after - sent]
                    client.sendall(piece)
                    sent += len(piece)
                    if sent == self.cut_after:
                        break
            for end in (client, server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _upwards(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := client.recv(65536):
                self.requests.append(piece)
                server.sendall(piece)


@contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    """An open proxy to a port of this machine."""
    made = Proxy(("127.0.0.1", port))
    made.open()
    try:
        yield made
    finally:
        made.close()
