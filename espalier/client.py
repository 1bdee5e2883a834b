"""The HTTP client: submit a job, wait for it, fetch what comes out, each file by Range with resume and checked against its sha256.

    with Client("http://127.0.0.1:8000", "esp_…") as client:
        job = client.submit("HuggingFaceTB/SmolLM2-135M-Instruct", "cfsp", 0.2)
        job = client.wait(job["id"])
        client.download(job["id"], Path("smaller"))

Errors:

ClientError
├── ApiError            the service refused: the fields of its problem+json
├── UnreachableError    no answer from the service
├── UploadError         the service could not use what was uploaded
└── DownloadError       a file that came is not the file that the manifest names
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self, TypedDict
from urllib.parse import quote
from uuid import uuid4

import httpx

from espalier import uploading
from espalier.uploading import Checkpoint, CheckpointFile, CheckpointSummary, DeclaredFile

FINISHED = ("succeeded", "failed", "cancelled")
DEFAULT_URL = "http://127.0.0.1:8000"

_TRY_AGAIN = (429, 502, 503, 504)


class Progress(TypedDict):
    fraction: float
    blocks_done: int | None
    blocks_total: int | None
    round: int | None
    rounds: int | None
    masks_done: int | None
    masks_total: int | None
    steps_done: int | None
    steps_total: int | None
    loss: float | None
    tokens_per_second: float | None
    eta_seconds: float | None


class JobError(TypedDict):
    code: str
    message: str
    hint: str


class Job(TypedDict):
    """A job as the service tells it; times are RFC 3339 in UTC."""

    id: str
    state: str
    phase: str | None
    model: str
    method: str
    queue: str
    priority: int
    recipe: dict[str, Any]
    progress: Progress
    attempt: int
    max_attempts: int
    error: JobError | None
    links: dict[str, str | None]
    created_at: str
    started_at: str | None
    updated_at: str
    finished_at: str | None


class Event(TypedDict):
    sequence: int
    kind: str
    message: str
    data: dict[str, Any]
    created_at: str


class Artifact(TypedDict):
    path: str
    role: str
    bytes: int
    sha256: str


class Method(TypedDict):
    name: str
    paper: str
    prunes: str
    denominator: str
    patterns: bool
    structured: bool
    model_types: list[str]
    parameters: dict[str, Any]


class Recovery(TypedDict):
    name: str
    summary: str
    parameters: dict[str, Any]
    presets: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Downloaded:
    """A file that was fetched and verified; `resumed_at` is the byte from which this call went on."""

    path: Path
    artifact: Artifact
    resumed_at: int


class ClientError(Exception):
    """An error of this client; its text says what was wrong."""


class UnreachableError(ClientError):
    """The service did not answer."""


class UploadError(ClientError):
    """An uploaded checkpoint is not what was sent, or can't be pruned."""


class DownloadError(ClientError):
    """A file could not be fetched whole and right."""


class ApiError(ClientError):
    """An RFC 9457 answer of the service."""

    def __init__(self, status: int, problem: dict[str, Any]) -> None:
        self.status = status
        self.problem = problem
        self.code = str(problem.get("code") or "")
        self.title = str(problem.get("title") or "")
        self.detail = str(problem.get("detail") or "")
        self.hint = str(problem.get("hint") or "")
        self.request_id = str(problem.get("request_id") or "")
        self.errors: list[dict[str, Any]] = problem.get("errors") or []
        super().__init__(self._sentence())

    @classmethod
    def of(cls, response: httpx.Response) -> ApiError:
        try:
            problem = response.json()
        except ValueError:
            problem = None
        if not isinstance(problem, dict):
            problem = {"title": response.reason_phrase, "detail": f"{response.url} answered {response.status_code} without a problem document."}
        return cls(response.status_code, problem)

    def _sentence(self) -> str:
        lines = [self.detail or self.title or f"HTTP {self.status}"]
        lines += [f"  {error.get('pointer') or error.get('parameter') or 'request'}: {error.get('message', '')}" for error in self.errors[1:]]
        lines += [self.hint] if self.hint else []
        return "\n".join(lines)


