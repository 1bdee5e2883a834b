"""A checkpoint as one uncompressed tar, laid out from the manifest alone, so that any span of it can be served without having made the rest."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from app.files import File
from app.models import Artifact, Job
from app.storage import Store


@dataclass(frozen=True)
class Segment:
    """A stretch of the tar: bytes given here, or an object of the store."""

    size: int
    content: bytes = b""
    key: str = ""


def checkpoint_tar(job: Job, artifacts: Sequence[Artifact], store: Store) -> File:
    """The files of role `checkpoint` in a folder named like the job."""
    assert job.finished_at is not None
    assert job.artifact_prefix is not None
    artifacts = [artifact for artifact in artifacts if artifact.role == "checkpoint"]
    segments = lay_out(job.id, artifacts, job.artifact_prefix, int(job.finished_at.timestamp()))
    digest = hashlib.sha256()
    for segment in segments:
        digest.update(segment.content)
    for artifact in artifacts:
        digest.update(artifact.sha256.encode())
    return File(
        name=f"{job.id}.tar",
        size=sum(segment.size for segment in segments),
        sha256=digest.hexdigest(),
        media_type="application/x-tar",
        read=lambda start, end: read(segments, store, start, end),
    )


def lay_out(folder: str, artifacts: Sequence[Artifact], prefix: str, modified: int) -> list[Segment]:
    """Headers, files and padding in order; the end is padded to a full record, as tar does."""
    segments: list[Segment] = []
    for artifact in artifacts:
        entry = tarfile.TarInfo(f"{folder}/{PurePosixPath(artifact.path).relative_to('checkpoint')}")
        entry.size, entry.mtime, entry.mode = artifact.bytes, modified, 0o644
        header = entry.tobuf(tarfile.PAX_FORMAT)
        segments += [Segment(len(header), content=header), Segment(artifact.bytes, key=prefix + artifact.path), _zeros(-artifact.bytes % tarfile.BLOCKSIZE)]
    length = sum(segment.size for segment in segments) + 2 * tarfile.BLOCKSIZE
    return [*segments, _zeros(2 * tarfile.BLOCKSIZE + -length % tarfile.RECORDSIZE)]


def read(segments: Sequence[Segment], store: Store, start: int, end: int) -> Iterator[bytes]:
    position = 0
    for segment in segments:
        low, high = max(start - position, 0), min(end - position, segment.size)
        position += segment.size
        if low >= high:
            continue
        if segment.key:
            yield from store.get_range(segment.key, low, high)
        else:
            yield segment.content[low:high]


def _zeros(count: int) -> Segment:
    return Segment(count, content=bytes(count))
