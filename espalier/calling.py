"""How a client's calls are made: sent, sent again where that may help, and answers read."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx

from espalier.both import AwaitingWire, BlockingWire, Wire
from espalier.errors import ApiError, ClientError
from espalier.sending import Call, Outage, no_answer, retry_after, worth_another_try

DEFAULT_URL = "http://127.0.0.1:8000"
POLL_SECONDS = 2.0  # where the service does not say when to ask again

T = TypeVar("T")


class Calls:
    """What all operations are made of."""

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


def items(response: httpx.Response) -> Any:
    return response.json()["items"]


def nothing(response: httpx.Response) -> None:
    pass


def once(key: str | None) -> dict[str, str]:
    return {"Idempotency-Key": key or uuid4().hex}


def url_path(kind: str, *parts: str) -> str:
    identifier, *more = parts
    return "/".join((f"/v1/{kind}", quote(identifier, safe=""), *(quote(part) for part in more)))


def given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}
