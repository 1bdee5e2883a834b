"""The upload of a result, as the process that it is: what is stored, what a killed one leaves, and what it does while the store is away."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from app.storage import CHUNK_BYTES, Store, open_store
from tests.jobs import wait_until
from tests.servers import S3

PREFIX = "tenant/jobs/job/a1/"
LARGE = hashlib.shake_256(b"weights").digest(CHUNK_BYTES + 4097)
MEGABYTE = 2**20


@dataclass
class Upload:
    """An upload's input, and where it stores it."""

    folder: Path
    environment: dict[str, str]
    store: Store

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def write(self, name: str, content: bytes) -> None:
        (self.out / name).parent.mkdir(parents=True, exist_ok=True)
        (self.out / name).write_bytes(content)

    def write_zeros(self, name: str, size: int) -> None:
        self.write(name, b"")
        os.truncate(self.out / name, size)

    def start(self, **settings: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "worker.upload", str(self.out), PREFIX, str(self.folder / "manifest.json")]
        environment = {**os.environ, **self.environment, **settings}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, **settings: str) -> list[dict[str, Any]]:
        """What a successful upload says."""
        process = self.start(**settings)
        said, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint
        return [json.loads(line) for line in said.splitlines()]

    def manifest(self) -> list[dict[str, Any]]:
        return list(json.loads((self.folder / "manifest.json").read_text()))

    def stored(self) -> dict[str, str]:
        """The sha256 of each object."""
        return {entry.key.removeprefix(PREFIX): self._sha256(entry.key, entry.bytes) for entry in self.store.entries(PREFIX)}

    def etags(self) -> dict[str, str]:
        return {entry.key.removeprefix(PREFIX): entry.etag for entry in self.store.entries(PREFIX)}

    def _sha256(self, key: str, size: int) -> str:
        digest = hashlib.sha256()
        for chunk in self.store.get_range(key, 0, size):
            digest.update(chunk)
        return digest.hexdigest()


@pytest.fixture
def local(tmp_path: Path) -> Upload:
    settings = Settings(home=tmp_path / "home")
    (tmp_path / "out").mkdir()
    return Upload(tmp_path, {"ESPALIER_HOME": str(tmp_path / "home")}, open_store(settings))


@pytest.fixture
def remote(tmp_path: Path, s3: S3, local: Upload) -> Iterator[Upload]:
    environment = s3.environment | {"ESPALIER_STORE_URL": f"{s3.url}/{tmp_path.name}"}
    values = {name.removeprefix("ESPALIER_").lower(): value for name, value in environment.items()}
    store = open_store(Settings.model_validate(values))
    yield Upload(tmp_path, environment, store)
    store.delete_prefix(PREFIX)


@pytest.fixture(params=["local", "remote"])
def upload(request: pytest.FixtureRequest) -> Upload:
    made: Upload = request.getfixturevalue(request.param)
    return made


def test_a_result_is_stored_with_its_manifest(upload: Upload) -> None:
    files = {"report.json": b"{}", "checkpoint/config.json": b"{1}", "checkpoint/model.safetensors": LARGE, "checkpoint/extra/x": b"", "padded/x": b"x"}
    for name, content in files.items():
        upload.write(name, content)
    upload.write("work-of-the-engine", b"not of the result")
    events = upload.run()
    assert [(entry["path"], entry["role"], entry["bytes"]) for entry in upload.manifest()] == [
        ("report.json", "report", 2),
        ("checkpoint/config.json", "checkpoint", 3),
        ("checkpoint/extra/x", "checkpoint", 0),
        ("checkpoint/model.safetensors", "checkpoint", len(LARGE)),
        ("padded/x", "padded", 1),
    ]
    expected = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert {entry["path"]: entry["sha256"] for entry in upload.manifest()} == upload.stored() == expected
    total = sum(len(content) for content in files.values())
    assert events[0] == {"event": "phase", "phase": "upload"}
    assert events[-1] == {"event": "progress", "phase": "upload", "done": total, "total": total, "eta_seconds": 0}


