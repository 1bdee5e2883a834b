"""Bonsai's rounds: random sub-models of what is left of the model are evaluated, and the units go that they miss least. The maths are in pruners/bonsai.py.

Between rounds there are only masks over the dense model's units: a sub-model is the stored model, its blocks sliced on their way. What a round removes follows
from its prior and from the perplexities of its sub-models, which are recorded one by one.

With layers alike (the uniform layout, or the local scope) every module of a kind loses the same number of units, on a straight way to the last round's numbers.
Otherwise all compete, and only parameters count.

Notation: n units of a module, U units of all modules, C candidates, M masks.
"""

from __future__ import annotations

import bisect
import functools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.counting import count_parameters
from app.estimate import bonsai_rounds
from app.exceptions import RecipeError
from app.recipe import Bonsai
from worker.checkpoint import WRITTEN_AS
from worker.choosing import Choice, possible_groups
from worker.evaluation import Edit
from worker.pruners import bonsai
from worker.pruners.base import StructuredPruner
from worker.pruners.bonsai import Evidence, Fit
from worker.slicing import slice_aligned, slice_kept
from worker.state import ROUNDS
from worker.structured import Keep
from worker.submodels import SubModel, evaluated, scratch_of
from worker.survey import survey
from worker.walk import Pruning, RoundStep

WALK = ROUNDS
LEAST_MASKS = 8  # are evaluated whatever time they take
FIRST_CHECK = 32  # masks after which a round is first asked whether its choice is stable


@dataclass(frozen=True)
class Module:
    """All units of one kind in one block of the dense model."""

    block: int
    unit: Literal["channels", "groups"]
    units: int
    cost: int  # parameters of a unit, biases included

    @property
    def name(self) -> str:
        return f"{self.block}.{self.unit}"


@dataclass(frozen=True)
class Rounds:
    """What all rounds of a run share."""

    run: Pruning
    pruner: StructuredPruner
    method: Bonsai
    modules: list[Module]
    target: float  # of `whole`, to be removed
    whole: int  # parameters of the dense model without embedding and head
    costs: list[float]  # of a sub-model of each round
    starts: list[int]  # the first block of each part of the model

    @property
    def released(self) -> bool:
        return self.method.mode == "code"

    @property
    def alike(self) -> bool:
        """Whether every module of a kind loses the same number of units."""
        return not self.released and (self.method.scope == "local" or self.run.recipe.output.layout == "uniform")

    def removed(self, left: Sequence[Tensor]) -> int:
        """Parameters of the units that are gone."""
        return sum(module.cost * (module.units - int(mask.sum())) for module, mask in zip(self.modules, left, strict=True))


@dataclass(frozen=True)
class Goal:
    """What one round may remove."""

    removable: list[int]  # units of each module
    budget: int  # parameters in all
    fraction: float  # of each module that goes on average; twice as much are its candidates


def choose_in_rounds(run: Pruning, pruner: StructuredPruner, method: Bonsai, target: float) -> tuple[Choice, list[str]]:
    """What stays when `target` of the parameters without embedding and head are removed, and what there is to say of it; goes on where the state says.

    Raises RecipeError where even all units that may go are too few.
    """
    rounds = _open(run, pruner, method, target)
    records = run.state.blocks(WALK)
    left, known = [torch.ones(module.units, dtype=torch.bool) for module in rounds.modules], bonsai.no_evidence(len(rounds.modules))
    if records:
        stored = load_file(_file(run, len(records) - 1))
        left, known = [stored[module.name] for module in rounds.modules], Evidence(stored["evidence.kept"], stored["evidence.utility"])
    while (goal := _goal(rounds, left)) is not None:
        number = len(records)
        left, known, facts = _round(rounds, number, left, known, goal)
        masks = {module.name: mask for module, mask in zip(rounds.modules, left, strict=True)}
        save_file(masks | {"evidence.kept": known.kept, "evidence.utility": known.utility}, _file(run, number))
        run.state.finish_block(WALK, [_file(run, number)], facts)
        records = run.state.blocks(WALK)
    shutil.rmtree(scratch_of(run), ignore_errors=True)
    keeps: list[Keep | None] = [*_keeps(rounds, left)]
    return Choice(keeps), _notes(rounds, left)


