"""What a walk over the blocks has finished, so that a killed job goes on at its last verified block."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.exceptions import EspalierError

ROUNDS = "rounds"  # the walk whose records are of rounds and not of blocks


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def needed_files(state: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """The files (path -> sha256) that a `state.json` goes on from: those that stay as they are, and those that the next blocks may write over."""
    walks: dict[str, list[dict[str, Any]]] = state["walks"]
    kept = {path: digest for blocks in walks.values() for block in blocks for path, digest in block["files"].items()}
    return kept, {path: digest for blocks in walks.values() for path, digest in blocks[-1]["next_inputs"].items()}


class WalkState:
    """`state.json` in the work directory: a fingerprint of everything that the result depends on, for each walk a record of every finished block, and figures.

    A record names the files that the block left (path relative to the work directory -> sha256) and the facts about it. What the next block reads is
    verified too. A figure is what was measured once and is not measured again.
    """

    def __init__(self, work: Path, fingerprint: str) -> None:
        self.work = work
        self.path = work / "state.json"
        self.fingerprint = fingerprint
        self._walks: dict[str, list[dict[str, Any]]] = {}
        self._figures: dict[str, Any] = {}
        self.refused: str | None = None  # why an earlier state was not gone on with

    @classmethod
    def open(cls, work: Path, fingerprint: str) -> WalkState:
        """The state to go on with; where it belongs to another job or fails a hash, all is removed, and `refused` says why.

        Raises EspalierError for a folder that holds files but no state: they are not this engine's to remove.
        """
        work.mkdir(parents=True, exist_ok=True)
        state = cls(work, fingerprint)
        if state.path.is_file():
            state.refused = state._load()
            if state.refused:
                state._clear()
                state._save()
            for half_written in work.rglob(".*"):  # by a process that died; safetensors gives each a name of its own
                half_written.unlink()
        else:
            if any(entry != state.path.with_suffix(".tmp") for entry in work.iterdir()):
                raise EspalierError(
                    f"The work directory {work} holds files of something else.", code="work_not_empty", hint="Name a new or an empty directory."
                )
            state._save()
        return state

    def remove(self) -> None:
        """Remove the work directory."""
        self._clear()
        self.path.unlink()
        self.work.rmdir()

    def _clear(self) -> None:
        """Remove all but `state.json`, which goes last: it tells a later attempt that the rest may go."""
        for entry in self.work.iterdir():
            if entry != self.path:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def blocks(self, walk: str) -> list[dict[str, Any]]:
        """The records of a walk, in the order of the blocks."""
        return self._walks.get(walk, [])

    @property
    def finished(self) -> int:
        """Blocks finished in all walks."""
        return sum(len(blocks) for walk, blocks in self._walks.items() if walk != ROUNDS)

    @property
    def finished_rounds(self) -> int:
        return len(self.blocks(ROUNDS))

    def _load(self) -> str | None:
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            fingerprint, walks, figures = stored["fingerprint"], dict(stored["walks"]), dict(stored["figures"])
        except (ValueError, KeyError, TypeError):
            return "its state can't be read"
        if fingerprint != self.fingerprint:
            return "the model, the recipe, the text or the code is another one"
        kept, written_over = needed_files(stored)
        for path, digest in (kept | written_over).items():
            if not (self.work / path).is_file() or sha256_of(self.work / path) != digest:
                return f"{path} is damaged"
        self._walks, self._figures = walks, figures
        return None

    def finish_block(self, walk: str, files: Sequence[Path], facts: dict[str, Any], next_inputs: Sequence[Path] = ()) -> None:
        """Record a block whose files are whole; `next_inputs` are files that the next block reads and may write over."""
        self._walks.setdefault(walk, []).append({"files": self._digests(files), "facts": facts, "next_inputs": self._digests(next_inputs)})
        self._save()

    def _digests(self, files: Sequence[Path]) -> dict[str, str]:
        return {str(file.relative_to(self.work)): sha256_of(file) for file in files}

    def forget(self, kind: str) -> None:
        """Have the figures whose names begin so measured again."""
        self._figures = {name: value for name, value in self._figures.items() if not name.startswith(kind)}
        self._save()

    def figure(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gives (JSON), or gave in an earlier attempt."""
        if name not in self._figures:
            self._figures[name] = measure()
            self._save()
        return self._figures[name]

    def has_figure(self, name: str) -> bool:
        return name in self._figures

    def _save(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump({"fingerprint": self.fingerprint, "walks": self._walks, "figures": self._figures}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self.path)