@pytest.mark.parametrize("stray", [".hidden", "a b", "ä", "-x", "x\n", "folder/.tmp3"])
def test_a_file_whose_name_is_no_key_is_told_and_left_out(local: Upload, stray: str) -> None:
    local.write("report.json", b"{}")
    local.write("checkpoint/config.json", b"{}")
    local.write(f"checkpoint/{stray}", b"x")
    [told] = [event["message"] for event in local.run() if event["event"] == "log"]
    assert repr(f"checkpoint/{stray}") in told
    assert [entry["path"] for entry in local.manifest()] == ["report.json", "checkpoint/config.json"]


def test_an_upload_that_was_killed_goes_on_with_what_is_missing(upload: Upload) -> None:
    upload.write("report.json", b"{}")
    upload.write("checkpoint/a.safetensors", LARGE)
    os.mkfifo(upload.out / "checkpoint" / "b.safetensors")  # nobody writes to it, so that the upload waits there
    process = upload.start()
    wait_until(lambda: set(upload.etags()) == {"report.json", "checkpoint/a.safetensors"}, what="the first files")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (upload.folder / "manifest.json").exists()
    before = upload.etags()  # of a local object it tells inode and time, so that it changes when the file is written again

    (upload.out / "checkpoint" / "b.safetensors").unlink()
    upload.write("checkpoint/b.safetensors", b"b")
    upload.run()
    assert upload.stored() == {entry["path"]: entry["sha256"] for entry in upload.manifest()}
    after = upload.etags()
    assert set(after) == {"report.json", "checkpoint/a.safetensors", "checkpoint/b.safetensors"}
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("other", [b"[]", LARGE[::-1]], ids=["small", "large"])
def test_what_another_process_stored_is_not_replaced(upload: Upload, other: bytes) -> None:
    upload.write("report.json", b"{}" if len(other) == 2 else LARGE)
    (upload.folder / "other").write_bytes(other)
    upload.store.put_file(f"{PREFIX}report.json", upload.folder / "other")
    process = upload.start()
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "The store has another 'tenant/jobs/job/a1/report.json' already." in complaint
    assert upload.stored() == {"report.json": hashlib.sha256(other).hexdigest()}


def test_an_upload_outlasts_a_store_that_is_away(remote: Upload, s3: S3) -> None:
    remote.write("report.json", b"{}")
    for number in range(3):
        remote.write_zeros(f"checkpoint/{number}.safetensors", 40 * MEGABYTE)
    process = remote.start()
    assert process.stdout is not None
    wait_until(lambda: "report.json" in remote.etags(), what="the first file", pause=0.005)
    process.send_signal(signal.SIGSTOP)  # so that it does not end before the store has gone away
    s3.server.stop()
    process.send_signal(signal.SIGCONT)
    time.sleep(3)
    assert process.poll() is None, "it has ended before or because the store went away"
    s3.server.start()
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    assert remote.stored() == {entry["path"]: entry["sha256"] for entry in remote.manifest()}


def test_an_upload_gives_up_when_patience_is_at_its_end(remote: Upload) -> None:
    remote.write("report.json", b"{}")
    began = time.monotonic()
    process = remote.start(ESPALIER_S3_ENDPOINT="http://127.0.0.1:9", ESPALIER_STORE_PATIENCE_SECONDS="3")
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "The object store does not answer." in complaint
    assert 3 < time.monotonic() - began < 100


def test_memory_does_not_grow_with_the_files(local: Upload) -> None:
    local.write("report.json", b"{}")
    small = peak_of(local)
    local.store.delete_prefix(PREFIX)
    for number in range(3):
        local.write_zeros(f"checkpoint/{number}.safetensors", 100 * MEGABYTE)
    assert peak_of(local) - small < 64 * MEGABYTE


def peak_of(upload: Upload) -> int:
    """Most resident bytes of an upload."""
    with upload.start() as process:
        assert process.stdout is not None
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024
