"""The HTTP client, blocking and async: submit a job, follow it, fetch what comes out, each file by Range with resume and checked against its sha256.

    with Client("http://127.0.0.1:8000", "esp_…") as client:
        job = client.submit("HuggingFaceTB/SmolLM2-135M-Instruct", "cfsp", 0.2)
        job = client.wait(job["id"])
        client.download(job["id"], Path("smaller"))

    async with AsyncClient() as client:
        async for event in client.stream(job["id"]):
            print(event["message"])

Both have the methods of `Operations`; `espalier.answers` has the types of what they give, `espalier.errors` what they raise. A call that may be sent again
without harm is, after an error that may pass, for `patience` seconds: reads and deletions always, a submission because it carries an Idempotency-Key.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx

from espalier import uploading
from espalier.answers import (
    ArtifactFile,
    Checkpoint,
    CheckpointFile,
    CheckpointSummary,
    Delivery,
    Entry,
    Event,
    EventPage,
    Job,
    Key,
    Method,
    NewKey,
    Queue,
    Recovery,
    Report,
    SinkRun,
    Usage,
    Validation,
    Webhook,
    WebhookWithSecret,
)
from espalier.both import Awaiting, AwaitingWire, Blocking, BlockingWire, Iteration, Operation, Wire
from espalier.downloading import Downloaded, Target, targets
from espalier.errors import ApiError, ClientError, UnreachableError, UploadError
from espalier.sending import MAY_PASS, Call, Outage, no_answer, retry_after, worth_another_try
from espalier.uploading import DeclaredFile

FINISHED = ("succeeded", "failed", "cancelled")
DEFAULT_URL = "http://127.0.0.1:8000"
LONG_POLL_SECONDS = 30  # of the 60 that the service allows: what lies between may cut a longer silence
POLL_SECONDS = 2.0
SILENCE_SECONDS = 45.0  # after which a stream, in which something comes every 15 seconds, counts as cut

T = TypeVar("T")


class Operations:
    """What both clients can do. Without arguments, `ESPALIER_URL` and `ESPALIER_API_KEY` say where the service is and who asks.

    timeout: seconds until a silent connection counts as broken. patience: seconds of outage that a call survives, where it may be sent again; calls that take
    long have their own for what comes after the first answer.
    """

    _wires: ClassVar[type[BlockingWire] | type[AwaitingWire]]
    _wire: Wire

    def __init__(self, url: str | None = None, api_key: str | None = None, *, timeout: float = 30, patience: float = 10) -> None:
        self.url = (url or os.environ.get("ESPALIER_URL") or DEFAULT_URL).rstrip("/")
        self._timeout, self._patience = timeout, patience
        key = api_key or os.environ.get("ESPALIER_API_KEY") or ""
        # Sent with each call to the service and not held by the connection, so that it never goes along to an object store.
        self._authorization = {"Authorization": f"Bearer {key}"} if key else {}
        if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", self.url):
            raise ClientError(f"'{self.url}' is not the address of a service; set ESPALIER_URL, e.g. to {DEFAULT_URL}")
        here = re.match(r"https?://(localhost|127\.|\[::1\])", self.url) is not None
        headers = {"User-Agent": "espalier", "Accept-Encoding": "identity"}
        # A proxy from the environment does not lead to this machine.
        self._wire = self._wires(base_url=self.url, timeout=timeout, trust_env=not here, headers=headers)

    # ------------------------------------------------------------------ jobs

    @Operation
    async def submit(
        self, /, model: str, method: str | dict[str, Any], sparsity: float | str | dict[str, Any], *, idempotency_key: str | None = None, **more: Any
    ) -> Job:
        """Submit a job; `more` are further fields (`calibration`, `recovery`, `output`, `queue`, `metadata`, `sinks`, …), see the service's /docs.

        idempotency_key: under the same key the same job is submitted once only, whoever sends it; else every call has one of its own.
        """
        recipe = {"model": model, "method": method, "sparsity": sparsity, **more}
        return await self._send(Call[Job]("POST", "/v1/jobs", json=recipe, headers=_once(idempotency_key)))

    @Operation
    async def estimate(self, /, model: str, method: str | dict[str, Any], sparsity: float | str | dict[str, Any], **more: Any) -> Validation:
        """What `submit` would refuse is refused, and nothing is submitted: the whole recipe, what the job would cost, and where it would run."""
        recipe = {"model": model, "method": method, "sparsity": sparsity, **more}
        return await self._send(Call[Validation]("POST", "/v1/jobs", params={"validate_only": True}, json=recipe, repeats=True))

    @Operation
    async def get(self, job_id: str) -> Job:
        return await self._send(Call[Job]("GET", _path("jobs", job_id)))

    @Iteration
    async def jobs(
        self,
        *,
        state: str | Sequence[str] | None = None,
        method: str | None = None,
        model: str | None = None,
        queue: str | None = None,
        created_after: datetime | str | None = None,
        created_before: datetime | str | None = None,
        metadata: Mapping[str, str] | None = None,
        page_size: int = 50,
    ) -> AsyncIterator[Job]:
        """All jobs that these filters leave, newest first, page by page. A time has its zone."""
        filters = _given(state=state, method=method, model=model, queue=queue, created_after=_time(created_after), created_before=_time(created_before))
        filters |= {f"metadata[{name}]": value for name, value in (metadata or {}).items()}
        async for job in self._pages("/v1/jobs", filters, page_size):
            yield job

    @Iteration
    async def events(self, job_id: str, *, after: int = 0) -> AsyncIterator[Event]:
        """The events so far of a job whose sequence number is above `after`, oldest first."""
        while True:
            page = await self._send(Call[EventPage]("GET", _path("jobs", job_id, "events"), params={"after": after}))
            for event in page["items"]:
                yield event
            if page["finished"] or not page["items"]:
                return
            after = page["next"]

    @Iteration
    async def stream(self, job_id: str, *, after: int = 0, patience: float = 60) -> AsyncIterator[Event]:
        """The events of a job above `after`, then each as it happens, until it has finished. A stream that is cut goes on where it was, none lost or doubled."""
        outage, begun = Outage(patience), False
        while True:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
            response = await self._open(
                Call("GET", _path("jobs", job_id, "events"), headers=headers, waits=SILENCE_SECONDS - self._timeout), patience if begun else None
            )
            begun = True
            cut = UnreachableError(f"The events of {job_id} stopped coming from {self.url}.")
            try:
                async for message in self._wire.messages(response):
                    if message.event == "end":
                        return
                    if not message.data:  # how long to wait before connecting again
                        continue
                    event: Event = message.json()
                    after, outage = event["sequence"], Outage(patience)
                    yield event
            except httpx.TransportError as error:
                cut.__cause__ = error
            finally:
                await self._wire.release(response)
            await self._wire.sleep(outage.pause(cut))

    @Operation
    async def wait(
        self,
        job_id: str,
        *,
        on_progress: Callable[[Job], None] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  for both clients
        patience: float = 60,
    ) -> Job:
        """The finished job; `on_progress` is told of each change. Survives outages of up to `patience` seconds, raises TimeoutError after `timeout` seconds."""
        give_up = math.inf if timeout is None else time.monotonic() + timeout
        standing: httpx.Response | None = None
        job: Job | None = None
        at_once = True  # whether the service has room for one more who waits
        while job is None or job["state"] not in FINISHED:
            left = give_up - time.monotonic()
            if job is not None and left <= 0:
                raise TimeoutError(f"{job_id} is still {job['state']} after {timeout:g} seconds; it goes on without this client")
            seconds = int(min(LONG_POLL_SECONDS, left)) if at_once and standing is not None else 0
            if standing is not None and not seconds:
                await self._wire.sleep(min(left, retry_after(standing) or POLL_SECONDS))
            try:
                answer = await self._answer(_standing(job_id, standing, seconds), None if standing is None else patience)
            except ApiError as error:
                if error.code != "too_many_streams":
                    raise
                at_once = False
                continue
            if answer.status_code != 304:
                standing, job = answer, answer.json()
                if on_progress is not None:
                    on_progress(answer.json())
        return job

    @Operation
    async def cancel(self, job_id: str) -> Job:
        return await self._send(Call[Job]("POST", _path("jobs", job_id, "cancel")))

    @Operation
    async def retry(self, job_id: str, *, idempotency_key: str | None = None) -> Job:
        """Try a job again that has failed or was cancelled; it goes on from its last verified block."""
        return await self._send(Call[Job]("POST", _path("jobs", job_id, "retry"), headers=_once(idempotency_key)))

    @Operation
    async def delete(self, job_id: str) -> None:
        """Delete a finished job with its events, report and files."""
        await self._send(Call("DELETE", _path("jobs", job_id), _nothing))

    @Operation
    async def report(self, job_id: str) -> Report:
        """What a succeeded job measured."""
        return await self._send(Call[Report]("GET", _path("jobs", job_id, "report")))

    # ----------------------------------------------------------------- sinks

    @Operation
    async def sinks(self, job_id: str) -> list[SinkRun]:
        """Where the job's result goes, and what became of that."""
        job = await self._send(Call[Job]("GET", _path("jobs", job_id)))
        return job["sinks"]

    @Operation
    async def add_sink(self, job_id: str, sink: dict[str, Any]) -> Job:
        """Bring the result of a succeeded job to one more place, e.g. `{"name": "hub", "repository": "owner/name", "token": "…"}`."""
        return await self._send(Call[Job]("POST", _path("jobs", job_id, "sinks"), json=sink))

    @Operation
    async def retry_sink(self, job_id: str, number: int, secrets: dict[str, str] | None = None) -> Job:
        """Try a failed sink again. Its secrets were forgotten, so they are given again."""
        return await self._send(Call[Job]("POST", _path("jobs", job_id, "sinks", str(number), "retry"), json=secrets or {}))

    # ------------------------------------------------------------- artifacts

    @Operation
    async def artifacts(self, job_id: str) -> list[ArtifactFile]:
        """The manifest of a succeeded job."""
        return await self._send(_manifest(job_id))

    @Operation
    async def download(
        self,
        job_id: str,
        folder: Path,
        *,
        roles: Collection[str] = (),
        resume: bool = True,
        on_bytes: Callable[[ArtifactFile, int], None] | None = None,
        patience: float = 60,
    ) -> list[Downloaded]:
        """Fetch the files of a job below `folder`, all or those of some roles, and check each against its sha256.

        What an earlier call left unfinished is continued, unless `resume` is False; what is there already and right is kept. `on_bytes` is told how far each
        file is. Outages of up to `patience` seconds are survived. Raises DownloadError for a file whose bytes are not those of the manifest.
        """
        wanted = targets(folder, await self._send(_manifest(job_id)), roles)
        return [await self._download_file(job_id, target, resume, on_bytes or _ignore, patience) for target in wanted]

    async def _download_file(self, job_id: str, target: Target, resume: bool, on_bytes: Callable[[ArtifactFile, int], None], patience: float) -> Downloaded:
        artifact = target.artifact
        if await self._wire.offload(lambda: target.is_there):
            on_bytes(artifact, artifact["bytes"])
            return Downloaded(target.path, artifact, artifact["bytes"])
        resumed_at = target.begin(resume=resume)
        outage = Outage(patience)
        while (have := target.have) < artifact["bytes"]:
            try:
                await self._fetch(job_id, target, have, on_bytes)
                break
            except (UnreachableError, ApiError) as error:
                if isinstance(error, ApiError) and error.status not in MAY_PASS:
                    raise
                if target.have > have:
                    outage = Outage(patience)
                await self._wire.sleep(outage.pause(error))
        await self._wire.offload(target.finish, job_id)
        on_bytes(artifact, artifact["bytes"])
        return Downloaded(target.path, artifact, resumed_at)

    async def _fetch(self, job_id: str, target: Target, have: int, on_bytes: Callable[[ArtifactFile, int], None]) -> None:
        """Append to the part what comes in one answer, from the service or from the object store that it redirects to."""
        artifact = target.artifact
        span = {"Range": f"bytes={have}-"} if have else {}
        condition = {"If-Range": f'"{artifact["sha256"]}"'} if have else {}
        http = self._wire.http
        request = http.build_request("GET", _path("jobs", job_id, "artifacts", artifact["path"]), headers=self._authorization | span | condition)
        try:
            response = await self._wire.send(request, stream=True)
            if response.status_code == 307:
                await self._wire.release(response)
                # An object store has an ETag of its own, so the condition stays behind; the hash of the whole file is checked in any case.
                location = response.url.join(response.headers["Location"])
                response = await self._wire.send(http.build_request("GET", location, headers=span), stream=True)
            try:
                if response.status_code not in (200, 206):
                    await self._wire.read(response)
                    raise ApiError.of(response)
                with target.part.open("ab" if response.status_code == 206 else "wb") as file:
                    async for chunk in self._wire.chunks(response):
                        await self._wire.offload(file.write, chunk)
                        on_bytes(artifact, file.tell())
            finally:
                await self._wire.release(response)
        except httpx.TransportError as error:
            raise UnreachableError(f"'{artifact['path']}' stopped coming from {self.url}: {error or type(error).__name__}") from error

    # ----------------------------------------------------------- checkpoints

    @Iteration
    async def checkpoints(self, *, name: str | None = None, states: Sequence[str] = (), page_size: int = 50) -> AsyncIterator[CheckpointSummary]:
        """All uploaded checkpoints, newest first, page by page."""
        async for checkpoint in self._pages("/v1/checkpoints", _given(name=name, state=list(states)), page_size):
            yield checkpoint

    @Operation
    async def checkpoint(self, checkpoint_id: str) -> Checkpoint:
        return await self._send(Call[Checkpoint]("GET", _path("checkpoints", checkpoint_id)))

    @Operation
    async def delete_checkpoint(self, checkpoint_id: str) -> None:
        await self._send(Call("DELETE", _path("checkpoints", checkpoint_id), _nothing))

    @Operation
    async def upload(
        self, folder: Path, *, name: str | None = None, on_bytes: Callable[[CheckpointFile, int], None] | None = None, patience: float = 60
    ) -> Checkpoint:
        """Upload the checkpoint in a folder and wait until it is ready; its id is a job's `model`. Files that no job reads stay behind.

        What an earlier call, or another client, began to upload under this name with the same bytes is continued; where it is ready already, nothing is sent.
        `on_bytes` is told how much of each file has come. Outages of up to `patience` seconds are survived. Raises UploadError where the checkpoint can't be used.
        """
        files, name = await self._wire.offload(uploading.declare, folder), name or uploading.name_of(folder)
        declaration = Call[Checkpoint]("POST", "/v1/checkpoints", json={"name": name, "files": files}, headers=_once(None))
        begun = await self._begun(name, files, patience)
        checkpoint = await self._send(declaration, patience) if begun is None else begun
        if checkpoint["state"] == "uploading":
            for file in checkpoint["files"]:
                await self._upload_file(checkpoint, file, folder, on_bytes or _ignore, patience)
            await self._send(Call("POST", _path("checkpoints", checkpoint["id"], "complete"), repeats=True), patience)
        return await self._wait_until_ready(checkpoint["id"], patience)

    async def _begun(self, name: str, files: Sequence[DeclaredFile], patience: float) -> Checkpoint | None:
        states = ("uploading", "verifying", "ready")
        async for summary in self._pages("/v1/checkpoints", {"name": name, "state": states}, 50):
            if summary["bytes"] == sum(file["bytes"] for file in files):
                checkpoint = await self._send(Call[Checkpoint]("GET", _path("checkpoints", summary["id"])), patience)
                if uploading.is_same(checkpoint, files):
                    return checkpoint
        return None

    async def _upload_file(
        self, checkpoint: Checkpoint, file: CheckpointFile, folder: Path, on_bytes: Callable[[CheckpointFile, int], None], patience: float
    ) -> None:
        parts = uploading.missing_parts(checkpoint, file, folder)
        have = file["bytes"] - sum(part.size for part in parts)
        on_bytes(file, have)
        for part in parts:
            path = _path("checkpoints", checkpoint["id"], "files", file["path"], "parts", str(part.number))
            await self._send(Call("PUT", path, body=part.read, headers=await self._wire.offload(part.headers)), patience)
            have += part.size
            on_bytes(file, have)

    async def _wait_until_ready(self, checkpoint_id: str, patience: float) -> Checkpoint:
        while True:
            answer = await self._answer(Call("GET", _path("checkpoints", checkpoint_id)), patience)
            checkpoint: Checkpoint = answer.json()
            if checkpoint["error"] is not None:
                raise UploadError(f"{checkpoint_id} can't be used: {checkpoint['error']['message']} {checkpoint['error']['hint']}")
            if checkpoint["state"] == "ready":
                return checkpoint
            await self._wire.sleep(retry_after(answer) or POLL_SECONDS)

    # ------------------------------------------------------- what there is

    @Operation
    async def methods(self) -> list[Method]:
        return await self._send(Call("GET", "/v1/methods", _items))

    @Operation
    async def recoveries(self) -> list[Recovery]:
        return await self._send(Call("GET", "/v1/recoveries", _items))

    @Operation
    async def queues(self) -> list[Queue]:
        """The classes of workers, and how busy they are."""
        return await self._send(Call("GET", "/v1/queues", _items))

    @Operation
    async def usage(self) -> Usage:
        """What the tenant has, and what it may have."""
        return await self._send(Call[Usage]("GET", "/v1/usage"))

    # ------------------------------------------------------------------ keys

    @Iteration
    async def keys(self, *, page_size: int = 50) -> AsyncIterator[Key]:
        """The tenant's keys, without their secrets, newest first."""
        async for key in self._pages("/v1/keys", {}, page_size):
            yield key

    @Operation
    async def create_key(self, name: str, scopes: Sequence[str], *, lifetime: int | None = None) -> NewKey:
        """Make a key, whose secret is told this once. lifetime: seconds until it expires."""
        return await self._send(Call[NewKey]("POST", "/v1/keys", json={"name": name, "scopes": list(scopes), "lifetime": lifetime}))

    @Operation
    async def rotate_key(self, key_id: str, *, overlap: int = 3600) -> NewKey:
        """Replace a key by a new one; the old one stays good for `overlap` seconds."""
        return await self._send(Call[NewKey]("POST", _path("keys", key_id, "rotate"), json={"overlap": overlap}))

    @Operation
    async def revoke_key(self, key_id: str) -> None:
        await self._send(Call("DELETE", _path("keys", key_id), _nothing))

    # -------------------------------------------------------------- webhooks

    @Operation
    async def webhooks(self) -> list[Webhook]:
        return await self._send(Call("GET", "/v1/webhooks", _items))

    @Operation
    async def create_webhook(self, url: str, *, kinds: Sequence[str] = (), description: str = "", every_job: bool = True) -> WebhookWithSecret:
        """Have news of jobs posted to an address; kinds: of which news, all by default. The secret that signs them is told this once."""
        webhook = {"url": url, "description": description, "every_job": every_job, **({"kinds": list(kinds)} if kinds else {})}
        return await self._send(Call[WebhookWithSecret]("POST", "/v1/webhooks", json=webhook))

    @Operation
    async def delete_webhook(self, webhook_id: str) -> None:
        await self._send(Call("DELETE", _path("webhooks", webhook_id), _nothing))

    @Operation
    async def enable_webhook(self, webhook_id: str) -> Webhook:
        """Send again to a webhook that was disabled."""
        return await self._send(Call[Webhook]("POST", _path("webhooks", webhook_id, "enable"), repeats=True))

    @Operation
    async def rotate_webhook(self, webhook_id: str, *, overlap: int = 24 * 3600) -> WebhookWithSecret:
        """Make a new secret; for `overlap` seconds messages are signed by both."""
        return await self._send(Call[WebhookWithSecret]("POST", _path("webhooks", webhook_id, "rotate"), params={"overlap": overlap}))

    @Operation
    async def test_webhook(self, webhook_id: str) -> Delivery:
        """Send a message of the kind `ping`; the deliveries tell what came of it."""
        return await self._send(Call[Delivery]("POST", _path("webhooks", webhook_id, "test")))

    @Iteration
    async def deliveries(self, webhook_id: str, *, page_size: int = 50) -> AsyncIterator[Delivery]:
        """What was and is to be sent to a webhook, newest first."""
        async for delivery in self._pages(_path("webhooks", webhook_id, "deliveries"), {}, page_size):
            yield delivery

    @Operation
    async def replay(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Send a message once more, under the same id."""
        return await self._send(Call[Delivery]("POST", _path("webhooks", webhook_id, "deliveries", delivery_id, "replay")))

    # ----------------------------------------------------------------- audit

    @Iteration
    async def audit(
        self,
        *,
        action: str | None = None,
        target: str | None = None,
        key_id: str | None = None,
        created_after: datetime | str | None = None,
        created_before: datetime | str | None = None,
        page_size: int = 50,
    ) -> AsyncIterator[Entry]:
        """The calls that changed something, newest first."""
        times = {"created_after": _time(created_after), "created_before": _time(created_before)}
        async for entry in self._pages("/v1/audit", _given(action=action, target=target, key_id=key_id, **times), page_size):
            yield entry

    # ------------------------------------------------------------------ HTTP

    async def _pages(self, path: str, filters: Mapping[str, Any], page_size: int) -> AsyncIterator[Any]:
        params = {**filters, "limit": page_size}
        while True:
            page = await self._send(Call[Any]("GET", path, params=params))
            for item in page["items"]:
                yield item
            if page.get("next") is None:
                return
            params["cursor"] = page["next"]

    async def _send(self, call: Call[T], patience: float | None = None) -> T:
        return call.parse(await self._answer(call, patience))

    async def _answer(self, call: Call[Any], patience: float | None = None) -> httpx.Response:
        """A good answer, read whole; after tries for `patience` seconds where the call may be sent again."""
        response = await self._open(call, patience)
        try:
            await self._wire.read(response)
        finally:
            await self._wire.release(response)
        return response

    async def _open(self, call: Call[Any], patience: float | None) -> httpx.Response:
        outage = Outage(self._patience if patience is None else patience)
        while True:
            failure: httpx.TransportError | ApiError
            after: float | None = None
            try:
                response = await self._wire.send(self._request(call), stream=True)
                if response.is_success or response.status_code == 304:
                    return response
                await self._wire.read(response)
                failure, after = ApiError.of(response), retry_after(response)
                if call.method == "DELETE" and failure.status == 404 and outage.tries:
                    return response  # an answer was lost, and this is what it would have brought about
            except httpx.TransportError as error:
                failure = error
            told = failure if isinstance(failure, ApiError) else no_answer(self.url, failure)
            if not worth_another_try(call, failure):
                raise told
            await self._wire.sleep(outage.pause(told, after))

    def _request(self, call: Call[Any]) -> httpx.Request:
        body = None if call.body is None else self._wire.body(call.body())
        timeout = httpx.Timeout(self._timeout, read=self._timeout + call.waits)
        headers = {**self._authorization, **call.headers}
        return self._wire.http.build_request(call.method, call.path, params=call.params or None, json=call.json, content=body, headers=headers, timeout=timeout)


class Client(Blocking, Operations):
    """Calls that return when they are done; a context manager that closes its connections."""

    _wires = BlockingWire
    _wire: BlockingWire


class AsyncClient(Awaiting, Operations):
    """The same calls to be awaited, and `async for` over what comes one by one; an async context manager."""

    _wires = AwaitingWire
    _wire: AwaitingWire


def _manifest(job_id: str) -> Call[list[ArtifactFile]]:
    return Call("GET", _path("jobs", job_id, "artifacts"), _items)


def _standing(job_id: str, known: httpx.Response | None, seconds: int) -> Call[Job]:
    """Asks how a job stands; with seconds, as soon as that is another than is known."""
    if known is None or not seconds:
        return Call("GET", _path("jobs", job_id))
    return Call("GET", _path("jobs", job_id), params={"wait": seconds}, headers={"If-None-Match": known.headers["ETag"]}, waits=seconds)


def _items(response: httpx.Response) -> Any:
    return response.json()["items"]


def _nothing(response: httpx.Response) -> None:
    pass


def _once(key: str | None) -> dict[str, str]:
    return {"Idempotency-Key": key or uuid4().hex}


def _path(kind: str, *parts: str) -> str:
    identifier, *more = parts
    return "/".join((f"/v1/{kind}", quote(identifier, safe=""), *(quote(part) for part in more)))


def _given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def _time(value: datetime | str | None) -> str | None:
    return value.isoformat() if isinstance(value, datetime) else value


def _ignore(file: ArtifactFile | CheckpointFile, have: int) -> None:
    pass
