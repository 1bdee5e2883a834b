"""A checkpoint as one tar: whole, resumed after cuts, and damaged; and whatever a tar may hold that the manifest does not tell of."""

from __future__ import annotations

import asyncio
import hashlib
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from espalier.answers import ArtifactFile
from espalier.downloading import DownloadedTar
from espalier.errors import DownloadError, UnreachableError
from espalier.tar import TarCheck, TarTarget
from tests.espalier.conftest import Service
from tests.espalier.proxy import proxy
from tests.espalier.test_download import FILES, WEIGHTS

JOB = f"job_{1:032x}"
Fetch = Callable[..., DownloadedTar]


def blocking(service: Service, job_id: str, path: Path, url: str | None = None, **more: Any) -> DownloadedTar:
    with service.client(url) as client:
        return client.download_tar(job_id, path, **more)


def awaited(service: Service, job_id: str, path: Path, url: str | None = None, **more: Any) -> DownloadedTar:
    async def fetch() -> DownloadedTar:
        async with service.async_client(url) as client:
            return await client.download_tar(job_id, path, **more)

    return asyncio.run(fetch())


def contents(path: Path, job_id: str) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name.replace(job_id, "checkpoint"): tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]  # all are files


CHECKPOINT = {name: content for name, content in FILES.items() if name != "report.json"}


@pytest.mark.parametrize("fetch", [blocking, awaited])
def test_a_tar_comes_whole_and_is_kept(service: Service, tmp_path: Path, fetch: Fetch) -> None:
    job_id = service.job_with(FILES)
    told: dict[str, int] = {}

    def on_bytes(artifact: ArtifactFile, have: int) -> None:
        assert have >= told.get(artifact["path"], 0)
        told[artifact["path"]] = have

    with proxy(service.port) as network:
        fetched = fetch(service, job_id, tmp_path / "new/all.tar", network.url, on_bytes=on_bytes)
        assert (fetched.resumed_at, len(fetched.artifacts)) == (0, 3)
        network.requests.clear()
        again = fetch(service, job_id, tmp_path / "new/all.tar", network.url)
        assert again.resumed_at == (tmp_path / "new/all.tar").stat().st_size
        assert not any(b"/checkpoint" in request for request in network.requests)
    assert contents(tmp_path / "new/all.tar", job_id) == CHECKPOINT
    assert told == {name: len(content) for name, content in CHECKPOINT.items()}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["all.tar"]


@pytest.mark.parametrize("fetch", [blocking, awaited])
def test_a_cut_tar_is_resumed_by_this_call_and_by_a_later_one(service: Service, tmp_path: Path, fetch: Fetch) -> None:
    job_id = service.job_with(FILES)
    path, part = tmp_path / "all.tar", tmp_path / f"all.tar.{job_id}.part"
    with proxy(service.port) as network:
        network.cut_after = 1_000_000
        with pytest.raises(UnreachableError, match=job_id):
            fetch(service, job_id, path, network.url, patience=0)
        stopped_at = part.stat().st_size
        assert 0 < stopped_at < 1_000_000
        assert not path.exists()
        network.requests.clear()
        assert fetch(service, job_id, path, network.url).resumed_at == stopped_at
        ranges = [line for request in network.requests for line in request.split(b"\r\n") if line.startswith(b"Range:")]
    assert ranges[0] == f"Range: bytes={stopped_at}-".encode()
    assert len(ranges) >= 2
    assert contents(path, job_id) == CHECKPOINT
    assert fetch(service, job_id, path, resume=False).resumed_at == path.stat().st_size


def test_a_flipped_byte_is_found_in_the_store_and_in_the_part(service: Service, tmp_path: Path) -> None:
    job_id = service.job_with(FILES)
    path, part = tmp_path / "all.tar", tmp_path / f"all.tar.{job_id}.part"
    blocking(service, job_id, path)
    whole = path.read_bytes()
    path.unlink()
    part.write_bytes(whole[:100_000] + b"?" + whole[100_001:])
    with pytest.raises(DownloadError, match=r"'checkpoint/model.safetensors' of job_\w+ is damaged"):
        blocking(service, job_id, path)
    assert not part.exists()
    part.write_bytes(whole)
    assert blocking(service, job_id, path).resumed_at == len(whole)
    path.write_bytes(whole[:-1])
    assert blocking(service, job_id, path).resumed_at == 0
    (stored,) = (service.home / "objects").rglob(f"{job_id}/*/checkpoint/model.safetensors")
    stored.write_bytes(WEIGHTS[:1_234_567] + b"?" + WEIGHTS[1_234_568:])
    path.unlink()
    with pytest.raises(DownloadError, match=r"'checkpoint/model.safetensors' of job_\w+ is damaged"):
        blocking(service, job_id, path)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ the check


def manifest(files: dict[str, bytes]) -> list[ArtifactFile]:
    return [
        {"path": f"checkpoint/{name}", "role": "checkpoint", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    ]


def tar_of(files: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    made = BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{JOB}/{name}")
            entry.size, entry.type = len(content), kind
            tar.addfile(entry, BytesIO(content))
    return made.getvalue()


SMALL = {"config.json": b"{}", "empty.txt": b"", "block.bin": bytes(512), "x" * 120 + "é.bin": b"a long name has a header of its own"}


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 10_240, 10**6])
def test_a_tar_may_come_in_chunks_of_any_size(size: int) -> None:
    tar, check = tar_of(SMALL), TarCheck(JOB, manifest(SMALL))
    reached: dict[str, int] = {}
    for start in range(0, len(tar), size):
        assert not check.ended
        reached |= {artifact["path"]: have for artifact, have in check.add(tar[start : start + size])}
    assert check.ended
    assert reached == {f"checkpoint/{name}": len(content) for name, content in SMALL.items() if content}
    with pytest.raises(DownloadError, match="goes on after its end"):
        check.add(b"\0")


@pytest.mark.parametrize(
    ("tar", "told"),
    [
        (tar_of(SMALL | {"more.txt": b"?"}), r"more\.txt', which the manifest has not"),
        (tar_of({"../../outside": b"?"}), "which the manifest has not"),
        (tar_of(SMALL, tarfile.SYMTYPE), "which the manifest has not"),
        (tar_of({**SMALL, "config.json": b"[]"}), r"'checkpoint/config\.json' of job_\w+ is damaged"),
        (tar_of({**SMALL, "config.json": b"{ }"}), "with 3 bytes, the manifest says 2"),
        (tar_of({"config.json": b"{}"}), r"lacks 'job_\w+/block\.bin'"),
        (tar_of(SMALL) + bytes(512), "goes on after its end"),
        (b"not a tar" * 1000, "is no tar"),
        (tar_of({"x" * 2_000_000: b""}), "too large"),
    ],
    ids=["more", "outside", "link", "content", "size", "lacks", "longer", "garbage", "header"],
)
def test_what_is_not_as_in_the_manifest_is_refused(tar: bytes, told: str) -> None:
    with pytest.raises(DownloadError, match=told):
        TarCheck(JOB, manifest(SMALL)).add(tar)


def test_a_tar_that_ends_too_early_is_not_put_into_its_place(tmp_path: Path) -> None:
    target = TarTarget(tmp_path / "all.tar", JOB, manifest(SMALL))
    target.part.write_bytes(tar_of(SMALL)[:-1])
    target.begin(resume=True)
    assert not target.is_whole
    with pytest.raises(DownloadError, match="ended before all of its files had come"):
        target.finish(JOB)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_cannot_lead_outside(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="outside"):
        TarTarget(tmp_path / "all.tar", JOB, manifest({"../../x": b""}))
