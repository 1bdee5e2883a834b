"""How often a key, a tenant and an address may call. Processes that share a Redis share the counts; in the embedded default there is one process.

What a caller may still do is told by `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers). Without Redis nothing is limited: submitting
works without the broker.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from limits import RateLimitItem, WindowStats, parse
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError

from app.exceptions import RateError
from app.settings import Settings

READS = ("GET", "HEAD", "OPTIONS")
PREFIX = "espalier-rates"
ANSWER_SECONDS = 0.5  # that Redis may take
AWAY_SECONDS = 5.0  # for which a Redis that did not answer is left alone
WARN_SECONDS = 60.0  # between two log lines about it
OWN_SECONDS = 0.25  # for which a process counts by itself, and then tells Redis all at once
OWN_SHARE = 0.02  # of a limit, that a process counts so at most: of a small one, nothing
FAR_SHARE = 0.25  # of a limit; where less is left, every call is told
MAX_OWN_COUNTS = 10_000
CONNECTIONS = 32  # to Redis at once

T = TypeVar("T")
log = structlog.get_logger(__name__)


@dataclass
class OwnCount:
    """What a process last heard of a count, and what it has not told since."""

    left: int
    resets_at: float  # time.monotonic()
    heard_at: float
    untold: int = 0


class Rates:
    def __init__(self, settings: Settings) -> None:
        self._limits = {
            ("key", "read"): _limit(settings.rate_read),
            ("key", "write"): _limit(settings.rate_write),
            ("tenant", "read"): _limit(settings.rate_read_tenant),
            ("tenant", "write"): _limit(settings.rate_write_tenant),
        }
        self._refused = _limit(settings.rate_refused)
        self._pool: ConnectionPool | None = None
        url = settings.broker_url.get_secret_value()
        if url.startswith(("redis://", "rediss://")):
            self._pool = ConnectionPool.from_url(url, socket_timeout=ANSWER_SECONDS, socket_connect_timeout=ANSWER_SECONDS)
            storage: Any = RedisStorage(f"async+{url}", implementation="redispy", key_prefix=PREFIX, connection_pool=self._pool)  # type: ignore[arg-type]  # given on to the client
        else:
            storage = MemoryStorage()
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._own: dict[tuple[str, ...], OwnCount] = {}
        self._away_until = 0.0
        self._warned_at = -math.inf

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.aclose()

    async def count(self, method: str, tenant_id: str, key_id: str) -> dict[str, str]:
        """Count a call; the response headers that tell what is left. Raises RateError."""
        kind = "read" if method in READS else "write"
        policies, states = [], []
        for name, who in (("key", key_id), ("tenant", tenant_id)):
            limit = self._limits[name, kind]
            if limit is None:
                continue
            taken = self._take_alone(limit, name, kind, who) or await self._ask(self._take(limit, name, kind, who))
            if taken is None:
                continue
            within, left, seconds = taken
            policies.append(f'"{name}";q={limit.amount};w={limit.get_expiry()}')
            states.append(f'"{name}";r={left};t={seconds}')
            if not within:
                what = "that only read" if kind == "read" else "that change something"
                raise _too_often(f"This {name} may make {limit} calls {what}.", "rate_exceeded", seconds, _headers(policies, states))
        return _headers(policies, states)

    async def check_refused(self, address: str) -> None:
        """Raises RateError where an address has sent too many keys that were refused."""
        if self._refused is not None and await self._ask(self._limiter.test(self._refused, "address", address)) is False:
            await self._lock_out(self._refused, address)

    async def count_refused(self, address: str) -> None:
        """Count a key that was refused. Raises RateError where it was one too many."""
        if self._refused is not None and await self._ask(self._limiter.hit(self._refused, "address", address)) is False:
            await self._lock_out(self._refused, address)

    async def _lock_out(self, limit: RateLimitItem, address: str) -> None:
        stats = await self._ask(self._limiter.get_window_stats(limit, "address", address))
        seconds = 1 if stats is None else _seconds_to(stats)
        raise _too_often("Too many calls from this address had a key that is refused.", "too_many_refused", seconds, {})

    def _take_alone(self, limit: RateLimitItem, *who: str) -> tuple[bool, int, int] | None:
        """What `_take` answers, without asking Redis, where that was asked a moment ago and much is left. Redis costs more than all else of a short call."""
        own, now = self._own.get(who), time.monotonic()
        if own is None or now - own.heard_at > OWN_SECONDS or own.untold + 1 > OWN_SHARE * limit.amount or own.left < FAR_SHARE * limit.amount:
            return None
        own.untold += 1
        return True, own.left - own.untold, max(1, math.ceil(own.resets_at - now))

    async def _take(self, limit: RateLimitItem, *who: str) -> tuple[bool, int, int]:
        """-> whether one more was allowed, how many more are, and seconds until there are more again."""
        now = time.monotonic()
        if who not in self._own:
            while len(self._own) >= MAX_OWN_COUNTS:
                self._own.pop(next(iter(self._own)))
            self._own[who] = OwnCount(0, now, -math.inf)
        own = self._own[who]
        untold = own.untold if now - own.heard_at < limit.get_expiry() else 0
        own.untold, own.heard_at = 0, now  # where much is left, others count by themselves while Redis is asked
        within = await self._limiter.hit(limit, *who, cost=1 + untold)
        stats = await self._limiter.get_window_stats(limit, *who)
        seconds = _seconds_to(stats)
        own.left, own.resets_at, own.heard_at = stats.remaining, now + seconds, now
        return within, stats.remaining, seconds

    async def _ask(self, question: Coroutine[Any, Any, T]) -> T | None:
        """The answer; None where Redis does not give it in time, or lately did not."""
        if time.monotonic() < self._away_until:
            question.close()
            return None
        try:
            async with asyncio.timeout(ANSWER_SECONDS), self._slots:
                return await question
        except (RedisError, OSError) as error:  # a timeout is an OSError
            question.close()
            now = time.monotonic()
            self._away_until = now + AWAY_SECONDS
            if now > self._warned_at + WARN_SECONDS:
                self._warned_at = now
                log.warning("rates not limited", cause=repr(error))
            return None


def _limit(text: str) -> RateLimitItem | None:
    return parse(text) if text else None


def _seconds_to(stats: WindowStats) -> int:
    return max(1, math.ceil(stats.reset_time - time.time()))


def _headers(policies: Sequence[str], states: Sequence[str]) -> dict[str, str]:
    return {"RateLimit-Policy": ", ".join(policies), "RateLimit": ", ".join(states)} if policies else {}


def _too_often(message: str, code: str, seconds: int, headers: Mapping[str, str]) -> RateError:
    error = RateError(message, code=code, hint=f"Call again in {seconds} s, and less often.")
    error.headers = {"Retry-After": str(seconds), **headers}
    return error
