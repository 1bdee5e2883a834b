"""Sub-models of what is left of a model: the perplexity of each. Where a GPU can't hold the blocks, several run side by side, and a block is read once for all.

A killed job loses the work of one sub-model at most: a perplexity is recorded as soon as it is known, and sub-models side by side keep their hidden states
whenever they have run as many blocks together as one of them has.

Notation: B windows, T tokens, D hidden size.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from app.footprint import PASSING_BYTES
from worker.checkpoint import write_lasting
from worker.evaluation import Begun, Edit, Variant, embed, perplexity_of, run_up_to, run_variants
from worker.pruners.bonsai import MOST_PERPLEXITY
from worker.walk import Pruning

SIDE_BY_SIDE = 8  # at most


@dataclass(frozen=True)
class SubModel:
    """A part of what is left of the model."""

    name: str  # unlike any other's in the job
    edit: Edit
    part: int  # the first part of the model that it lacks units of


def evaluated(run: Pruning, whole: Edit, sub_models: Iterator[SubModel], starts: Sequence[int], *, side_by_side: bool) -> Iterator[tuple[float, float]]:
    """Perplexity and seconds of one sub-model after the other; what an earlier attempt measured isn't measured again.

    `whole` is what they are parts of, and what runs before the part of the model that they differ in; `starts` are these parts' first blocks.
    """
    assert run.tokens is not None
    tokens, scratch = run.tokens, scratch_of(run)

    @functools.cache
    def begun(part: int) -> Begun:
        folder = scratch / f"before {starts[part]}"
        folder.mkdir(parents=True, exist_ok=True)
        if part == 0:
            return embed(run.stream, tokens, folder)
        return run_up_to(starts[part], run.stream, Variant(whole, begun(part - 1)), folder, scratch)

    while group := [*itertools.islice(sub_models, _at_once(run) if side_by_side else 1)]:
        measured = _measured(run, [each for each in group if not run.state.has_figure(each.name)], starts, begun)
        for each in group:
            yield run.state.figure(each.name, functools.partial(next, measured))


def scratch_of(run: Pruning) -> Path:
    """Where sub-models keep hidden states."""
    return run.state.work / "sub-models"


def _at_once(run: Pruning) -> int:
    """Where reading takes the time: so many that their hidden states may stay on the GPU, and no more than there are blocks."""
    assert run.tokens is not None
    states = 2 * 4 * run.tokens.numel() * int(run.stream.config.hidden_size)
    return max(1, min(SIDE_BY_SIDE, len(run.stream), PASSING_BYTES // states))


def _measured(run: Pruning, group: Sequence[SubModel], starts: Sequence[int], begun: Callable[[int], Begun]) -> Iterator[tuple[float, float]]:
    """Perplexity and seconds of sub-models that run side by side, each as soon as it is known."""
    assert run.tokens is not None
    began = time.perf_counter()
    hidden, earlier = _run(run, group, starts, begun)
    of_blocks = earlier + (time.perf_counter() - began) / len(group)
    for states in hidden:
        began = time.perf_counter()
        value = perplexity_of(run.stream, run.tokens, states, MOST_PERPLEXITY)
        yield value, of_blocks + time.perf_counter() - began


def _run(run: Pruning, group: Sequence[SubModel], starts: Sequence[int], begun: Callable[[int], Begun]) -> tuple[list[Tensor], float]:
    """Last hidden states of sub-models, (B, T, D) each, and the seconds that each took in earlier attempts; goes on from what one of these kept."""
    began, file = time.perf_counter(), scratch_of(run) / "side by side.safetensors"
    kept = _kept(run, file, group)
    if kept is None:
        earlier, variants = 0.0, [Variant(each.edit, begun(each.part)) for each in group]
    else:
        block, earlier, inputs = kept
        arguments = run.stream.block_arguments(inputs[0].shape[1])
        variants = [Variant(each.edit, Begun(max(block, starts[each.part]), own, arguments)) for each, own in zip(group, inputs, strict=True)]
    stride = len(run.stream) // len(group)  # blocks that are as much work for all as the whole model is for one

    def keep(index: int, hidden: Sequence[Tensor]) -> None:
        following = index + 1
        if following % stride == 0 and following < len(run.stream):
            facts = {"block": following, "seconds": earlier + (time.perf_counter() - began) / len(group)}
            states = {each.name: own.clone() for each, own in zip(group, hidden, strict=True)}  # before their part, some are one tensor
            write_lasting(file, states, json.dumps(facts))

    return run_variants(run.stream, scratch_of(run), variants, keep), earlier


def _kept(run: Pruning, file: Path, group: Sequence[SubModel]) -> tuple[int, float, list[Tensor]] | None:
    """The block that sub-models go on with, the seconds that each has taken, and their inputs of that block, (B, T, D) each, or of their part's first."""
    if not file.is_file():
        return None
    with safe_open(file, framework="pt", device=str(run.stream.device)) as stored:
        if not {each.name for each in group} <= {*stored.keys()}:
            return None
        facts = json.loads(stored.metadata()["facts"])
        return facts["block"], facts["seconds"], [stored.get_tensor(each.name) for each in group]
