"""Runs a step of a job as a child process: forwards what it says, and ends it when the lease is lost, a cancel comes, or time or memory run out.

A child says one JSON object a line on stdout: `phase`, `progress`, `log`, and `error` as its last line before exit 2. It has a process group of its own,
and it dies with this process.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import psutil

from app.processes import dies_with
from worker.heartbeat import Heartbeat, Interruption
from worker.memory import anonymous_bytes

POLL_SECONDS = 0.25
CHUNK_BYTES = 65536
LONGEST_LINE = 1_000_000  # bytes
TAIL_BYTES = 4000  # of stderr that are kept
PROGRESS_STEP = 0.05  # of the whole job, between two progress events

Kind = Literal["succeeded", "failed", "crashed"] | Interruption


@dataclass(frozen=True)
class Phase:
    """What a child did from one moment to another, in nanoseconds since the epoch."""

    name: str
    began: int
    ended: int

    @property
    def seconds(self) -> float:
        return max(0, self.ended - self.began) / 1e9


@dataclass(frozen=True)
class Outcome:
    """How a step ended. `failed` is final; after `crashed` another attempt may help."""

    kind: Kind
    error: dict[str, str] | None = None
    said: str = ""  # the end of the child's stderr
    phases: Sequence[Phase] = ()


def supervise(
    command: Sequence[str],
    heart: Heartbeat,
    *,
    deadline: float,
    grace_seconds: float,
    memory_bytes: int = 0,
    environment: Mapping[str, str] | None = None,
    keep_open: Sequence[int] = (),
) -> Outcome:
    """Run `command` to its end, or to ours.

    deadline: by time.monotonic(). grace_seconds: between SIGTERM and SIGKILL. memory_bytes: anonymous memory of the child and what it started; 0: no limit.
    keep_open: file descriptors that the child inherits, so that a lock is held for as long as it lives.
    """
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        process_group=0,
        pass_fds=keep_open,
        env=environment,
        preexec_fn=dies_with(os.getpid()),  # noqa: PLW1509  it makes one system call
    )
    assert child.stdout is not None
    assert child.stderr is not None
    with child, selectors.DefaultSelector() as pipes:
        listener = _Listener(heart)
        for pipe, hear in ((child.stdout, listener.hear), (child.stderr, listener.overhear)):
            os.set_blocking(pipe.fileno(), False)
            pipes.register(pipe, selectors.EVENT_READ, hear)
        try:
            ended = None
            while ended is None and not _exited(child):
                _read(pipes, POLL_SECONDS)
                ended = _reason_to_end(child, heart, deadline, memory_bytes)
            if ended is not None:
                _end(child, pipes, grace_seconds)
        finally:
            _kill_group(child)
            status = child.wait()
        _read(pipes, 0)
    listener.end_phase()
    return replace(ended or _judge(status, listener), phases=listener.phases)


# ------------------------------------------------------------- what the child says


class _Listener:
    def __init__(self, heart: Heartbeat) -> None:
        self._heart = heart
        self._line = b""
        self._stderr = b""
        self._first: tuple[float, float] | None = None  # time and fraction of the first progress
        self._event_at = 0.0  # fraction, of the job or of the upload, at which the next progress event is due
        self._counts: dict[str, Any] = {}
        self._phase: tuple[str, int] | None = None  # the one that goes on, and when it began
        self.phases: list[Phase] = []
        self.error: dict[str, str] | None = None

    @property
    def said(self) -> str:
        return self._stderr.decode(errors="replace").strip()

    def hear(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        self._line = self._line[:LONGEST_LINE]
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                self._take(event)
            else:
                self.overhear(line + b"\n")

    def overhear(self, data: bytes) -> None:
        self._stderr = (self._stderr + data)[-TAIL_BYTES:]

    def _take(self, event: dict[str, Any]) -> None:
        match event:
            case {"event": "phase", "phase": str(phase)}:
                self.end_phase()
                self._phase = phase, time.time_ns()
                self._heart.enter_phase(phase)
            case {"event": "progress", "phase": str(), "done": int(), "total": int(), "fraction": float() | int()}:
                self._progress(event)
            case {"event": "progress", "phase": "upload", "done": int(done), "total": int(total), "eta_seconds": float(eta)}:
                self._stored(done, total, eta)
            case {"event": "log", "message": str(message)}:
                self._heart.tell("log", message)
            case {"event": "error", "code": str(code), "message": str(message)}:
                self.error = {"code": code, "message": message, "hint": str(event.get("hint", ""))}

    def end_phase(self) -> None:
        if self._phase is not None:
            self.phases.append(Phase(*self._phase, time.time_ns()))
            self._phase = None

    def _progress(self, event: dict[str, Any]) -> None:
        now, phase, fraction = time.monotonic(), event["phase"], float(event["fraction"])
        counted = "masks" if "round" in event else {"prune": "blocks", "recover": "steps"}.get(phase)
        if counted is not None:
            self._counts = {f"{counted}_done": event["done"], f"{counted}_total": event["total"]}
            self._counts |= {name: event[name] for name in ("round", "rounds", "loss", "tokens_per_second") if name in event}
        progress: dict[str, Any] = {"fraction": fraction, **self._counts}
        if self._first is None:
            self._first = now, fraction
        began, began_at = self._first
        if "eta_seconds" in event:  # the engine knows what its sub-models and steps take
            progress["eta_seconds"] = event["eta_seconds"]
        elif fraction - began_at > PROGRESS_STEP:
            progress["eta_seconds"] = round((now - began) * (1 - fraction) / (fraction - began_at), 1)
        self._heart.progress(progress)
        if fraction >= self._event_at:
            self._event_at = fraction + PROGRESS_STEP
            self._heart.tell("progress", f"{fraction:.0%} done.", {"phase": phase, **progress})

    def _stored(self, done: int, total: int, eta_seconds: float) -> None:
        """The upload counts bytes; it is no share of the job's fraction, which the engine has brought to its end."""
        progress = {"fraction": 1.0} | self._heart.last_progress | {"bytes_done": done, "bytes_total": total, "eta_seconds": eta_seconds}
        self._heart.progress(progress)
        if done >= self._event_at * total:
            self._event_at = done / total + PROGRESS_STEP
            self._heart.tell("progress", f"{done / 1e6:.1f} of {total / 1e6:.1f} MB stored.", {"phase": "upload", **progress})


