"""How much to remove so that a bound on the result holds: bisection over one survey of the dense model, so the calibration text is walked once."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from app.exceptions import RecipeError
from app.recipe import Budget
from worker.choosing import Choice, choose
from worker.slicing import edit_block, stored_size
from worker.structured import Keep
from worker.survey import Surveyed
from worker.walk import Pruning, stored

SIZE_STEPS = 4096  # fractions that are told apart where a try costs nothing
PERPLEXITY_STEPS = 64  # and where it costs an evaluation


def solve(run: Pruning, surveyed: list[Surveyed]) -> Choice:
    """The choice that removes least and meets the recipe's `target_…`, or removes most within its `max_perplexity_increase`.

    Restoration comes after it and is not taken into account. Raises RecipeError for a bound that holds already or can't be met.
    """
    budget = run.recipe.sparsity
    assert isinstance(budget, Budget)
    if budget.max_perplexity_increase is not None:
        return _most_within(run, surveyed, budget.max_perplexity_increase)
    bound, which = (budget.target_parameters, 0) if budget.target_parameters is not None else (budget.target_bytes, 1)
    assert bound is not None
    what = ("parameters", "bytes")[which]

    def fits(choice: Choice) -> bool:
        return stored_size(run, choice)[which] <= bound

    if fits(Choice([Keep()] * len(run.stream))):
        raise _refuse(f"The model has no more than {bound:,} {what} already.", "Ask for less than the dense model has.")
    least, most = _possible(run, surveyed, SIZE_STEPS)
    smallest = choose(run, surveyed, most / SIZE_STEPS)
    if not fits(smallest):
        raise _refuse(
            f"{run.recipe.method.name} can't bring the model down to {bound:,} {what}.",
            f"The least that it can leave is {stored_size(run, smallest)[which]:,}.",
        )
    step = _first(lambda step: fits(choose(run, surveyed, step / SIZE_STEPS)), least - 1, most)
    return choose(run, surveyed, step / SIZE_STEPS)


def _most_within(run: Pruning, surveyed: list[Surveyed], increase: float) -> Choice:
    measure, state = run.perplexity, run.state
    assert measure is not None

    def attempt(step: int) -> float:
        choice = choose(run, surveyed, step / PERPLEXITY_STEPS)

        def edit(index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
            left = edit_block(run, surveyed, choice, index, tensors)
            return None if left is None else stored(run, left)

        return measure(edit)

    def perplexity(step: int) -> float:
        return float(state.figure(f"perplexity at step {step}", lambda: attempt(step)))

    dense = float(state.figure("dense perplexity", lambda: measure(lambda index, tensors: tensors)))  # at step 0 a bound on widths may remove some
    allowed = dense * (1 + increase)
    least, most = _possible(run, surveyed, PERPLEXITY_STEPS)
    step = _first(lambda step: not perplexity(step) <= allowed, least - 1, most + 1) - 1
    if step < least:
        raise _refuse(
            f"Removing {least / PERPLEXITY_STEPS:.1%} already brings perplexity to {perplexity(least):.4g}, and {allowed:.4g} are allowed.",
            "Allow a larger increase.",
        )
    return choose(run, surveyed, step / PERPLEXITY_STEPS)


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The first step above `low` at which a condition holds, given that it doesn't at `low` and is taken to at `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _possible(run: Pruning, surveyed: list[Surveyed], steps: int) -> tuple[int, int]:
    """The lowest step from 1 and the highest whose fractions the method's own bounds allow; (1, 1) where they allow none."""

    def possible(step: int) -> bool:
        try:
            choose(run, surveyed, step / steps)
        except RecipeError:
            return False
        return True

    least = next(filter(possible, range(1, steps)), 1)
    return least, _first(lambda step: not possible(step), least, steps) - 1


def _refuse(message: str, hint: str) -> RecipeError:
    return RecipeError(message, code="target_unreachable", hint=hint, pointer="/sparsity")
