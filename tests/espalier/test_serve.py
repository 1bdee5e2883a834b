"""`espalier serve`: a process tree in the embedded default that comes up by itself, mends itself and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from espalier.client import Client
from tests.models import make_checkpoint

SECONDS = 60


@dataclass
class Running:
    process: subprocess.Popen[str]
    url: str
    key: str | None

    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, module: str) -> psutil.Process | None:
        children = [child for child in psutil.Process(self.process.pid).children() if child.status() != psutil.STATUS_ZOMBIE]
        return next((child for child in children if module in child.cmdline()), None)


@contextmanager
def serving(home: Path, **environment: str) -> Iterator[Running]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ESPALIER_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "espalier.cli", "serve", "--port", "0", "--json"],
        cwd=home,
        env={**clean, "ESPALIER_HOME": str(home), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    tree: list[psutil.Process] = []
    try:
        told = json.loads(process.stdout.readline())
        running = Running(process, told["url"], told["api_key"])
        tree = running.tree()
        yield running
    finally:
        process.terminate()
        assert process.wait(SECONDS) in (0, -signal.SIGKILL)
        process.stdout.close()
        assert_gone(tree)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=SECONDS)
    for process in alive:
        process.kill()
    assert not alive


def test_a_job_from_end_to_end(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "models/tiny", "llama")
    with serving(tmp_path, ESPALIER_MODEL_ROOTS=json.dumps([str(tmp_path / "models")])) as running, Client(running.url, running.key) as client:
        job = client.submit(str(model), "cfsp", 0.25, calibration={"samples": 2, "sequence_length": 16}, evaluation=None)
        job = client.wait(job["id"], timeout=200)
        assert job["state"] == "succeeded", job["error"]
        files = {file.artifact["path"]: file.path for file in client.download(job["id"], tmp_path / "result")}
        report = client.report(job["id"])
    before = json.loads((model / "config.json").read_text())["intermediate_size"]
    assert json.loads(files["checkpoint/config.json"].read_text())["intermediate_size"] == before * 3 // 4
    assert json.loads(files["report.json"].read_text()) == report


def test_children_come_back_and_the_key_is_shown_once(tmp_path: Path) -> None:
    with serving(tmp_path) as running:
        assert running.key is not None
        for module in ("celery", "uvicorn", "app.exporter"):
            first = running.child(module)
            assert first is not None
            first.kill()
            give_up = time.monotonic() + SECONDS
            while (second := running.child(module)) is None or second.pid == first.pid:
                assert time.monotonic() < give_up, f"{module} did not come back"
                time.sleep(0.1)
        with Client(running.url, running.key, timeout=SECONDS) as client:  # the address is the same, and the call waits for the new API
            assert list(client.jobs()) == []
    with serving(tmp_path) as again:
        assert again.key is None
        with Client(again.url, running.key) as client:
            assert list(client.jobs()) == []


def test_a_killed_service_leaves_no_process(tmp_path: Path) -> None:
    with serving(tmp_path) as running:
        tree = running.tree()
        assert len(tree) >= 2
        running.process.kill()
        running.process.wait()
        assert_gone(tree)


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = subprocess.run(
            [sys.executable, "-m", "espalier.cli", "serve", "--port", port],
            cwd=tmp_path,
            env={**os.environ, "ESPALIER_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    assert ended.returncode == 1
    assert f"port {port}" in ended.stderr
    assert not (tmp_path / "home").exists()


def test_a_refused_setting_is_told(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "espalier.cli", "serve"],
        cwd=tmp_path,
        env={**os.environ, "ESPALIER_ENVIRONMENT": "production"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert ended.returncode == 1
    assert "production needs ESPALIER_DATABASE_URL" in ended.stderr
    assert "Traceback" not in ended.stderr
