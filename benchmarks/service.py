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
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import text

from app.auth import create_key
from app.database import Database
from app.jobs.lease import StoredFile, beat, claim, claim_next, finish
from app.jobs.repository import JobFilter, insert_job, list_jobs
from app.models import Tenant, Worker
from app.processes import dies_with
from app.recipe import Recipe
from benchmarks.load import call, request
from benchmarks.results import keep, stored
from migrations import migrate
from tests.filling import fill
from tests.servers import Server, free_port, fresh_database, postgres, valkey

RECIPE = {"model": "owner/model", "method": "cfsp", "sparsity": 0.3}
CONNECTIONS = 16
UNLIMITED = {"ESPALIER_RATE_READ": "", "ESPALIER_RATE_WRITE": "", "ESPALIER_RATE_READ_TENANT": "", "ESPALIER_RATE_WRITE_TENANT": ""}
NEVER_MET = dict.fromkeys(UNLIMITED, "100000000/minute")  # what counting costs, without its end
COMMON = {"ESPALIER_MAX_QUEUED": "100000000", "ESPALIER_MAX_STREAMS": "2000", "OMP_NUM_THREADS": "1", "ESPALIER_HUB": "true"}
OURS = ("app.main:create_app", "--factory", "--http", "app.protocol:BoundedProtocol")
PLAIN = ("benchmarks.plain_service:app",)


@dataclass(frozen=True)
class Servers:
    """An empty database, a broker, and the processes of the database's server."""

    database_url: str
    broker_url: str
    postgres: Server

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
def api(where: Servers, home: Path, environment: Mapping[str, str], *, application: tuple[str, ...] = OURS, processes: int = 2) -> Iterator[Api]:
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
            stack.enter_context(api(where, home, environment, application=application))
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


# ------------------------------------------------------------ claim to finish


def measure_cycle(jobs: int = 1500) -> dict[str, Any]:
    """No-op jobs a second that two processes claim, beat and finish, as a worker's task does between its engine's start and end."""
    rows = []
    with servers() as where:
        database = Database(where.database_url)
        for capped in (False, True):
            with database.writing() as session:
                tenants = [f"tenant_{capped}_{number}" for number in range(4)]
                session.add_all(Tenant(id=tenant, name=tenant, max_running=100 if capped else None) for tenant in tenants)
            for start in range(0, jobs, 100):
                with database.writing() as session:
                    for number in range(start, start + 100):
                        insert_job(session, tenants[number % 4], Recipe.model_validate(RECIPE))
            before, began = cpu_seconds(where.database_process), time.perf_counter()
            workers = [
                subprocess.Popen([sys.executable, "-m", "benchmarks.service", "--drain", where.database_url], stdout=subprocess.PIPE, text=True)
                for _ in range(2)
            ]
            drained = [json.loads(worker.communicate()[0]) for worker in workers]
            seconds = max(each["ended"] for each in drained) - min(each["began"] for each in drained)
            done = sum(each["jobs"] for each in drained)
            if done != jobs:
                raise RuntimeError(f"{done} of {jobs} jobs were done")
            rows.append(
                {
                    "name": "tenants with a cap" if capped else "tenants without a cap",
                    "a_second": jobs / seconds,
                    "milliseconds": 1000 * sum(each["cpu"] for each in drained) / jobs,
                    "database_milliseconds": 1000 * (cpu_seconds(where.database_process) - before) / jobs,
                    "wall": time.perf_counter() - began,
                }
            )
        database.dispose()
    return {"rows": rows, "jobs": jobs}


def drain(database_url: str) -> dict[str, float]:
    """Do all jobs that wait, each in three transactions."""
    database = Database(database_url)
    worker = Worker(id=f"worker {os.getpid()}", queue="default", host_bytes=2**40, device_bytes=0)
    with database.reading() as session:
        session.execute(text("SELECT 1"))
    began, cpu, jobs = time.time(), time.process_time(), 0
    while True:
        with database.writing() as session:
            lease = claim_next(session, worker, 45)
        if lease is None:
            break
        with database.writing() as session:
            beat(session, lease, 45, phase="prune", progress={"fraction": 0.5})
        with database.writing() as session:
            finish(session, lease, "succeeded", report={}, files=[StoredFile("report.json", "report", 2, "0" * 64)])
        jobs += 1
    return {"jobs": jobs, "began": began, "ended": time.time(), "cpu": time.process_time() - cpu}


# -------------------------------------------------------------------- dispatch


