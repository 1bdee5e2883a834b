"""A stand-in for the engine where a test is about the processes around it: the same command line and the same events, a pause instead of work.

How it behaves is written in `behaviour.json` in the source folder: `steps` and `pause` (seconds each), `at` (the step at which it misbehaves) and one of
`kill` (a signal that it sends itself), `exit`, `error`, `allocate` (bytes), `deaf` (to SIGTERM), `talk` (lines);
`stuck` makes a result that takes for ever to upload.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def say(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def misbehave(behaviour: dict[str, Any]) -> int | None:
    if "kill" in behaviour:
        os.kill(os.getpid(), behaviour["kill"])
    if "error" in behaviour:
        say(event="error", **behaviour["error"])
        return 2
    if "allocate" in behaviour:
        held = bytearray(os.urandom(1)) * behaviour["allocate"]
        time.sleep(60)
        del held
    if "talk" in behaviour:
        for number in range(behaviour["talk"]):
            say(event="log", message=f"line {number}")
    if "exit" in behaviour:
        sys.stderr.write("the last words\n")
        return int(behaviour["exit"])
    return None


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("recipe", "source", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--text", nargs=2, action="append")
    parser.add_argument("--memory", type=int)
    asked = parser.parse_args()
    behaviour = json.loads((asked.source / "behaviour.json").read_text())
    if behaviour.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    asked.work.mkdir(parents=True, exist_ok=True)
    state = asked.work / "state"
    done = int(state.read_text()) if state.exists() else 0
    say(event="phase", phase="prune")
    say(event="log", message=f"begins at step {done}")
    steps = behaviour.get("steps", 3)
    for step in range(done, steps):
        if step == behaviour.get("at", 0) and (code := misbehave(behaviour)) is not None:
            return code
        time.sleep(behaviour.get("pause", 0.05))
        state.with_suffix(".new").write_text(str(step + 1))
        state.with_suffix(".new").replace(state)
        say(event="progress", phase="prune", done=step + 1, total=steps, fraction=(step + 1) / steps)
    (asked.out / "checkpoint").mkdir(parents=True, exist_ok=True)
    (asked.out / "checkpoint" / "model.safetensors").write_bytes(b"weights")
    if behaviour.get("stuck"):
        os.mkfifo(asked.out / "checkpoint" / "never-written")
    (asked.out / "report.json").write_text(json.dumps({"steps": steps}))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        say(event="error", code="disk_full", message="full", hint="")
        sys.exit(2)
