"""A local server that takes models as the Hugging Face Hub does, by as much of its protocol as huggingface_hub speaks without Xet."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from tests.local_http import Quiet, QuietServer, answering

TOKEN = "hf_test_token_of_a_user"
CHUNK_BYTES = 65536


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)  # their messages


@dataclass
class HubUploads:
    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # of Git LFS, by sha256
    pause: float = 0.0  # seconds before each chunk of an upload is read
    receiving: threading.Event = field(default_factory=threading.Event)  # set once an upload has begun
    requests: list[str] = field(default_factory=list)


class Server(QuietServer):
    hub: HubUploads


class Handler(Quiet, BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self._path().removeprefix("/api/models/").partition("/revision/")[0]
        repository = self.server.hub.repositories.get(name)
        if repository is None:
            return self._answer({"error": "Repository not found"}, 404)
        return self._answer({"id": name, "sha": _commit(repository), "siblings": [{"rfilename": path} for path in repository.files]})

    def do_POST(self) -> None:
        path, hub = self._path(), self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if asked := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            return self._answer({"files": [_mode(hub.repositories[asked[1]], file) for file in json.loads(body)["files"]]})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._answer({"transfer": "basic", "objects": [self._wanted(found) for found in json.loads(body)["objects"]]})
        asked = re.fullmatch(r"/api/models/(.+)/commit/main", path)
        assert asked is not None, path
        return self._commit(hub.repositories[asked[1]], asked[1], [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        hub, left, content = self.server.hub, int(self.headers["Content-Length"]), b""
        hub.receiving.set()
        while left:
            time.sleep(hub.pause)
            chunk = self.rfile.read(min(CHUNK_BYTES, left))
            if not chunk:
                return
            content, left = content + chunk, left - len(chunk)
        digest = hashlib.sha256(content).hexdigest()
        assert digest == self._path().rpartition("/")[2]
        hub.objects[digest] = content
        self._answer({})

    def _create(self, asked: dict[str, Any]) -> None:
        name, hub = f"{asked['organization']}/{asked['name']}", self.server.hub
        there = name in hub.repositories
        if not there:
            hub.repositories[name] = Repository(asked["visibility"] == "private")
        self._answer({"url": f"{hub.url}/{name}", "name": name} | ({"error": "You already created this model repo"} if there else {}), 409 if there else 200)

    def _wanted(self, asked: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.server.hub.url}/objects/{asked['oid']}"
        return asked | ({} if asked["oid"] in self.server.hub.objects else {"actions": {"upload": {"href": href}}})

    def _commit(self, repository: Repository, name: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                repository.files[value["path"]] = self.server.hub.objects[value["oid"]]
        commit = _commit(repository)
        self._answer({"success": True, "commitOid": commit, "commitUrl": f"{self.server.hub.url}/{name}/commit/{commit}"})

    def _path(self) -> str:
        return urlsplit(self.path).path

    def _answer(self, answer: Any, status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _commit(repository: Repository) -> str:
    return f"{len(repository.commits):040x}"


def _mode(repository: Repository, asked: dict[str, Any]) -> dict[str, Any]:
    large, there = asked["path"].endswith(".safetensors"), repository.files.get(asked["path"])
    oid = None
    if there is not None:
        oid = hashlib.sha256(there).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(there) + there).hexdigest()
    return {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


@contextmanager
def running_hub_uploads() -> Iterator[HubUploads]:
    server = Server(("127.0.0.1", 0), Handler)
    with answering(server) as url:
        server.hub = HubUploads(url)
        yield server.hub
