"""Sends news to webhooks: many at once, one at a time to each webhook, and without a database connection meanwhile.

One event loop in a thread of the dispatcher; the database is asked in short bursts from threads of its own. As many processes as there are share the work.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import httpx
import structlog
from sqlalchemy.orm import Session

from app.addresses import Address, Resolver, look_up, read_url, resolve
from app.database import Database
from app.exceptions import EspalierError
from app.settings import Settings
from app.vault import Vault
from app.webhooks import deliveries
from app.webhooks.deliveries import Answer, Try
from app.webhooks.signing import in_use, sign

AT_ONCE = 64
DATABASE_THREADS = 4
CONNECT_SECONDS = 5.0  # to one of several addresses
END_SECONDS = 5.0  # that what is being sent has when the process stops
LONGEST_PAUSE = 30.0  # between two looks at a database that doesn't answer
USER_AGENT = f"espalier/{version('espalier')}"

Result = TypeVar("Result")
log = structlog.get_logger(__name__)


def keep_sending(database: Database, settings: Settings, stopping: threading.Event, resolver: Resolver = look_up) -> None:
    """Send what is due until `stopping` is set. What is cut off then is sent again."""
    asyncio.run(_keep_sending(database, settings, stopping, resolver))


async def _keep_sending(database: Database, settings: Settings, stopping: threading.Event, resolver: Resolver) -> None:
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(AT_ONCE, "webhook-names"))  # that of look-ups, which may be slow
    lease_seconds = 2 * settings.webhook_timeout_seconds  # a try that lasts, and what it takes to record it
    sending: dict[asyncio.Future[Any], str] = {}
    pause = settings.sweep_seconds
    with ThreadPoolExecutor(DATABASE_THREADS, "webhook-rows") as threads, ThreadPoolExecutor(1, "webhook-stop") as waiter:
        stopped: asyncio.Future[Any] = loop.run_in_executor(waiter, stopping.wait)
        sender = _Sender(database, settings, threads, resolver)
        while not stopped.done():
            try:
                tries = await sender.ask(partial(_take, busy=list(sending.values()), limit=AT_ONCE - len(sending), lease_seconds=lease_seconds))
                pause = settings.sweep_seconds
            except Exception:  # whatever a driver raises, the next look tries again
                log.exception("deliveries can't be taken")
                tries, pause = [], min(2 * pause, LONGEST_PAUSE)
            sending |= {asyncio.ensure_future(sender.deliver(sent)): sent.webhook_id for sent in tries}
            ended, _ = await asyncio.wait({stopped, *sending}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            sending = {task: webhook_id for task, webhook_id in sending.items() if task not in ended}
        if sending:
            await asyncio.wait(sending, timeout=END_SECONDS)
        for task in sending:
            task.cancel()


def _take(session: Session, busy: Sequence[str], limit: int, lease_seconds: float) -> list[Try]:
    deliveries.forget(session)
    return deliveries.take(session, busy, limit, lease_seconds) if limit else []


class _Sender:
    """What all tries of a process share."""

    def __init__(self, database: Database, settings: Settings, threads: Executor, resolver: Resolver) -> None:
        self._database = database
        self._settings = settings
        self._threads = threads
        self._resolver = resolver
        self._vault = Vault(settings)
        self._certificates = httpx.create_ssl_context()  # takes long to build; reads SSL_CERT_FILE

    async def ask(self, question: Callable[[Session], Result]) -> Result:
        """Ask the database in one transaction."""

        def burst() -> Result:
            with self._database.writing() as session:
                return question(session)

        return await asyncio.get_running_loop().run_in_executor(self._threads, burst)

    async def deliver(self, sent: Try) -> None:
        answer = await self._send(sent)
        if answer.error is not None:
            log.info("news not taken", delivery_id=sent.delivery_id, webhook_id=sent.webhook_id, number=sent.number, why=answer.error)
        try:
            await self.ask(partial(deliveries.record, sent=sent, answer=answer, retry_seconds=self._settings.webhook_retry_seconds))
        except Exception:  # whatever a driver raises, it is sent again once the time of this try is over
            log.exception("a delivery can't be recorded", delivery_id=sent.delivery_id, webhook_id=sent.webhook_id)

    async def _send(self, sent: Try) -> Answer:
        seconds = self._settings.webhook_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                return await self._post(sent, in_use(self._vault.open(sent.secrets)))
        except TimeoutError:
            return Answer(None, f"There was no answer within {seconds:g} seconds.")
        except httpx.HTTPError as error:
            return Answer(None, f"{type(error).__name__}: {error}")
        except EspalierError as error:
            return Answer(None, error.message)
        except Exception:  # a fault of this service counts as a try, or it would be met for ever
            log.exception("news can't be sent", delivery_id=sent.delivery_id, webhook_id=sent.webhook_id)
            return Answer(None, "The service failed to send it; the error is in its log.")

    async def _post(self, sent: Try, secrets: Sequence[str]) -> Answer:
        address = read_url(sent.url, https_only=self._settings.environment == "production")
        ips = await resolve(address, self._settings.webhook_networks, self._resolver)
        for ip in ips[:-1]:
            try:
                return await self._post_to(ip, address, sent, secrets)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await self._post_to(ips[-1], address, sent, secrets)

    async def _post_to(self, ip: str, address: Address, sent: Try, secrets: Sequence[str]) -> Answer:
        """Connects to this IP address and no other; the certificate is verified for the name. What the receiver writes beside its status is not read."""
        body = json.dumps({"timestamp": sent.happened_at.isoformat()} | sent.payload).encode()
        moment = int(time.time())
        headers = {
            "Host": address.authority,
            "Content-Type": "application/json",
            "User-Agent": USER_AGENT,
            "webhook-id": sent.delivery_id,
            "webhook-timestamp": str(moment),
            "webhook-signature": sign(secrets, sent.delivery_id, moment, body),
        }
        url = httpx.URL(scheme=address.scheme, host=ip, port=address.port, raw_path=address.target.encode())
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)  # the time of the whole is bounded elsewhere
        # A client of its own: connections that are kept are shared by IP address, and so by names that only happen to have the same one.
        async with (
            httpx.AsyncClient(verify=self._certificates, trust_env=False, timeout=timeout) as client,
            client.stream("POST", url, content=body, headers=headers, extensions={"sni_hostname": address.host}) as response,
        ):
            status = response.status_code
            if response.is_success:
                return Answer(status)
            reason = "with a redirect, which is not followed" if response.is_redirect else "which is no success"
            return Answer(status, f"The receiver answered {status}, {reason}.", _wait_seconds(response.headers.get("Retry-After", "")))


def _wait_seconds(header: str) -> float:
    """The seconds that a `Retry-After` asks for; 0 where it asks for nothing that can be read."""
    if header.isdecimal():
        return float(header[:9])
    try:
        until = parsedate_to_datetime(header)
    except ValueError:
        return 0.0
    return (until if until.tzinfo else until.replace(tzinfo=UTC)).timestamp() - time.time()
