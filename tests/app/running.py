"""The API and a worker as processes of their own, on SQLite and files; the worker's engine is the stand-in of the fault tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from app.auth import create_key
from app.database import Database
from app.processes import dies_with
from migrations import migrate
from tests.jobs import wait_until
from tests.servers import free_port

RECIPE = {"model": "stand-in", "method": "magnitude", "sparsity": 0.5, "evaluation": None}


@dataclass(frozen=True)
class Running:
    client: httpx.Client
    key: str
    home: Path
    api: subprocess.Popen[bytes]
    workers: Sequence[subprocess.Popen[bytes]]

    def lines(self, process: str) -> list[dict[str, Any]]:
        """What `api` or `worker` logged; fails on a line that is no JSON object."""
        return [json.loads(line) for line in (self.home / f"{process}.log").read_text().splitlines()]

    def wait_for_end(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = {}

        def ended() -> bool:
            job.update(self.client.get(f"/v1/jobs/{job_id}").json())
            return job["state"] in ("succeeded", "failed", "cancelled")

        wait_until(ended, 120, "the job's end", pause=0.2)
        return job


@contextmanager
def running(home: Path, behaviour: dict[str, Any], environment: dict[str, str], *, api_workers: int = 1, worker: bool = True) -> Iterator[Running]:
    """behaviour: of the engine, see tests/faults/engine.py. api_workers: processes that share the API's port."""
    url = f"sqlite:///{home}/espalier.db"
    migrate(url)
    (home / "models" / "stand-in").mkdir(parents=True)
    (home / "models" / "stand-in" / "behaviour.json").write_text(json.dumps(behaviour))
    common = {**os.environ, "ESPALIER_HOME": str(home), "ESPALIER_SWEEP_SECONDS": "0.2", "OMP_NUM_THREADS": "1"} | environment
    own: dict[str, dict[str, str]] = {
        "api": {},
        "worker": {"ESPALIER_MODEL_ROOTS": json.dumps([str(home / "models")])},
    }  # to the API the model is one of the hub
    port = free_port()
    api = [
        "uvicorn",
        "app.main:create_app",
        "--factory",
        "--http",
        "app.protocol:BoundedProtocol",
        "--no-access-log",
        "--port",
        str(port),
        "--workers",
        str(api_workers),
        "--timeout-worker-healthcheck",
        "120",  # seconds; a machine may be slow, and a test may stop a process
    ]
    celery = ["celery", "--quiet", "-A", "tests.faults.worker", "worker", "-Q", "prune", "-c", "1", "--without-mingle", "--without-gossip"]
    processes = []
    for name, arguments in {"api": api, "worker": celery}.items() if worker else [("api", api)]:
        with (home / f"{name}.log").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *arguments],
                    env=common | own[name],
                    stderr=log,
                    preexec_fn=dies_with(os.getpid()),  # noqa: PLW1509  it makes one system call
                )
            )
    database = Database(url)
    with database.writing() as session:
        key = create_key(session, "running")
    database.dispose()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=30) as client:
            wait_until(lambda: _answers(client), 120, "the API")
            yield Running(client, key, home, processes[0], processes[1:])
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/livez").is_success
    except httpx.TransportError:
        return False
