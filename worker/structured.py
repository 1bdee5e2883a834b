"""Removing parts of a block: FFN channels, whole KV groups of attention, experts; and how many of them stay.

Notation: I FFN channels, G KV groups, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.architecture import Architecture, Config


@dataclass(frozen=True)
class Keep:
    """What stays of a block; None stands for all of it."""

    channels: tuple[Tensor, ...] | None = None  # (I,) bool for each FFN
    groups: Tensor | None = None  # (G,) bool
    experts: Tensor | None = None  # (E,) bool


def integer_widths(shares: Sequence[float], total: int, maximum: int, multiple_of: int = 1) -> list[int]:
    """Widths in proportion to `shares`, each a multiple within [multiple_of, maximum], that sum to `total` as nearly as the bounds and the multiple allow.

    A share that its bound cuts off is handed on to the others in proportion; what rounding leaves goes to the largest remainders.
    """
    units, top = round(total / multiple_of), maximum // multiple_of
    if top < 1:
        raise ValueError(f"no width up to {maximum} is a multiple of {multiple_of}")
    units = min(max(units, len(shares)), top * len(shares))
    low, high = 0.0, units * top / max(min(shares), 1e-12)
    for _ in range(200):  # the scale at which the bounded shares sum to the total
        scale = (low + high) / 2
        low, high = (scale, high) if sum(min(max(share * scale, 1.0), top) for share in shares) < units else (low, scale)
    exact = [min(max(share * high, 1.0), float(top)) for share in shares]
    widths = [int(width) for width in exact]
    by_remainder = sorted(range(len(shares)), key=lambda layer: (widths[layer] - exact[layer], layer))
    for layer in by_remainder[: units - sum(widths)]:
        widths[layer] += 1
    return [width * multiple_of for width in widths]


def channel_cost(architecture: Architecture, config: Config, index: int) -> int:
    """Weights that one FFN channel of a block has, in all its experts together."""
    hidden = architecture.dimensions(config).hidden
    return sum((len(mlp.outer) * mlp.parts + 1) * hidden for mlp in architecture.mlps(config, index))


def group_cost(architecture: Architecture, config: Config) -> int:
    """Weights that one KV group has: its queries' rows, a key's, a value's, and the output's columns."""
    size = architecture.dimensions(config)
    return (2 * size.queries_per_group + 2) * size.head_dim * size.hidden


def kept_columns(keep: Keep, architecture: Architecture, config: Config) -> Tensor | None:
    """(H·hd,) bool: the inputs of the attention's output that stay, those of whole groups; None for all."""
    size = architecture.dimensions(config)
    return None if keep.groups is None else keep.groups.repeat_interleave(size.queries_per_group * size.head_dim)


def slice_block(tensors: dict[str, Tensor], architecture: Architecture, config: Config, index: int, keep: Keep) -> dict[str, Tensor]:
    """A block's tensors, under their full names, without what `keep` leaves out. Experts that stay are numbered anew."""
    prefix = architecture.block_prefix(index)
    sliced = dict(tensors)
    out_dim, in_dim = (1, 0) if architecture.transposed else (0, 1)

    def select(linear: str, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
        weight, bias = f"{prefix}{linear}.weight", f"{prefix}{linear}.bias"
        for kept, name, dim in ((outputs, weight, out_dim), (outputs, bias, 0), (inputs, weight, in_dim)):
            if kept is not None and name in sliced:
                sliced[name] = sliced[name].index_select(dim, kept.to(sliced[name].device))

    if keep.channels is not None:
        for mlp, mask in zip(architecture.mlps(config, index), keep.channels, strict=True):
            kept = mask.nonzero().squeeze(1)
            stacked = torch.cat([kept + part * len(mask) for part in range(mlp.parts)])
            for linear in mlp.outer:
                select(linear, outputs=stacked)
            select(mlp.down, inputs=kept)
    columns = kept_columns(keep, architecture, config)
    if columns is not None and keep.groups is not None:
        attention, size = architecture.attention, architecture.dimensions(config)
        queries, keys = columns.nonzero().squeeze(1), keep.groups.repeat_interleave(size.head_dim).nonzero().squeeze(1)
        if attention.fused == "no":
            select(attention.query, outputs=queries)
            select(attention.key, outputs=keys)
            select(attention.value, outputs=keys)
        else:
            first_key, first_value = len(columns), len(columns) + size.kv_heads * size.head_dim
            select(attention.query, outputs=torch.cat((queries, keys + first_key, keys + first_value)))
        select(attention.output, inputs=queries)
    if keep.experts is not None:
        sliced = _without_experts(sliced, architecture, config, index, keep.experts)
    return sliced


def _without_experts(tensors: dict[str, Tensor], architecture: Architecture, config: Config, index: int, keep: Tensor) -> dict[str, Tensor]:
    assert architecture.experts is not None
    prefix, mlps, router = architecture.block_prefix(index), architecture.mlps(config, index), architecture.router(config, index)
    kept = keep.nonzero().squeeze(1)
    renamed = {linear: None for mlp in mlps for linear in mlp.linears} | {
        old: new
        for number, expert in enumerate(kept.tolist())
        for old, new in zip(mlps[expert].linears, architecture.experts.mlp_of(number).linears, strict=True)
    }
    left: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        linear, _, kind = name.removeprefix(prefix).rpartition(".")
        if linear == router:
            left[name] = tensor.index_select(0, kept.to(tensor.device))
        elif linear not in renamed:
            left[name] = tensor
        elif (new := renamed[linear]) is not None:
            left[f"{prefix}{new}.{kind}"] = tensor
    return left