def measure_dispatch(jobs: int = 60) -> dict[str, Any]:
    """Milliseconds from the answer to a submission until a real, idle worker on Valkey has claimed the job, and jobs a second of that worker with an engine that does nothing."""
    with servers() as where, tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "models" / "tiny").mkdir(parents=True)
        (home / "models" / "tiny" / "behaviour.json").write_text('{"steps": 1, "pause": 0}')
        database = Database(where.database_url)
        with database.writing() as session:
            key = create_key(session, "one")
        environment = {"ESPALIER_HOME": str(home), "ESPALIER_DATABASE_URL": where.database_url, "ESPALIER_BROKER_URL": where.broker_url}
        environment |= {"ESPALIER_MODEL_ROOTS": json.dumps([str(home / "models")])}
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", "--quiet", "-A", "tests.faults.worker", "worker", "-c", "1", "--without-mingle", "--without-gossip"],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=dies_with(os.getpid()),  # noqa: PLW1509  it makes one system call
        )
        latencies = []
        body = {"model": "tiny", "method": "magnitude", "sparsity": 0.5, "evaluation": None}
        try:
            with api(where, home, NEVER_MET) as served, httpx.Client(base_url=f"http://127.0.0.1:{served.port}", trust_env=False) as client:
                client.headers["Authorization"] = f"Bearer {key}"
                for number in range(jobs + 2):
                    answer = client.post("/v1/jobs", json=body)
                    job_id = answer.raise_for_status().json()["id"]
                    _wait(lambda job_id=job_id: _state(database, job_id) in ("succeeded", "failed"), 120)  # type: ignore[misc]
                    with database.reading() as session:
                        found = session.execute(
                            text("SELECT state, extract(epoch FROM started_at - created_at) FROM jobs WHERE id = :id"), {"id": job_id}
                        ).one()
                    if found[0] != "succeeded":
                        raise RuntimeError(f"job {job_id} is {found[0]}")
                    if number > 1:  # the first ones warm up
                        latencies.append(1000 * float(found[1]))
                    time.sleep(0.3)
        finally:
            worker.terminate()
            worker.wait(60)
            database.dispose()
    ordered = sorted(latencies)
    return {"p50_milliseconds": statistics.median(ordered), "p95_milliseconds": ordered[int(0.95 * len(ordered))], "jobs": jobs}


def _state(database: Database, job_id: str) -> str:
    with database.reading() as session:
        return str(session.execute(text("SELECT state FROM jobs WHERE id = :id"), {"id": job_id}).scalar_one())


# ----------------------------------------------------------------------- lists


def measure_lists(jobs: int, repetitions: int = 20) -> dict[str, Any]:
    """Milliseconds of a page of 20 jobs, as the repository reads it, by what it is filtered with."""
    rows = []
    with servers() as where:
        database = Database(where.database_url)
        fill(database, jobs)
        middle = datetime.now(UTC) - timedelta(seconds=jobs / 2)
        found: dict[str, Any] = {"states": ("succeeded",), "method": "wanda", "model": "owner/model-7", "queue": "large", "created_before": middle}
        rare: dict[str, Any] = {"states": ("running",), "model": "no/such", "labels": (("run", "70003"),)}
        choices = [dict(chosen) for number in range(len(found) + 1) for chosen in combinations(found.items(), number)]
        choices += [{name: value, **others} for name, value in rare.items() for others in ({}, {"method": "wanda"}, {"created_before": middle})]
        for chosen in choices:
            milliseconds = []
            for _ in range(repetitions):
                with database.reading() as session:
                    began = time.perf_counter()
                    list_jobs(session, "tenant_3", JobFilter(**chosen), None, 21)
                    milliseconds.append(1000 * (time.perf_counter() - began))
            name = ", ".join(f"{name} (rare)" if chosen[name] == rare.get(name) else name for name in chosen) or "all"
            rows.append(
                {"name": name, "p95_milliseconds": sorted(milliseconds)[int(0.95 * repetitions) - 1], "p50_milliseconds": statistics.median(milliseconds)}
            )
        database.dispose()
    return {"rows": sorted(rows, key=lambda row: -row["p95_milliseconds"]), "jobs": jobs}


# ---------------------------------------------------------- downloads and streams


