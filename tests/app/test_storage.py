"""The object store, the same on a local directory and on S3."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.exceptions import UnavailableError
from app.settings import Settings
from app.storage import CHUNK_BYTES, PIECE_BYTES, Store, open_store
from tests.servers import S3

LARGE = hashlib.shake_256(b"large").digest(2 * CHUNK_BYTES + 4097)


def s3_settings(s3: S3, **changes: str) -> Settings:
    values = {"store_url": s3.url, "s3_endpoint": s3.endpoint, "s3_region": s3.region, "s3_access_key": s3.access_key, "s3_secret_key": s3.secret_key}
    return Settings.model_validate(values | changes)


@pytest.fixture(params=["local", "s3", "s3 with a prefix"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(Settings(home=tmp_path / "home"))
    s3: S3 = request.getfixturevalue("s3")
    prefix = f"{s3.url}/some/prefix" if "prefix" in request.param else s3.url
    return open_store(s3_settings(s3, store_url=prefix))


def put(store: Store, key: str, content: bytes, folder: Path) -> tuple[int, str]:
    (folder / "content").write_bytes(content)
    return store.put_file(key, folder / "content")


def get(store: Store, key: str) -> bytes:
    return b"".join(store.get_range(key, 0, store.size(key)))


@pytest.mark.parametrize("content", [b"", b"x", bytes(5000), LARGE[:CHUNK_BYTES], LARGE[: CHUNK_BYTES + 1], LARGE], ids=lambda content: str(len(content)))
def test_what_is_put_comes_back(store: Store, content: bytes, tmp_path: Path) -> None:
    assert put(store, "t/jobs/j/a1/checkpoint/file", content, tmp_path) == (len(content), hashlib.sha256(content).hexdigest())
    assert store.size("t/jobs/j/a1/checkpoint/file") == len(content)
    assert get(store, "t/jobs/j/a1/checkpoint/file") == content


def test_any_span_comes_in_chunks(store: Store, tmp_path: Path) -> None:
    put(store, "spans", LARGE, tmp_path)
    for start, end in [(0, 1), (5, 5), (CHUNK_BYTES - 1, CHUNK_BYTES + 1), (1, len(LARGE)), (len(LARGE) - 1, len(LARGE))]:
        chunks = list(store.get_range("spans", start, end))
        assert b"".join(chunks) == LARGE[start:end]
        assert all(0 < len(chunk) <= PIECE_BYTES for chunk in chunks)


def test_a_later_put_replaces(store: Store, tmp_path: Path) -> None:
    put(store, "twice", LARGE, tmp_path)
    put(store, "twice", b"new", tmp_path)
    assert get(store, "twice") == b"new"


@pytest.mark.parametrize("content", [b"x", LARGE], ids=["small", "large"])
def test_what_is_created_is_written_once(store: Store, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "other").write_bytes(content[::-1] + b"y")
    (tmp_path / "changed").write_bytes(b"z" + content[1:])
    done: list[int] = []
    first = store.put_file(f"once/{len(content)}", tmp_path / "file", create=True, on_bytes=done.append)
    assert sum(done) == len(content)
    [before] = store.entries("once/")
    assert store.put_file(f"once/{len(content)}", tmp_path / "file", create=True, on_bytes=done.append) == first
    assert sum(done) == 2 * len(content)
    for name in ("other", "changed"):
        with pytest.raises(UnavailableError) as told:
            store.put_file(f"once/{len(content)}", tmp_path / name, create=True)
        assert told.value.code == "store_conflict"
    assert store.entries("once/") == [before]
    assert get(store, f"once/{len(content)}") == content
    store.delete_prefix("once/")


def test_pages_hold_everything_below_a_prefix_and_can_be_deleted(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.storage.PAGE", 2)
    keys = {f"p/jobs/j{number}/a1/x" for number in range(5)}
    for key in sorted({*keys, "p/jobs2/x", "q/x"}):
        put(store, key, b"x", tmp_path)
    pages = list(store.pages("p/jobs"))
    assert all(0 < len(page) <= 2 for page in pages)
    entries = [entry for page in pages for entry in page]
    assert {entry.key for entry in entries} == keys
    assert len(entries) == len(keys)
    assert all(entry.bytes == 1 and abs((datetime.now(UTC) - entry.modified).total_seconds()) < 60 for entry in entries)
    store.delete([*keys, "p/jobs/j0/a1/never-was"])
    assert list(store.pages("p/jobs")) == []
    assert get(store, "p/jobs2/x") == get(store, "q/x") == b"x"
    store.delete(["p/jobs2/x", "q/x"])


def test_delete_prefix_deletes_that_prefix_alone(store: Store, tmp_path: Path) -> None:
    for key in ("t/jobs/j/a1/report.json", "t/jobs/j/a1/checkpoint/x", "t/jobs/j/a11/x", "t/jobs/j/a2/x"):
        put(store, key, b"x", tmp_path)
    store.delete_prefix("t/jobs/j/a1/")
    store.delete_prefix("t/jobs/j/a1/")
    for gone in ("t/jobs/j/a1/report.json", "t/jobs/j/a1/checkpoint/x"):
        with pytest.raises(FileNotFoundError):
            store.size(gone)
        with pytest.raises(FileNotFoundError):
            list(store.get_range(gone, 0, 1))
    assert get(store, "t/jobs/j/a11/x") == get(store, "t/jobs/j/a2/x") == b"x"
    store.delete_prefix("t/jobs/j")
    with pytest.raises(FileNotFoundError):
        store.size("t/jobs/j/a2/x")


@pytest.mark.parametrize("key", ["", "/", "/a", "a/", "a//b", "..", "../a", "a/../b", "a/./b", ".a", "a b", "ä", "a\0b", "a\nb", "a\\b", "a#1", "a" * 1025])
def test_malformed_keys_are_refused(store: Store, key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a key"):
        put(store, key, b"x", tmp_path)
    with pytest.raises(ValueError, match="not a key"):
        store.size(key)
    with pytest.raises(ValueError, match="not a key"):
        list(store.get_range(key, 0, 1))
    with pytest.raises(ValueError, match="not a key"):
        store.presign(key, 60)
    if not key.endswith("a/"):
        with pytest.raises(ValueError, match="not a key"):
            store.delete_prefix(key)


def test_a_source_that_breaks_off_leaves_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.put_file("broken/missing", tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        store.size("broken/missing")


def test_a_store_that_answers_is_ready(store: Store) -> None:
    store.check()


# --------------------------------------------------------------------- local


def test_a_local_object_is_never_seen_half_written(tmp_path: Path) -> None:
    store = open_store(Settings(home=tmp_path / "home"))
    old, new = LARGE, LARGE[::-1]
    put(store, "file", old, tmp_path)
    seen: set[bytes] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add((tmp_path / "home" / "objects" / "file").read_bytes())

    reader = threading.Thread(target=look)
    reader.start()
    put(store, "file", new, tmp_path)
    done.set()
    reader.join()
    assert seen <= {old, new}


def test_delete_prefix_takes_what_a_killed_upload_left(tmp_path: Path) -> None:
    store = open_store(Settings(home=tmp_path / "home"))
    put(store, "t/a1/file", b"x", tmp_path)
    folder = tmp_path / "home" / "objects" / "t" / "a1"
    (folder / "half#1").write_bytes(b"half")  # the name under which obstore writes before it renames
    store.delete_prefix("t/a1/")
    assert not folder.exists()


def test_what_a_killed_upload_left_is_listed_and_deleted_with_its_folders(tmp_path: Path) -> None:
    store = open_store(Settings(home=tmp_path / "home"))
    put(store, "t/jobs/j1/a1/file", b"x", tmp_path)
    folder = tmp_path / "home" / "objects" / "t" / "jobs" / "j2" / "a1" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "half#1").write_bytes(b"half")
    half = "t/jobs/j2/a1/checkpoint/half#1"
    assert {entry.key for page in store.pages("t/jobs") for entry in page} == {"t/jobs/j1/a1/file", half}
    assert [entry.key for entry in store.entries("t/jobs")] == ["t/jobs/j1/a1/file"]
    store.delete([half])
    assert [path.name for path in (tmp_path / "home" / "objects" / "t" / "jobs").iterdir()] == ["j1"]


def test_a_local_store_signs_nothing(tmp_path: Path) -> None:
    assert open_store(Settings(home=tmp_path)).presign("key", 60) is None


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "content").write_bytes(LARGE)
    program = """
