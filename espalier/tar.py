"""A checkpoint that comes as one tar: each file in it is compared with the manifest while it passes."""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Generator, Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import IO

from espalier.answers import ArtifactFile
from espalier.downloading import Progress, damaged, make_room, parts_of
from espalier.errors import DownloadError

BLOCK = tarfile.BLOCKSIZE
FOLDER = "checkpoint/"
MAX_HEAD_BYTES = 2**20  # of what tells a file's name and size
CHUNK_BYTES = 2**20


class TarTarget:
    """Where the tar of a job's checkpoint goes, and where it lies until all of it has come and is right."""

    def __init__(self, path: Path, job_id: str, artifacts: Collection[ArtifactFile]) -> None:
        """Raises DownloadError for a manifest whose paths lead elsewhere."""
        self.path = path
        self.part = path.with_name(f"{path.name}.{job_id}.part")  # so that a part is never continued with the bytes of another job
        self.artifacts = [artifact for artifact in artifacts if artifact["role"] == "checkpoint" and parts_of(artifact)]
        self.name = f"The checkpoint of {job_id}"
        self.etag = None
        self._job_id = job_id
        self._check = TarCheck(job_id, self.artifacts)

    @property
    def is_there(self) -> bool:
        check = TarCheck(self._job_id, self.artifacts)
        try:
            for chunk in _chunks(self.path) if self.path.is_file() else ():
                check.add(chunk)
        except DownloadError:
            return False
        return check.ended

    @property
    def is_whole(self) -> bool:
        return self._check.ended

    @property
    def have(self) -> int:
        """Bytes of the part."""
        return self.part.stat().st_size

    def begin(self, *, resume: bool) -> int:
        """Make room for what will come; how much has come before, which is checked anew. Raises DownloadError where that is wrong, and deletes it."""
        make_room(self.part, keep=resume)
        self._check = TarCheck(self._job_id, self.artifacts)
        for chunk in _chunks(self.part):
            self._follow(chunk)
        return self.have

    def add(self, file: IO[bytes], chunk: bytes) -> Progress:
        """Write a chunk to the part. Raises DownloadError for a file that is not as in the manifest, and deletes the part."""
        file.write(chunk)
        return self._follow(chunk)

    def finish(self, job_id: str) -> None:
        """Put a whole part into its place. Raises DownloadError for one that ends too early, and deletes it."""
        if not self.is_whole:
            self.part.unlink()
            raise DownloadError(f"The tar of {job_id} ended before all of its files had come. What was fetched of it is deleted; download again.")
        self.part.replace(self.path)

    def _follow(self, chunk: bytes) -> Progress:
        try:
            return self._check.add(chunk)
        except DownloadError:
            self.part.unlink()
            raise


class TarCheck:
    """Reads a tar chunk by chunk, and holds no more of it than a header."""

    def __init__(self, job_id: str, artifacts: Collection[ArtifactFile]) -> None:
        self.ended = False
        self._job_id = job_id
        self._missing = {f"{job_id}/{artifact['path'].removeprefix(FOLDER)}": artifact for artifact in artifacts}
        self._rest = memoryview(b"")  # of the chunk
        self._seen = 0
        self._progress: Progress = []
        self._steps = self._read()
        next(self._steps)

    def add(self, chunk: bytes) -> Progress:
        """How far the files are of which this chunk has something. Raises DownloadError for what is not as in the manifest."""
        self._progress = []
        self._steps.send(chunk)
        return self._progress

    def _read(self) -> Generator[None, bytes, None]:
        while any(block := (yield from self._take(BLOCK))):
            yield from self._compare((yield from self._member(block)))
        if self._missing:
            raise self._wrong(f"lacks '{min(self._missing)}'")
        yield from self._take(-self._seen % tarfile.RECORDSIZE)
        self.ended = True
        yield from self._some(1)
        raise self._wrong("goes on after its end")

    def _member(self, block: bytes) -> Generator[None, bytes, tarfile.TarInfo]:
        """What follows, from its header; a long name or a large size has a header of its own before."""
        head = block
        try:
            while (more := tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")).type == tarfile.XHDTYPE:
                if len(head) + more.size > MAX_HEAD_BYTES:
                    raise self._wrong("has a header that is too large")
                head += yield from self._take(more.size + -more.size % BLOCK)
                block = yield from self._take(BLOCK)
                head += block
            with tarfile.open(fileobj=BytesIO(head), mode="r:") as tar:
                member = tar.next()
        except (tarfile.TarError, ValueError) as error:
            raise self._wrong("is no tar") from error
        assert member is not None
        return member

    def _compare(self, member: tarfile.TarInfo) -> Generator[None, bytes, None]:
        artifact = self._missing.pop(member.name, None)
        if artifact is None or not member.isreg():
            raise self._wrong(f"has '{member.name}', which the manifest has not")
        if member.size != artifact["bytes"]:
            raise self._wrong(f"has '{member.name}' with {member.size} bytes, the manifest says {artifact['bytes']}")
        digest, have = sha256(), 0
        while have < member.size:
            piece = yield from self._some(member.size - have)
            digest.update(piece)
            have += len(piece)
            self._progress.append((artifact, have))
        if digest.hexdigest() != artifact["sha256"]:
            raise damaged(self._job_id, artifact, digest.hexdigest())
        yield from self._take(-member.size % BLOCK)

    def _some(self, most: int) -> Generator[None, bytes, memoryview]:
        """Up to so many of the next bytes, at least one; waits for the next chunk where this one is read."""
        while not self._rest:
            self._rest = memoryview((yield))
        piece, self._rest = self._rest[:most], self._rest[most:]
        self._seen += len(piece)
        return piece

    def _take(self, size: int) -> Generator[None, bytes, bytes]:
        """Just so many of the next bytes."""
        taken = b""
        while len(taken) < size:
            taken += yield from self._some(size - len(taken))
        return taken

    def _wrong(self, what: str) -> DownloadError:
        return DownloadError(f"The tar of {self._job_id} {what}. What was fetched of it is deleted; download again.")


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