def _read(pipes: selectors.BaseSelector, seconds: float) -> None:
    """Hear what there is, waiting up to `seconds` for the first of it."""
    for key, _ in pipes.select(seconds):
        pipe: Any = key.fileobj
        for _ in range(100):  # a child that never stops talking must not keep us from looking at the rest
            try:
                data = os.read(pipe.fileno(), CHUNK_BYTES)
            except BlockingIOError:
                break
            if not data:
                pipes.unregister(pipe)
                break
            key.data(data)


# ------------------------------------------------------------------ how it ends


def _reason_to_end(child: subprocess.Popen[bytes], heart: Heartbeat, deadline: float, memory_bytes: int) -> Outcome | None:
    interruption = heart.interruption()
    if interruption is not None:
        return Outcome(interruption)
    if time.monotonic() > deadline:
        error = {
            "code": "max_runtime_exceeded",
            "message": "The job ran longer than limits.max_runtime, all attempts together.",
            "hint": "Raise limits.max_runtime, or ask for less.",
        }
        return Outcome("failed", error)
    if memory_bytes and anonymous_bytes_of_family(child.pid) > memory_bytes:
        gigabytes = f"{memory_bytes / 1e9:.2f} GB"
        hint = "Use fewer or shorter calibration samples, a smaller model, or a larger worker."
        return Outcome("failed", {"code": "out_of_memory", "message": f"The engine needed more than the {gigabytes} that this worker allows.", "hint": hint})
    return None


def _judge(status: int, listener: _Listener) -> Outcome:
    if status == 0:
        return Outcome("succeeded", said=listener.said)
    if status == 2 and listener.error is not None:
        return Outcome("failed", listener.error, listener.said)
    if status < 0:
        error = {
            "code": "worker_lost",
            "message": f"The engine was killed by signal {-status} ({signal.strsignal(-status)}).",
            "hint": "Most often memory ran out: use fewer calibration samples, a smaller model or a larger worker.",
        }
    else:
        hint = "The job's events show what it said last; if the model loads in transformers, report it with the recipe."
        error = {"code": "engine_failed", "message": f"The engine ended with exit status {status}.", "hint": hint}
    return Outcome("crashed", error, listener.said)


def _end(child: subprocess.Popen[bytes], pipes: selectors.BaseSelector, grace_seconds: float) -> None:
    os.killpg(child.pid, signal.SIGTERM)
    give_up = time.monotonic() + grace_seconds
    while time.monotonic() < give_up and not _exited(child):
        _read(pipes, min(POLL_SECONDS, grace_seconds))


def _exited(child: subprocess.Popen[bytes]) -> bool:
    """Without reaping it, so that its process group still is its own."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """The child and whatever it started."""
    os.killpg(child.pid, signal.SIGKILL)


def anonymous_bytes_of_family(pid: int) -> int:
    """Memory that a process and its descendants hold and that no file backs."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    return sum(anonymous_bytes(member.pid) for member in family)
