"""Fetching models: from a stand-in for the hub, and from a real S3 server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.exceptions import RecipeError
from app.models import Checkpoint
from app.settings import Settings
from app.source import find_stored, read_source
from app.storage import Store, open_store
from tests import jobs
from tests.checkpoints import store_checkpoint
from tests.hub import FIRST, SECOND, Hub, running_hub
from tests.models import make_checkpoint, write_json
from tests.servers import S3
from worker import cache
from worker.announce import describe
from worker.fetch import in_bucket, in_store
from worker.locks import take
from worker.tasks import run_next


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "llama", max_shard_size="100KB")


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as server:
        folder = tmp_path / "on-hub"
        for name in ("model", "pickled", "own-code"):
            shutil.copytree(checkpoint, folder / name)
            server.models[f"org/{name}"] = folder / name
        for name, content in {"pytorch_model.bin": b"pickle", "modeling_own.py": b"import os", "README.md": b"hello"}.items():
            (folder / "model" / name).write_bytes(content)
        (folder / "model" / "onnx").mkdir()
        (folder / "model" / "onnx" / "model.safetensors").write_bytes(b"other")
        for weights in (folder / "pickled").glob("*.safetensors*"):
            weights.unlink()
        (folder / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
        config = json.loads((checkpoint / "config.json").read_text())
        write_json(folder / "own-code" / "config.json", config | {"auto_map": {"AutoModel": "own.Model"}})
        yield server


def fetch(environment: dict[str, str], tmp_path: Path, model: str) -> tuple[int, list[dict[str, str]]]:
    command = [sys.executable, "-m", "worker.fetch", model, str(tmp_path / "model.json"), "tenant_1"]
    environment = environment | {"ESPALIER_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf")}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode in (0, 2), ended.stderr
    return ended.returncode, [json.loads(line) for line in ended.stdout.splitlines()]


def answer(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "model.json").read_text())
    return found


def same_files(folder: Path, other: Path) -> bool:
    return {path.name: path.read_bytes() for path in folder.iterdir()} == {path.name: path.read_bytes() for path in other.iterdir()}


# ------------------------------------------------------------------ the hub


def test_safetensors_configuration_and_tokenizer_come_at_one_commit(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    code, events = fetch(hub.environment, tmp_path, "org/model")
    assert code == 0, events
    assert events[0] == {"event": "phase", "phase": "fetch"}
    assert FIRST in events[-1]["message"]
    first = answer(tmp_path)
    folder = Path(first["folder"])
    assert same_files(folder, checkpoint)
    assert folder.name == "model"
    assert folder.is_relative_to(tmp_path / "home" / "models")
    assert first["revision"] == FIRST
    assert first["cached"]
    assert not list((tmp_path / "hf").rglob("*.safetensors"))  # it lies on the disk once

    hub.commit = SECOND  # the next attempt of the job still sees the same model, and another job the new one
    sent = dict(hub.sent)
    assert fetch(hub.environment, tmp_path, "org/model")[0] == 0
    assert answer(tmp_path) == first
    assert hub.sent == sent
    (tmp_path / "model.json").unlink()
    assert fetch(hub.environment, tmp_path, "org/model")[0] == 0
    assert answer(tmp_path)["revision"] == SECOND


def test_a_later_attempt_finds_its_model_while_the_hub_is_away(hub: Hub, tmp_path: Path) -> None:
    assert fetch(hub.environment, tmp_path, "org/model")[0] == 0
    assert fetch(hub.environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}, tmp_path, "org/model")[0] == 0


@pytest.mark.parametrize(("model", "code"), [("org/pickled", "pickle_weights"), ("org/none", "model_not_found"), ("org/own-code", "auto_map")])
def test_what_can_not_be_fetched_is_refused_with_its_reason(hub: Hub, tmp_path: Path, model: str, code: str) -> None:
    refused(hub.environment, tmp_path, model, code)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not [name for name in hub.sent if name.endswith((".safetensors", ".bin"))]  # it is refused before any weights are fetched


def test_what_does_not_fit_is_not_begun(hub: Hub, tmp_path: Path) -> None:
    hub.said_bytes = 10**15
    refused(hub.environment, tmp_path, "org/model", "disk_full")
    refused(hub.environment | {"ESPALIER_MODEL_CACHE_BYTES": "1000000"}, tmp_path, "org/model", "model_too_large")
    assert not hub.sent


def refused(environment: dict[str, str], tmp_path: Path, model: str, code: str) -> None:
    status, events = fetch(environment, tmp_path, model)
    assert status == 2
    assert (events[-1]["event"], events[-1]["code"]) == ("error", code)
    assert events[-1]["hint"]
    assert not (tmp_path / "model.json").exists()


ENGINE = """
import json, sys
from pathlib import Path
from worker.locks import take
source, out = Path(sys.argv[2]), Path(sys.argv[3])
removable = take(source.parent.parent) is not None
(out / "checkpoint").mkdir(parents=True)
(out / "checkpoint" / "config.json").write_bytes((source / "config.json").read_bytes())
(out / "report.json").write_text(json.dumps({"removable": removable}))
"""


def test_a_jobs_model_can_not_be_removed_while_its_engine_runs(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (hub.environment | {"ESPALIER_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hf")}).items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    database = jobs.open_database(settings.database_url.get_secret_value())
    job_id = jobs.submit(database, model="org/model")
    run_next(describe(settings), settings, database, engine=(sys.executable, "-c", ENGINE))
    job = jobs.get(database, job_id)
    database.dispose()
    assert job.error is None
    assert job.report == {"removable": False}
    lock = take(next((tmp_path / "home" / "models").glob("*/model")).parent)
    assert lock is not None
    os.close(lock)


# -------------------------------------------------------------------- buckets


@pytest.mark.parametrize("url", ["s3://models/public", "s3://models/publicity/x", "s3://models/public/../x", "s3://models/public//x", "s3://other/public/x"])
def test_a_url_outside_the_allowed_ones_is_refused(url: str) -> None:
    with pytest.raises(RecipeError) as refusal:
        find_stored(url, ["s3://models/public/"])
    assert refusal.value.code == "model_outside_roots"


def test_a_url_below_an_allowed_one_names_a_model() -> None:
    assert find_stored("s3://models/public/tiny/", ["s3://others", "s3://models/public"]) == "s3://models/public/tiny"
    assert find_stored("org/model", []) is None


def put(store: Store, prefix: str, folder: Path) -> None:
    for path in folder.iterdir():
        store.put_file(f"{prefix}/{path.name}", path)


def settings_for(s3: S3, home: Path) -> Settings:
    return Settings.model_validate({name.removeprefix("ESPALIER_").lower(): value for name, value in s3.environment.items()} | {"home": home})


def test_a_model_comes_from_a_bucket_as_it_was_when_the_job_began(s3: S3, hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    store, url = open_store(settings_for(s3, tmp_path)), f"{s3.url}/models/{tmp_path.name}/tiny"
    put(store, f"models/{tmp_path.name}/tiny", checkpoint)
    environment = hub.environment | s3.environment | {"ESPALIER_MODEL_URLS": json.dumps([f"{s3.url}/models"])}
    code, events = fetch(environment, tmp_path, url)
    assert code == 0, events
    first = answer(tmp_path)
    assert same_files(Path(first["folder"]), checkpoint)
    assert Path(first["folder"]).name == "tiny"

    changed = tmp_path / "config.json"
    changed.write_text((checkpoint / "config.json").read_text() + "\n")
    store.put_file(f"models/{tmp_path.name}/tiny/config.json", changed)
    assert fetch(environment, tmp_path, url)[0] == 0  # a later attempt, from the cache
    assert answer(tmp_path) == first
    shutil.rmtree(tmp_path / "home")  # on another machine it can't be had any more
    code, events = fetch(environment, tmp_path, url)
    assert (code, events[-1]["code"]) == (2, "model_changed")
    (tmp_path / "model.json").unlink()  # another job
    assert fetch(environment, tmp_path, url)[0] == 0
    assert (Path(answer(tmp_path)["folder"]) / "config.json").read_text() == changed.read_text()


def test_an_empty_place_in_a_bucket_is_refused(s3: S3, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refusal:
        in_bucket(f"{s3.url}/models/nothing", settings_for(s3, tmp_path))
    assert refusal.value.code == "model_not_found"


def test_a_model_that_changes_while_it_is_fetched_is_not_used(s3: S3, checkpoint: Path, tmp_path: Path) -> None:
    settings = settings_for(s3, tmp_path)
    put(open_store(settings), f"models/{tmp_path.name}", checkpoint)
    model = in_bucket(f"{s3.url}/models/{tmp_path.name}", settings)
    open_store(settings).put_file(f"models/{tmp_path.name}/config.json", checkpoint / "tokenizer.json")
    with pytest.raises(OSError, match="was changed"):
        cache.fill(tmp_path / "models", 0, model, lambda message: None)
    assert not list((tmp_path / "models").rglob("*.safetensors"))


@pytest.mark.parametrize("where", ["directory", "bucket"])
def test_an_uploaded_checkpoint_is_fetched_by_its_hashes(where: str, request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> None:
    environment = {"ESPALIER_UPLOAD_PART_BYTES": str(2**16), "ESPALIER_HOME": str(tmp_path / "home")}
    if where == "bucket":
        environment |= request.getfixturevalue("s3").environment
    settings = Settings.model_validate({name.removeprefix("ESPALIER_").lower(): value for name, value in environment.items()})
    database = jobs.open_database(settings.database_url.get_secret_value())
    store = open_store(settings)
    checkpoint_id = store_checkpoint(database, store, settings, jobs.TENANT, checkpoint)
    code, events = fetch(environment, tmp_path, checkpoint_id)
    assert code == 0, events
    first = answer(tmp_path)
    assert same_files(Path(first["folder"]), checkpoint)
    assert read_source(Path(first["folder"])).model_type == "llama"
    with database.reading() as session:
        assert first["revision"] == session.get_one(Checkpoint, checkpoint_id).sha256

    key = next(entry.key for entry in store.entries(f"{jobs.TENANT}/checkpoints/{checkpoint_id}/") if "/config.json." in entry.key)
    changed = tmp_path / "config.json"
    changed.write_bytes(bytes(store.size(key)))
    store.put_file(key, changed)
    assert fetch(environment, tmp_path, checkpoint_id)[0] == 0  # from the cache
    with pytest.raises(OSError, match=r"did not arrive whole: config\.json"):
        cache.fill(tmp_path / "others", 0, in_store(checkpoint_id, jobs.TENANT, settings), lambda message: None)
    jobs.add_tenant(database, "other")
    with pytest.raises(RecipeError, match="There is no checkpoint"):
        in_store(checkpoint_id, "tenant_other", settings)
    database.dispose()