import resource, sys
from pathlib import Path
from app.exceptions import UnavailableError
from app.settings import Settings
from app.storage import CHUNK_BYTES, open_store
store = open_store(Settings(home=Path("home")))
resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK_BYTES, CHUNK_BYTES))  # no file may grow beyond it, as on a full disk
try:
    store.put_file("t/a1/file", Path("content"))
except UnavailableError as error:
    sys.stdout.write(error.code)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "store_full", done.stderr
    store = open_store(Settings(home=tmp_path / "home"))
    with pytest.raises(FileNotFoundError):
        store.size("t/a1/file")
    store.delete_prefix("t/a1")
    assert [file for file in (tmp_path / "home").rglob("*") if file.is_file()] == []


def test_a_missing_local_directory_is_not_ready(tmp_path: Path) -> None:
    store = open_store(Settings(home=tmp_path / "home"))
    (tmp_path / "home" / "objects").rmdir()
    with pytest.raises(UnavailableError) as told:
        store.check()
    assert told.value.code == "store_unavailable"


# ------------------------------------------------------------------------ S3


@pytest.mark.parametrize("changes", [{"s3_secret_key": "wrong"}, {"s3_access_key": "wrong"}, {"store_url": "s3://no-such-bucket"}])
def test_a_store_that_refuses_is_not_ready(s3: S3, changes: dict[str, str], tmp_path: Path) -> None:
    store = open_store(s3_settings(s3, **changes))
    with pytest.raises(UnavailableError) as told:
        store.check()
    assert told.value.code == "store_unavailable"
    assert s3.endpoint not in told.value.message
    if "store_url" not in changes:  # the test server makes a bucket for whom it trusts
        with pytest.raises(UnavailableError):
            put(store, "key", b"x", tmp_path)


def test_signed_urls_name_the_public_address(s3: S3) -> None:
    url = open_store(s3_settings(s3, s3_public_endpoint="https://files.example.org")).presign("t/file", 60)
    assert url is not None
    assert url.startswith("https://files.example.org/artifacts/t/file?")
    assert "X-Amz-Expires=60" in url


@pytest.mark.parametrize("url", ["gs://bucket", "s3:///prefix", "objects", "http://host/bucket"])
def test_an_address_that_is_no_store(url: str) -> None:
    with pytest.raises(ValueError, match="ESPALIER_STORE_URL"):
        open_store(Settings(store_url=url))