def measure_download(size: int) -> dict[str, Any]:
    """What the API's memory grows by while it sends a large file from the local store, whole and by a range."""
    with servers() as where, tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        home = Path(folder)
        database = Database(where.database_url)
        stack.callback(database.dispose)
        with database.writing() as session:
            key = create_key(session, "one")
            tenant = session.execute(text("SELECT id FROM tenants")).scalar_one()
            job = insert_job(session, tenant, Recipe.model_validate(RECIPE))
            lease = claim(session, job.id, "worker", 45)
            assert lease is not None
        path = home / "objects" / f"{lease.artifact_prefix}checkpoint/model.safetensors"
        path.parent.mkdir(parents=True)
        digest, block = hashlib.sha256(), os.urandom(2**24)
        with path.open("wb") as file:
            for _ in range(size // len(block)):
                file.write(block)
                digest.update(block)
        stored_file = StoredFile("checkpoint/model.safetensors", "checkpoint", path.stat().st_size, digest.hexdigest())
        with database.writing() as session:
            finish(session, lease, "succeeded", report={}, files=[stored_file])
        served = stack.enter_context(api(where, home, {}, processes=1))
        client = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{served.port}", headers={"Authorization": f"Bearer {key}"}, trust_env=False))
        url = f"/v1/jobs/{job.id}/artifacts/checkpoint/model.safetensors"
        client.get(url, headers={"Range": "bytes=0-1023"}).raise_for_status()
        rows = []
        for name, headers in {"whole": {}, "the second half, by Range": {"Range": f"bytes={stored_file.bytes // 2}-"}}.items():
            before, highest, received, began = served.memory(), served.memory(), hashlib.sha256(), time.perf_counter()
            count = 0
            with client.stream("GET", url, headers=headers) as answer:
                for number, chunk in enumerate(answer.iter_raw(2**20)):
                    received.update(chunk)
                    count += len(chunk)
                    if number % 16 == 0:
                        highest = {kind: max(size, highest[kind]) for kind, size in served.memory().items()}
            if not headers and received.hexdigest() != stored_file.sha256:
                raise RuntimeError("the bytes are not those that were stored")
            seconds = time.perf_counter() - began
            growth = {kind: highest[kind] - before[kind] for kind in highest}
            rows.append({"name": name, "bytes": count, "seconds": seconds, "growth": growth})
    return {"rows": rows}


def measure_streams(streams: int = 500) -> dict[str, Any]:
    """What the API's memory grows by with so many open streams of events."""
    with servers() as where, tempfile.TemporaryDirectory() as folder:
        database = Database(where.database_url)
        with database.writing() as session:
            key = create_key(session, "one")
            tenant = session.execute(text("SELECT id FROM tenants")).scalar_one()
            ids = [insert_job(session, tenant, Recipe.model_validate(RECIPE)).id for _ in range(10)]
        with api(where, Path(folder), UNLIMITED, processes=1) as served:
            call(served.port, request("GET", f"/v1/jobs/{ids[0]}", {"Authorization": f"Bearer {key}"}), connections=4, seconds=1)
            before = served.memory()
            sockets = []
            for number in range(streams):
                client = socket.create_connection(("127.0.0.1", served.port))
                head = {"Authorization": f"Bearer {key}", "Accept": "text/event-stream"}
                client.sendall(request("GET", f"/v1/jobs/{ids[number % len(ids)]}/events", head))
                sockets.append(client)
            answered = sum(b" 200 " in client.recv(65536) for client in sockets)
            time.sleep(3)
            after, cpu = served.memory(), served.seconds()
            time.sleep(5)
            idle = (served.seconds() - cpu) / 5
            for client in sockets:
                client.close()
        database.dispose()
    return {"streams": answered, "growth": {kind: after[kind] - before[kind] for kind in after}, "cpu": idle}


def main() -> None:
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "requests": lambda: measure_requests(asked.seconds, asked.turns),
        "cycle": measure_cycle,
        "dispatch": measure_dispatch,
        "lists": lambda: measure_lists(asked.rows),
        "download": lambda: measure_download(int(asked.gigabytes * 1e9)),
        "streams": measure_streams,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(parts))
    parser.add_argument("--seconds", type=float, default=3, help="of each turn of requests")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the table that is listed")
    parser.add_argument("--gigabytes", type=float, default=2, help="of the file that is downloaded")
    parser.add_argument("--drain", metavar="URL", help=argparse.SUPPRESS)  # a worker of `cycle`
    asked = parser.parse_args()
    if asked.drain:
        print(json.dumps(drain(asked.drain)))
        return
    for part, measure in parts.items():
        if asked.only in (None, part):
            load = os.getloadavg()[0]
            result = measure()
            print(json.dumps({part: result}, indent=1), flush=True)
            keep("service", stored().get("service", {}) | {part: result | {"load": [load, os.getloadavg()[0]]}})


if __name__ == "__main__":
    main()
