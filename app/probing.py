"""Slow questions that are asked often, such as whether the database answers."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Probe(Generic[Answer]):
    """Asks one question for all who ask at the same time, in one thread of its own, and keeps the answer for a while: many who ask load nothing."""

    def __init__(self, ask: Callable[[], Answer], *, patience: float, keep: float) -> None:
        self._ask = ask
        self._patience = patience  # seconds that one who asks waits
        self._keep = keep  # seconds that an answer is good for
        self._asked: Future[Answer | Exception] | None = None
        self._stale_at = math.inf

    async def answer(self) -> Answer:
        """Raises TimeoutError where it takes too long, and what the question raises."""
        if self._asked is None or time.monotonic() >= self._stale_at:
            self._asked, self._stale_at = Future(), math.inf
            threading.Thread(target=self._run, args=(self._asked,), name="probe", daemon=True).start()  # a hung one keeps no process from ending
        asked = self._asked
        await asyncio.wait([asyncio.wrap_future(asked)], timeout=self._patience)
        if not asked.done():
            raise TimeoutError
        answer = asked.result()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _run(self, asked: Future[Answer | Exception]) -> None:
        try:
            answer: Answer | Exception = self._ask()
        except Exception as error:  # noqa: BLE001  whatever it is, those who ask get it
            answer = error
        self._stale_at = time.monotonic() + self._keep
        asked.set_result(answer)
