"""Uploading checkpoints: over SQLite with a directory, and over Postgres with an S3 server."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select, update

from app.auth import create_key
from app.checkpoints.verifying import verify_next
from app.database import Database, db_now
from app.main import create_app
from app.models import AuditEntry, Checkpoint, Tenant
from app.processes import dies_with
from app.retention import tidy
from app.storage import open_store
from espalier import uploading
from migrations import migrate
from tests.app.conftest import RECIPE, Api, make_settings
from tests.checkpoints import store_checkpoint
from tests.jobs import wait_until
from tests.models import make_checkpoint, write_json
from tests.servers import S3

PART_BYTES = 2**16
PRUNING = RECIPE | {"method": "magnitude", "evaluation": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "llama", max_shard_size="150KB")


@pytest.fixture(scope="module")
def shared_uploads(migrated_url: str, roots: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Api]:
    store = {}
    if migrated_url.startswith("postgresql"):
        environment = request.getfixturevalue("s3").environment
        store = {name.removeprefix("ESPALIER_").lower(): value for name, value in environment.items()}
    bounds = {"upload_part_bytes": PART_BYTES, "max_checkpoint_bytes": 10**9, "orphan_seconds": 0, "lease_seconds": 1, "beat_seconds": 0.3}
    settings = make_settings(tmp_path_factory.mktemp("home"), migrated_url, roots, **store, **bounds)
    database = Database(migrated_url)
    with TestClient(create_app(settings)) as client:
        yield Api(client, database, open_store(settings), settings)
    database.dispose()


@pytest.fixture
def api(shared_uploads: Api) -> Api:
    return shared_uploads.other_tenant()


def tenant_id(api: Api) -> str:
    with api.database.reading() as session:
        return session.scalars(select(Tenant.id).where(Tenant.name == api.tenant)).one()


def stored(api: Api) -> list[str]:
    """The keys below the tenant's checkpoints."""
    return [entry.key for page in api.store.pages(f"{tenant_id(api)}/checkpoints") for entry in page]


def declaration(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"name": "tiny", "files": uploading.declare(folder)} | changes


def declare(api: Api, folder: Path) -> dict[str, Any]:
    answer = api.post("/v1/checkpoints", json=declaration(folder))
    assert answer.status_code == 201, answer.text
    checkpoint: dict[str, Any] = answer.json()
    assert answer.headers["Location"] == f"/v1/checkpoints/{checkpoint['id']}"
    return checkpoint


