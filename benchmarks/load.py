"""Requests over a few kept connections, as fast as they are answered, by a client that takes little of the machine."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Load:
    """What came of it."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # seconds
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def requests(self) -> int:
        return len(self.latencies)

    def quantile(self, share: float) -> float:
        return sorted(self.latencies)[min(self.requests - 1, int(share * self.requests))]


def call(port: int, request: bytes, *, connections: int, seconds: float, requests: int | None = None) -> Load:
    """Send one request again and again, for so long or so often in all."""
    return asyncio.run(_call(port, request, connections, seconds, requests))


def request(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *(f"{name}: {value}" for name, value in headers.items()), f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


async def _call(port: int, request: bytes, connections: int, seconds: float, requests: int | None) -> Load:
    load = Load()
    began = time.perf_counter()

    async def one_connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() - began < seconds and (requests is None or load.requests < requests):
            sent = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]
            if length.strip():
                await reader.readexactly(int(length))
            load.latencies.append(time.perf_counter() - sent)
            load.statuses[int(head[9:12])] += 1
        writer.close()

    await asyncio.gather(*(one_connection() for _ in range(connections)))
    load.seconds = time.perf_counter() - began
    return load
