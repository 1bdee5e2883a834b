"""Clients that send too much, too slowly or nothing at all lose their connection, and others are answered meanwhile. Raw sockets against a real uvicorn."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.protocol import MAX_HEAD_BYTES
from app.serve import API
from tests.app.running import Running, running

HEADER_SECONDS = 2.0
BODY_SECONDS = 3.0
SLACK_SECONDS = 30.0  # of a machine that is slow
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
DOCKERFILE = (Path(__file__).parents[2] / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    bounds = {"ESPALIER_HEADER_SECONDS": str(HEADER_SECONDS), "ESPALIER_BODY_SECONDS": str(BODY_SECONDS)}
    with running(tmp_path_factory.mktemp("service"), {}, bounds, worker=False) as running_service:
        yield running_service


@pytest.fixture
def connection(service: Running) -> Iterator[socket.socket]:
    url = service.client.base_url
    with socket.create_connection((url.host, url.port), timeout=60) as connected:
        yield connected


def read_to_end(connection: socket.socket) -> bytes:
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:  # what was still being sent was not read
        pass
    return received


def drip(connection: socket.socket, pieces: Callable[[], bytes], service: Running, seconds: float) -> tuple[float, bytes]:
    """Send a piece ten times a second, while another client is answered -> the seconds until the connection was closed, and what came."""
    began = time.monotonic()
    connection.settimeout(0.1)
    received = b""
    while time.monotonic() - began < seconds:
        assert service.client.get("/livez").elapsed.total_seconds() < 10
        try:
            connection.sendall(pieces())
            part = connection.recv(65536)
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            break
        if not part:
            break
        received += part
    else:
        pytest.fail(f"the connection was still open after {seconds} s")
    return time.monotonic() - began, received


def test_the_service_is_started_with_these_bounds() -> None:
    assert "app.protocol:BoundedProtocol" in API
    (command,) = [json.loads(line) for line in re.findall(r"(?m)^CMD (\[.+\])$", DOCKERFILE) if "uvicorn" in line]
    assert command[command.index("--http") + 1] == API[API.index("--http") + 1]


@pytest.mark.parametrize(
    "bomb",
    [
        GET + b"X-Long: " + b"x" * 20_000_000,
        GET + b"X-Many: x\r\n" * 2_000_000,
        b"GET /" + b"x" * 20_000_000,
        GET + b"x" * 20_000_000,
        b"\r\n" * 10_000_000,
        GET + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-Trailer: " + b"x" * 20_000_000,
    ],
    ids=["value", "count", "path", "name", "blank lines", "trailer"],
)
def test_a_head_without_end_is_refused(service: Running, connection: socket.socket, bomb: bytes) -> None:
    before = memory(service)
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        connection.sendall(2 * bomb)
    assert memory(service) - before < 15_000_000
    assert service.client.get("/livez").status_code == 200


def test_a_head_that_is_a_little_too_long_is_told(connection: socket.socket) -> None:
    connection.sendall(GET + b"X-Long: " + b"x" * (MAX_HEAD_BYTES + 1) + b"\r\n\r\n")
    assert read_to_end(connection).startswith(b"HTTP/1.1 431 ")


def test_a_long_head_is_taken(connection: socket.socket) -> None:
    connection.sendall(GET + b"Connection: close\r\nX-Long: " + b"x" * (MAX_HEAD_BYTES - 1000) + b"\r\n\r\n")
    assert read_to_end(connection).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_says_nothing_is_cut_off(connection: socket.socket) -> None:
    began = time.monotonic()
    assert read_to_end(connection).startswith(b"HTTP/1.1 408 ")
    assert HEADER_SECONDS - 0.2 < time.monotonic() - began < HEADER_SECONDS + SLACK_SECONDS


def test_a_slow_head_is_cut_off(service: Running, connection: socket.socket) -> None:
    connection.sendall(GET)
    seconds, received = drip(connection, lambda: b"X-More: x\r\n", service, HEADER_SECONDS + SLACK_SECONDS)
    assert seconds > HEADER_SECONDS - 0.2
    assert not received or received.startswith(b"HTTP/1.1 408 ")


def test_a_slow_second_head_is_cut_off(service: Running, connection: socket.socket) -> None:
    connection.sendall(GET + b"\r\n")
    assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    seconds, _ = drip(connection, lambda: b"\r\n", service, HEADER_SECONDS + SLACK_SECONDS)
    assert seconds > HEADER_SECONDS - 0.2


def test_a_slow_body_is_cut_off(service: Running, connection: socket.socket) -> None:
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.key}\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    connection.sendall(head.encode())
    seconds, received = drip(connection, lambda: b" ", service, BODY_SECONDS + SLACK_SECONDS)
    assert seconds > BODY_SECONDS - 0.2
    assert not received or received.startswith(b"HTTP/1.1 408 ")


def test_a_slow_body_that_nobody_reads_is_cut_off(service: Running, connection: socket.socket) -> None:
    connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
    seconds, received = drip(connection, lambda: b" ", service, BODY_SECONDS + 2 * SLACK_SECONDS)
    assert received.startswith(b"HTTP/1.1 404 ")
    assert seconds < BODY_SECONDS + SLACK_SECONDS


def test_requests_on_one_connection_are_each_in_time(connection: socket.socket) -> None:
    for count in (1, 1, 1, 1, 1, 1, 3):  # longer together than one may take, and three at once
        connection.sendall((GET + b"\r\n") * count)
        answers = b""
        while answers.count(b'{"status":"ok"}') < count:
            answers += connection.recv(65536)
        assert answers.count(b"HTTP/1.1 200 ") == count
        time.sleep(HEADER_SECONDS / 4)


def memory(service: Running) -> int:
    """Bytes that the API's process holds."""
    return int(Path(f"/proc/{service.api.pid}/statm").read_text().split()[1]) * 4096
