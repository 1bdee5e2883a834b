"""Bounds on what a report measured, by which a pipeline decides whether a pruned model may go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypedDict

from espalier.answers import Measured, Report


class Gate(NamedTuple):
    bound: Literal["max", "min"]
    measure: Callable[[Report], float | None]  # None: the job did not measure it


class Verdict(TypedDict):
    gate: str
    limit: float
    measured: float | None
    met: bool


def judge(report: Report, limits: Mapping[str, float | None]) -> list[Verdict]:
    """A verdict for each limit that is given, by the gate's name. What was not measured is not met."""
    return [_verdict(name, limit, report) for name, limit in limits.items() if limit is not None]


def _verdict(name: str, limit: float, report: Report) -> Verdict:
    bound, measure = GATES[name]
    measured = measure(report)
    met = measured is not None and (measured <= limit if bound == "max" else measured >= limit)
    return Verdict(gate=name, limit=limit, measured=measured, met=met)


def perplexity(model: Measured | None) -> float | None:
    """None where it was not measured."""
    return model["perplexity"]["value"] if model and model["perplexity"] else None


def _perplexity_increase(report: Report) -> float | None:
    before, after = perplexity(report["before"]), perplexity(report["after"])
    return None if before is None or after is None else after / before - 1


def _checkpoint_bytes(report: Report) -> float | None:
    return report["after"]["checkpoint_bytes"] if report["after"] else None


def _speedup(report: Report) -> float | None:
    before, after = report["before"], report["after"]
    if not before or not after or not before["speed"] or not after["speed"]:
        return None
    return after["speed"]["decode_tokens_per_second"] / before["speed"]["decode_tokens_per_second"]


GATES: dict[str, Gate] = {
    "max_perplexity_increase": Gate("max", _perplexity_increase),
    "max_perplexity": Gate("max", lambda report: perplexity(report["after"])),
    "max_parameters": Gate("max", lambda report: report["parameters_after"]["all"]),
    "max_bytes": Gate("max", _checkpoint_bytes),
    "min_sparsity": Gate("min", lambda report: report["sparsity"]["all"]),
    "min_speedup": Gate("min", _speedup),
}
