"""Uploading a folder by the client and by the command line, through cuts and kills, and pruning what was uploaded."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.processes import dies_with
from app.settings import Settings
from espalier.answers import CheckpointFile
from espalier.errors import ApiError, UploadError
from tests.espalier.conftest import Service, running_service
from tests.espalier.proxy import Proxy, proxy
from tests.jobs import wait_until
from tests.models import load_model, make_checkpoint, write_json
from worker.announce import describe
from worker.tasks import ENGINE, run_next

PART_BYTES = 2**16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_checkpoint(tmp_path_factory.mktemp("models") / "my tiny", "llama", max_shard_size="150KB")
    for name in ("README.md", "pytorch_model.bin", "modeling_own.py"):
        (made / name).write_bytes(b"not to be sent")
    (made / "original").mkdir()
    (made / "original" / "params.json").write_text("{}")
    return made


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("uploads"), sweep_seconds=0.2, upload_part_bytes=PART_BYTES) as service:
        yield service


@pytest.fixture
def service(uploads: Service) -> Service:
    """The shared service with a tenant of its own for the test."""
    return Service(uploads.url, uploads.database, uploads.store, uploads.home)


def parts_sent(network: Proxy) -> int:
    return sum(piece.startswith(b"PUT ") for piece in network.requests)


def test_a_folder_is_uploaded_once(service: Service, folder: Path) -> None:
    told: dict[str, list[int]] = {}

    def on_bytes(file: CheckpointFile, have: int) -> None:
        told.setdefault(file["path"], []).append(have)

    with proxy(service.port) as network, service.client(network.url) as client:
        checkpoint = client.upload(folder, on_bytes=on_bytes)
        assert (checkpoint["state"], checkpoint["name"]) == ("ready", "my-tiny")
        assert {file["path"] for file in checkpoint["files"]} == {path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja")}
        for file in checkpoint["files"]:
            assert told[file["path"]] == [*range(0, file["bytes"], PART_BYTES), file["bytes"]]
        sent = parts_sent(network)
        assert sent == sum(-(-file["bytes"] // PART_BYTES) for file in checkpoint["files"])
        assert client.upload(folder) == checkpoint
        assert parts_sent(network) == sent
        assert [each["id"] for each in client.checkpoints()] == [checkpoint["id"]]
        assert client.upload(folder, name="another")["id"] != checkpoint["id"]
        client.delete_checkpoint(checkpoint["id"])
        with pytest.raises(ApiError, match="There is no checkpoint"):
            client.checkpoint(checkpoint["id"])


def test_an_async_upload(service: Service, folder: Path) -> None:
    async def upload() -> str:
        async with service.async_client() as client:
            return (await client.upload(folder))["state"]

    assert asyncio.run(upload()) == "ready"


def test_an_upload_goes_on_after_cuts(service: Service, folder: Path) -> None:
    with proxy(service.port) as network, service.client(network.url) as client:

        def on_bytes(file: CheckpointFile, have: int) -> None:
            network.cut_after = None if file["path"].startswith("tokenizer") else 1500

        checkpoint = client.upload(folder, on_bytes=on_bytes)
        assert checkpoint["state"] == "ready"
        assert parts_sent(network) > sum(-(-file["bytes"] // PART_BYTES) for file in checkpoint["files"])


def test_what_a_killed_client_has_sent_is_not_sent_again(service: Service, folder: Path, tmp_path: Path) -> None:
    large = shutil.copytree(folder, tmp_path / "large")
    (large / "zeros.txt").write_bytes(bytes(200 * PART_BYTES))
    command = [sys.executable, "-m", "espalier.cli", "upload", str(large)]
    environment = os.environ | {"ESPALIER_URL": service.url, "ESPALIER_API_KEY": service.key}

    def zeros_left(checkpoint_id: str) -> int:
        with service.client() as client:
            return next(len(file["missing"]) for file in client.checkpoint(checkpoint_id)["files"] if file["path"] == "zeros.txt")

    def begun() -> bool:
        with service.client() as client:
            ids = [each["id"] for each in client.checkpoints(name="large")]
        return bool(ids) and zeros_left(ids[0]) < 195

    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=dies_with(os.getpid()))  # noqa: PLW1509
    wait_until(begun, 60, "some parts")
    first.kill()
    first.wait()
    with proxy(service.port) as network:
        with service.client() as client:
            (summary,) = client.checkpoints(name="large")
        left = zeros_left(summary["id"])
        assert 0 < left < 195
        ended = subprocess.run([*command, "--json"], env=environment | {"ESPALIER_URL": network.url}, capture_output=True, text=True, timeout=120, check=False)
        assert ended.returncode == 0, ended.stderr
        checkpoint = json.loads(ended.stdout)
        assert (checkpoint["id"], checkpoint["state"]) == (summary["id"], "ready")
        assert left - 1 <= parts_sent(network) <= left  # one may have come after it was counted


def test_what_can_not_be_used_is_told(service: Service, folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    write_json(other / "config.json", json.loads((other / "config.json").read_text()) | {"num_hidden_layers": 9})
    with service.client() as client:
        with pytest.raises(UploadError, match="lacks the tensor"):
            client.upload(other)
        (other / "config.json").unlink()
        with pytest.raises(ApiError) as refused:
            client.upload(other)
    assert refused.value.code == "config_missing"
    environment = os.environ | {"ESPALIER_URL": service.url, "ESPALIER_API_KEY": service.key}
    ended = subprocess.run(
        [sys.executable, "-m", "espalier.cli", "upload", str(other)], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "config_missing" in ended.stderr


COPIES = """
import json, shutil, sys
from pathlib import Path
source, out = Path(sys.argv[2]), Path(sys.argv[3])
shutil.copytree(source, out / "checkpoint")
(out / "report.json").write_text("{}")
"""


@pytest.mark.parametrize("where", ["directory", "bucket"])
def test_an_uploaded_model_is_pruned(where: str, folder: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the engine where the parts lie in a bucket; in a directory by one that copies the model that it is given."""
    environment = {"ESPALIER_HOME": str(tmp_path / "home"), "ESPALIER_UPLOAD_PART_BYTES": str(PART_BYTES), "ESPALIER_HUB": "false"}
    if where == "bucket":
        environment |= request.getfixturevalue("s3").environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    more = {name.removeprefix("ESPALIER_").lower(): value for name, value in environment.items() if name != "ESPALIER_HOME"}
    with running_service(tmp_path / "home", **more | {"sweep_seconds": 0.2}) as service, service.client() as client:
        checkpoint = client.upload(folder)
        job = client.submit(checkpoint["id"], "magnitude", 0.5, evaluation=None)
        run_next(describe(settings), settings, service.database, engine=ENGINE if where == "bucket" else (sys.executable, "-c", COPIES))
        job = client.wait(job["id"], timeout=60)
        assert (job["state"], job["error"], job["model"]) == ("succeeded", None, checkpoint["id"])
        client.download(job["id"], tmp_path / "result", roles=("checkpoint",))
        client.delete_checkpoint(checkpoint["id"])
    result = tmp_path / "result" / "checkpoint"
    if where == "bucket":
        assert sum(int((weight == 0).sum()) for weight in load_model(result).parameters()) > 10_000
    else:
        assert {path.name: path.read_bytes() for path in result.iterdir()} == {
            file["path"]: (folder / file["path"]).read_bytes() for file in checkpoint["files"]
        }
