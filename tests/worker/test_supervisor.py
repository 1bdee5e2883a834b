"""A child under a lease: what it says arrives, and it is gone when it must be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import update
from sqlalchemy.exc import OperationalError

from app.database import Database
from app.jobs.lease import Lease, claim
from app.models import Job
from tests import jobs
from worker.heartbeat import MAX_EVENTS, Heartbeat
from worker.supervisor import Outcome, anonymous_bytes_of_family, supervise

LEASE_SECONDS = 120.0


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = jobs.open_database(f"sqlite:///{tmp_path}/jobs.db")
    yield opened
    opened.dispose()


@pytest.fixture
def lease(database: Database) -> Lease:
    job_id = jobs.submit(database)
    with database.writing() as session:
        claimed = claim(session, job_id, "worker", LEASE_SECONDS)
    assert claimed is not None
    return claimed


@pytest.fixture
def heart(database: Database, lease: Lease) -> Iterator[Heartbeat]:
    with make_heart(database, lease) as beating:
        yield beating


def make_heart(database: Database, lease: Lease, *, lease_seconds: float = LEASE_SECONDS, **options: Any) -> Heartbeat:
    return Heartbeat(database, lease, claimed_at=time.monotonic(), lease_seconds=lease_seconds, beat_seconds=0.2, **options)


def run(heart: Heartbeat, script: str, *arguments: str, seconds: float = 120, grace_seconds: float = 5, **options: Any) -> Outcome:
    command = (sys.executable, "-c", script, *arguments)
    return supervise(command, heart, deadline=time.monotonic() + seconds, grace_seconds=grace_seconds, **options)


def test_what_a_child_says_reaches_the_job(database: Database, lease: Lease, heart: Heartbeat) -> None:
    script = """
import json, sys
def say(**event): print(json.dumps(event))
say(event="phase", phase="prune")
say(event="log", message="hello\\0")
for done in range(1, 101):
    say(event="progress", phase="prune", done=done, total=100, fraction=done / 100)
print("a library prints")
say(event="unknown"); say(event="phase", phase=7); print("[1]"); print("{"); sys.stdout.write('{"event": "log", "message": "no newline"}')
print("a warning", file=sys.stderr)
"""
    outcome = run(heart, script)
    heart.stop()
    assert outcome.kind == "succeeded"
    assert {"a library prints", "a warning", "[1]", "{"} <= set(outcome.said.splitlines())
    job = jobs.get(database, lease.job_id)
    assert job.phase == "prune"
    assert job.progress.pop("eta_seconds") == 0
    assert job.progress == {"fraction": 1.0, "blocks_done": 100, "blocks_total": 100}
    told = jobs.events(database, lease.job_id)
    assert told[:4] == ["queued", "claimed", "phase", "log"]
    assert 10 <= told.count("progress") <= 20


def test_a_refusal_is_the_child_s_own(heart: Heartbeat) -> None:
    error = {"code": "calibration_text_too_short", "message": "The text is short.", "hint": "Give a longer one."}
    outcome = run(heart, "import sys; print(sys.argv[1]); sys.exit(2)", json.dumps({"event": "error"} | error))
    assert (outcome.kind, outcome.error) == ("failed", error)


ROUND = {"event": "progress", "phase": "prune", "done": 3, "total": 40, "fraction": 0.01, "round": 2, "rounds": 4, "eta_seconds": 77.5}
STEP = {"event": "progress", "phase": "recover", "done": 5, "total": 20, "fraction": 0.9, "loss": 2.5, "tokens_per_second": 300.0, "eta_seconds": 12.0}

STORED = {"event": "progress", "phase": "upload", "done": 5, "total": 20, "eta_seconds": 3.0}


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (STORED, {"fraction": 1.0, "bytes_done": 5, "bytes_total": 20, "eta_seconds": 3.0}),
        (ROUND, {"fraction": 0.01, "masks_done": 3, "masks_total": 40, "round": 2, "rounds": 4, "eta_seconds": 77.5}),
        (STEP, {"fraction": 0.9, "steps_done": 5, "steps_total": 20, "loss": 2.5, "tokens_per_second": 300.0, "eta_seconds": 12.0}),
    ],
)
def test_sub_models_training_steps_and_bytes_are_counted_as_such(
    database: Database, lease: Lease, heart: Heartbeat, event: dict[str, Any], told: dict[str, Any]
) -> None:
    assert run(heart, "import sys; print(sys.argv[1])", json.dumps(event)).kind == "succeeded"
    heart.stop()
    assert jobs.get(database, lease.job_id).progress == told


@pytest.mark.parametrize(("script", "code"), [("raise KeyError('last words')", "engine_failed"), ("import os; os.kill(os.getpid(), 9)", "worker_lost")])
def test_a_crash_may_be_tried_again(heart: Heartbeat, script: str, code: str) -> None:
    outcome = run(heart, script)
    assert outcome.kind == "crashed"
    assert outcome.error is not None
    assert outcome.error["code"] == code
    assert ("last words" in outcome.said) == (code == "engine_failed")


def test_exit_2_without_a_reason_is_a_crash(heart: Heartbeat) -> None:
    assert run(heart, "import sys; sys.exit(2)").kind == "crashed"


def test_a_child_that_runs_too_long_is_ended(heart: Heartbeat) -> None:
    outcome = run(heart, "import time; time.sleep(60)", seconds=0.5)
    assert outcome.kind == "failed"
    assert outcome.error is not None
    assert outcome.error["code"] == "max_runtime_exceeded"


def test_memory_counts_with_what_the_child_started_and_without_mapped_files(heart: Heartbeat, tmp_path: Path) -> None:
    mapped = tmp_path / "mapped"
    mapped.write_bytes(bytes(200_000_000))
    script = """
