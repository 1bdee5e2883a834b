"""A request as data, and the decision whether and when to send it again. Nothing here waits or reads from the network."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import random
from typing import Any, Generic, TypeVar

import httpx

from espalier.errors import ApiError, ClientError, UnreachableError

T_co = TypeVar("T_co", covariant=True)

FIRST_PAUSE, LONGEST_PAUSE, LONGEST_RETRY_AFTER = 0.25, 8.0, 60.0
MAY_PASS = (429, 502, 503, 504)
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


def _json(response: httpx.Response) -> Any:
    return response.json()


@dataclass(frozen=True)
class Call(Generic[T_co]):
    """A request, and what to make of its answer."""

    method: str
    path: str
    parse: Callable[[httpx.Response], T_co] = _json
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    body: Callable[[], Iterator[bytes]] | None = None  # gives it anew for every try
    repeats: bool = False  # whether sending it twice does what sending it once does, though its method does not say so
    waits: float = 0.0  # seconds that the service may take on purpose

    @property
    def repeatable(self) -> bool:
        return self.repeats or self.method in ("GET", "PUT", "DELETE") or "Idempotency-Key" in self.headers


def worth_another_try(call: Call[Any], failure: httpx.TransportError | ApiError) -> bool:
    """Whether a failure may pass, and sending the call again does no harm even if the service has acted on it."""
    if isinstance(failure, httpx.TransportError):
        return call.repeatable or isinstance(failure, NOT_SENT)
    if failure.code == "idempotency_key_in_flight":
        return True
    if failure.code == "too_many_streams" and "wait" in call.params:
        return False  # who waits may ask without waiting
    return failure.status == 429 or (call.repeatable and failure.status in MAY_PASS)


def pause_before_try(tries: int, retry_after: float | None, luck: float) -> float:
    """Seconds after so many tries: a quarter, doubled with each up to 8, of which `luck` (0 to 1) decides half; beside what the service asks for."""
    backoff: float = min(FIRST_PAUSE * 2 ** (tries - 1), LONGEST_PAUSE)
    return (retry_after or 0.0) + backoff * (0.5 + luck / 2)


def retry_after(response: httpx.Response) -> float | None:
    """Seconds of a `Retry-After` header; its other form, a date, counts as absent."""
    try:
        return min(max(float(response.headers["Retry-After"]), 0.0), LONGEST_RETRY_AFTER)
    except (KeyError, ValueError):
        return None


def no_answer(url: str, error: httpx.TransportError) -> UnreachableError:
    return UnreachableError(f"No answer from {url} ({error or type(error).__name__}). Is the service up, and is ESPALIER_URL right?")


class Outage:
    """Counts the tries since something last worked; seconds are counted from its making."""

    def __init__(self, patience: float) -> None:
        self._give_up = time.monotonic() + patience
        self.tries = 0

    def pause(self, error: ClientError, after: float | None = None) -> float:
        """Seconds until the next try. Raises the error where they would use up the patience."""
        self.tries += 1
        seconds = pause_before_try(self.tries, after, random())  # noqa: S311  no secret
        if time.monotonic() + seconds > self._give_up:
            raise error
        return seconds
