"""A job whose machine is lost goes on at another one, from what was stored while its engine ran, and ends with the very bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select

from app.models import Artifact
from app.recipe import Recipe
from app.settings import Settings
from app.storage import Store, open_store
from tests import jobs
from tests.models import make_checkpoint, make_text
from tests.servers import S3
from worker import durable, training
from worker.announce import describe
from worker.state import WalkState, sha256_of
from worker.tasks import run_next

FINGERPRINT = "the same"
PREFIX = "tenant/jobs/job/resume/"


@pytest.fixture(params=["local", "s3"])
def settings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of this process and of those that it starts."""
    chosen = {"ESPALIER_HOME": str(tmp_path / "home"), "ESPALIER_RESUME_PUSH_SECONDS": "0"}
    if request.param == "s3":
        s3: S3 = request.getfixturevalue("s3")
        chosen |= s3.environment | {"ESPALIER_STORE_URL": f"{s3.url}/{tmp_path.name}"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    return Settings()


@pytest.fixture
def store(settings: Settings) -> Store:
    return open_store(settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job's directory."""
    made = tmp_path / "job"
    made.mkdir()
    return made


def finish_block(folder: Path, size: int = 1000) -> int:
    """What an engine does at the end of a block: a shard that stays, and hidden states in one of two files in turns. -> blocks finished"""
    state = WalkState.open(folder / "work", FINGERPRINT)
    assert state.refused is None
    block = state.finished
    shard, hidden = folder / "work" / f"shard.{block}", folder / "work" / f"hidden.{block % 2}.bin"
    shard.write_bytes(os.urandom(size))
    hidden.write_bytes(os.urandom(size))
    state.finish_block("prune", [shard], {}, [hidden])
    return state.finished


def push(store: Store, folder: Path, token: int = 1, stored: set[str] | None = None) -> None:
    durable.push(store, folder, PREFIX, token, set() if stored is None else stored)


def pulled(store: Store, tmp_path: Path) -> WalkState:
    """What an engine on another machine goes on from."""
    other = tmp_path / f"other-{random.random()}"
    other.mkdir()
    durable.pull(store, other, PREFIX)
    assert not (other / "pull").exists()
    return WalkState.open(other / "work", FINGERPRINT)


def objects(store: Store) -> dict[str, str]:
    return {entry.key: entry.etag for entry in store.entries(PREFIX) if "/objects/" in entry.key}


# ------------------------------------------------------------------ the state


def test_another_machine_gets_the_blocks_the_latest_hidden_states_and_the_models_version(store: Store, folder: Path, tmp_path: Path) -> None:
    stored: set[str] = set()
    (folder / "model.json").write_text('{"revision": "abc"}')
    for block in range(1, 4):
        finish_block(folder)
        before = objects(store)
        push(store, folder, stored=stored)
        assert len(objects(store)) == block + 3  # shards; one file of hidden states, the state, the model's version
        assert len([key for key, etag in objects(store).items() if before.get(key) == etag]) >= block - 1  # a shard is sent once
    state = pulled(store, tmp_path)
    assert state.refused is None
    assert state.finished == 3
    assert {path.name for path in state.work.iterdir()} == {"state.json", "shard.0", "shard.1", "shard.2", "hidden.0.bin"}
    assert json.loads((state.work.parent / "model.json").read_text()) == {"revision": "abc"}
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "work"]


def test_a_training_goes_on_from_its_last_step(store: Store, folder: Path, tmp_path: Path) -> None:
    assert tuple(f"work/recovery/{name}" for name in (training.STATE, training.BEST)) == durable.TRAINING
    finish_block(folder)
    before = durable._signature(folder)
    for name in durable.TRAINING:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(os.urandom(100))
    assert durable._signature(folder) != before
    push(store, folder)
    work = pulled(store, tmp_path).work
    for name in durable.TRAINING:
        assert (work.parent / name).read_bytes() == (folder / name).read_bytes()


def test_what_the_engine_writes_over_meanwhile_is_not_stored(store: Store, folder: Path, tmp_path: Path) -> None:
    finish_block(folder)
    push(store, folder)
    finish_block(folder)
    (folder / "work" / "hidden.1.bin").write_bytes(b"the next block but one has begun")
    with pytest.raises(durable.Moved):
        push(store, folder)
    assert pulled(store, tmp_path).finished == 1


@pytest.mark.parametrize("damage", ["flip", "missing object", "half a manifest", "no state", "outside"])
def test_a_damaged_state_is_refused_and_the_job_starts_anew(store: Store, folder: Path, tmp_path: Path, damage: str) -> None:
    finish_block(folder)
    push(store, folder)
    manifest = json.loads(b"".join(store.get_range(f"{PREFIX}1/manifest.json", 0, store.size(f"{PREFIX}1/manifest.json"))))
    key, changed = f"{PREFIX}1/objects/{manifest['work/shard.0']}", tmp_path / "changed"
    match damage:
        case "flip":
            store.get_file(changed, key)
            changed.write_bytes(changed.read_bytes()[:-1] + bytes([changed.read_bytes()[-1] ^ 1]))
            store.put_file(key, changed)
        case "missing object":
            store.delete([key])
        case _:
            del manifest["work/state.json"]
            manifest["work/../../outside"] = manifest["work/shard.0"]
            if damage == "outside":
                manifest["work/state.json"] = manifest["work/shard.0"]
            changed.write_text(json.dumps(manifest)[: 20 if damage == "half a manifest" else None])
            store.put_file(f"{PREFIX}1/manifest.json", changed)
    other = tmp_path / "other"
    other.mkdir()
    assert "damaged" in (durable.pull(store, other, PREFIX) or "")
    assert not list(other.iterdir())


def test_the_machine_that_knows_more_is_gone_on_with(store: Store, folder: Path, tmp_path: Path) -> None:
    """Attempts 1 and 4 run here, 2 and 3 elsewhere; only 3 stored anything."""
    finish_block(folder)
    (folder / "attempt").write_text("1")
    assert durable.worked_elsewhere(folder, 4)
    assert not durable.worked_elsewhere(folder, 2)
    shutil.copytree(folder, tmp_path / "elsewhere")
    finish_block(tmp_path / "elsewhere")
    push(store, tmp_path / "elsewhere", 3)
    durable.pull(store, folder, PREFIX)
    assert WalkState.open(folder / "work", FINGERPRINT).finished == 2

    finish_block(folder)
    (folder / "attempt").write_text("4")
    assert durable.pull(store, folder, PREFIX) is None
    assert WalkState.open(folder / "work", FINGERPRINT).finished == 3


def test_objects_without_a_manifest_are_no_state(store: Store, folder: Path, tmp_path: Path) -> None:
    finish_block(folder)
    push(store, folder)
    store.delete([f"{PREFIX}1/manifest.json"])
    assert durable.pull(store, tmp_path, PREFIX) is None


def test_an_attempt_that_lost_its_lease_spoils_nothing(store: Store, folder: Path, tmp_path: Path) -> None:
    zombie: set[str] = set()
    finish_block(folder)
    push(store, folder, 1, zombie)
    shutil.copytree(folder, tmp_path / "second")
    finish_block(tmp_path / "second")
    push(store, tmp_path / "second", 2)
    assert all(key.startswith(f"{PREFIX}2/") for key in objects(store))
    for _ in range(3):
        finish_block(folder)
        push(store, folder, 1, zombie)
    assert pulled(store, tmp_path).finished == 2


def is_stored(store: Store, token: int) -> bool:
    return f"{PREFIX}{token}/manifest.json" in {entry.key for entry in store.entries(PREFIX)}


@pytest.mark.parametrize("settings", ["s3"], indirect=True)
def test_a_store_process_killed_at_any_moment_leaves_a_whole_state(store: Store, folder: Path, tmp_path: Path) -> None:
    draw, ending = random.Random(0), threading.Event()
    finish_block(folder)

    def work() -> None:
        while not ending.wait(0.02):
            finish_block(folder, 300_000)

    engine = threading.Thread(target=work)
    engine.start()
    try:
        for token in (1, 2):
            pushing = subprocess.Popen([sys.executable, "-m", "worker.durable", "push", str(folder), PREFIX, str(token)], stderr=subprocess.DEVNULL)
            jobs.wait_until(partial(is_stored, store, token))
            time.sleep(draw.random())
            pushing.kill()
            pushing.wait()
            state = pulled(store, tmp_path)
            assert state.refused is None
            assert state.finished > 0
    finally:
        ending.set()
        engine.join()


# -------------------------------------------------------------------- the job


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Holds a model and a text; the engine computes in one thread."""
    make_checkpoint(tmp_path / "inputs" / "tiny", "llama", layers=8, hidden=64, ffn=128)
    make_text(tmp_path / "inputs", 20000).rename(tmp_path / "inputs" / "mine.txt")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "inputs"


def kill_engine_after(blocks: int, work: Path) -> None:
    def recorded() -> int:
        try:
            return sum(map(len, json.loads((work / "state.json").read_text())["walks"].values()))
        except FileNotFoundError:
            return 0

    jobs.wait_until(lambda: recorded() >= blocks, 120, pause=0.002)
    for process in psutil.Process().children(recursive=True):
        if "worker.pipeline" in process.cmdline():
            process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("settings", ["s3"], indirect=True)
def test_a_job_goes_on_at_another_machine(settings: Settings, store: Store, inputs: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "method": "cfsp",
        "sparsity": 0.4,
        "restoration": "least_squares",
        "calibration": {"source": "mine.txt", "samples": 32, "sequence_length": 128},
        "limits": {"resume": "durable"},
    }
    settings = settings.model_copy(update={"model_roots": (inputs,), "text_roots": (inputs,), "lease_seconds": 60, "beat_seconds": 1})
    database = jobs.open_database(settings.database_url.get_secret_value())
    worker = describe(settings)
    job_id = jobs.submit(database, **recipe)
    killing = threading.Thread(target=kill_engine_after, args=(5, settings.work_dir / job_id / "work"))
    killing.start()
    run_next(worker, settings, database)
    killing.join()
    assert jobs.get(database, job_id).state == "queued", jobs.messages(database, job_id)
    assert objects_of(store, job_id)

    shutil.rmtree(settings.work_dir)  # another machine
    run_next(worker, settings, database)
    job = jobs.get(database, job_id)
    assert job.state == "succeeded", job.error
    assert job.report is not None
    assert (job.report["resumed_at_block"] or 0) >= 5, jobs.messages(database, job_id)
    assert any(message.startswith("Has the state") for message in jobs.messages(database, job_id))
    assert objects_of(store, job_id) == []

    with database.reading() as session:
        stored = {row.path: row.sha256 for row in session.execute(select(Artifact).where(Artifact.job_id == job_id)).scalars()}
    database.dispose()
    (tmp_path / "recipe.json").write_text(Recipe.model_validate(job.recipe).model_dump_json())
    checkpoint = write_undisturbed(tmp_path / "recipe.json", inputs, tmp_path / "out")
    undisturbed = {f"checkpoint/{path.name}": sha256_of(path) for path in checkpoint.iterdir() if path.suffix in (".safetensors", ".json")}
    assert undisturbed.items() <= stored.items()
    assert len(undisturbed) > 9


def write_undisturbed(recipe: Path, inputs: Path, out: Path) -> Path:
    """The checkpoint of an engine that nobody kills before it has written it."""
    command: list[str | Path] = [sys.executable, "-m", "worker.pipeline", recipe, inputs / "tiny", out, "--text", "mine.txt", inputs / "mine.txt"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as engine:
        assert engine.stdout is not None
        assert any(json.loads(line) == {"event": "phase", "phase": "verify"} for line in engine.stdout)
        engine.kill()
    return out / "checkpoint"


def objects_of(store: Store, job_id: str) -> list[str]:
    return [entry.key for entry in store.entries(f"{jobs.TENANT}/jobs/{job_id}/resume/")]
