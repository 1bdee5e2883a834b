"""A real MLflow server on SQLite. Its packages lie in a folder of their own, made once, so that those of the service stay as they are."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.servers import Server, free_port

REQUIREMENTS = Path(__file__).with_name("mlflow.txt")


def packages() -> Path:
    """Where the packages of tests/mlflow.txt are; they are installed there if they are not yet."""
    folder = Path(sys.prefix) / f"mlflow-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests that run at once
        if not folder.exists():
            fresh = folder.with_suffix(".new")
            shutil.rmtree(fresh, ignore_errors=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(fresh), "--requirement", str(REQUIREMENTS)]
            done = subprocess.run(pip, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
            fresh.rename(folder)
    return folder


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """The URL of a server that keeps everything below `folder`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = {
        "host": "127.0.0.1",
        "port": port,
        "backend-store-uri": f"sqlite:///{folder}/mlflow.db",
        "artifacts-destination": folder / "artifacts",
        "workers": 1,
    }
    server = Server(
        command=[sys.executable, "-m", "mlflow", "server", *(part for name, value in options.items() for part in (f"--{name}", str(value)))],
        log=folder / "mlflow.log",
        ready=lambda: httpx.get(f"{url}/health", timeout=5, trust_env=False).raise_for_status(),
        environment={"PYTHONPATH": str(packages()), "PYTHONWARNINGS": "ignore", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"},
    )
    server.start(seconds=120)
    try:
        yield url
    finally:
        assert server.process is not None
        os.killpg(server.process.pid, signal.SIGKILL)  # asked to end, it waits, and leaves its own children
        server.stop()