def _open(run: Pruning, pruner: StructuredPruner, method: Bonsai, target: float) -> Rounds:
    architecture, config = run.stream.architecture, run.stream.source.config
    size = architecture.dimensions(config)
    modules = []
    for index in range(size.layers):
        if method.units != "attention":
            width = architecture.ffn_width(config, index)
            modules.append(Module(index, "channels", width, _cost(run, index, Keep(channels=(torch.arange(width) > 0,)))))
        if method.units != "ffn":
            modules.append(Module(index, "groups", size.kv_heads, _cost(run, index, Keep(groups=torch.arange(size.kv_heads) > 0))))
    whole, costs = count_parameters(run.stream.source, []).non_embedding, bonsai_rounds(run.recipe, run.stream.source)
    rounds = Rounds(run, pruner, method, modules, target, whole, costs, method.first_blocks(size.layers))
    most = sum(module.cost * (module.units - (not rounds.released)) for module in modules) / rounds.whole
    if target > most:
        raise RecipeError(
            f"Removing {target:.1%} of all parameters but embedding and head needs more than the {most:.1%} that bonsai can remove here.",
            code="target_unreachable",
            hint="Ask for less, or set units to 'both'.",
            pointer="/sparsity",
        )
    return rounds


def _cost(run: Pruning, index: int, without_one: Keep) -> int:
    """Parameters that a block loses with one unit."""
    prefix = run.stream.architecture.block_prefix(index)
    tensors = {name: torch.empty(entry.shape, device="meta") for name, entry in run.stream.source.tensors.items() if name.startswith(prefix)}
    sliced = slice_kept(run, index, tensors, without_one)
    return sum(tensor.numel() for tensor in tensors.values()) - sum(tensor.numel() for tensor in sliced.values())


# ------------------------------------------------------------------ how much goes


def _goal(rounds: Rounds, left: Sequence[Tensor]) -> Goal | None:
    """What the next round may remove; None after the last."""
    records, method = rounds.run.state.blocks(WALK), rounds.method
    number, counts, removed = len(records), [int(mask.sum()) for mask in left], rounds.removed(left)
    if not rounds.released and number == len(rounds.costs):
        return None
    if rounds.alike:
        kept = _kept_alike(rounds, number + 1)
        removable = [count - kept[module.unit] for module, count in zip(rounds.modules, counts, strict=True)]
        budget = sum(module.cost * units for module, units in zip(rounds.modules, removable, strict=True))
        return Goal(removable, budget, budget / (rounds.whole - removed))
    if rounds.released:
        fraction = bonsai.round_fraction(rounds.target, removed / rounds.whole, method.prune_fraction)
        stuck = bool(records) and not records[-1]["facts"]["removed"]
        return Goal(counts, int(rounds.whole * fraction), fraction) if fraction and not stuck else None
    # What earlier rounds left over is made up for.
    budget = int(rounds.whole * min(rounds.target, method.prune_fraction * (number + 1))) - removed
    spared = records[-1]["facts"]["spared"] if records else []
    fixed = [_is_fixed(rounds, module) or module.name in spared for module in rounds.modules]
    removable = [0 if stays else max(count - 1, 0) for stays, count in zip(fixed, counts, strict=True)]
    return Goal(removable, budget, budget / (rounds.whole - removed))


def _is_fixed(rounds: Rounds, module: Module) -> bool:
    """The first block keeps all its KV groups where config.json, which states the largest number, may not state any number."""
    stream = rounds.run.stream
    return module.name == "0.groups" and stream.architecture.heads_divide_hidden and stream.source.model_type not in WRITTEN_AS


