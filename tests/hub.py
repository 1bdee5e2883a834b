"""A local server that speaks as much of the Hugging Face Hub's protocol as huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

from tests.local_http import Quiet, QuietServer, answering

FIRST, SECOND = "1" * 40, "2" * 40
CHUNK_BYTES = 4096


@dataclass
class Hub:
    """`models` are the folders of models by name; each is at `commit`."""

    url: str
    models: dict[str, Path] = field(default_factory=dict)
    commit: str = FIRST
    said_bytes: int | None = None  # of every file, where the hub shall lie
    pauses: dict[str, float] = field(default_factory=dict)  # seconds before each chunk of a file
    sent: dict[str, int] = field(default_factory=dict)  # bytes of each file

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "ESPALIER_"))}
        return kept | {"HF_ENDPOINT": self.url, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}


class Server(QuietServer):
    hub: Hub


class Handler(Quiet, BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        if path.startswith("api/models/"):
            return self._tell(*path.removeprefix("api/models/").replace("/tree/", "/revision/").partition("/revision/")[::2], tree="/tree/" in path)
        name, _, rest = path.partition("/resolve/")
        commit, _, file = rest.partition("/")
        return self._send(self.server.hub.models[name] / file, commit)

    do_HEAD = do_GET  # noqa: N815  http.server looks for this name

    def _tell(self, name: str, revision: str, *, tree: bool) -> None:
        if name not in self.server.hub.models:
            return self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        told = []
        for file in sorted(path for path in self.server.hub.models[name].rglob("*") if path.is_file()):
            path, size = str(file.relative_to(self.server.hub.models[name])), self.server.hub.said_bytes or file.stat().st_size
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            lfs = {"lfs": {"oid" if tree else "sha256": sha256, "size": size, "pointerSize": 100}} if file.suffix == ".safetensors" else {}
            told.append({"type": "file", "path": path, "size": size, "oid": sha256[:40]} if tree else {"rfilename": path, "size": size, "blobId": sha256[:40]})
            told[-1] |= lfs
        commit = revision if len(revision) == 40 else self.server.hub.commit
        answer = told if tree else {"id": name, "sha": commit, "siblings": told}
        return self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, file: Path, commit: str) -> None:
        content = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._answer(206 if asked else 200, content[start:], headers, file)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], file: Path | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "GET":
            return
        try:
            for start in range(0, len(body), CHUNK_BYTES):
                if file is not None:
                    time.sleep(self.server.hub.pauses.get(file.name, 0))
                chunk = body[start : start + CHUNK_BYTES]
                self.wfile.write(chunk)
                if file is not None:
                    self.server.hub.sent[file.name] = self.server.hub.sent.get(file.name, 0) + len(chunk)
        except OSError:  # the client was killed
            self.close_connection = True


@contextmanager
def running_hub() -> Iterator[Hub]:
    server = Server(("127.0.0.1", 0), Handler)
    with answering(server) as url:
        server.hub = Hub(url)
        yield server.hub