class Client:
    """A connection to one service. Without arguments, `ESPALIER_URL` and `ESPALIER_API_KEY` say where and who."""

    def __init__(self, url: str | None = None, api_key: str | None = None, *, timeout: float = 30) -> None:
        self.url = (url or os.environ.get("ESPALIER_URL") or DEFAULT_URL).rstrip("/")
        key = api_key or os.environ.get("ESPALIER_API_KEY") or ""
        # Sent with each call to the service and not held by the connection, so that it never goes along to an object store.
        self._authorization = {"Authorization": f"Bearer {key}"} if key else {}
        if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", self.url):
            raise ClientError(f"'{self.url}' is not the address of a service; set ESPALIER_URL, e.g. to {DEFAULT_URL}")
        here = re.match(r"https?://(localhost|127\.|\[::1\])", self.url) is not None
        # A proxy from the environment does not lead to this machine.
        self._http = httpx.Client(base_url=self.url, timeout=timeout, trust_env=not here, headers={"User-Agent": "espalier", "Accept-Encoding": "identity"})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # ------------------------------------------------------------------ jobs

    def submit(self, model: str, method: str | dict[str, Any], sparsity: float | str | dict[str, Any], **more: Any) -> Job:
        """Submit a job; `more` are further fields of a recipe (`calibration`, `evaluation`, `output`, `limits`)."""
        job: Job = self._send("POST", "/v1/jobs", json={"model": model, "method": method, "sparsity": sparsity, **more}).json()
        return job

    def estimate(self, model: str, method: str | dict[str, Any], sparsity: float | str | dict[str, Any], **more: Any) -> dict[str, Any] | None:
        """What `submit` would refuse is refused, and nothing is submitted: what the job would cost, None where the service can't see the checkpoint."""
        recipe = {"model": model, "method": method, "sparsity": sparsity, **more}
        cost: dict[str, Any] | None = self._send("POST", "/v1/jobs", params={"validate_only": True}, json=recipe).json()["estimate"]
        return cost

    def get(self, job_id: str) -> Job:
        job: Job = self._send("GET", _job_path(job_id)).json()
        return job

    def jobs(self, *, state: str | None = None, method: str | None = None, model: str | None = None, page_size: int = 50) -> Iterator[Job]:
        """All jobs, newest first, page by page."""
        filters = {name: value for name, value in {"state": state, "method": method, "model": model}.items() if value is not None}
        params = {**filters, "limit": page_size}
        while True:
            page = self._send("GET", "/v1/jobs", params=params).json()
            yield from page["items"]
            if page["next"] is None:
                return
            params["cursor"] = page["next"]

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Event]:
        """The events of a job whose sequence number is above `after`, oldest first."""
        while True:
            page = self._send("GET", _job_path(job_id, "events"), params={"after": after}).json()
            yield from page["items"]
            if page["finished"] or not page["items"]:
                return
            after = page["next"]

    def wait(self, job_id: str, *, on_progress: Callable[[Job], None] | None = None, timeout: float | None = None, patience: float = 60) -> Job:
        """The finished job. Asks as often as the service says, survives outages of up to `patience` seconds, raises TimeoutError after `timeout` seconds."""
        give_up = None if timeout is None else time.monotonic() + timeout
        while True:
            response = self._send("GET", _job_path(job_id), patience=patience)
            job: Job = response.json()
            if on_progress is not None:
                on_progress(job)
            if job["state"] in FINISHED:
                return job
            pause = _retry_after(response, otherwise=2)
            if give_up is not None:
                left = give_up - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"{job_id} is still {job['state']} after {timeout:g} seconds; it goes on without this client")
                pause = min(pause, left)
            time.sleep(pause)

    def cancel(self, job_id: str) -> Job:
        job: Job = self._send("POST", _job_path(job_id, "cancel")).json()
        return job

    def report(self, job_id: str) -> dict[str, Any]:
        """What a succeeded job measured."""
        report: dict[str, Any] = self._send("GET", _job_path(job_id, "report")).json()
        return report

    def methods(self) -> list[Method]:
        methods: list[Method] = self._send("GET", "/v1/methods").json()["items"]
        return methods

    def recoveries(self) -> list[Recovery]:
        recoveries: list[Recovery] = self._send("GET", "/v1/recoveries").json()["items"]
        return recoveries

    # ------------------------------------------------------------- artifacts

    def artifacts(self, job_id: str, *, patience: float = 0) -> list[Artifact]:
        """The manifest of a succeeded job."""
        artifacts: list[Artifact] = self._send("GET", _job_path(job_id, "artifacts"), patience=patience).json()["items"]
        return artifacts

    def download(
        self,
        job_id: str,
        target: Path,
        *,
        roles: tuple[str, ...] = (),
        on_bytes: Callable[[Artifact, int], None] | None = None,
        patience: float = 60,
    ) -> list[Downloaded]:
        """Fetch the files of a job below `target`, all or those of some roles, and check each against its sha256.

        What an earlier call left unfinished is continued, what is there already and right is kept. `on_bytes` is told how far each file is.
        Outages of up to `patience` seconds are survived. Raises DownloadError for a file whose bytes are not those of the manifest.
        """
        wanted = [artifact for artifact in self.artifacts(job_id, patience=patience) if not roles or artifact["role"] in roles]
        return [self._download_file(job_id, artifact, target, on_bytes or _ignore, patience) for artifact in wanted]

    def _download_file(self, job_id: str, artifact: Artifact, target: Path, on_bytes: Callable[[Artifact, int], None], patience: float) -> Downloaded:
        path = _below(target, artifact["path"])
        if path.is_file() and path.stat().st_size == artifact["bytes"] and _sha256(path) == artifact["sha256"]:
            on_bytes(artifact, artifact["bytes"])
            return Downloaded(path, artifact, artifact["bytes"])
        path.parent.mkdir(parents=True, exist_ok=True)
        # The name holds the hash, so that a part is never continued with the bytes of another file.
        part = path.with_name(f"{path.name}.{artifact['sha256'][:16]}.part")
        part.touch()
        if part.stat().st_size > artifact["bytes"]:
            part.write_bytes(b"")
        resumed_at = part.stat().st_size
        self._fetch(_job_path(job_id, "artifacts", artifact["path"]), artifact, part, on_bytes, patience)
        found = _sha256(part)
        if found != artifact["sha256"]:
            part.unlink()
            raise DownloadError(
                f"'{artifact['path']}' of {job_id} is damaged: its sha256 is {found}, the manifest says {artifact['sha256']}. What was fetched of it is deleted; download again."
            )
        part.replace(path)
        return Downloaded(path, artifact, resumed_at)

    def _fetch(self, url: str, artifact: Artifact, part: Path, on_bytes: Callable[[Artifact, int], None], patience: float) -> None:
        """Fill `part` up to the artifact's size, going on where it ends after every cut, until `patience` seconds have brought nothing."""
        outage = _Outage(patience)
        while (have := part.stat().st_size) < artifact["bytes"]:
            try:
                with self._open(url, artifact, have) as response:
                    if response.status_code in _TRY_AGAIN:
                        response.read()
                        outage.pause(ApiError.of(response), response)
                        continue
                    if response.status_code not in (200, 206):
                        response.read()
                        raise ApiError.of(response)
                    with part.open("ab" if response.status_code == 206 else "wb") as file:
                        for chunk in response.iter_raw():
                            file.write(chunk)
                            on_bytes(artifact, file.tell())
            except httpx.TransportError as error:
                if part.stat().st_size > have:
                    outage = _Outage(patience)
                outage.pause(UnreachableError(f"'{artifact['path']}' stopped coming from {self.url}: {error or type(error).__name__}"))
            else:
                if part.stat().st_size != artifact["bytes"]:
                    size = part.stat().st_size
                    part.unlink()
                    raise DownloadError(
                        f"'{artifact['path']}' came with {size} bytes, the manifest says {artifact['bytes']}. What was fetched of it is deleted."
                    )
        on_bytes(artifact, artifact["bytes"])

    def _open(self, url: str, artifact: Artifact, offset: int) -> AbstractContextManager[httpx.Response]:
        """Begin to read a file at `offset`, from the service or from the object store that it redirects to."""
        span = {"Range": f"bytes={offset}-"} if offset else {}
        condition = {"If-Range": f'"{artifact["sha256"]}"'} if offset else {}
        response = self._http.send(self._http.build_request("GET", url, headers=self._authorization | span | condition), stream=True)
        if response.status_code != 307:
            return closing(response)
        response.close()
        # An object store has an ETag of its own, so the condition stays behind; the hash of the whole file is checked in any case.
        location = response.url.join(response.headers["Location"])
        return closing(self._http.send(self._http.build_request("GET", location, headers=span), stream=True))

    # ----------------------------------------------------------- checkpoints

    def checkpoints(self, *, name: str | None = None, states: Sequence[str] = (), page_size: int = 50, patience: float = 0) -> Iterator[CheckpointSummary]:
        """All uploaded checkpoints, newest first, page by page."""
        params = {"limit": page_size, "state": list(states), **({} if name is None else {"name": name})}
        while True:
            page = self._send("GET", "/v1/checkpoints", params=params, patience=patience).json()
            yield from page["items"]
            if page["next"] is None:
                return
            params["cursor"] = page["next"]

    def checkpoint(self, checkpoint_id: str, *, patience: float = 0) -> Checkpoint:
        checkpoint: Checkpoint = self._send("GET", _checkpoint_path(checkpoint_id), patience=patience).json()
        return checkpoint

    def delete_checkpoint(self, checkpoint_id: str) -> None:
        self._send("DELETE", _checkpoint_path(checkpoint_id))

    def upload(
        self, folder: Path, *, name: str | None = None, on_bytes: Callable[[CheckpointFile, int], None] | None = None, patience: float = 60
    ) -> Checkpoint:
        """Upload the checkpoint in a folder and wait until it is ready; its id is a job's `model`. Files that no job reads stay behind.

        What an earlier call, or another client, began to upload under this name with the same bytes is continued; where it is ready already, nothing is sent.
        `on_bytes` is told how much of each file has come. Outages of up to `patience` seconds are survived. Raises UploadError where the checkpoint can't be used.
        """
        files, name = uploading.declare(folder), name or uploading.name_of(folder)
        checkpoint = self._begun(name, files, patience) or self._declare(name, files, patience)
        if checkpoint["state"] == "uploading":
            for file in checkpoint["files"]:
                self._upload_file(checkpoint, file, folder, on_bytes or _ignore, patience)
            self._send("POST", _checkpoint_path(checkpoint["id"], "complete"), patience=patience)
        return self._wait_until_ready(checkpoint["id"], patience)

    def _begun(self, name: str, files: Sequence[DeclaredFile], patience: float) -> Checkpoint | None:
        for summary in self.checkpoints(name=name, states=("uploading", "verifying", "ready"), patience=patience):
            if summary["bytes"] == sum(file["bytes"] for file in files):
                checkpoint = self.checkpoint(summary["id"], patience=patience)
                if uploading.is_same(checkpoint, files):
                    return checkpoint
        return None

    def _declare(self, name: str, files: Sequence[DeclaredFile], patience: float) -> Checkpoint:
        once = {"Idempotency-Key": uuid4().hex}
        checkpoint: Checkpoint = self._send("POST", "/v1/checkpoints", json={"name": name, "files": files}, headers=once, patience=patience).json()
        return checkpoint

    def _upload_file(
        self, checkpoint: Checkpoint, file: CheckpointFile, folder: Path, on_bytes: Callable[[CheckpointFile, int], None], patience: float
    ) -> None:
        parts = uploading.missing_parts(checkpoint, file, folder)
        have = file["bytes"] - sum(part.size for part in parts)
        on_bytes(file, have)
        for part in parts:
            path = _checkpoint_path(checkpoint["id"], "files", file["path"], "parts", str(part.number))
            self._send("PUT", path, content=part.read, headers=part.headers(), patience=patience)
            have += part.size
            on_bytes(file, have)

    def _wait_until_ready(self, checkpoint_id: str, patience: float) -> Checkpoint:
        while True:
            response = self._send("GET", _checkpoint_path(checkpoint_id), patience=patience)
            checkpoint: Checkpoint = response.json()
            if checkpoint["error"] is not None:
                raise UploadError(f"{checkpoint_id} can't be used: {checkpoint['error']['message']} {checkpoint['error']['hint']}")
            if checkpoint["state"] == "ready":
                return checkpoint
            time.sleep(_retry_after(response, otherwise=2))

    # ------------------------------------------------------------------ HTTP

    def _send(
        self,
        verb: str,
        path: str,
        *,
        params: dict[str, Any] | None = None,
        json: Any = None,
        content: Callable[[], Iterator[bytes]] | None = None,
        headers: dict[str, str] | None = None,
        patience: float = 0,
    ) -> httpx.Response:
        """content: gives the body anew for every try."""
        outage = _Outage(patience)
        while True:
            body = None if content is None else content()
            try:
                response = self._http.request(verb, path, params=params, json=json, content=body, headers=self._authorization | (headers or {}))
            except httpx.TransportError as error:
                outage.pause(UnreachableError(f"No answer from {self.url} ({error or type(error).__name__}). Is the service up, and is ESPALIER_URL right?"))
                continue
            if response.is_success:
                return response
            if response.status_code not in _TRY_AGAIN:
                raise ApiError.of(response)
            outage.pause(ApiError.of(response), response)