def _kept_alike(rounds: Rounds, number: int) -> dict[str, int]:
    """Units of each kind that stay in every block after so many rounds: a straight way to those that meet the target best."""
    kinds = {module.unit: module for module in rounds.modules}
    per_block = rounds.target * rounds.whole / len(rounds.run.stream)
    channels, groups = kinds.get("channels"), kinds.get("groups")

    def channels_beside(groups_left: int) -> int:
        if channels is None:
            return 0
        of_groups = groups.cost * (groups.units - groups_left) if groups else 0
        return min(max(channels.units - round((per_block - of_groups) / channels.cost), 1), channels.units)

    def error(groups_left: int) -> float:
        kept = {"channels": channels_beside(groups_left), "groups": groups_left}
        return abs(per_block - sum(module.cost * (module.units - kept[unit]) for unit, module in kinds.items()))

    last = {"groups": 0}
    if groups is not None:
        share = 1 - per_block / sum(module.cost * module.units for module in kinds.values())
        possible = [count for count in range(1, groups.units + 1) if possible_groups(rounds.run, [count])[0] == count]
        last["groups"] = min(possible, key=lambda count: (channels is not None and error(count) > channels.cost, abs(count - groups.units * share)))
    last["channels"] = channels_beside(last["groups"])
    done = number / len(rounds.costs)
    return {unit: module.units - round((module.units - last[unit]) * done) for unit, module in kinds.items()}


# ---------------------------------------------------------------------- a round


