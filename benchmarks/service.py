"""The service under load, on loopback with its real servers: CPU time of requests beside a plain version, jobs through the lease, dispatch, lists, downloads, streams.

    python -m benchmarks.service [--only requests|cycle|dispatch|lists|download|streams] [--seconds 3] [--turns 5] [--rows 1000000] [--gigabytes 2]

Postgres and Valkey are started from the wheels of the tests, and the API as two processes. CPU time is read from /proc and stands for itself whatever else the
machine does; what is measured by the clock is only as good as the machine was quiet. Results go to `benchmarks/engine.json`, and from there into
`benchmarks/README.md`, part by part.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import text

from app.auth import create_key
from app.database import Database
from app.jobs.lease import StoredFile, beat, claim, claim_next, finish
from app.jobs.repository import insert_job
from app.models import Tenant, Worker
from app.processes import dies_with
from app.recipe import Recipe
from app.settings import Settings
from app.storage import open_store
from benchmarks.load import Load, call, request
from benchmarks.results import keep, stored
from migrations import migrate
from tests.servers import Server, free_port, fresh_database, postgres, valkey

RECIPE = {"model": "owner/model", "method": "cfsp", "sparsity": 0.3}
CONNECTIONS = 16
UNLIMITED = {"ESPALIER_RATE_READ": "", "ESPALIER_RATE_WRITE": "", "ESPALIER_RATE_READ_TENANT": "", "ESPALIER_RATE_WRITE_TENANT": ""}
NEVER_MET = {name: "100000000/minute" for name in UNLIMITED}  # what counting costs, without its end
COMMON = {"ESPALIER_MAX_QUEUED": "100000000", "ESPALIER_MAX_STREAMS": "2000", "OMP_NUM_THREADS": "1", "ESPALIER_HUB": "true"}
OURS = ("app.main:create_app", "--factory", "--http", "app.protocol:BoundedProtocol")
PLAIN = ("benchmarks.plain_service:app",)
STATES = ("queued", "running", "cancelling", "succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Servers:
    """An empty database, a broker, and the processes of the database's server."""

    database_url: str
    broker_url: str
    postgres: Server

    def settings(self, home: Path) -> Settings:
        return Settings.model_validate({"home": home, "database_url": self.database_url, "broker_url": self.broker_url})

    @property
    def database_process(self) -> psutil.Process:
        assert self.postgres.process is not None
        return psutil.Process(self.postgres.process.pid)


@contextlib.contextmanager
def servers() -> Iterator[Servers]:
    with postgres() as (url, server), valkey() as (broker_url, _), fresh_database(url) as database_url:
        migrate(database_url)
        yield Servers(database_url, broker_url, server)


@dataclass(frozen=True)
class Api:
    port: int
    process: psutil.Process

    def seconds(self) -> float:
        return cpu_seconds(self.process)

    def memory(self) -> dict[str, int]:
        """Bytes of all its processes, resident and anonymous."""
        sizes = [memory(process) for process in family(self.process)]
        return {kind: sum(size[kind] for size in sizes) for kind in ("resident", "anonymous")}


