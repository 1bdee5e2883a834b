"""Durable resume: what an engine has finished is stored while it runs, so that a job whose machine is lost goes on at another one.

    python -m worker.durable push FOLDER PREFIX TOKEN    as long as the engine runs; SIGTERM asks for a last time
    python -m worker.durable pull FOLDER PREFIX          before the engine starts, where another machine may know more of the job

FOLDER is the job's directory. Below PREFIX each attempt stores under its token, so that one that lost its lease spoils nothing: `objects/<sha256>`, and
`manifest.json`, which says what file each object is. The manifest goes last, and objects that the one before it named are deleted after that.

What a walk needs to go on are the files of its records and the latest hidden states; a training needs its parameters and its optimizer's moments.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import structlog

from app import logging
from app.exceptions import UnavailableError
from app.processes import dies_with
from app.settings import get_settings
from app.storage import Store, open_store
from worker.state import needed_files, sha256_of

ATTEMPT = "attempt"  # the token of the last attempt that ran the engine here
MODEL = "model.json"  # which version of the model the first attempt fetched
STATE = "work/state.json"
# A training's state goes on from parameters that are at least as new, so it comes first. Each file is renamed into place and never changes.
TRAINING = ("work/recovery/training.safetensors", "work/recovery/best.safetensors")
MANIFEST = "manifest.json"
COPIES = "push"  # folder, beside the work directory, for what the engine may write over
REST = 3  # times as long as it took to store a state, nothing is stored: the network and the disk are the engine's too
POLL_SECONDS = 0.2
LAST_PUSH_SECONDS = 60.0

log = structlog.get_logger(__name__)


class Moved(Exception):  # noqa: N818  the engine goes on meanwhile
    """A file is not any more what the state says."""


# ------------------------------------------------------------------- storing


@contextmanager
def pushing(folder: Path, prefix: str, token: int) -> Iterator[Callable[[], None]]:
    """Store what the engine finishes while this is entered, from a process of its own. What it yields stores the last state, for as long as that may take."""
    (folder / ATTEMPT).write_text(str(token), encoding="utf-8")
    command = [sys.executable, "-m", "worker.durable", "push", str(folder), prefix, str(token)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        preexec_fn=dies_with(os.getpid()),  # noqa: PLW1509  it makes one system call
    )

    def last_push() -> None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(LAST_PUSH_SECONDS)

    try:
        yield last_push
    finally:
        child.kill()
        child.wait()


def push_until_told(store: Store, folder: Path, prefix: str, token: int, least_seconds: float) -> None:
    """Store every state that there is time for, and when SIGTERM, which must be blocked, is pending, the last one."""
    stored: set[str] = set()
    seen: object = None
    told = False
    while True:
        began, rest = time.monotonic(), least_seconds
        try:
            now = _signature(folder)
            if now not in (None, seen):
                push(store, folder, prefix, token, stored)
                seen = now
        except (Moved, FileNotFoundError):
            rest = 0.0
        except (UnavailableError, OSError):
            log.exception("the state was not stored")
        if told:
            return
        told = signal.sigtimedwait([signal.SIGTERM], max(rest, POLL_SECONDS, REST * (time.monotonic() - began))) is not None


def _signature(folder: Path) -> object:
    """Another one whenever there is something new to store; None where the engine has no state yet."""
    found = [path.stat() for name in (STATE, *TRAINING) if (path := folder / name).is_file()]
    return [(status.st_ino, status.st_mtime_ns) for status in found] if (folder / STATE).is_file() else None


def push(store: Store, folder: Path, prefix: str, token: int, stored: set[str]) -> None:
    """Store the engine's state, as it is now, unless it has moved on: Moved or FileNotFoundError. `stored` are the sha256s of the objects that are there."""
    copies = folder / COPIES
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir()
    try:
        files = _snapshot(folder, copies)
        place = f"{prefix}{token}/"
        for path, digest in files.values():
            if digest not in stored:
                _, sent = store.put_file(f"{place}objects/{digest}", path)
                stored.add(digest)  # so that what is wrong is deleted, too
                if sent != digest:
                    raise Moved
        manifest = copies / MANIFEST
        manifest.write_text(json.dumps({name: digest for name, (_, digest) in files.items()}), encoding="utf-8")
        store.put_file(place + MANIFEST, manifest)
    finally:
        shutil.rmtree(copies, ignore_errors=True)
    wanted = {digest for _, digest in files.values()}
    if superseded := stored - wanted:
        store.delete([f"{place}objects/{digest}" for digest in superseded])
        stored &= wanted
    for earlier in _tokens(store, prefix):
        if earlier < token:
            store.delete_prefix(f"{prefix}{earlier}/")


