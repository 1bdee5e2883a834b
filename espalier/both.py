"""One text for two clients. An operation is written once, as a coroutine that waits for nothing but its `Wire`; over a `BlockingWire` it never suspends, so the
blocking client runs it to its end within an ordinary call.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, overload

import httpx
from anyio.to_thread import run_sync
from httpx_sse import EventSource, ServerSentEvent

P = ParamSpec("P")
T = TypeVar("T")


class Wire(Protocol):
    """Everything that an operation waits for."""

    @property
    def http(self) -> httpx.Client | httpx.AsyncClient: ...
    async def send(self, request: httpx.Request, *, stream: bool) -> httpx.Response: ...
    async def read(self, response: httpx.Response) -> None: ...
    async def release(self, response: httpx.Response) -> None: ...
    def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]: ...
    def messages(self, response: httpx.Response) -> AsyncIterator[ServerSentEvent]: ...
    def body(self, chunks: Iterator[bytes]) -> Iterator[bytes] | AsyncIterator[bytes]: ...
    async def sleep(self, seconds: float) -> None: ...
    async def offload(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T: ...


class BlockingWire:
    """Waits in the caller's thread."""

    def __init__(self, **settings: Any) -> None:
        self.http = httpx.Client(**settings)

    async def send(self, request: httpx.Request, *, stream: bool) -> httpx.Response:
        return self.http.send(request, stream=stream)

    async def read(self, response: httpx.Response) -> None:
        response.read()

    async def release(self, response: httpx.Response) -> None:
        response.close()

    async def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        for chunk in response.iter_raw():
            yield chunk

    async def messages(self, response: httpx.Response) -> AsyncIterator[ServerSentEvent]:
        for message in EventSource(response).iter_sse():
            yield message

    def body(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        return chunks

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251  no event loop runs this

    async def offload(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return function(*args, **kwargs)


class AwaitingWire:
    """Waits in the caller's event loop; what reads and writes files runs in threads."""

    def __init__(self, **settings: Any) -> None:
        self.http = httpx.AsyncClient(**settings)

    async def send(self, request: httpx.Request, *, stream: bool) -> httpx.Response:
        return await self.http.send(request, stream=stream)

    async def read(self, response: httpx.Response) -> None:
        await response.aread()

    async def release(self, response: httpx.Response) -> None:
        await response.aclose()

    def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        return response.aiter_raw()

    def messages(self, response: httpx.Response) -> AsyncIterator[ServerSentEvent]:
        return EventSource(response).aiter_sse()

    async def body(self, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
        while chunk := await self.offload(next, chunks, b""):
            yield chunk

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def offload(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await run_sync(functools.partial(function, *args, **kwargs))


class Blocking:
    """The side of a client whose operations are ordinary calls."""

    _wire: BlockingWire

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._wire.http.close()


class Awaiting:
    """The side of a client whose operations are awaited."""

    _wire: AwaitingWire

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._wire.http.aclose()


class Operation(Generic[P, T]):
    """A method of both clients."""

    def __init__(self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Blocking, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: Awaiting, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Any, owner: type) -> Any:
        if client is None:
            return self
        method = functools.partial(self._function, client)
        return _blocking(method) if isinstance(client, Blocking) else method


class Iteration(Generic[P, T]):
    """Likewise, one that gives things one by one."""

    def __init__(self, function: Callable[Concatenate[Any, P], AsyncIterator[T]]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Self: ...
    @overload
    def __get__(self, client: Blocking, owner: type) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, client: Awaiting, owner: type) -> Callable[P, AsyncIterator[T]]: ...
    def __get__(self, client: Any, owner: type) -> Any:
        if client is None:
            return self
        method = functools.partial(self._function, client)
        return _iterating(method) if isinstance(client, Blocking) else method


def _blocking(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        result: T = _finish(method(*args, **kwargs))
        return result

    return call


def _iterating(method: Callable[P, Any]) -> Callable[P, Iterator[T]]:
    def iterate(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        items = method(*args, **kwargs)
        try:
            while True:
                try:
                    item = _finish(anext(items))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            _finish(items.aclose())

    return iterate


def _finish(coroutine: Any) -> Any:
    """The result of a coroutine that never suspends."""
    try:
        coroutine.__await__().send(None)
    except StopIteration as ended:
        return ended.value
    raise AssertionError("an operation waited for something that is not its wire")
