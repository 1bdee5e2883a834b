"""What a download consists of, apart from HTTP: where a file of a manifest goes, how much of it is there, and whether it is right."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from espalier.answers import ArtifactFile
from espalier.errors import DownloadError

Progress = list[tuple[ArtifactFile, int]]  # how many bytes of which files are there


@dataclass(frozen=True)
class Downloaded:
    """A file that was fetched and verified; `resumed_at` is the byte from which this call went on."""

    path: Path
    artifact: ArtifactFile
    resumed_at: int


@dataclass(frozen=True)
class DownloadedTar:
    """A tar of a checkpoint that was fetched, the files in it verified; `resumed_at` is the byte from which this call went on."""

    path: Path
    artifacts: list[ArtifactFile]
    resumed_at: int


@dataclass(frozen=True)
class Target:
    """Where a file of the manifest goes, and where it lies until all of it has come and is right."""

    artifact: ArtifactFile
    path: Path
    part: Path

    @classmethod
    def below(cls, folder: Path, artifact: ArtifactFile) -> Target:
        """Raises DownloadError for a path that leads out of the folder."""
        path = folder.joinpath(*parts_of(artifact))
        # The name holds the hash, so that a part is never continued with the bytes of another file.
        return cls(artifact, path, path.with_name(f"{path.name}.{artifact['sha256'][:16]}.part"))

    @property
    def name(self) -> str:
        return f"'{self.artifact['path']}'"

    @property
    def etag(self) -> str:
        return f'"{self.artifact["sha256"]}"'

    @property
    def artifacts(self) -> list[ArtifactFile]:
        return [self.artifact]

    @property
    def is_there(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.artifact["bytes"] and _sha256(self.path) == self.artifact["sha256"]

    @property
    def is_whole(self) -> bool:
        return self.have >= self.artifact["bytes"]

    @property
    def have(self) -> int:
        """Bytes of the part."""
        return self.part.stat().st_size

    def begin(self, *, resume: bool) -> int:
        """Make room for what will come; how much has come before."""
        make_room(self.part, keep=resume)
        if self.have > self.artifact["bytes"]:
            make_room(self.part, keep=False)
        return self.have

    def add(self, file: IO[bytes], chunk: bytes) -> Progress:
        """Write a chunk to the part."""
        file.write(chunk)
        return [(self.artifact, file.tell())]

    def finish(self, job_id: str) -> None:
        """Put a whole part into its place. Raises DownloadError for one that is not what the manifest says, and deletes it."""
        size, wanted = self.have, self.artifact["bytes"]
        found = _sha256(self.part)
        if found == self.artifact["sha256"]:
            self.part.replace(self.path)
            return
        self.part.unlink()
        if size != wanted:
            told = f"{self.name} of {job_id} came with {size} bytes, the manifest says {wanted}."
            raise DownloadError(f"{told} What was fetched of it is deleted; download again.")
        raise damaged(job_id, self.artifact, found)


def targets(folder: Path, artifacts: Collection[ArtifactFile], roles: Collection[str]) -> list[Target]:
    """Those of some roles, or all."""
    return [Target.below(folder, artifact) for artifact in artifacts if not roles or artifact["role"] in roles]


def parts_of(artifact: ArtifactFile) -> tuple[str, ...]:
    """The path of a file in its parts. Raises DownloadError for one that leads out of a folder."""
    name = artifact["path"]
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise DownloadError(f"The manifest names the file '{name}', which would lie outside the target folder; nothing is written.")
    return parts


def make_room(part: Path, *, keep: bool) -> None:
    """See that there is a part to write to, with what it holds or empty."""
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    if not keep:
        part.write_bytes(b"")


def damaged(job_id: str, artifact: ArtifactFile, found: str) -> DownloadError:
    told = f"'{artifact['path']}' of {job_id} is damaged: its sha256 is {found}, the manifest says {artifact['sha256']}."
    return DownloadError(f"{told} What was fetched of it is deleted; download again.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