def _snapshot(folder: Path, copies: Path) -> dict[str, tuple[Path, str]]:
    """Every file that a later attempt needs by its name below the folder: where it can be read at leisure, and its sha256."""
    state = copies / "state.json"
    os.link(folder / STATE, state)
    kept, written_over = needed_files(json.loads(state.read_text(encoding="utf-8")))
    files = {f"work/{name}": (folder / "work" / name, digest) for name, digest in kept.items()}
    for number, (name, digest) in enumerate(written_over.items()):
        copy = copies / f"inputs.{number}"
        shutil.copyfile(folder / "work" / name, copy)
        if sha256_of(copy) != digest:
            raise Moved
        files[f"work/{name}"] = copy, digest
    for name in TRAINING:
        if (folder / name).is_file():
            os.link(folder / name, copies / PurePosixPath(name).name)
            files[name] = copies / PurePosixPath(name).name, sha256_of(copies / PurePosixPath(name).name)
    if (folder / MODEL).is_file():
        files[MODEL] = folder / MODEL, sha256_of(folder / MODEL)
    files[STATE] = state, sha256_of(state)
    return files


# ------------------------------------------------------------------ fetching


def pull(store: Store, folder: Path, prefix: str) -> str | None:
    """Bring the latest state that was stored, if it is later than what this machine has; what there is to say of it. A damaged one is refused."""
    tokens = _tokens(store, prefix)
    if not tokens or tokens[-1] <= _last_here(folder):
        return None
    place, part = f"{prefix}{tokens[-1]}/", folder / "pull"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        store.get_file(part / MANIFEST, place + MANIFEST)
        manifest = _read_manifest(part / MANIFEST)
        for name, digest in manifest.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            if store.get_file(part / name, f"{place}objects/{digest}") != digest:
                raise ValueError(f"{name} is damaged")
    except (ValueError, FileNotFoundError) as error:
        log.warning("the stored state was refused", why=str(error))
        shutil.rmtree(part)
        return "What an earlier attempt stored of its state is damaged, and can't be gone on with."
    (part / MANIFEST).unlink()
    shutil.rmtree(folder / "work", ignore_errors=True)
    for path in sorted(part.iterdir()):  # the model's version, then the work directory at once
        path.rename(folder / path.name)
    part.rmdir()
    return "Has the state that an earlier attempt stored."


def worked_elsewhere(folder: Path, token: int) -> bool:
    """Whether another machine may know more of the job than this one, when attempt `token` begins."""
    return token > 1 and _last_here(folder) != token - 1


def _last_here(folder: Path) -> int:
    """The last attempt that ran the engine in this folder; 0: none."""
    mark = folder / ATTEMPT
    return int(mark.read_text(encoding="utf-8")) if mark.is_file() else 0


def _tokens(store: Store, prefix: str) -> list[int]:
    """Of the attempts that have stored a state, in their order."""
    found = [re.fullmatch(rf"{re.escape(prefix)}(\d+)/{MANIFEST}", entry.key) for entry in store.entries(prefix)]
    return sorted(int(match[1]) for match in found if match)


def _read_manifest(path: Path) -> dict[str, str]:
    """Names and sha256s. Raises ValueError."""
    manifest: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or STATE not in manifest:
        raise ValueError("the manifest is not whole")
    for name in manifest:
        if name != MODEL and (not name.startswith("work/") or ".." in PurePosixPath(name).parts):
            raise ValueError(f"the manifest names {name!r}")
    return manifest


# --------------------------------------------------------------- the command


def main(what: str, folder: Path, prefix: str, *token: str) -> int:
    if what == "push":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # before the store starts threads, which inherit it
    logging.configure()
    settings = get_settings()
    store = open_store(settings, patience_seconds=settings.store_patience_seconds)
    if what == "push":
        push_until_told(store, folder, prefix, int(token[0]), settings.resume_push_seconds)
        return 0
    try:
        said = pull(store, folder, prefix)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _say(event="error", code="disk_full", message="The state of the earlier attempt does not fit on the worker's disk.", hint="Free space in its home.")
        return 2
    if said:
        _say(event="log", message=said)
    return 0


def _say(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
