"""LoRA: y = (W + (α / r) · B A) x, with A (r, C_in) random and B (C_out, r) zero at the start (Hu et al., arXiv 2106.09685).

The adapters are peft's; where the pruning left masks M they are our own of B A ⊙ M, since plain ones would fill the zeros.

Notation: C_in inputs and C_out outputs of a linear, r rank.
"""

from __future__ import annotations

from collections.abc import Callable

from app.recovery import LoRA
from worker.recovery.adapters import MaskLoRA, add_lora, attach
from worker.recovery.base import Adapted, Student, own_head


def adapt(student: Student, config: LoRA) -> Adapted:
    """Adapters beside the linears, the model's own weights fixed but for the head's, if asked. B A is added to W in float32 in the end.

    The scale α / r is the same in every block, so that ranks by importance change where the adapters have room and nothing else.
    """
    model = student.model
    targets = [[name for name in linears if _is_target(name, student, config)] for linears in student.linears()]
    ranks = [config.rank] * len(targets)
    if config.ranks == "importance":
        sides = [[model.get_submodule(name).weight.shape for name in names] for names in targets]
        ranks = share_ranks(
            student.importance(), [sum(sum(pair) for pair in block) for block in sides], [max(min(pair) for pair in block) for block in sides], config.rank
        )
    rank_of = {name: rank for block, rank in zip(targets, ranks, strict=True) for name in block}
    merge = _masked(student, rank_of, config) if student.masks else _plain(student, rank_of, config)
    head = [own_head(model)] if config.head else []
    for weight in head:
        weight.requires_grad_(True)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return Adapted(parameters, merge)


def _plain(student: Student, rank_of: dict[str, int], config: LoRA) -> Callable[[], None]:
    tuner = add_lora(student.model, rank_of, config.alpha / config.rank, transposed=student.architecture.transposed, dropout=config.dropout)

    def merge() -> None:
        tuner.merge_and_unload()

    return merge


def _masked(student: Student, rank_of: dict[str, int], config: LoRA) -> Callable[[], None]:
    scale, transposed = config.alpha / config.rank, student.architecture.transposed

    def adapter_of(name: str, rank: int) -> MaskLoRA:
        weight, mask = student.model.get_submodule(name).weight, student.masks.get(f"{name}.weight")
        return MaskLoRA(weight, mask, rank, scale, transposed=transposed, dropout=config.dropout)

    return attach(student.model, {name: adapter_of(name, rank) for name, rank in rank_of.items()})


def _is_target(linear: str, student: Student, config: LoRA) -> bool:
    of_attention = linear.endswith(tuple(f".{name}" for name in student.architecture.attention.linears))
    return {"all": True, "attention": of_attention, "ffn": not of_attention}[config.targets]


def share_ranks(importance: list[float], costs: list[int], most: list[int], rank: int) -> list[int]:
    """Ranks of blocks in proportion to their coarse importance, with at most the parameters of equal ranks and as nearly those as whole ranks allow.

    importance, costs (parameters of rank 1) and most (the highest rank that makes sense): one entry a block. Each block has at least rank 1. CFSP (Wang et al.,
    arXiv 2409.13199) trains more where its coarse importance is higher; its rule is not public, so this one is ours.
    """
    budget = rank * sum(costs)
    scale = budget / sum(cost * value for cost, value in zip(costs, importance, strict=True))
    ideal = [scale * value for value in importance]
    ranks = [max(1, min(int(value), bound)) for value, bound in zip(ideal, most, strict=True)]

    def spent() -> int:
        return sum(cost * given for cost, given in zip(costs, ranks, strict=True))

    while spent() > budget and max(ranks) > 1:
        ranks[ranks.index(max(ranks))] -= 1
    while True:
        left = budget - spent()
        room = [block for block, cost in enumerate(costs) if cost <= left and ranks[block] < most[block]]
        if not room:
            return ranks
        ranks[max(room, key=lambda block: ideal[block] - ranks[block])] += 1
