"""Runs the engine as its own process and samples its memory from outside."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from app.recipe import Recipe

FIELDS = {"resident": "VmRSS", "anonymous": "RssAnon", "mapped": "RssFile"}
KINDS = (*FIELDS, "family")  # the last: anonymous, with that of the processes which the engine started
SAMPLE_SECONDS = 0.01


def watch(recipe: Recipe, model: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Prune `model` into `folder`: highest bytes by phase and in all, of each kind, the seconds of each phase, and what was checked of the result."""
    asked = folder / "recipe.json"
    asked.write_text(recipe.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "worker.pipeline", str(asked), str(model), str(folder / "out"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    phase, starts, peaks = "imports", {"imports": time.monotonic()}, {"imports": dict.fromkeys(KINDS, 0)}
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            peaks[phase] = _highest(peaks[phase], _sizes(process.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "phase":
                starts[event["phase"]], peaks[event["phase"]] = time.monotonic(), dict.fromkeys(KINDS, 0)
                phase = event["phase"]
            elif event["event"] == "error":
                print(event["message"], file=sys.stderr)
        code = process.wait()
    finally:
        stop.set()
        sampler.join()
        process.kill()
        process.wait()
    if code != 0:
        raise RuntimeError(f"the engine ended with {code}")
    ends = [*list(starts.values())[1:], time.monotonic()]
    peak = dict.fromkeys(KINDS, 0)
    for of_phase in peaks.values():
        peak = _highest(peak, of_phase)
    seconds = {name: end - start for (name, start), end in zip(starts.items(), ends, strict=True)}
    report = json.loads((folder / "out" / "report.json").read_text(encoding="utf-8"))
    return {"phases": peaks, "peak": peak, "seconds": seconds, "checked": report["loads_with"][0]["checked"]}


def _highest(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {kind: max(one[kind], other[kind]) for kind in KINDS}


def _sizes(pid: int) -> dict[str, int]:
    """Bytes of a process by kind; zeros once it has ended."""
    own = _fields(pid)
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except (FileNotFoundError, ProcessLookupError):
        children = []
    return own | {"family": own["anonymous"] + sum(_fields(int(child))["anonymous"] for child in children)}


def _fields(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return dict.fromkeys(FIELDS, 0)
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return {kind: sizes.get(field, 0) for kind, field in FIELDS.items()}