@contextlib.contextmanager
def api(where: Servers, home: Path, application: tuple[str, ...] = OURS, processes: int = 2, **environment: str) -> Iterator[Api]:
    """The API in so many processes, as `application` names it to uvicorn."""
    port = free_port()
    common = {"ESPALIER_HOME": str(home), "ESPALIER_DATABASE_URL": where.database_url, "ESPALIER_BROKER_URL": where.broker_url} | COMMON
    command = [sys.executable, "-m", "uvicorn", *application, "--no-access-log", "--workers", str(processes), "--port", str(port)]
    with (home / f"api-{port}.log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **common, **environment}, stdout=log, stderr=log, preexec_fn=dies_with(os.getpid()))  # noqa: PLW1509  it makes one system call
    try:
        _wait(lambda: _listens(port), 120)
        time.sleep(2)  # until each process listens
        yield Api(port, psutil.Process(process.pid))
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def cpu_seconds(process: psutil.Process) -> float:
    """Of a process, those below it, and those below it that have ended."""
    total = 0.0
    for each in family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(each.cpu_times()[:4])  # user, system, and both of children that were waited for
    return total


def memory(process: psutil.Process) -> dict[str, int]:
    status = Path(f"/proc/{process.pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {kind: int(fields.get(name, "0 kB").split()[0]) * 1024 for kind, name in (("resident", "VmRSS"), ("anonymous", "RssAnon"))}


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _wait(condition: Callable[[], Any], seconds: float, pause: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(pause)


# ------------------------------------------------------------------- requests


def measure_requests(seconds: float, turns: int) -> dict[str, Any]:
    """CPU milliseconds of one request, of the API's processes and of the database's, and requests a second; medians of turns."""
    rows: dict[str, list[dict[str, float]]] = {}
    with servers() as where, tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        home = Path(folder)
        database = Database(where.database_url)
        with database.writing() as session:
            key = create_key(session, "one")
        ours, unlimited, plain = (
            stack.enter_context(api(where, home, application, **environment))
            for application, environment in ((OURS, NEVER_MET), (OURS, UNLIMITED), (PLAIN, {}))
        )
        authorization = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{ours.port}", headers=authorization, trust_env=False) as client:
            job = client.post("/v1/jobs", json=RECIPE)
        path = job.headers["location"]
        body = json.dumps(RECIPE).encode()
        kinds = {
            "GET": request("GET", path, authorization),
            "304": request("GET", path, authorization | {"If-None-Match": "*"}),
            "POST": request("POST", "/v1/jobs", authorization | {"Content-Type": "application/json"}, body),
        }
        contenders = {"plain": plain, "the service": ours, "the service, rates not limited": unlimited}
        cases = [(kind, name) for kind in kinds for name in contenders if not (kind == "304" and name == "plain")]
        for turn in range(turns + 1):
            for kind, name in cases:
                found = _measure_calls(contenders[name], where, kinds[kind], seconds if turn else 1)
                if turn:  # the first is to warm up
                    rows.setdefault(f"{kind}, {name}", []).append(found)
                with database.writing() as session:  # the number of waiting jobs is no part of it
                    session.execute(text("DELETE FROM jobs WHERE id <> :kept"), {"kept": path.rpartition("/")[2]})
                    session.execute(text("DELETE FROM audit_log"))
        database.dispose()
    medians = [
        {"name": name, **{field: statistics.median(turn[field] for turn in found) for field in found[0]}, "turns": len(found)} for name, found in rows.items()
    ]
    return {"rows": medians, "connections": CONNECTIONS, "seconds": seconds}


def _measure_calls(server: Api, where: Servers, sent: bytes, seconds: float) -> dict[str, float]:
    before, database_before = server.seconds(), cpu_seconds(where.database_process)
    load = call(server.port, sent, connections=CONNECTIONS, seconds=seconds)
    time.sleep(0.5)  # in which messages of the last ones go out
    spent, database_spent = server.seconds() - before, cpu_seconds(where.database_process) - database_before
    if any(status >= 400 for status in load.statuses):
        raise RuntimeError(f"answers: {load.statuses}")
    return {
        "milliseconds": 1000 * spent / load.requests,
        "database_milliseconds": 1000 * database_spent / load.requests,
        "a_second": load.requests / load.seconds,
        "p99_milliseconds": 1000 * load.quantile(0.99),
    }


def main() -> None:
    parts = {"requests": lambda: measure_requests(asked.seconds, asked.turns)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(parts))
    parser.add_argument("--seconds", type=float, default=3, help="of each turn of requests")
    parser.add_argument("--turns", type=int, default=5)
    asked = parser.parse_args()
    for part, measure in parts.items():
        if asked.only in (None, part):
            load = os.getloadavg()[0]
            result = measure() | {"load": load}
            print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
