"""What a job will cost, told from its recipe and the checkpoint's headers before anything is computed.

The unit of time is a token that passes all decoder blocks of the dense model; its constants are from SmolLM2-135M on two CPU cores. Memory and disk are
reckoned in app/footprint.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field

from app.architecture import ARCHITECTURES
from app.counting import count_parameters, fraction_of, macs_per_token
from app.footprint import TOKENS_TAUGHT_AT_ONCE, footprint, walks_twice
from app.recipe import Bonsai, Budget, LeastSquares, Recipe
from app.recovery import Perp
from app.source import Source

WITH_HEAD = 1.5  # what a perplexity takes, in passes through the blocks alone
RELEASED_TOLERANCE = 0.02  # as near to the target as Bonsai's released code goes
IN_ROUNDS = ("prune", "write", "recover")  # phases that come in every round
MACS_PER_SECOND = 50e9  # of two CPU cores, in float32
LEAST_MACS_PER_SECOND, MOST_MACS_PER_SECOND = 20e9, 20e12  # of two cores that others share, and of a large GPU, which was not measured
LEAST_READ_PER_SECOND, MOST_READ_PER_SECOND = 150e6, 3e9  # bytes, from a cold disk and from the page cache
LEAST_STARTING, MOST_STARTING = 10.0, 60.0  # seconds, of the engine and the processes that try its result


class Estimate(BaseModel):
    """What a job will cost."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    forward_tokens: int = Field(description="Tokens that pass all decoder blocks of the dense model, or cost as much, by phases in sum.", examples=[52000])
    phases: dict[str, int] = Field(description="The same, phase by phase.", examples=[{"prune": 17384, "evaluate": 18432}])
    rounds: int | None = Field(description="Rounds, of a method that prunes in rounds.", examples=[4])
    sub_models: int | None = Field(description="Sub-models that its rounds evaluate at most.", examples=[400])
    multiply_accumulates: int = Field(description="Of all phases.", examples=[5_500_000_000_000])
    seconds_on_two_cores: float = Field(description="About what two CPU cores take; a GPU takes far less.", examples=[110.0])
    seconds_least: float = Field(description="What a large GPU and a fast disk take at least; not measured on a GPU.", examples=[12.5])
    seconds_most: float = Field(description="What two CPU cores that others share, and a slow disk, take at most.", examples=[340.0])
    passes: int = Field(description="Times that all weights are read at most; where they fit in the page cache, from the disk only once.", examples=[7])
    source_bytes: int = Field(description="Weight files of the dense model.", examples=[269_060_552])
    host_bytes: int = Field(
        description="Anonymous memory that the job needs on a worker that computes on its CPU: the peak of the engine and of the processes that it starts. "
        "With more room it tries whole models in fresh processes, which it otherwise leaves out.",
        examples=[722_000_000],
    )
    phase_host_bytes: dict[str, int] = Field(description="The same, phase by phase.", examples=[{"load": 632_000_000, "verify": 722_000_000}])
    peak_phase: str = Field(description="The phase that needs the most.", examples=["verify"])
    device_bytes: int = Field(description="Memory that the job needs on a GPU, the driver's included, if the worker has one.", examples=[1_020_000_000])
    disk_bytes: int = Field(
        description="The most that lies in the worker's work directory: hidden states, state, finished blocks and the result; without the dense model.",
        examples=[276_000_000],
    )
    output_bytes: int = Field(
        description="The checkpoint: weights, masks, tokenizer, and the padded copy if one is asked for. At most so much, where only the perplexity is bounded.",
        examples=[245_000_000],
    )


def estimate(recipe: Recipe, source: Source, text_bytes: Mapping[str, int] | None = None) -> Estimate:
    """Raises RecipeError for a target that is more than there is.

    `text_bytes` are the sizes of the texts that the recipe names by a path; one that is left out counts as the larger of the bundled ones.
    """
    phases = {phase: round(cost) for phase, cost in phase_costs(recipe, source).items() if cost}
    rounds = len(bonsai_rounds(recipe, source))
    macs = sum(phases.values()) * _block_macs(source)
    read = passes(recipe, source) * source.weight_bytes
    held = footprint(recipe, source, text_bytes or {})
    peak = max(held.host, key=lambda phase: held.host[phase])
    return Estimate(
        forward_tokens=sum(phases.values()),
        phases=phases,
        rounds=rounds or (recipe.rounds if recipe.rounds > 1 else None),
        sub_models=rounds * recipe.method.masks if isinstance(recipe.method, Bonsai) and rounds else None,
        multiply_accumulates=macs,
        seconds_on_two_cores=round(macs / MACS_PER_SECOND, 1),
        seconds_least=round(LEAST_STARTING + source.weight_bytes / MOST_READ_PER_SECOND + macs / MOST_MACS_PER_SECOND, 1),
        seconds_most=round(MOST_STARTING + read / LEAST_READ_PER_SECOND + macs / LEAST_MACS_PER_SECOND, 1),
        passes=passes(recipe, source),
        source_bytes=source.weight_bytes,
        host_bytes=held.host[peak],
        phase_host_bytes=held.host,
        peak_phase=peak,
        device_bytes=held.device,
        disk_bytes=held.disk,
        output_bytes=held.output,
    )


