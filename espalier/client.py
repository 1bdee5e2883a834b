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
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import httpx

from espalier.answers import (
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
from espalier.both import Awaiting, AwaitingWire, Blocking, BlockingWire, Iteration, Operation
from espalier.calling import POLL_SECONDS, given, items, nothing, once, url_path
from espalier.errors import ApiError, UnreachableError
from espalier.sending import Call, Outage, retry_after
from espalier.transfers import Transfers

FINISHED = ("succeeded", "failed", "cancelled")
LONG_POLL_SECONDS = 30  # of the 60 that the service allows: what lies between may cut a longer silence
SILENCE_SECONDS = 45.0  # after which a stream, in which something comes every 15 seconds, counts as cut


class Operations(Transfers):
    """What both clients can do. Without arguments, `ESPALIER_URL` and `ESPALIER_API_KEY` say where the service is and who asks.

    timeout: seconds until a silent connection counts as broken. patience: seconds of outage that a call survives, where it may be sent again; calls that take
    long have their own for what comes after the first answer.
    """

    # ------------------------------------------------------------------ jobs

    @Operation
    async def submit(
        self, /, model: str, method: str | dict[str, Any], sparsity: float | str | dict[str, Any], *, idempotency_key: str | None = None, **more: Any
    ) -> Job:
        """Submit a job; `more` are further fields (`calibration`, `recovery`, `output`, `queue`, `metadata`, `sinks`, …), see the service's /docs.

        idempotency_key: under the same key the same job is submitted once only, whoever sends it; else every call has one of its own.
        """
        recipe = {"model": model, "method": method, "sparsity": sparsity, **more}
        return await self._send(Call[Job]("POST", "/v1/jobs", json=recipe, headers=once(idempotency_key)))

    @Operation
    async def estimate(self, /, model: str, method: str | dict[str, Any], sparsity: float | str | dict[str, Any], **more: Any) -> Validation:
        """What `submit` would refuse is refused, and nothing is submitted: the whole recipe, what the job would cost, and where it would run."""
        recipe = {"model": model, "method": method, "sparsity": sparsity, **more}
        return await self._send(Call[Validation]("POST", "/v1/jobs", params={"validate_only": True}, json=recipe, repeats=True))

    @Operation
    async def get(self, job_id: str) -> Job:
        return await self._send(Call[Job]("GET", url_path("jobs", job_id)))

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
        filters = given(state=state, method=method, model=model, queue=queue, created_after=_time(created_after), created_before=_time(created_before))
        filters |= {f"metadata[{name}]": value for name, value in (metadata or {}).items()}
        async for job in self._pages("/v1/jobs", filters, page_size):
            yield job

    @Iteration
    async def events(self, job_id: str, *, after: int = 0) -> AsyncIterator[Event]:
        """The events so far of a job whose sequence number is above `after`, oldest first."""
        while True:
            page = await self._send(Call[EventPage]("GET", url_path("jobs", job_id, "events"), params={"after": after}))
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
                Call("GET", url_path("jobs", job_id, "events"), headers=headers, waits=SILENCE_SECONDS - self._timeout), patience if begun else None
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
        return await self._send(Call[Job]("POST", url_path("jobs", job_id, "cancel")))

    @Operation
    async def retry(self, job_id: str, *, idempotency_key: str | None = None) -> Job:
        """Try a job again that has failed or was cancelled; it goes on from its last verified block."""
        return await self._send(Call[Job]("POST", url_path("jobs", job_id, "retry"), headers=once(idempotency_key)))

    @Operation
    async def delete(self, job_id: str) -> None:
        """Delete a finished job with its events, report and files."""
        await self._send(Call("DELETE", url_path("jobs", job_id), nothing))

    @Operation
    async def report(self, job_id: str) -> Report:
        """What a succeeded job measured."""
        return await self._send(Call[Report]("GET", url_path("jobs", job_id, "report")))

    # ----------------------------------------------------------------- sinks

    @Operation
    async def sinks(self, job_id: str) -> list[SinkRun]:
        """Where the job's result goes, and what became of that."""
        job = await self._send(Call[Job]("GET", url_path("jobs", job_id)))
        return job["sinks"]

    @Operation
    async def add_sink(self, job_id: str, sink: dict[str, Any]) -> Job:
        """Bring the result of a succeeded job to one more place, e.g. `{"name": "hub", "repository": "owner/name", "token": "…"}`."""
        return await self._send(Call[Job]("POST", url_path("jobs", job_id, "sinks"), json=sink))

    @Operation
    async def retry_sink(self, job_id: str, number: int, secrets: dict[str, str] | None = None) -> Job:
        """Try a failed sink again. Its secrets were forgotten, so they are given again."""
        return await self._send(Call[Job]("POST", url_path("jobs", job_id, "sinks", str(number), "retry"), json=secrets or {}))

    # ------------------------------------------------------- what there is

    @Operation
    async def methods(self) -> list[Method]:
        return await self._send(Call("GET", "/v1/methods", items))

    @Operation
    async def recoveries(self) -> list[Recovery]:
        return await self._send(Call("GET", "/v1/recoveries", items))

    @Operation
    async def queues(self) -> list[Queue]:
        """The classes of workers, and how busy they are."""
        return await self._send(Call("GET", "/v1/queues", items))

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
        return await self._send(Call[NewKey]("POST", url_path("keys", key_id, "rotate"), json={"overlap": overlap}))

    @Operation
    async def revoke_key(self, key_id: str) -> None:
        await self._send(Call("DELETE", url_path("keys", key_id), nothing))

    # -------------------------------------------------------------- webhooks

    @Operation
    async def webhooks(self) -> list[Webhook]:
        return await self._send(Call("GET", "/v1/webhooks", items))

    @Operation
    async def create_webhook(self, url: str, *, kinds: Sequence[str] = (), description: str = "", every_job: bool = True) -> WebhookWithSecret:
        """Have news of jobs posted to an address; kinds: of which news, all by default. The secret that signs them is told this once."""
        webhook = {"url": url, "description": description, "every_job": every_job, **({"kinds": list(kinds)} if kinds else {})}
        return await self._send(Call[WebhookWithSecret]("POST", "/v1/webhooks", json=webhook))

    @Operation
    async def delete_webhook(self, webhook_id: str) -> None:
        await self._send(Call("DELETE", url_path("webhooks", webhook_id), nothing))

    @Operation
    async def enable_webhook(self, webhook_id: str) -> Webhook:
        """Send again to a webhook that was disabled."""
        return await self._send(Call[Webhook]("POST", url_path("webhooks", webhook_id, "enable"), repeats=True))

    @Operation
    async def rotate_webhook(self, webhook_id: str, *, overlap: int = 24 * 3600) -> WebhookWithSecret:
        """Make a new secret; for `overlap` seconds messages are signed by both."""
        return await self._send(Call[WebhookWithSecret]("POST", url_path("webhooks", webhook_id, "rotate"), params={"overlap": overlap}))

    @Operation
    async def test_webhook(self, webhook_id: str) -> Delivery:
        """Send a message of the kind `ping`; the deliveries tell what came of it."""
        return await self._send(Call[Delivery]("POST", url_path("webhooks", webhook_id, "test")))

    @Iteration
    async def deliveries(self, webhook_id: str, *, job_id: str | None = None, page_size: int = 50) -> AsyncIterator[Delivery]:
        """What was and is to be sent to a webhook, newest first; all, or what tells of one job."""
        async for delivery in self._pages(url_path("webhooks", webhook_id, "deliveries"), given(job_id=job_id), page_size):
            yield delivery

    @Operation
    async def replay(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Send a message once more, under the same id."""
        return await self._send(Call[Delivery]("POST", url_path("webhooks", webhook_id, "deliveries", delivery_id, "replay")))

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
        async for entry in self._pages("/v1/audit", given(action=action, target=target, key_id=key_id, **times), page_size):
            yield entry


class Client(Blocking, Operations):
    """Calls that return when they are done; a context manager that closes its connections."""

    _wires = BlockingWire
    _wire: BlockingWire


class AsyncClient(Awaiting, Operations):
    """The same calls to be awaited, and `async for` over what comes one by one; an async context manager."""

    _wires = AwaitingWire
    _wire: AwaitingWire


def _standing(job_id: str, known: httpx.Response | None, seconds: int) -> Call[Job]:
    """Asks how a job stands; with seconds, as soon as that is another than is known."""
    if known is None or not seconds:
        return Call("GET", url_path("jobs", job_id))
    return Call("GET", url_path("jobs", job_id), params={"wait": seconds}, headers={"If-None-Match": known.headers["ETag"]}, waits=seconds)


def _time(value: datetime | str | None) -> str | None:
    return value.isoformat() if isinstance(value, datetime) else value