def put(api: Api, checkpoint: dict[str, Any], path: str, number: int, content: bytes, **headers: str) -> httpx2.Response:
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    headers = {"Content-Digest": f"sha-256=:{digest}:"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return api.request("PUT", f"/v1/checkpoints/{checkpoint['id']}/files/{path}/parts/{number}", content=content, headers=headers)


def part_of(folder: Path, path: str, number: int) -> bytes:
    return (folder / path).read_bytes()[number * PART_BYTES : (number + 1) * PART_BYTES]


def upload(api: Api, folder: Path) -> dict[str, Any]:
    """A checkpoint whose parts have all come, the last ones first."""
    checkpoint = declare(api, folder)
    for file in checkpoint["files"]:
        for number in reversed(file["missing"]):
            answer = put(api, checkpoint, file["path"], number, part_of(folder, file["path"], number))
            assert answer.status_code == 201, answer.text
    return checkpoint


def verified(api: Api, folder: Path, change: Callable[[dict[str, Any]], object] = lambda checkpoint: None) -> dict[str, Any]:
    """A checkpoint after its verification; change: is done to its parts before that."""
    checkpoint = upload(api, folder)
    change(checkpoint)
    answer = api.post(f"/v1/checkpoints/{checkpoint['id']}/complete")
    assert (answer.status_code, answer.json()["state"]) == (202, "verifying")
    assert verify_next(api.database, api.store, api.settings, threading.Event())
    result: dict[str, Any] = api.get(f"/v1/checkpoints/{checkpoint['id']}").json()
    return result


def problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json()["hint"]
    said: dict[str, Any] = answer.json()
    return said


# -------------------------------------------------------------------- the way


def test_what_comes_in_parts_is_verified_and_a_job_can_use_it(api: Api, folder: Path, roots: Path) -> None:
    checkpoint = verified(api, folder)
    assert (checkpoint["state"], checkpoint["error"], checkpoint["bytes"]) == ("ready", None, sum(path.stat().st_size for path in folder.iterdir()))
    assert len(checkpoint["sha256"]) == 64
    assert checkpoint["completed_at"]
    assert {file["path"]: file["missing"] for file in checkpoint["files"]} == {path.name: [] for path in folder.iterdir()}
    assert len(stored(api)) == sum(-(-path.stat().st_size // PART_BYTES) for path in folder.iterdir()) > len(checkpoint["files"])

    shutil.copytree(folder, roots / "models" / "same", dirs_exist_ok=True)
    estimates = [api.post("/v1/jobs?validate_only=true", json=PRUNING | {"model": model}).json()["estimate"] for model in (checkpoint["id"], "same")]
    assert estimates[0] == estimates[1]
    assert estimates[0]["host_bytes"]
    assert api.submit(**PRUNING | {"model": checkpoint["id"]})
    with api.database.reading() as session:
        actions = session.scalars(select(AuditEntry.action).where(AuditEntry.target == checkpoint["id"]).order_by(AuditEntry.id)).all()
    assert actions == ["checkpoint.declare", *["checkpoint.part"] * len(stored(api)), "checkpoint.complete"]


def test_a_job_on_a_checkpoint_is_checked_as_any_other(api: Api, folder: Path) -> None:
    checkpoint = verified(api, folder)
    refused = api.post("/v1/jobs", json=PRUNING | {"model": checkpoint["id"], "sparsity": "2:5"})
    assert problem(refused, 422, "pattern_does_not_fit")["errors"][0]["pointer"] == "/sparsity"


def test_the_parts_that_are_missing_are_told(api: Api, folder: Path) -> None:
    checkpoint = declare(api, folder)
    file = next(file for file in checkpoint["files"] if len(file["missing"]) > 1)
    put(api, checkpoint, file["path"], 1, part_of(folder, file["path"], 1))
    told = api.get(f"/v1/checkpoints/{checkpoint['id']}").json()["files"]
    assert next(each for each in told if each["path"] == file["path"])["missing"] == [number for number in file["missing"] if number != 1]
    said = problem(api.post(f"/v1/checkpoints/{checkpoint['id']}/complete"), 409, "checkpoint_incomplete")
    assert said["detail"] == "Part 0 of 'chat_template.jinja' has not come."


def test_completing_again_changes_nothing(api: Api, folder: Path) -> None:
    checkpoint = verified(api, folder)
    again = api.post(f"/v1/checkpoints/{checkpoint['id']}/complete")
    assert (again.status_code, again.json()) == (202, checkpoint)
    problem(put(api, checkpoint, "config.json", 0, part_of(folder, "config.json", 0)), 409, "checkpoint_not_uploading")


def test_the_list_goes_page_by_page(api: Api, folder: Path) -> None:
    ids = [declare(api, folder)["id"] for _ in range(3)]
    first = api.get("/v1/checkpoints?limit=2&state=uploading&name=tiny").json()
    second = api.get(f"/v1/checkpoints?limit=2&cursor={first['next']}").json()
    assert [checkpoint["id"] for checkpoint in first["items"] + second["items"]] == ids[::-1]
    assert second["next"] is None
    for nothing in ("state=ready", "name=other"):
        assert api.get(f"/v1/checkpoints?{nothing}").json()["items"] == []
    assert api.get("/v1/checkpoints?cursor=x").status_code == 422


def test_a_declaration_that_is_sent_again_is_made_once(api: Api, folder: Path) -> None:
    answers = [api.post("/v1/checkpoints", json=declaration(folder), headers={"Idempotency-Key": "once"}) for _ in range(2)]
    assert answers[0].json() == answers[1].json()
    assert len(api.get("/v1/checkpoints").json()["items"]) == 1


# ---------------------------------------------------------------- what is refused


def file_at(path: str, size: int = 10) -> dict[str, Any]:
    return {"path": path, "bytes": size, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("more", "without", "code"),
    [
        ([file_at("pytorch_model.bin")], "", "file_unsafe"),
        ([file_at("model.pt")], "", "file_unsafe"),
        ([file_at("MODEL.PKL")], "", "file_unsafe"),
        ([file_at("modeling_own.py")], "", "file_unsafe"),
        ([file_at("README.md")], "", "file_kind_refused"),
        ([file_at("noending")], "", "file_kind_refused"),
        ([file_at("config.json")], "", "path_twice"),
        ([file_at("tokenizer.model", 10**9)], "", "checkpoint_too_large"),
        ([], "config.json", "config_missing"),
        ([file_at("sub/config.json")], "config.json", "config_missing"),
        ([file_at("sub/model.safetensors")], ".safetensors", "weights_missing"),
        ([], "tokenizer.json", "tokenizer_missing"),
        ([file_at("config.json", 10**6)], "config.json", "file_too_large"),
    ],
)
def test_files_that_are_not_taken_are_refused_by_name(api: Api, folder: Path, more: list[dict[str, Any]], without: str, code: str) -> None:
    files = [file for file in declaration(folder)["files"] if not (without and file["path"].endswith(without))]
    said = problem(api.post("/v1/checkpoints", json=declaration(folder, files=files + more)), 422, code)
    assert said["errors"][0]["pointer"].startswith("/files")
    if len(more) == 1 and not without and code != "checkpoint_too_large":
        assert more[0]["path"] in said["detail"]


@pytest.mark.parametrize(
    "path", ["../config.json", "/etc/passwd.json", "a/b/c.json", ".hidden.json", "a//b.json", "a\\b.json", "a b.json", "", "x" * 200 + ".json"]
)
def test_paths_that_could_lead_elsewhere_are_refused(api: Api, folder: Path, path: str) -> None:
    files = [*declaration(folder)["files"], file_at(path)]
    assert api.post("/v1/checkpoints", json=declaration(folder, files=files)).status_code == 422
    assert put(api, {"id": "ckpt_" + "0" * 32}, path, 0, b"x").status_code in (404, 422)


def weights(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data


def tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (weights({"a": tensor(0, 4, [1]), "b": tensor(0, 4, [1])}, bytes(4)), "checkpoint_truncated"),  # overlap
        (weights({"a": tensor(4, 8, [1])}, bytes(8)), "checkpoint_truncated"),  # hole
        (weights({"a": tensor(0, 4, [1])}, bytes(8)), "checkpoint_truncated"),  # rest
        (weights({"a": tensor(0, 400, [100])}, bytes(4)), "checkpoint_truncated"),  # beyond the end
        (weights({"a": tensor(0, 4, [2])}, bytes(4)), "checkpoint_truncated"),  # shape
        (weights({"a": tensor(0, 4, [1], "F4")}, bytes(4)), "checkpoint_truncated"),  # dtype
        (weights({"a": tensor(0, 4, [-1, -1])}, bytes(4)), "checkpoint_truncated"),
        (weights({"a": tensor(0, 4, [1] * 10_000)}, bytes(4)), "checkpoint_truncated"),
        (weights(b"{" * 10_000), "checkpoint_truncated"),
        (weights(b"[" * 60_000), "checkpoint_truncated"),
        (weights(b"not JSON"), "checkpoint_truncated"),
        (weights({}, length=2**63), "checkpoint_truncated"),
        (weights(b"{}" + b" " * 70_000), "header_too_large"),
        (b"short", "checkpoint_truncated"),
        (b"PK\x03\x04" + bytes(100), "checkpoint_truncated"),
    ],
)
def test_a_crafted_header_is_refused_before_anything_is_stored(api: Api, folder: Path, tmp_path: Path, content: bytes, code: str) -> None:
    crafted = shutil.copytree(folder, tmp_path / "crafted")
    (crafted / "model-00001-of-00001.safetensors").write_bytes(content)
    checkpoint = declare(api, crafted)
    said = problem(put(api, checkpoint, "model-00001-of-00001.safetensors", 0, content[:PART_BYTES]), 422, code)
    assert str(tmp_path) not in said["detail"]
    assert stored(api) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [({"auto_map": {"AutoModel": "own.Model"}}, "auto_map"), ({"model_type": "unheard_of"}, "unsupported_model_type"), ({"hidden_size": -1}, "config_invalid")],
)
def test_a_configuration_that_can_not_be_pruned_is_refused_before_anything_is_stored(
    api: Api, folder: Path, tmp_path: Path, change: dict[str, Any], code: str
) -> None:
    crafted = shutil.copytree(folder, tmp_path / "crafted")
    write_json(crafted / "config.json", json.loads((crafted / "config.json").read_text()) | change)
    checkpoint = declare(api, crafted)
    said = problem(put(api, checkpoint, "config.json", 0, part_of(crafted, "config.json", 0)), 422, code)
    assert "/tmp" not in said["detail"]
    assert stored(api) == []


def test_a_part_that_is_not_as_announced_is_refused(api: Api, folder: Path) -> None:
    checkpoint, content = declare(api, folder), part_of(folder, "config.json", 0)
    path = f"/v1/checkpoints/{checkpoint['id']}/files/config.json/parts/0"
    other = f"sha-256=:{base64.b64encode(bytes(32)).decode()}:"
    said = problem(put(api, checkpoint, "config.json", 0, content, Content_Digest=other), 422, "part_damaged")
    assert hashlib.sha256(content).hexdigest() in said["detail"]
    problem(put(api, checkpoint, "config.json", 0, content + b" "), 422, "part_size_wrong")
    problem(api.request("PUT", path, content=iter([content]), headers={"Content-Digest": other}), 411, "length_required")
    assert api.request("PUT", path, content=content).status_code == 422
    for digest in ("md5=:x:", "sha-256=:x:", "sha-256", f"{other}, {other}"):
        assert put(api, checkpoint, "config.json", 0, content, Content_Digest=digest).status_code == 422
    assert stored(api) == []
    problem(put(api, checkpoint, "config.json", 1, content), 404, "part_not_found")
    problem(put(api, checkpoint, "generation.json", 0, content), 404, "file_not_found")
    assert put(api, checkpoint, "config.json", -1, content).status_code == 422


def test_a_part_may_come_again_but_not_with_other_bytes(api: Api, folder: Path) -> None:
    checkpoint, content = declare(api, folder), part_of(folder, "tokenizer.json", 0)
    assert put(api, checkpoint, "tokenizer.json", 0, content).status_code == 201
    there = stored(api)
    again = put(api, checkpoint, "tokenizer.json", 0, content)
    assert (again.status_code, again.json()) == (200, {"number": 0, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    problem(put(api, checkpoint, "tokenizer.json", 0, bytes(len(content))), 409, "part_differs")
    assert stored(api) == there


@pytest.mark.parametrize("fault", ["bytes", "shorter", "gone"])
def test_what_was_damaged_in_the_store_is_found(api: Api, folder: Path, tmp_path: Path, fault: str) -> None:
    def damage(checkpoint: dict[str, Any]) -> None:
        key = next(key for key in stored(api) if "model-00001-of" in key and ".00001." in key)
        content = bytearray(b"".join(api.store.get_range(key, 0, api.store.size(key))))
        if fault == "gone":
            api.store.delete([key])
            return
        content[100] ^= 1
        (tmp_path / "damaged").write_bytes(content if fault == "bytes" else content[:100])
        api.store.put_file(key, tmp_path / "damaged")

    checkpoint = verified(api, folder, damage)
    assert (checkpoint["state"], checkpoint["error"]["code"], checkpoint["sha256"]) == ("failed", "checkpoint_damaged", None)
    assert "'model-00001-of" in checkpoint["error"]["message"]
    assert stored(api) == []
    problem(api.post("/v1/jobs", json=PRUNING | {"model": checkpoint["id"]}), 422, "checkpoint_not_ready")
    problem(api.post(f"/v1/checkpoints/{checkpoint['id']}/complete"), 409, "checkpoint_not_uploading")


def test_weights_that_do_not_fit_the_configuration_are_found(api: Api, folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    write_json(other / "config.json", json.loads((other / "config.json").read_text()) | {"num_hidden_layers": 9})
    checkpoint = verified(api, other)
    assert checkpoint["error"]["code"] == "weights_incomplete"
    assert checkpoint["error"]["message"].startswith("'tiny' lacks the tensor")


def test_a_tenant_has_a_bound(api: Api, folder: Path) -> None:
    size = declare(api, folder)["bytes"]
    with api.database.writing() as session:
        session.execute(update(Tenant).where(Tenant.name == api.tenant).values(max_stored_bytes=2 * size))
    first = declare(api, folder)
    refused = api.post("/v1/checkpoints", json=declaration(folder))
    problem(refused, 429, "too_much_stored")
    assert int(refused.headers["Retry-After"]) > 0
    assert api.request("DELETE", f"/v1/checkpoints/{first['id']}").status_code == 204
    declare(api, folder)


# ------------------------------------------------------------- whose, and how long


def test_another_tenants_checkpoint_is_not_there(api: Api, folder: Path) -> None:
    other = api.other_tenant()
    checkpoint = verified(other, folder)
    path = f"/v1/checkpoints/{checkpoint['id']}"
    assert api.get("/v1/checkpoints").json()["items"] == []
    for answer in (api.get(path), api.request("DELETE", path), api.post(f"{path}/complete"), put(api, checkpoint, "config.json", 0, b"{}")):
        problem(answer, 404, "checkpoint_not_found")
    for model in (checkpoint["id"], "ckpt_" + "0" * 32):
        said = problem(api.post("/v1/jobs", json=PRUNING | {"model": model}), 422, "checkpoint_not_found")
        assert said["errors"][0]["pointer"] == "/model"
    assert other.get(path).json() == checkpoint
    reader = api.new_key(["jobs:read", "jobs:write", "artifacts:read"])
    problem(api.get("/v1/checkpoints", key=reader), 403, "scope_missing")


def test_a_checkpoint_stays_while_a_job_needs_it(api: Api, folder: Path) -> None:
    uploading_still = upload(api, folder)
    problem(api.post("/v1/jobs", json=PRUNING | {"model": uploading_still["id"]}), 422, "checkpoint_not_ready")
    checkpoint = verified(api, folder)
    path = f"/v1/checkpoints/{checkpoint['id']}"
    job_id = api.submit(**PRUNING | {"model": checkpoint["id"]})
    assert job_id in problem(api.request("DELETE", path), 409, "checkpoint_in_use")["detail"]
    api.post(f"/v1/jobs/{job_id}/cancel")
    before = len(stored(api))
    assert api.request("DELETE", path).status_code == 204
    assert len(stored(api)) == before // 2
    assert api.get(path).status_code == 404
    problem(api.post(f"/v1/jobs/{job_id}/retry"), 422, "checkpoint_not_found")


def test_uploads_that_rest_are_given_up_and_stray_parts_are_swept(api: Api, folder: Path, tmp_path: Path) -> None:
    resting, kept, ready = upload(api, folder), upload(api, folder), verified(api, folder)
    with api.database.writing() as session:
        session.execute(update(Checkpoint).where(Checkpoint.id == resting["id"]).values(updated_at=db_now(-2 * 24 * 3600 - 60)))
        session.execute(update(Checkpoint).where(Checkpoint.id == kept["id"]).values(updated_at=db_now(-2 * 24 * 3600 + 60)))
    (tmp_path / "stray").write_bytes(b"stray")
    own = stored(api)
    of_kept = next(key for key in own if kept["id"] in key)
    for stray in (f"{of_kept.rpartition('.')[0]}.{'0' * 64}", f"{tenant_id(api)}/checkpoints/ckpt_{'0' * 32}/config.json.00000.{'0' * 64}"):
        api.store.put_file(stray, tmp_path / "stray")
    time.sleep(1.1)  # SeaweedFS tells times in whole seconds
    tidy(api.database, api.store, api.settings, threading.Event())
    assert stored(api) == [key for key in own if resting["id"] not in key]
    assert api.get(f"/v1/checkpoints/{resting['id']}").status_code == 404
    assert {api.get(f"/v1/checkpoints/{each['id']}").json()["state"] for each in (kept, ready)} == {"uploading", "ready"}


# ------------------------------------------------------------------- processes


def test_the_verification_of_a_killed_process_is_taken_up_by_another(api: Api, folder: Path, tmp_path: Path) -> None:
    large = shutil.copytree(folder, tmp_path / "large")
    with (large / "zeros.txt").open("wb") as file:
        file.truncate(256 * 2**20)
    settings = api.settings.model_copy(update={"upload_part_bytes": 2**30})
    checkpoint_id = store_checkpoint(api.database, api.store, settings, tenant_id(api), large, verified=False)
    names = ("store_url", "s3_endpoint", "s3_region", "lease_seconds", "beat_seconds", "home")
    secrets = {name: getattr(settings, name).get_secret_value() for name in ("database_url", "s3_access_key", "s3_secret_key")}
    environment = {f"ESPALIER_{name}".upper(): str(value) for name, value in ({name: getattr(settings, name) for name in names} | secrets).items()}

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "app.dispatcher"]
        return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.DEVNULL, preexec_fn=dies_with(os.getpid()))  # noqa: PLW1509

    def row() -> Checkpoint:
        with api.database.reading() as session:
            return session.get_one(Checkpoint, checkpoint_id)

    first = start()
    wait_until(lambda: row().lease_until is not None, 60, "the verification", pause=0.005)
    first.kill()
    first.wait()
    killed = row()
    assert killed.state == "verifying"
    second = start()
    try:
        wait_until(lambda: row().state != "verifying", 60, "the second verification", pause=0.1)
    finally:
        second.send_signal(signal.SIGTERM)
        second.wait(60)
    assert (row().state, row().error) == ("ready", None)


@contextmanager
def api_process(home: Path, **environment: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """The API as a process of its own, with parts of 128 MiB."""
    migrate(url := f"sqlite:///{home}/espalier.db")
    database = Database(url)
    with database.writing() as session:
        key = create_key(session, "process")
    database.dispose()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "uvicorn", "app.main:create_app", "--factory", "--no-access-log", "--fd", str(listener.fileno())]
        settings = os.environ | environment | {"ESPALIER_HOME": str(home), "ESPALIER_UPLOAD_PART_BYTES": str(2**27)}
        with (home / "api.log").open("wb") as log:
            api = subprocess.Popen(command, env=settings, stderr=log, pass_fds=[listener.fileno()], preexec_fn=dies_with(os.getpid()))  # noqa: PLW1509  it makes one system call
        base = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=base, headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=60) as client:
            client.get("/livez").raise_for_status()
            yield client, api
        api.terminate()
        api.wait(30)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    with api_process(tmp_path_factory.mktemp("process")) as made:
        yield made


@pytest.fixture
def process_on_s3(tmp_path: Path, s3: S3) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    with api_process(tmp_path, **s3.environment) as made:
        yield made


def put_there(client: httpx.Client, checkpoint: dict[str, Any], part: uploading.Part) -> httpx.Response:
    path = f"/v1/checkpoints/{checkpoint['id']}/files/{part.file.name}/parts/{part.number}"
    return client.put(path, content=part.read(), headers=part.headers())


@pytest.mark.parametrize("store", ["process", "process_on_s3"])
def test_a_large_part_takes_little_memory(store: str, request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> None:
    client, api = request.getfixturevalue(store)
    large = shutil.copytree(folder, tmp_path / "large")
    with (large / "zeros.txt").open("wb") as file:
        file.truncate(2**27)
    checkpoint = client.post("/v1/checkpoints", json=declaration(large)).json()

    def peak() -> int:
        return int(Path(f"/proc/{api.pid}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024

    small = {file["path"]: file for file in checkpoint["files"]}
    assert put_there(client, checkpoint, uploading.missing_parts(checkpoint, small["tokenizer.json"], large)[0]).status_code == 201
    before = peak()
    (part,) = uploading.missing_parts(checkpoint, small["zeros.txt"], large)
    assert put_there(client, checkpoint, part).status_code == 201
    assert peak() - before < 32 * 2**20
    said = client.post("/v1/jobs", content=b" " * (2**20 + 1), headers={"Content-Type": "application/json"})
    assert (said.status_code, said.json()["code"]) == (413, "body_too_large")  # others than parts have the bound that they had


def test_of_different_bytes_at_the_same_moment_one_is_kept(process: tuple[httpx.Client, subprocess.Popen[bytes]], folder: Path, tmp_path: Path) -> None:
    client, _ = process
    checkpoint = client.post("/v1/checkpoints", json=declaration(folder)).json()
    size = (folder / "tokenizer.json").stat().st_size
    parts = []
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        path = tmp_path / str(number) / "tokenizer.json"
        path.write_bytes(bytes([number]) * size)
        parts += [uploading.Part(path, 0, 0, size)] * 2
    with ThreadPoolExecutor(len(parts)) as pool:
        answers = list(pool.map(lambda part: put_there(client, checkpoint, part), parts))
    assert sorted(answer.status_code for answer in answers) == [200, 201, *[409] * 14]
    assert len({answer.json()["sha256"] for answer in answers if answer.is_success}) == 1


def test_a_cut_part_leaves_nothing(process: tuple[httpx.Client, subprocess.Popen[bytes]], folder: Path) -> None:
    client, _ = process
    checkpoint = client.post("/v1/checkpoints", json=declaration(folder)).json()
    file = next(file for file in checkpoint["files"] if file["bytes"] > 100_000)
    part = uploading.missing_parts(checkpoint, file, folder)[0]

    def broken() -> Iterator[bytes]:
        yield (folder / file["path"]).read_bytes()[:50_000]
        raise InterruptedError

    with pytest.raises(InterruptedError):
        client.put(f"/v1/checkpoints/{checkpoint['id']}/files/{file['path']}/parts/0", content=broken(), headers=part.headers())
    told = client.get(f"/v1/checkpoints/{checkpoint['id']}").json()
    assert next(each["missing"] for each in told["files"] if each["path"] == file["path"]) == [0]
    assert put_there(client, checkpoint, part).status_code == 201