def _round(rounds: Rounds, number: int, left: list[Tensor], known: Evidence, goal: Goal) -> tuple[list[Tensor], Evidence, dict[str, Any]]:
    """What is left after one round, what is known of the modules then, and the round's facts."""
    method, pace = rounds.method, Pace(rounds, number)
    nothing = {"masks": 0, "spared": [], "tau": None, "removed": 0, "seconds": 0.0}
    if not goal.budget:
        return left, known, nothing
    priors = _priors(rounds, number, left, pace)
    candidates = _candidates(rounds, priors, goal)
    candidate = torch.cat(candidates)  # (U,), as all that follow
    if not candidate.any():
        return left, known, nothing
    modules = torch.arange(len(left)).repeat_interleave(torch.tensor([len(prior) for prior in priors]))
    costs = torch.tensor([module.cost for module in rounds.modules])[modules]
    expected = bonsai.expected_worth(priors, [module.cost for module in rounds.modules])
    worth, relative = torch.cat(expected), torch.cat(bonsai.relative_worth(expected, priors, candidates))

    def choose(weights: Tensor) -> Tensor:
        return _chosen(rounds, goal, weights, candidates, modules, costs)

    own = Candidates(modules[candidate], torch.cat(priors)[candidate], worth[candidate], relative[candidate])

    def told(perplexities: list[float]) -> Told:
        return Told(masks[: len(perplexities), candidate], bonsai.utility(torch.tensor(perplexities, dtype=torch.float64), rounds.released))

    def weigh(perplexities: list[float]) -> Fit:
        return _fit(rounds, number, told(perplexities), own, known)

    def is_settled(perplexities: list[float]) -> bool:
        half, whole = (choose(weigh(some).weights) for some in (perplexities[: len(perplexities) // 2], perplexities))
        return bonsai.stable(half, whole, costs)

    perplexities: list[float] = []
    fitted = None
    if method.masks:
        sampled = [bonsai.sampling(prior, mask) for prior, mask in zip(priors, candidates, strict=True)]
        kinds, parts = _kinds(rounds).tolist(), [_part(rounds, module) for module in rounds.modules]
        generator = _generator(rounds, number, 1)
        masks = bonsai.draw_masks(sampled, candidates, goal.fraction, method.masks // 2, generator, rounds.released, kinds, parts)
        perplexities = _evaluate(rounds, number, left, masks, pace, is_settled)
        fitted = weigh(perplexities)
    gone = choose(fitted.weights if fitted else (worth / costs if rounds.released else worth)[candidate])
    if not rounds.released and number + 1 == len(rounds.costs):
        gone |= _rest(goal, gone | candidate, gone, worth, costs, modules)
    after = _narrowed(left, ~gone)
    facts = {
        "masks": len(perplexities),
        "spared": _spared(rounds, number, told(perplexities), own) if method.masks else [],
        "tau": fitted.tau if fitted else None,
        "removed": rounds.removed(after) - rounds.removed(left),
        "seconds": pace.seconds,
    }
    if method.masks and not rounds.released:
        sound = told(perplexities).sound
        known += bonsai.evidence(sound.masks, sound.utility, own.relative, own.modules, len(left))
    return after, known, facts


def _spared(rounds: Rounds, number: int, told: Told, own: Candidates) -> list[str]:
    """The modules that lose nothing in later rounds, as every broken sub-model, and no other, lacks all of their candidates."""
    before: list[str] = rounds.run.state.blocks(WALK)[number - 1]["facts"]["spared"] if number else []
    if rounds.released:
        return before
    essential = bonsai.suspects(told.masks, told.broken)[1]
    return before + [rounds.modules[place].name for place in own.modules.unique().tolist() if essential[own.modules == place].all()]


def _chosen(rounds: Rounds, goal: Goal, weights: Tensor, candidates: Sequence[Tensor], modules: Tensor, costs: Tensor) -> Tensor:
    """Which units go by the weights of the candidates: (C,), each (n,) bool, (U,), (U,) -> (U,) bool."""
    candidate = torch.cat([*candidates])
    gone = torch.zeros_like(candidate)
    if rounds.released and rounds.method.scope == "local":
        for place, mask in enumerate(candidates):
            if mask.any():
                gone[modules == place] = bonsai.select_local(weights[modules[candidate] == place], mask, goal.fraction) & mask
    else:
        gone[candidate] = bonsai.select(weights, costs[candidate], modules[candidate], goal.removable, goal.budget, rounds.released)
    return gone


def _rest(goal: Goal, decided: Tensor, gone: Tensor, worth: Tensor, costs: Tensor, modules: Tensor) -> Tensor:
    """What else goes in the last round, where candidates left over parameters that none of them fits into: by the prior. All (U,)."""
    lost = modules[gone].bincount(minlength=len(goal.removable)).tolist()
    removable = [most - already for most, already in zip(goal.removable, lost, strict=True)]
    rest = torch.zeros_like(gone)
    rest[~decided] = bonsai.select(worth[~decided], costs[~decided], modules[~decided], removable, goal.budget - int(costs[gone].sum()))
    return rest


def _candidates(rounds: Rounds, priors: Sequence[Tensor], goal: Goal) -> list[Tensor]:
    """Which of its units each module may lose in this round, (n,) bool each."""
    found = []
    for module, prior, removable in zip(rounds.modules, priors, goal.removable, strict=True):
        fraction = removable / len(prior) if rounds.alike and removable else goal.fraction
        possible = removable > 0 and module.cost <= goal.budget
        found.append(bonsai.candidates(prior, min(fraction, 0.5)) if possible else torch.zeros(len(prior), dtype=torch.bool))
    return found


def _priors(rounds: Rounds, number: int, left: Sequence[Tensor], pace: Pace) -> list[Tensor]:
    """The prior of each module's units that are left, (n,) float32 each."""
    run = rounds.run
    if rounds.method.prior == "random":
        generator = _generator(rounds, number, 0)
        return [torch.rand(int(mask.sum()), generator=generator) for mask in left]
    keeps, size = _keeps(rounds, left), run.stream.architecture.dimensions(run.stream.source.config)
    surveyed = survey(
        run, rounds.pruner, lambda index: pace.tell(0, index + 1), f"prior.{number}", lambda index, tensors: slice_kept(run, index, tensors, keeps[index])
    )

    def of(module: Module) -> Tensor:
        scores = surveyed[module.block].scores
        if module.unit == "channels":
            return scores["channels"][0]
        return scores["columns"].view(-1, size.queries_per_group * size.head_dim).mean(dim=1)

    return [of(module) if mask.any() else torch.zeros(0) for module, mask in zip(rounds.modules, left, strict=True)]


def _evaluate(rounds: Rounds, number: int, left: list[Tensor], masks: Tensor, pace: Pace, settled: Callable[[list[float]], bool]) -> list[float]:
    """Perplexities of sub-models, (M, U) bool: of all masks, or of the first of them where these settle the round or its time is over."""
    stream = rounds.run.stream

    def sub_model(place: int, mask: Tensor) -> SubModel:
        after = _narrowed(left, mask)
        lacking = [_part(rounds, module) for module, before, own in zip(rounds.modules, left, after, strict=True) if not own.equal(before)]
        return SubModel(f"round {number}, mask {place}", _sliced(rounds, after), min(lacking, default=0))

    sub_models = (sub_model(place, mask) for place, mask in enumerate(masks))
    found: list[float] = []
    with stream.holding_blocks() as reads_again:
        for value, seconds in evaluated(rounds.run, _sliced(rounds, left), sub_models, rounds.starts, side_by_side=reads_again):
            found.append(value)
            pace.add(seconds)
            pace.tell(len(found), len(stream))
            whole_pairs = len(found) >= LEAST_MASKS and len(found) % 2 == 0
            if whole_pairs and pace.is_over():
                break
            if not rounds.released and _is_checked(len(found), len(masks)) and settled(found):
                break
    return found


def _sliced(rounds: Rounds, left: Sequence[Tensor]) -> Edit:
    """The model less what isn't left, on its way."""
    run, keeps = rounds.run, _keeps(rounds, left)
    return lambda index, tensors: slice_aligned(run, index, tensors, keeps[index])


def _is_checked(count: int, total: int) -> bool:
    """At 32, 64, 128 … masks, as long as to end there saves a third of them; less isn't worth what they would tell, nor that no one knows how long a round will take."""
    return count >= FIRST_CHECK and math.log2(count / FIRST_CHECK).is_integer() and 3 * count <= 2 * total


@dataclass(frozen=True)
class Candidates:
    """What is known of a round's candidates before its sub-models, (C,) each."""

    modules: Tensor
    prior: Tensor
    worth: Tensor  # expected, see bonsai.expected_worth
    relative: Tensor  # see bonsai.relative_worth


@dataclass(frozen=True)
class Told:
    """What a round's sub-models have told."""

    masks: Tensor  # (M, C) bool
    utility: Tensor  # (M,) float64

    @functools.cached_property
    def broken(self) -> Tensor:
        return bonsai.broken(self.utility)

    @property
    def sound(self) -> Told:
        """Of pairs neither of which is broken."""
        whole = ~self.broken.view(-1, 2).any(dim=1).repeat_interleave(2)
        return Told(self.masks[whole], self.utility[whole])


def _fit(rounds: Rounds, number: int, told: Told, own: Candidates, known: Evidence) -> Fit:
    """What each candidate is worth, (C,): one model for all modules or one for each, as the recipe says."""
    if rounds.released:
        return _fit_released(rounds, told, own, _generator(rounds, number, 2))
    sound = told.sound
    pairs = len(sound.masks) // 2
    if pairs < 2 or pairs + len(known.utility) < bonsai.LEAST_PAIRS:
        fitted = Fit(own.worth, 0.0)
    elif rounds.method.scope == "global":
        fitted = bonsai.fit(sound.masks, sound.utility, own.relative, own.modules, _kinds(rounds)[own.modules], known)
    else:
        one = torch.zeros_like(own.modules)
        fitted = _by_module(own, lambda which: bonsai.fit(sound.masks[:, which], sound.utility, own.relative[which], one[which], one[which]))
    return Fit(torch.where(bonsai.suspects(told.masks, told.broken)[0], torch.inf, fitted.weights), fitted.tau)


def _fit_released(rounds: Rounds, told: Told, own: Candidates, generator: torch.Generator) -> Fit:
    if rounds.method.scope == "global":
        return bonsai.fit_released(told.masks, told.utility, generator)
    return _by_module(own, lambda which: bonsai.fit_released(told.masks[:, which], told.utility, generator, own.prior[which]))


def _by_module(own: Candidates, fit: Callable[[Tensor], Fit]) -> Fit:
    fits = [fit(own.modules == module) for module in own.modules.unique()]
    return Fit(torch.cat([fitted.weights for fitted in fits]), sum(fitted.tau for fitted in fits) / len(fits))


def _kinds(rounds: Rounds) -> Tensor:
    """0 for each module of FFN channels, 1 for one of KV groups; 0 for all where there is one kind."""
    first = rounds.modules[0].unit
    return torch.tensor([module.unit != first for module in rounds.modules]).long()


def _part(rounds: Rounds, module: Module) -> int:
    """The part of the model that a module is in."""
    return bisect.bisect(rounds.starts, module.block) - 1


def _generator(rounds: Rounds, number: int, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed((rounds.run.recipe.calibration.seed * 1_000_000 + number) * 3 + purpose)


# ------------------------------------------------------------------- how far it is


class Pace:
    """Seconds and costs of the sub-models so far: how long it still takes, and when a round's share of the time budget is over.

    Seconds come from the state, so that an attempt that goes on ends its rounds where the one before would have.
    """

    def __init__(self, rounds: Rounds, number: int) -> None:
        self._rounds, self._number = rounds, number
        self._finished = [record["facts"] for record in rounds.run.state.blocks(WALK)]
        assert rounds.run.tokens is not None
        costs = rounds.costs + rounds.costs[-1:] * (number + 1 - len(rounds.costs))  # the released code may need more rounds than planned
        self._costs = [rounds.run.tokens.numel() * cost for cost in costs]  # of a sub-model in each round
        self._seconds_before: float = sum(facts["seconds"] for facts in self._finished)
        self._masks = 0
        self.seconds = 0.0  # of this round

    def add(self, seconds: float) -> None:
        self._masks += 1
        self.seconds += seconds

    def is_over(self) -> bool:
        """Whether this round has used up its share of what is left of the time budget."""
        if self._rounds.method.time_budget is None:
            return False
        left = self._rounds.method.time_budget - self._seconds_before
        return self.seconds >= left * self._costs[self._number] / sum(self._costs[self._number :])

    def tell(self, masks: int, blocks: int) -> None:
        """Report so many sub-models, after so many blocks of the prior's walk."""
        rounds, number, costs = self._rounds, self._number, self._costs
        total = rounds.method.masks
        expected = next((facts["masks"] for facts in reversed(self._finished) if facts["masks"]), total)  # rounds that ended early make others likely to
        done = sum((facts["masks"] + 1) * cost for facts, cost in zip(self._finished, costs, strict=False))
        left = (max(expected, masks) - masks + 1 - blocks / len(rounds.run.stream)) * costs[number] + (expected + 1) * sum(costs[number + 1 :])
        measured = sum(facts["masks"] * cost for facts, cost in zip(self._finished, costs, strict=False)) + self._masks * costs[number]
        seconds = self._seconds_before + self.seconds
        pace = seconds / measured if measured else None
        if pace and rounds.method.time_budget is not None:
            left = min(left, max(rounds.method.time_budget - seconds, 0) / pace)
        done += (masks + blocks / len(rounds.run.stream)) * costs[number]
        rounds.run.round_step(RoundStep(number + 1, len(costs), masks, total, done, left, pace))


# ---------------------------------------------------------------------- helpers


def _narrowed(left: Sequence[Tensor], kept: Tensor) -> list[Tensor]:
    """Masks over all units of each module, less what a mask over those that are left, (U,) bool, leaves out."""
    narrowed = []
    for mask, stays in zip(left, kept.split([int(mask.sum()) for mask in left]), strict=True):
        after = mask.clone()
        after[mask] = stays
        narrowed.append(after)
    return narrowed


def _keeps(rounds: Rounds, left: Sequence[Tensor]) -> list[Keep]:
    """What stays of each block."""
    masks = {module.name: mask for module, mask in zip(rounds.modules, left, strict=True) if not mask.all()}
    keeps = []
    for index in range(len(rounds.run.stream)):
        channels, groups = masks.get(f"{index}.channels"), masks.get(f"{index}.groups")
        keeps.append(Keep(channels=None if channels is None else (channels,), groups=groups))
    return keeps


def _notes(rounds: Rounds, left: Sequence[Tensor]) -> list[str]:
    records = [record["facts"] for record in rounds.run.state.blocks(WALK)]
    notes = []
    if rounds.method.masks and records:
        masks, taus = ", ".join(str(facts["masks"]) for facts in records), ", ".join(f"{facts['tau']:.2f}" for facts in records if facts["tau"] is not None)
        notes.append(f"Sub-models evaluated in each round: {masks}. Kendall's tau of their perplexities and those predicted from others: {taus}.")
    gone = [f"{module.unit} of block {module.block}" for module, mask in zip(rounds.modules, left, strict=True) if not mask.any()]
    if gone:
        notes.append(f"Nothing stays of the {', '.join(gone)}: one unit is stored, with outgoing weights of zero, so that the model loads.")
    return notes


def _file(run: Pruning, number: int) -> Path:
    return run.state.work / f"{WALK}.{number}.safetensors"
