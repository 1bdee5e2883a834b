"""Downloads: whole, resumed after cuts, and damaged ones."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from espalier.answers import ArtifactFile
from espalier.downloading import targets
from espalier.errors import ApiError, DownloadError, UnreachableError
from tests.espalier.conftest import Service, running_service
from tests.espalier.proxy import proxy
from tests.servers import S3

WEIGHTS = random.Random(0).randbytes(3_000_000)
FILES = {"checkpoint/config.json": b"{}", "checkpoint/model.safetensors": WEIGHTS, "report.json": b'{"x": 1}', "checkpoint/empty.txt": b""}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def part_of(folder: Path, content: bytes = WEIGHTS) -> Path:
    """Where the unfinished weights lie."""
    return folder / f"checkpoint/model.safetensors.{hashlib.sha256(content).hexdigest()[:16]}.part"


def test_all_files_come(service: Service, tmp_path: Path) -> None:
    told: dict[str, int] = {}

    def on_bytes(artifact: ArtifactFile, have: int) -> None:
        told[artifact["path"]] = have

    with service.client() as client:
        job_id = service.job_with(FILES)
        files = client.download(job_id, tmp_path, on_bytes=on_bytes)
    assert contents(tmp_path) == FILES
    assert told == {name: len(content) for name, content in FILES.items()}
    assert {file.artifact["path"]: file.resumed_at for file in files} == dict.fromkeys(FILES, 0)


def test_roles_choose_files(service: Service, tmp_path: Path) -> None:
    with service.client() as client:
        client.download(service.job_with(FILES), tmp_path, roles=("report",))
    assert contents(tmp_path) == {"report.json": FILES["report.json"]}


def test_what_is_there_is_kept_and_what_is_wrong_is_replaced(service: Service, tmp_path: Path) -> None:
    job_id = service.job_with(FILES)
    with proxy(service.port) as network, service.client(network.url) as client:
        client.download(job_id, tmp_path)
        (tmp_path / "checkpoint/config.json").write_bytes(b"[]")
        network.requests.clear()
        client.download(job_id, tmp_path)
        assert [request.split()[1].decode() for request in network.requests] == [
            f"/v1/jobs/{job_id}/artifacts",
            f"/v1/jobs/{job_id}/artifacts/checkpoint/config.json",
        ]
    assert contents(tmp_path) == FILES


def test_a_cut_connection_is_resumed(service: Service, tmp_path: Path) -> None:
    job_id = service.job_with(FILES)
    with proxy(service.port) as network:
        network.cut_after = 1_100_000
        with service.client(network.url) as client:
            client.download(job_id, tmp_path)
        ranges = [line for request in network.requests for line in request.split(b"\r\n") if line.startswith(b"Range:")]
        conditions = [line for request in network.requests for line in request.split(b"\r\n") if line.startswith(b"If-Range:")]
    assert contents(tmp_path) == FILES
    assert len(ranges) == 2
    assert conditions == [f'If-Range: "{hashlib.sha256(WEIGHTS).hexdigest()}"'.encode()] * 2


def test_a_later_call_goes_on_where_an_earlier_one_stopped(service: Service, tmp_path: Path) -> None:
    job_id = service.job_with(FILES)
    with proxy(service.port) as network:
        network.cut_after = 1_000_000
        with service.client(network.url) as client, pytest.raises(UnreachableError, match=r"model\.safetensors"):
            client.download(job_id, tmp_path, patience=0)
    stopped_at = part_of(tmp_path).stat().st_size
    assert 0 < stopped_at < 1_000_000
    assert not (tmp_path / "checkpoint/model.safetensors").exists()
    with service.client() as client:
        files = client.download(job_id, tmp_path)
    assert {file.path.name: file.resumed_at for file in files}["model.safetensors"] == stopped_at
    assert contents(tmp_path) == FILES


def test_a_flipped_byte_in_the_store_is_found(service: Service, tmp_path: Path) -> None:
    job_id = service.job_with(FILES)
    (stored,) = (service.home / "objects").rglob(f"{job_id}/*/checkpoint/model.safetensors")
    damaged = bytearray(stored.read_bytes())
    damaged[1_234_567] ^= 1
    stored.write_bytes(damaged)
    with service.client() as client, pytest.raises(DownloadError, match=r"'checkpoint/model.safetensors' of job_\w+ is damaged"):
        client.download(job_id, tmp_path)
    assert "checkpoint/model.safetensors" not in contents(tmp_path)
    assert not part_of(tmp_path).exists()


def test_a_flipped_byte_in_the_part_is_found(service: Service, tmp_path: Path) -> None:
    job_id = service.job_with(FILES)
    part = part_of(tmp_path)
    part.parent.mkdir()
    part.write_bytes(b"?" + WEIGHTS[1:1000])
    with service.client() as client:
        with pytest.raises(DownloadError, match="damaged"):
            client.download(job_id, tmp_path)
        client.download(job_id, tmp_path)
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize("part", [WEIGHTS, WEIGHTS + b"more"], ids=["whole", "too long"])
def test_a_part_of_full_length_or_more(service: Service, tmp_path: Path, part: bytes) -> None:
    job_id = service.job_with(FILES)
    part_of(tmp_path).parent.mkdir()
    part_of(tmp_path).write_bytes(part)
    with service.client() as client:
        client.download(job_id, tmp_path)
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside", "C:outside", "a\\outside", ""])
def test_a_manifest_cannot_write_outside_the_folder(tmp_path: Path, name: str) -> None:
    artifact: ArtifactFile = {"path": name, "role": "checkpoint", "bytes": 1, "sha256": "0" * 64}
    with pytest.raises(DownloadError, match="outside"):
        targets(tmp_path / "target", [artifact], ())


def test_a_download_may_begin_anew(service: Service, tmp_path: Path) -> None:
    job_id = service.job_with(FILES)
    part = part_of(tmp_path)
    part.parent.mkdir()
    part.write_bytes(b"?" + WEIGHTS[1:1000])
    with service.client() as client:
        files = client.download(job_id, tmp_path, resume=False)
    assert {file.resumed_at for file in files} == {0}
    assert contents(tmp_path) == FILES


def test_an_unfinished_job_has_no_files(service: Service, tmp_path: Path) -> None:
    with service.client() as client, pytest.raises(ApiError) as refused:
        client.download(service.submit(), tmp_path)
    assert (refused.value.status, refused.value.code) == (409, "job_not_finished")


def test_download_from_s3(s3: S3, tmp_path: Path) -> None:
    """The first request is redirected to the bucket, where the key does not go; a cut is made good by a Range request."""
    bucket = proxy(int(s3.endpoint.rpartition(":")[2]))
    with bucket as network:
        settings = {"store_url": f"s3://{s3.bucket}/client", "s3_endpoint": s3.endpoint, "s3_public_endpoint": network.url}
        with running_service(tmp_path / "home", **settings, s3_access_key=s3.access_key, s3_secret_key=s3.secret_key) as service:
            job_id = service.job_with(FILES)
            network.cut_after = 1_100_000
            with service.client() as client:
                client.download(job_id, tmp_path / "target")
    assert contents(tmp_path / "target") == FILES
    sent = b"".join(network.requests)
    assert sent.count(b"GET /") >= 3
    assert b"authorization" not in sent.lower().replace(b"x-amz", b"")
    assert service.key.encode() not in sent