import mmap, subprocess, sys, time
if sys.argv[1] == "map":
    with open(sys.argv[2], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        sum(view[start] for start in range(0, len(view), 4096))
        time.sleep(1)
else:
    subprocess.run([sys.executable, "-c", "import time; held = bytearray(b'x') * 200_000_000; time.sleep(60)"])
"""
    assert run(heart, script, "map", str(mapped), memory_bytes=120_000_000).kind == "succeeded"
    began = time.monotonic()
    outcome = run(heart, script, "allocate", memory_bytes=120_000_000)
    assert outcome.error is not None
    assert outcome.error["code"] == "out_of_memory"
    assert time.monotonic() - began < 50


def test_a_cancel_ends_a_child_that_does_not_listen_and_its_children(database: Database, lease: Lease, heart: Heartbeat, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"])
with open(sys.argv[1], "w") as file: file.write(f"{os.getpid()} {child.pid}")
time.sleep(60)
"""

    def cancel_later() -> float:
        jobs.wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2, 60, "the children")
        asked = time.monotonic()
        jobs.cancel(database, lease.job_id)
        return asked

    with ThreadPoolExecutor(1) as pool:
        cancelled = pool.submit(cancel_later)
        outcome = run(heart, script, str(pids), grace_seconds=2)
    assert outcome.kind == "cancelled"
    assert 2 <= time.monotonic() - cancelled.result() < 50
    family = [int(pid) for pid in pids.read_text().split()]
    jobs.wait_until(lambda: not any(map(alive, family)), 60, "the end of the children")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_lost_lease_ends_the_child(database: Database, lease: Lease, heart: Heartbeat) -> None:
    with database.writing() as session:
        session.execute(update(Job).values(lease_token=9))
    began = time.monotonic()
    assert run(heart, "import time; time.sleep(60)").kind == "lost"
    assert time.monotonic() - began < 50
    assert jobs.events(database, lease.job_id) == ["queued", "claimed"]


def test_a_shutdown_ends_the_child(database: Database, lease: Lease) -> None:
    with make_heart(database, lease, draining=lambda: True) as heart:
        assert run(heart, "import time; time.sleep(60)").kind == "draining"


def test_a_database_outage_shorter_than_the_lease_changes_nothing(database: Database, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, back = database.writing, time.monotonic() + 3

    def failing() -> Any:
        if time.monotonic() < back:
            raise OperationalError("UPDATE", None, ConnectionError("the server is away"))
        return writing()

    monkeypatch.setattr(database, "writing", failing)
    script = 'import time; print(\'{"event": "log", "message": "said during the outage"}\', flush=True); time.sleep(4)'
    with make_heart(database, lease) as heart:
        assert run(heart, script).kind == "succeeded"
    assert "said during the outage" in jobs.messages(database, lease.job_id)


def test_a_database_outage_longer_than_the_lease_ends_the_child(database: Database, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> Any:
        raise OperationalError("UPDATE", None, ConnectionError("the server is away"))

    monkeypatch.setattr(database, "writing", failing)
    began = time.monotonic()
    with make_heart(database, lease, lease_seconds=6) as heart:
        assert run(heart, "import time; time.sleep(60)").kind == "lost"
    assert 5 < time.monotonic() - began < 50


def test_a_child_dies_with_its_supervisor(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    supervisor = """
import sys, time
from pathlib import Path
from app.database import Database
from app.jobs.lease import claim
from tests import jobs
from worker.heartbeat import Heartbeat
from worker.supervisor import supervise
database = jobs.open_database(f"sqlite:///{sys.argv[1]}/jobs.db")
job_id = jobs.submit(database)
with database.writing() as session:
    lease = claim(session, job_id, "worker", 30)
child = [sys.executable, "-c", "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)", f"{sys.argv[1]}/pid"]
with Heartbeat(database, lease, claimed_at=time.monotonic(), lease_seconds=30, beat_seconds=1) as heart:
    supervise(child, heart, deadline=time.monotonic() + 60, grace_seconds=5)
"""
    with subprocess.Popen([sys.executable, "-c", supervisor, str(tmp_path)]) as process:
        jobs.wait_until(lambda: pid_file.exists() and pid_file.read_text(), 60, "the child")
        process.send_signal(signal.SIGKILL)
    pid = int(pid_file.read_text())
    jobs.wait_until(lambda: not alive(pid), 60, "the child's end")


def test_a_child_that_never_stops_talking_neither_blocks_nor_floods(database: Database, lease: Lease, heart: Heartbeat) -> None:
    script = """
import json, sys, time
line = json.dumps({"event": "log", "message": "x" * 50}) + "\\n"
end = time.monotonic() + 3
while time.monotonic() < end: sys.stdout.write(line)
sys.stdout.write("y" * 5_000_000)
"""
    began = time.monotonic()
    assert run(heart, script).kind == "succeeded"
    assert time.monotonic() - began < 100
    heart.stop()
    assert len(jobs.events(database, lease.job_id)) == MAX_EVENTS + 2
    assert jobs.messages(database, lease.job_id)[-1] == "This attempt's further events are left out."


def test_a_command_that_can_not_be_started_is_an_error(heart: Heartbeat) -> None:
    with pytest.raises(FileNotFoundError):
        supervise(["/there/is/no/such/command"], heart, deadline=time.monotonic() + 5, grace_seconds=1)


def test_memory_of_a_process_that_is_gone_is_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert anonymous_bytes_of_family(process.pid) == 0
    assert anonymous_bytes_of_family(os.getpid()) > 1_000_000
