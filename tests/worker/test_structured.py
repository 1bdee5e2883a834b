"""Widths and slicing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear, silu

from worker.architecture import ARCHITECTURES
from worker.structured import integer_widths, slice_channels


@given(
    shares=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12),
    keep=st.floats(0.05, 1.0),
    multiple_of=st.sampled_from([1, 2, 8]),
)
@settings(deadline=None)
def test_widths_are_bounded_whole_and_meet_the_total(shares: list[float], keep: float, multiple_of: int) -> None:
    maximum, layers = 64, len(shares)
    total = round(keep * maximum * layers)
    widths = integer_widths(shares, total, maximum, multiple_of)
    assert all(multiple_of <= width <= maximum and width % multiple_of == 0 for width in widths)
    reachable = min(max(round(total / multiple_of), layers), layers * maximum // multiple_of) * multiple_of
    assert sum(widths) == reachable
    for one, two in zip(shares, widths, strict=True):
        for other, width in zip(shares, widths, strict=True):
            assert one <= other or two >= width - multiple_of  # a larger share never gets less, but for rounding


def test_widths_follow_the_shares_and_hand_on_what_a_bound_cuts_off() -> None:
    assert integer_widths([0.5, 0.25, 0.25], 40, 100) == [20, 10, 10]
    assert integer_widths([0.8, 0.1, 0.1], 40, 20) == [20, 10, 10]
    assert integer_widths([0.998, 0.001, 0.001], 12, 100) == [10, 1, 1]  # never zero


def test_a_multiple_that_no_width_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        integer_widths([1.0], 64, 100, multiple_of=128)


def test_slicing_removes_the_channels_from_all_three_matrices_and_the_biases() -> None:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    architecture, prefix = ARCHITECTURES["llama"], "model.layers.3."
    tensors = {
        f"{prefix}mlp.gate_proj.weight": rand(12, 5),
        f"{prefix}mlp.gate_proj.bias": rand(12),
        f"{prefix}mlp.up_proj.weight": rand(12, 5),
        f"{prefix}mlp.up_proj.bias": rand(12),
        f"{prefix}mlp.down_proj.weight": rand(5, 12),
        f"{prefix}mlp.down_proj.bias": rand(5),
        f"{prefix}input_layernorm.weight": rand(5),
    }
    keep = torch.tensor([True, False, True, True] * 3)
    sliced = slice_channels(tensors, prefix, architecture, keep)

    def mlp(weights: dict[str, torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        part = {name.removeprefix(f"{prefix}mlp."): weight for name, weight in weights.items()}
        inner = silu(linear(x, part["gate_proj.weight"], part["gate_proj.bias"])) * linear(x, part["up_proj.weight"], part["up_proj.bias"])
        return linear(inner if mask is None else inner * mask, part["down_proj.weight"], part["down_proj.bias"])

    x = rand(7, 5)
    torch.testing.assert_close(mlp(sliced, None), mlp(tensors, keep.float()))
    assert sliced[f"{prefix}mlp.down_proj.weight"].shape == (5, 9)
    assert sliced[f"{prefix}input_layernorm.weight"] is tensors[f"{prefix}input_layernorm.weight"]
