"""The models that a worker keeps: each whole or not there, fetched once, never removed from under a job, and no more of them than are allowed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from app.exceptions import RecipeError
from tests.hub import FIRST, Hub, running_hub
from tests.jobs import wait_until
from tests.models import make_checkpoint
from worker import cache
from worker.cache import RemoteFile, RemoteModel
from worker.state import sha256_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "llama", max_shard_size="30KB")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def remote(checkpoint: Path, name: str, transfer: Callable[[Path], None] | None = None) -> RemoteModel:
    """A model with the checkpoint's files."""

    def copy(folder: Path) -> None:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)

    files = {path.name: RemoteFile(path.stat().st_size, sha256_of(path) if path.suffix == ".safetensors" else None) for path in checkpoint.iterdir()}
    return RemoteModel(name, "1", files, transfer or copy)


def fill(models: Path, model: RemoteModel, limit: int = 0, told: list[str] | None = None) -> Path:
    return cache.fill(models, limit, model, (told if told is not None else []).append)


def names(models: Path) -> set[str]:
    """Of the models that are there."""
    return {path.name for path in models.glob("*/model/*")}


def flip_a_byte(file: Path) -> None:
    """One bit is another one, and nothing else shows it."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


# ------------------------------------------------------------- real processes


def start_fetch(hub: Hub, tmp_path: Path, result: str = "model.json") -> subprocess.Popen[bytes]:
    environment = hub.environment | {"ESPALIER_HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    return subprocess.Popen([sys.executable, "-m", "worker.fetch", "org/tiny", str(tmp_path / result), "tenant_1"], env=environment, stdout=subprocess.DEVNULL)


def has_sent(hub: Hub, least: float) -> bool:
    return sum(hub.sent.values()) > least


def test_a_transfer_killed_at_any_moment_leaves_no_model_and_is_gone_on_with(checkpoint: Path, tmp_path: Path, models: Path) -> None:
    weights = {path.name: path.stat().st_size for path in checkpoint.glob("*.safetensors")}
    assert len(weights) > 3
    with running_hub() as hub:
        hub.models["org/tiny"] = checkpoint
        last = max(weights)
        hub.pauses = dict.fromkeys(sorted(weights)[1:], 0.05) | {last: 3600}  # so that it does not come whole before it is killed
        for share in (0.4, 0.9):
            fetching = start_fetch(hub, tmp_path)
            wait_until(partial(has_sent, hub, share * (sum(weights.values()) - weights[last])), pause=0.001)
            fetching.kill()
            fetching.wait()
            assert cache.find(models, "org/tiny", FIRST) is None
            assert not (tmp_path / "model.json").exists()
        hub.pauses.clear()
        assert start_fetch(hub, tmp_path).wait() == 0
        again = [name for name, size in weights.items() if hub.sent[name] > size]
    found = cache.find(models, "org/tiny", FIRST)
    assert found == Path(json.loads((tmp_path / "model.json").read_text())["folder"])
    assert {path.name: path.read_bytes() for path in found.iterdir()} == {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert len(again) < len(weights)  # what had come whole was not sent again


def test_two_jobs_that_want_the_same_model_fetch_it_once(checkpoint: Path, tmp_path: Path) -> None:
    with running_hub() as hub:
        hub.models["org/tiny"] = checkpoint
        hub.pauses = dict.fromkeys((path.name for path in checkpoint.iterdir()), 0.03)
        fetching = [start_fetch(hub, tmp_path, f"{number}.json") for number in range(2)]
        assert [process.wait() for process in fetching] == [0, 0]
        assert {name: hub.sent[name] for name in hub.sent if name.endswith(".safetensors")} == {
            path.name: path.stat().st_size for path in checkpoint.glob("*.safetensors")
        }
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text()


def test_a_model_stays_for_as_long_as_a_process_of_the_job_lives(checkpoint: Path, models: Path) -> None:
    lock = cache.hold(fill(models, remote(checkpoint, "held")))
    assert lock is not None
    engine = subprocess.Popen(["sleep", "600"], pass_fds=[lock])
    os.close(lock)
    told: list[str] = []
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(fill, models, remote(checkpoint, "next"), remote(checkpoint, "next").bytes, told)
        wait_until(lambda: told)
        assert names(models) == {"held"}
        engine.send_signal(signal.SIGKILL)
        engine.wait()
        waiting.result(timeout=60)
    assert "Waits for room" in told[0]
    assert names(models) == {"next"}


# ------------------------------------------------------------------- the bound


def test_the_least_recently_used_models_that_no_job_holds_make_room(checkpoint: Path, models: Path) -> None:
    a, b, c, d = (remote(checkpoint, name) for name in "abcd")
    limit = a.bytes * 5 // 2
    fill(models, a, limit)
    fill(models, b, limit)
    assert cache.find(models, "a", "1") is not None  # so b is the one that was not used for longest
    fill(models, c, limit)
    assert names(models) == {"a", "c"}
    lock = cache.hold(fill(models, a, limit))
    assert lock is not None
    fill(models, c, limit)
    fill(models, d, limit)  # a was not used for longest, but a job holds it
    assert names(models) == {"a", "d"}
    os.close(lock)
    fill(models, b, limit)
    assert names(models) == {"b", "d"}
    assert len([entry for entry in models.iterdir() if entry.is_dir()]) == 2


def test_jobs_that_fetch_at_once_share_the_room(checkpoint: Path, models: Path) -> None:
    """However they interleave, no more than two models are ever there or under way."""
    one, there = remote(checkpoint, "any").bytes, list[int]()

    def watched(name: str) -> RemoteModel:
        def transfer(folder: Path) -> None:
            shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
            there.append(sum(len(files) for place, _, files in os.walk(models) if Path(place).parent.name in ("part", "model")))

        return remote(checkpoint, name, transfer)

    with ThreadPoolExecutor(6) as pool:
        assert len(list(pool.map(lambda number: fill(models, watched(f"model-{number % 4}"), 2 * one), range(12)))) == 12
    assert max(there) <= 2 * len(list(checkpoint.iterdir()))
    assert len(names(models)) == 2


def test_a_model_beyond_the_bound_is_refused(checkpoint: Path, models: Path) -> None:
    model = remote(checkpoint, "large")
    with pytest.raises(RecipeError, match=r"takes .* GB") as refusal:
        fill(models, model, model.bytes - 1)
    assert refusal.value.code == "model_too_large"
    assert names(models) == set()


def test_what_a_killed_transfer_left_makes_room_too(checkpoint: Path, models: Path) -> None:
    def fail(folder: Path) -> None:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        raise ConnectionError("the server went away")

    abandoned = remote(checkpoint, "abandoned", fail)
    with pytest.raises(ConnectionError):
        fill(models, abandoned)
    assert list(models.glob("*/part/abandoned/*.safetensors"))  # for the next attempt
    fill(models, remote(checkpoint, "next"), abandoned.bytes)
    assert not list(models.glob("*/part"))


# --------------------------------------------------------------------- damage


def test_a_damaged_model_is_found_when_it_is_next_used_and_fetched_again(checkpoint: Path, models: Path) -> None:
    model = remote(checkpoint, "tiny")
    for damage in (flip_a_byte, Path.unlink, lambda file: file.write_bytes(b"")):
        weights = next(fill(models, model).glob("*.safetensors"))
        damage(weights)
        assert cache.find(models, "tiny", "1") is None
        assert fill(models, model) == weights.parent
        assert weights.read_bytes() == (checkpoint / weights.name).read_bytes()


def test_a_damaged_model_is_not_replaced_under_a_job(checkpoint: Path, models: Path) -> None:
    model, told = remote(checkpoint, "tiny"), list[str]()
    folder = fill(models, model)
    lock = cache.hold(folder)
    assert lock is not None
    flip_a_byte(folder / "tokenizer.json")
    replacing = threading.Thread(target=fill, args=(models, model, 0, told))
    replacing.start()
    wait_until(lambda: told)
    assert cache.find(models, "tiny", "1") is None
    os.close(lock)
    replacing.join(timeout=60)
    assert cache.find(models, "tiny", "1") == folder


def test_what_arrives_damaged_is_not_kept(checkpoint: Path, models: Path) -> None:
    def damaged(folder: Path) -> None:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        flip_a_byte(next(folder.glob("*.safetensors")))

    with pytest.raises(OSError, match="did not arrive whole: model-"):
        fill(models, remote(checkpoint, "tiny", damaged))
    assert not list(models.rglob("*.safetensors"))
    fill(models, remote(checkpoint, "tiny"))


def test_a_full_disk_leaves_nothing(checkpoint: Path, models: Path) -> None:
    def fills_the_disk(folder: Path) -> None:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
        with Path("/dev/full").open("wb") as stream:
            stream.write(b"more")

    with pytest.raises(OSError, match="No space left") as full:
        fill(models, remote(checkpoint, "tiny", fills_the_disk))
    assert full.value.errno == errno.ENOSPC
    assert [path.name for path in models.rglob("*") if path.is_file() and path.name != "lock"] == []


def test_a_model_larger_than_the_disk_drives_out_others_in_vain(checkpoint: Path, models: Path) -> None:
    fill(models, remote(checkpoint, "tiny"))
    lock = cache.hold(next(models.glob("*/model/*")))
    assert lock is not None
    with pytest.raises(OSError, match=r"takes .* GB"):
        fill(models, RemoteModel("vast", "1", {"model.safetensors": RemoteFile(10**15)}, lambda folder: None))
    assert names(models) == {"tiny"}
    os.close(lock)