class _Outage:
    """Counts the seconds since something last worked; `pause` sleeps, longer each time, or raises once `patience` is used up."""

    def __init__(self, patience: float) -> None:
        self._give_up = time.monotonic() + patience
        self._next = 0.25

    def pause(self, error: ClientError, response: httpx.Response | None = None) -> None:
        seconds = self._next if response is None else _retry_after(response, otherwise=self._next)
        if time.monotonic() + seconds > self._give_up:
            raise error
        time.sleep(seconds)
        self._next = min(self._next * 2, 8)


def _job_path(job_id: str, *more: str) -> str:
    return "/".join(("/v1/jobs", quote(job_id, safe=""), *(quote(part) for part in more)))


def _checkpoint_path(checkpoint_id: str, *more: str) -> str:
    return "/".join(("/v1/checkpoints", quote(checkpoint_id, safe=""), *(quote(part) for part in more)))


def _retry_after(response: httpx.Response, *, otherwise: float) -> float:
    """Seconds of a `Retry-After` header; its other form, a date, counts as absent."""
    try:
        return min(max(float(response.headers["Retry-After"]), 0.1), 60)
    except (KeyError, ValueError):
        return otherwise


def _below(folder: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise DownloadError(f"The manifest names the file '{name}', which would lie outside the target folder; nothing is written.")
    return folder.joinpath(*parts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ignore(file: Artifact | CheckpointFile, have: int) -> None:
    pass
