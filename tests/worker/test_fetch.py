"""Fetching from a hub: a local server that speaks as much of its protocol as huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

FIRST, SECOND = "1" * 40, "2" * 40
MODEL = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"import os",
    "README.md": b"hello",
    "onnx/model.safetensors": b"other",
}
MODELS = {"org/model": MODEL, "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}, "org/huge": {"model.safetensors": b"x"}}


class Hub(ThreadingHTTPServer):
    daemon_threads = True
    commit = FIRST


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        if path.startswith("api/models/"):
            name, _, revision = path.removeprefix("api/models/").replace("/tree/", "/revision/").partition("/revision/")
            if name not in MODELS:
                return self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            sizes = {file: 10**18 if name == "org/huge" else len(content) for file, content in MODELS[name].items()}
            commit = revision if len(revision) == 40 else self.server.commit
            if "/tree/" in path:
                entries = [{"type": "file", "path": file, "size": size, "oid": file} for file, size in sizes.items()]
                return self._answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            siblings = [{"rfilename": file, "size": size} for file, size in sizes.items()]
            return self._answer(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode(), {"Content-Type": "application/json"})
        name, _, rest = path.partition("/resolve/")
        commit, _, file = rest.partition("/")
        content = MODELS[name][file]
        return self._answer(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit})

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def fetch(hub: Hub, tmp_path: Path, model: str) -> tuple[int, list[dict[str, str]]]:
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | settings
    command = [sys.executable, "-m", "worker.fetch", model, str(tmp_path / "model.json")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode in (0, 2), ended.stderr
    return ended.returncode, [json.loads(line) for line in ended.stdout.splitlines()]


def test_safetensors_configuration_and_tokenizer_come_at_one_commit(hub: Hub, tmp_path: Path) -> None:
    code, events = fetch(hub, tmp_path, "org/model")
    assert code == 0
    assert events[0] == {"event": "phase", "phase": "fetch"}
    assert FIRST in events[-1]["message"]
    result = json.loads((tmp_path / "model.json").read_text())
    folder = Path(result["folder"])
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert result["revision"] == FIRST

    hub.commit = SECOND  # the next attempt of the job still sees the same model, and another job the new one
    assert fetch(hub, tmp_path, "org/model")[0] == 0
    assert json.loads((tmp_path / "model.json").read_text()) == result
    (tmp_path / "model.json").unlink()
    assert fetch(hub, tmp_path, "org/model")[0] == 0
    assert json.loads((tmp_path / "model.json").read_text())["revision"] == SECOND


@pytest.mark.parametrize(("model", "code"), [("org/pickled", "pickle_weights"), ("org/none", "model_not_found"), ("org/huge", "disk_full")])
def test_what_can_not_be_fetched_is_refused_with_its_reason(hub: Hub, tmp_path: Path, model: str, code: str) -> None:
    status, events = fetch(hub, tmp_path, model)
    assert status == 2
    assert (events[-1]["event"], events[-1]["code"]) == ("error", code)
    assert events[-1]["hint"]
    assert not (tmp_path / "model.json").exists()
