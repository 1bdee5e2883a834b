"""What the engine says of how far it is: events, one JSON object each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from worker.training import Step
from worker.walk import RoundStep

Emit = Callable[[dict[str, Any]], None]


@dataclass
class Progress:
    """Tells phases and blocks as events; the fraction of the whole job is counted in tokens that pass the blocks."""

    emit: Emit
    seconds: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    finished: float = 0.0
    reached: float = 0.0
    current: str = ""
    cost: float = 0.0  # of the current phase

    def plan(self, costs: dict[str, float]) -> None:
        self.costs = costs

    def log(self, message: str) -> None:
        self.emit({"event": "log", "message": message})

    @contextmanager
    def phase(self, name: str, share: float = 1.0) -> Iterator[None]:
        """`share` is of the phase's cost, where the phase comes more than once."""
        self.current, self.cost = name, self.costs.get(name, 0.0) * share
        self.emit({"event": "phase", "phase": name})
        start = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 3)
        self.finished += self.cost

    def skip(self, name: str, share: float) -> None:
        """What an earlier attempt has done of a phase."""
        self.finished += self.costs.get(name, 0.0) * share

    def step(self, done: int, total: int, **more: float) -> None:
        self._tell(done, total, done / total, **more)

    def round_step(self, step: RoundStep) -> None:
        """A sub-model of a round; `eta_seconds` is of the whole job, once one was measured."""
        later = sum(self.costs.values()) - self.finished - self.cost
        eta = {} if step.pace is None else {"eta_seconds": round(step.pace * (step.cost_left + later), 1)}
        self._tell(step.done, step.total, step.cost_done / (step.cost_done + step.cost_left), round=step.number, rounds=step.rounds, **eta)

    def train_step(self, step: Step) -> None:
        """A step of a training; `eta_seconds` is of the whole job."""
        cost = self.cost / step.total
        later = sum(self.costs.values()) - self.finished - self.cost
        eta = step.eta_seconds + step.seconds / cost * later
        self._tell(
            step.done,
            step.total,
            step.done / step.total,
            loss=step.loss,
            tokens_per_second=round(step.tokens_per_second, 1),
            eta_seconds=round(eta, 1),
        )

    def _tell(self, done: int, total: int, share: float, **more: float) -> None:
        all_costs = sum(self.costs.values())
        fraction = (self.finished + self.cost * share) / all_costs if all_costs else 0.0
        self.reached = max(self.reached, min(fraction, 1.0))  # what a phase costs may prove more than was thought
        self.emit({"event": "progress", "phase": self.current, "done": done, "total": total, "fraction": round(self.reached, 4), **more})
