"""Files and tars: ranges, conditions and redirects, from a local directory and from S3."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from fastapi.testclient import TestClient

from app.database import Database
from app.exceptions import RangeError
from app.files import parse_range
from app.main import create_app
from app.storage import CHUNK_BYTES, open_store
from tests.app.conftest import Api, make_settings
from tests.servers import S3, free_port

SMALL = bytes(range(256)) * 4
LARGE = hashlib.shake_256(b"large").digest(2 * CHUNK_BYTES + 4097)
FILES = {
    "checkpoint/config.json": b"{}",
    "checkpoint/empty.txt": b"",
    "checkpoint/model.safetensors": LARGE,
    "padded/config.json": b'{"padded": true}',
    "report.json": SMALL,
}


@pytest.fixture(scope="module")
def finished(shared_api: Api, tmp_path_factory: pytest.TempPathFactory) -> tuple[Api, str]:
    api = shared_api.other_tenant()
    return api, api.succeed(tmp_path_factory.mktemp("files"), FILES)


def test_the_manifest_names_every_file(finished: tuple[Api, str]) -> None:
    api, job_id = finished
    items = api.get(f"/v1/jobs/{job_id}/artifacts").json()["items"]
    assert {item["path"]: (item["bytes"], item["sha256"]) for item in items} == {
        path: (len(content), hashlib.sha256(content).hexdigest()) for path, content in FILES.items()
    }
    assert {item["path"]: item["role"] for item in items}["padded/config.json"] == "padded"
    assert {item["path"]: item["role"] for item in items}["report.json"] == "report"


@pytest.mark.parametrize("path", FILES)
def test_a_whole_file(finished: tuple[Api, str], path: str) -> None:
    api, job_id = finished
    answer = api.get(f"/v1/jobs/{job_id}/artifacts/{path}")
    assert (answer.status_code, answer.content) == (200, FILES[path])
    assert answer.headers["ETag"] == f'"{hashlib.sha256(FILES[path]).hexdigest()}"'
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Content-Length"] == str(len(FILES[path]))
    assert answer.headers["Content-Disposition"] == f'attachment; filename="{path.rpartition("/")[2]}"'
    head = api.request("HEAD", f"/v1/jobs/{job_id}/artifacts/{path}")
    assert (head.status_code, head.content) == (200, b"")
    for name in ("ETag", "Accept-Ranges", "Content-Length", "Content-Type", "Content-Disposition"):
        assert head.headers[name] == answer.headers[name]


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=0-", (0, 1000)),
        ("bytes=999-", (999, 1000)),
        ("bytes=10-19", (10, 20)),
        ("bytes=990-5000", (990, 1000)),
        (f"bytes=0-{10**18}", (0, 1000)),
        ("bytes=-1", (999, 1000)),
        ("bytes=-1000", (0, 1000)),
        ("bytes=-5000", (0, 1000)),
        ("BYTES=5-6", (5, 7)),
        ("bytes = 5-6 ", (5, 7)),
        ("bytes=1000-", 416),
        ("bytes=1000-1001", 416),
        ("bytes=-0", 416),
        ("bytes=6-5", None),
        ("bytes=", None),
        ("bytes=-", None),
        ("bytes=a-b", None),
        ("bytes=1", None),
        ("bytes=--5", None),
        ("bytes=0-1,5-6", None),
        ("bytes=٣-٤", None),
        ("bytes=0-" + "9" * 5000, None),
        ("lines=0-1", None),
        ("", None),
    ],
)
def test_ranges(header: str, span: tuple[int, int] | int | None) -> None:
    if span == 416:
        with pytest.raises(RangeError) as refused:
            parse_range(header, 1000)
        assert refused.value.headers == {"Content-Range": "bytes */1000"}
    else:
        assert parse_range(header, 1000) == span


@pytest.mark.parametrize("part", ["artifacts/checkpoint/model.safetensors", "artifacts/report.json", "checkpoint"])
def test_ranges_and_conditions_over_http(finished: tuple[Api, str], part: str) -> None:
    api, job_id = finished
    path = f"/v1/jobs/{job_id}/{part}"
    whole = api.get(path)
    content, etag = whole.content, whole.headers["ETag"]
    assert re.fullmatch('"[0-9a-f]{64}"', etag)
    size = len(content)
    for start, end in [(0, 1), (1, size), (size // 2, size // 2 + 300), (size - 1, size)]:
        piece = api.get(path, headers={"Range": f"bytes={start}-{end - 1}"})
        assert (piece.status_code, piece.content) == (206, content[start:end])
        assert piece.headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
        assert piece.headers["Content-Length"] == str(end - start)
        assert piece.headers["ETag"] == etag
    assert api.get(path, headers={"Range": "bytes=-10"}).content == content[-10:]
    assert api.get(path, headers={"Range": "bytes=5-9", "If-Range": etag}).content == content[5:10]
    for stale in ('"0"', f"W/{etag}", "Wed, 21 Oct 2026 07:28:00 GMT"):
        assert api.get(path, headers={"Range": "bytes=5-9", "If-Range": stale}).content == content
    head = api.request("HEAD", path, headers={"Range": "bytes=5-9"})
    assert (head.status_code, head.headers["Content-Length"], head.content) == (206, "5", b"")
    beyond = api.get(path, headers={"Range": f"bytes={size}-"})
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{size}")
    assert beyond.json()["code"] == "range_not_satisfiable"
    for known in (etag, f"W/{etag}", f'"0", {etag}', "*"):
        same = api.get(path, headers={"If-None-Match": known, "Range": "bytes=5-9"})
        assert (same.status_code, same.content, same.headers["ETag"]) == (304, b"", etag)


def test_an_empty_file_has_no_ranges(finished: tuple[Api, str]) -> None:
    api, job_id = finished
    answer = api.get(f"/v1/jobs/{job_id}/artifacts/checkpoint/empty.txt", headers={"Range": "bytes=0-"})
    assert (answer.status_code, answer.headers["Content-Range"]) == (416, "bytes */0")


@pytest.mark.parametrize("path", ["nope", "checkpoint", "checkpoint/", "%00", "checkpoint%2Fnope", "..%2F..%2Fetc%2Fpasswd", "a" * 2000, "%F0%9F%8C%B3"])
def test_a_file_that_is_not_there(finished: tuple[Api, str], path: str) -> None:
    api, job_id = finished
    answer = api.get(f"/v1/jobs/{job_id}/artifacts/{path}")
    assert (answer.status_code, answer.json()["code"]) == (404, "artifact_not_found")


def test_the_tar_holds_the_checkpoint_and_is_the_same_every_time(finished: tuple[Api, str]) -> None:
    api, job_id = finished
    answer = api.get(f"/v1/jobs/{job_id}/checkpoint")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/x-tar"
    assert answer.headers["Content-Disposition"] == f'attachment; filename="{job_id}.tar"'
    assert int(answer.headers["Content-Length"]) == len(answer.content)
    assert len(answer.content) % tarfile.RECORDSIZE == 0
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        members = {member.name: member for member in tar.getmembers()}
        assert set(members) == {f"{job_id}/{name}" for name in ("config.json", "empty.txt", "model.safetensors")}
        for name, member in members.items():
            file = tar.extractfile(member)
            assert file is not None
            assert file.read() == FILES["checkpoint/" + name.partition("/")[2]]
            assert (member.mode, member.uid, member.uname, member.isfile()) == (0o644, 0, "", True)
    again = api.get(f"/v1/jobs/{job_id}/checkpoint")
    assert (again.content, again.headers["ETag"]) == (answer.content, answer.headers["ETag"])


def test_a_tar_with_many_files_and_long_names_can_be_resumed_anywhere(api: Api, tmp_path: Path) -> None:
    files = {f"checkpoint/{'x' * length}-{length}.json": bytes(length * 37) for length in (1, 80, 95, 101, 160)}
    job_id = api.succeed(tmp_path, files)
    path = f"/v1/jobs/{job_id}/checkpoint"
    content = api.get(path).content
    for cut in [*range(1, len(content), 997), 511, 512, 513, len(content) - 1]:
        assert api.get(path, headers={"Range": f"bytes={cut}-{cut + 600}"}).content == content[cut : cut + 601]
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert {member.name.partition("/")[2] for member in tar.getmembers()} == {name.partition("/")[2] for name in files}


def test_a_large_file_streams_in_little_memory(sqlite_template: Path, roots: Path, tmp_path: Path) -> None:
    """Over a real server, where a HEAD has no body and a reader that is slow holds back the sender."""
    (tmp_path / "espalier.db").write_bytes(sqlite_template.read_bytes())
    settings = make_settings(tmp_path, f"sqlite:///{tmp_path}/espalier.db", roots)
    database = Database(settings.database_url.get_secret_value())
    with TestClient(create_app(settings)) as client:
        api = Api(client, database, open_store(settings), settings)
        job_id = api.succeed(tmp_path, {"checkpoint/model.safetensors": bytes(200 * 1024 * 1024)})
    database.dispose()
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", "app.main:create_app", "--port", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path, env={"ESPALIER_HOME": str(tmp_path)}, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {api.key}"}, transport=httpx.HTTPTransport(retries=8)
        ) as reader:
            head = reader.head(f"/v1/jobs/{job_id}/checkpoint")
            before = psutil.Process(server.pid).memory_info().rss
            most = received = 0
            with reader.stream("GET", f"/v1/jobs/{job_id}/checkpoint") as answer:
                for chunk in answer.iter_bytes(4 * 1024 * 1024):
                    received += len(chunk)
                    most = max(most, psutil.Process(server.pid).memory_info().rss)
            assert received == int(head.headers["Content-Length"]) == int(answer.headers["Content-Length"]) > 200 * 1024 * 1024
            assert most - before < 64 * 1024 * 1024
            assert reader.get("/livez").status_code == 200
    finally:
        server.terminate()
        server.wait()


# ------------------------------------------------------------------------ S3


@pytest.fixture(scope="module")
def on_s3(s3: S3, sqlite_template: Path, roots: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, str]]:
    folder = tmp_path_factory.mktemp("s3")
    url = f"sqlite:///{folder / 'espalier.db'}"
    (folder / "espalier.db").write_bytes(sqlite_template.read_bytes())
    values = {
        "store_url": f"{s3.url}/prefix",
        "s3_endpoint": s3.endpoint,
        "s3_region": s3.region,
        "s3_access_key": s3.access_key,
        "s3_secret_key": s3.secret_key,
    }
    settings = make_settings(folder, url, roots, **values)
    database = Database(url)
    with TestClient(create_app(settings)) as client:
        api = Api(client, database, open_store(settings), settings)
        yield api, api.succeed(folder, FILES)
    database.dispose()


@pytest.mark.parametrize("path", FILES)
def test_s3_serves_the_file_itself(on_s3: tuple[Api, str], path: str) -> None:
    api, job_id = on_s3
    answer = api.get(f"/v1/jobs/{job_id}/artifacts/{path}", headers={"Range": "bytes=1-2"})
    assert (answer.status_code, answer.content) == (307, b"")
    assert answer.headers["ETag"] == f'"{hashlib.sha256(FILES[path]).hexdigest()}"'
    url = answer.headers["Location"]
    assert api.key not in url
    assert httpx.get(url).content == FILES[path]
    if FILES[path]:
        piece = httpx.get(url, headers={"Range": "bytes=1-2"})
        assert (piece.status_code, piece.content) == (206, FILES[path][1:3])
    assert httpx.get(url.replace("X-Amz-Signature=", "X-Amz-Signature=0")).status_code == 403
    assert httpx.delete(url).status_code == 403


def test_what_s3_cannot_answer_is_answered_here(on_s3: tuple[Api, str]) -> None:
    api, job_id = on_s3
    path = f"/v1/jobs/{job_id}/artifacts/checkpoint/model.safetensors"
    head = api.request("HEAD", path)
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(len(LARGE)))
    etag = head.headers["ETag"]
    assert api.get(path, headers={"If-None-Match": etag}).status_code == 304
    resumed = api.get(path, headers={"Range": f"bytes={CHUNK_BYTES - 5}-", "If-Range": etag})
    assert (resumed.status_code, resumed.content) == (206, LARGE[CHUNK_BYTES - 5 :])
    changed = api.get(path, headers={"Range": "bytes=5-", "If-Range": '"0"'})
    assert (changed.status_code, changed.content) == (200, LARGE)


def test_the_tar_streams_from_s3(on_s3: tuple[Api, str]) -> None:
    api, job_id = on_s3
    content = api.get(f"/v1/jobs/{job_id}/checkpoint").content
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        file = tar.extractfile(f"{job_id}/model.safetensors")
        assert file is not None
        assert file.read() == LARGE
    piece = api.get(f"/v1/jobs/{job_id}/checkpoint", headers={"Range": f"bytes={CHUNK_BYTES - 100}-{CHUNK_BYTES + 1000}"})
    assert piece.content == content[CHUNK_BYTES - 100 : CHUNK_BYTES + 1001]
