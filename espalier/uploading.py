"""What an upload consists of, apart from HTTP: the files of a folder with their hashes, and of each the parts that are still to be sent."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from espalier.answers import Checkpoint, CheckpointFile

KINDS = (".safetensors", ".json", ".txt", ".model", ".jinja")
CHUNK_BYTES = 2**20  # that are read and sent at once


class DeclaredFile(TypedDict):
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """A stretch of a file, to be sent as one body."""

    file: Path
    number: int
    begin: int
    size: int

    def read(self) -> Iterator[bytes]:
        with self.file.open("rb") as stream:
            stream.seek(self.begin)
            left = self.size
            while left and (chunk := stream.read(min(CHUNK_BYTES, left))):
                left -= len(chunk)
                yield chunk

    def headers(self) -> dict[str, str]:
        """Its length and hash; reads it once."""
        digest = hashlib.sha256()
        for chunk in self.read():
            digest.update(chunk)
        value = base64.b64encode(digest.digest()).decode()
        return {"Content-Length": str(self.size), "Content-Digest": f"sha-256=:{value}:", "Content-Type": "application/octet-stream"}


def declare(folder: Path) -> list[DeclaredFile]:
    """The files of a folder that a service takes: weights, configuration and tokenizer that lie in it, not below; reads all of them."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in KINDS and path.is_file() and path.stat().st_size)
    return [DeclaredFile(path=path.name, bytes=path.stat().st_size, sha256=_sha256(path)) for path in paths]


def name_of(folder: Path) -> str:
    """A name for the checkpoint that a service takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).lstrip("._-")[:96] or "checkpoint"


def is_same(checkpoint: Checkpoint, files: Sequence[DeclaredFile]) -> bool:
    """Whether a checkpoint was declared with just these files."""
    theirs = [(file["path"], file["bytes"], file["sha256"]) for file in checkpoint["files"]]
    return sorted(theirs) == sorted((file["path"], file["bytes"], file["sha256"]) for file in files)


def missing_parts(checkpoint: Checkpoint, file: CheckpointFile, folder: Path) -> list[Part]:
    size = checkpoint["part_bytes"]
    return [Part(folder / file["path"], number, number * size, min(size, file["bytes"] - number * size)) for number in file["missing"]]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
