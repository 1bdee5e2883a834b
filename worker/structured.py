"""Removing whole FFN channels: widths, slicing, and what a fraction of something else means in channels."""

from __future__ import annotations

from torch import Tensor

from worker.architecture import Architecture


def integer_widths(shares: list[float], total: int, maximum: int, multiple_of: int = 1) -> list[int]:
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


def slice_channels(tensors: dict[str, Tensor], prefix: str, architecture: Architecture, keep: Tensor) -> dict[str, Tensor]:
    """A block's tensors without the FFN channels where `keep` (I,) is False: rows of gate and up with their biases, columns of down."""
    kept = keep.nonzero().squeeze(1)
    sliced = dict(tensors)
    for linear in architecture.channel_outputs:
        for part in ("weight", "bias"):
            name = f"{prefix}{linear}.{part}"
            if name in sliced:
                sliced[name] = sliced[name].index_select(0, kept)
    down = f"{prefix}{architecture.down}.weight"
    sliced[down] = sliced[down].index_select(1, kept)
    return sliced
