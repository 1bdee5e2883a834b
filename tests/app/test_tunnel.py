"""Where the clients of sinks get to, whatever names mean a moment later and wherever they are sent on to."""

from __future__ import annotations

import hashlib
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import obstore
import pytest

from app.exceptions import AddressError
from app.settings import Settings, get_settings
from app.sinks import s3 as sink
from app.sinks.results import Result, ResultFile, SinkFailed
from app.sinks.schemas import SINK
from app.sinks.tunnel import tunnel
from app.storage import open_store
from tests.app.test_webhooks import certificate
from tests.local_http import Quiet, QuietServer, answering
from tests.receiver import receiving
from tests.servers import S3

CONTENT = bytes(range(256)) * 2**16  # of two parts of an upload


def port_of(url: str) -> int:
    port = httpx.URL(url).port
    assert port is not None
    return port


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What each look-up of a name of this process is answered, in turn. What is not Python asks the system, which knows none of the names here."""
    answers: list[str] = []
    ask = socket.getaddrinfo

    def answer(host: Any, port: Any, *more: Any, **options: Any) -> Any:
        known = str(host).endswith(".example")
        return ask(answers.pop(0) if known else host, port, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    monkeypatch.setenv("ESPALIER_SINK_NETWORKS", '["127.0.0.1/32"]')
    monkeypatch.setenv("NO_PROXY", "*")  # must not lead around the tunnel
    get_settings.cache_clear()
    yield answers
    get_settings.cache_clear()


def copy(endpoint: str, bucket: str, keys: dict[str, str], folder: Path) -> None:
    """Bring a small result to a bucket."""
    target: Any = SINK.validate_python({"name": "s3", "url": f"s3://{bucket}/rebound", "endpoint": endpoint} | keys)
    store = open_store(Settings.model_validate({"home": folder}))
    (folder / "file").write_bytes(CONTENT)
    store.put_file("one/checkpoint/model.safetensors", folder / "file")
    files = [ResultFile("checkpoint/model.safetensors", "checkpoint", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())]
    sink.copy(target, Result("job_1", "owner/dense", "cfsp", 1_000, "one/", "", files, {}, {}), store, folder)


def test_a_bucket_is_reached_where_its_name_led_when_it_was_checked(names: list[str], s3: S3, tmp_path: Path) -> None:
    """DNS rebinding: the name is looked up once for all the requests of a copy, and none of them finds another server."""
    names += ["127.0.0.1", "127.0.0.9"]
    keys = {"access_key": s3.access_key, "secret_key": s3.secret_key}
    copy(f"http://s3.example:{port_of(s3.endpoint)}", s3.bucket, keys, tmp_path)
    assert names == ["127.0.0.9"]
    options: Any = {"access_key_id": s3.access_key, "secret_access_key": s3.secret_key, "virtual_hosted_style_request": False}
    bucket = obstore.store.S3Store(s3.bucket, endpoint=s3.endpoint, region=s3.region, client_options={"allow_http": True}, **options)
    assert obstore.get(bucket, "rebound/checkpoint/model.safetensors").bytes().to_bytes() == CONTENT
    with pytest.raises(AddressError) as refused:
        copy(f"http://s3.example:{port_of(s3.endpoint)}", s3.bucket, keys, tmp_path)
    assert (refused.value.code, names) == ("address_not_public", [])


@contextmanager
def saying(status: int, **headers: str) -> Iterator[tuple[str, list[str]]]:
    """An HTTP server that answers all requests alike: its URL, and the methods and targets that it was asked for."""
    asked: list[str] = []

    class Handler(Quiet, BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_PUT = do_POST = do_HEAD  # noqa: N815  named so by the library

    with answering(QuietServer(("127.0.0.1", 0), Handler)) as url:
        yield url, asked


def test_a_redirect_leads_nowhere_else(names: list[str], tmp_path: Path) -> None:
    with saying(200) as (inside, stolen), saying(307, Location=f"{inside}/secrets") as (outside, asked):
        names += ["127.0.0.1"]
        with pytest.raises(SinkFailed) as failed:
            copy(outside.replace("127.0.0.1", "s3.example"), "bucket", {"access_key": "a", "secret_key": "b"}, tmp_path)
    assert failed.value.code == "sink_unreachable"
    assert any("/secrets" in target for target in asked), "the library follows redirects"
    assert stolen == []


def test_over_https_the_server_proves_its_name(tmp_path: Path) -> None:
    authority, server = certificate(tmp_path, "s3.example")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(server)
    with receiving(tls) as receiver, tunnel(["127.0.0.9", "127.0.0.1"], port_of(receiver.url)) as proxy:
        with httpx.Client(proxy=proxy, verify=ssl.create_default_context(cafile=str(authority)), trust_env=False) as client:
            assert client.post("https://s3.example:9/x", content=CONTENT).status_code == 204
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                client.post("https://others.example:9/x")
        assert [message.body for message in receiver.messages] == [CONTENT]


def test_a_server_that_is_not_there_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with tunnel(["127.0.0.1"], port) as proxy, httpx.Client(proxy=proxy, trust_env=False) as client:
        assert client.get("http://s3.example/x").status_code == 502
        with pytest.raises(httpx.ProxyError):
            client.get("https://s3.example/x")