def passes(recipe: Recipe, source: Source) -> int:
    """Times that all weights are read at most: once for their hash and once for the last check, and in every walk over the blocks."""
    pruning = 2 if recipe.facts.structured or walks_twice(recipe) else 1
    if isinstance(recipe.method, Bonsai):
        pruning += len(bonsai_rounds(recipe, source)) * (recipe.method.masks + 1) - 1
    recovering = 0
    if recipe.recovery is not None:
        windows = recipe.recovery.windows[0]
        at_once = max(1, TOKENS_TAUGHT_AT_ONCE // recipe.recovery.sequence_length)
        recovering = 2 + (-(-windows // at_once) if recipe.recovery.distillation is not None else 0)
    evaluating = 0 if recipe.evaluation is None else 2 + (recipe.recovery is not None)
    return 2 + recipe.rounds * (pruning + recovering) + evaluating


def phase_costs(recipe: Recipe, source: Source) -> dict[str, float]:
    """The cost of each phase, in all rounds."""
    tokens = recipe.calibration.samples * recipe.calibration.sequence_length if recipe.calibrates else 0
    passes: float = 1 if recipe.facts.structured else 3
    if isinstance(recipe.restoration, LeastSquares):
        passes = 5 if recipe.restoration.drift else 4
    if isinstance(recipe.method, Bonsai):
        passes += sum((recipe.method.masks + 1) * cost for cost in bonsai_rounds(recipe, source))
    costs = {"prune": tokens * passes + 1000.0, "write": 300.0, "verify": 3000.0}
    if recipe.evaluation is not None:
        evaluated = recipe.evaluation.windows * recipe.evaluation.sequence_length * WITH_HEAD + (5000.0 if recipe.evaluation.speed else 0.0)
        costs |= {"evaluate_dense": evaluated, "evaluate": evaluated}
    if recipe.recovery is not None:
        trained = recipe.recovery.total_steps * recipe.recovery.batch * recipe.recovery.sequence_length
        costs["recover"] = trained * (4.0 if recipe.recovery.gradient_checkpointing else 3.0) + 2000.0
        if isinstance(recipe.recovery, Perp) and recipe.recovery.reconstructs:
            passed = 3 * trained + 5 * recipe.recovery.samples * recipe.recovery.sequence_length  # targets, errors before and after, the next block's inputs
            costs["recover"] = passed * (1 if recipe.recovery.parts == "block" else 2)
        costs["teach"] = trained * 1.2 if recipe.recovery.distillation is not None else 0.0
        if recipe.evaluation is not None:
            costs["evaluate_pruned"] = recipe.evaluation.windows * recipe.evaluation.sequence_length * WITH_HEAD
    return costs | {phase: costs[phase] * recipe.rounds for phase in IN_ROUNDS if phase in costs}


def bonsai_rounds(recipe: Recipe, source: Source) -> list[float]:
    """What a sub-model of each of Bonsai's rounds costs a token on average: as much as what is left of the blocks that it runs, and the head. Empty for other methods."""
    method = recipe.method
    if not isinstance(method, Bonsai) or isinstance(recipe.sparsity, Budget):
        return []
    dense = count_parameters(source, [])
    target, whole = fraction_of(recipe, dense), dense.non_embedding
    size = ARCHITECTURES[source.model_type].dimensions(source.config)
    head = size.vocab * size.embedding
    tolerance = RELEASED_TOLERANCE if method.mode == "code" else 0
    count = max(1, math.ceil((target - tolerance) / method.prune_fraction - 1e-9))
    starts = method.first_blocks(size.layers)
    share = 1 - sum(starts) / (len(starts) * size.layers)
    return [WITH_HEAD * (whole * share * (1 - min(target, number * method.prune_fraction)) + head) / (whole + head) for number in range(count)]


def _block_macs(source: Source) -> int:
    """Multiply-accumulates a token in all blocks, without the head."""
    size = ARCHITECTURES[source.model_type].dimensions(source.config)
    return macs_per_token(source) - size.vocab * size.embedding
