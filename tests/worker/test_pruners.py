"""The maths of each method, against values worked out independently."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from app.recipe import CFSP, METHODS, MethodName
from worker.architecture import ARCHITECTURES
from worker.pruners import PRUNERS, cfsp, magnitude, wanda
from worker.pruners.base import ChannelPruner, MaskPruner, Target


def test_every_method_has_a_config_facts_and_a_pruner() -> None:
    assert set(PRUNERS) == set(METHODS) == set(get_args(MethodName))
    for name, (config, facts) in METHODS.items():
        assert config.model_fields["name"].default == name
        assert set(facts.model_types) == set(ARCHITECTURES)
        assert isinstance(PRUNERS[name], ChannelPruner if facts.structured else MaskPruner)


WEIGHT = torch.tensor([[1.0, -6.0, 3.0, -4.0], [5.0, 2.0, -8.0, 7.0]])


def test_magnitude_compares_in_the_matrix_or_in_the_row() -> None:
    assert magnitude.mask(WEIGHT, Target(0.5)).tolist() == [[False, True, False, False], [True, False, True, True]]
    assert magnitude.mask(WEIGHT, Target(0.5), "row").tolist() == [[False, True, False, True], [False, False, True, True]]
    assert magnitude.mask(WEIGHT, Target(0.5, (1, 2))).tolist() == [[False, True, False, True], [True, False, True, False]]


def test_wanda_weighs_by_the_input_norm() -> None:
    norm = torch.tensor([10.0, 1.0, 1.0, 0.5])
    torch.testing.assert_close(wanda.score(WEIGHT, norm), torch.tensor([[10.0, 6.0, 3.0, 2.0], [50.0, 2.0, 8.0, 3.5]]))
    assert wanda.mask(WEIGHT, norm, Target(0.5)).tolist() == [[True, True, False, False], [True, False, True, False]]
    assert wanda.mask(WEIGHT, norm, Target(0.5, (2, 4))).tolist() == [[True, True, False, False], [True, False, True, False]]


@pytest.mark.parametrize("fraction", [0.1, 0.33, 0.5, 0.9])
def test_wanda_drops_exactly_the_fraction_in_every_row(fraction: float) -> None:
    weight = torch.randn(16, 48, generator=torch.Generator().manual_seed(0))
    mask = wanda.mask(weight, torch.ones(48), Target(fraction))
    assert (48 - mask.sum(1)).tolist() == [round(48 * fraction)] * 16


def test_angular_distance_is_in_half_turns_and_survives_rounding() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    y = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(cfsp.angular(x, y), torch.tensor([0.0, 0.5, 1.0, 0.25]), atol=1e-4, rtol=0)
    same = torch.randn(1000, 577, generator=torch.Generator().manual_seed(0))
    assert cfsp.angular(same, same).isfinite().all()  # a cosine of 1 + 1e-7 would give NaN


def test_other_coarse_distances() -> None:
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert cfsp.cosine(x, y).item() == pytest.approx(1.0)
    assert cfsp.mse(x, y).item() == pytest.approx((9 + 16) / 2)
    assert cfsp.mae(x, y).item() == pytest.approx(3.5)
    assert cfsp.uniform(x, y).tolist() == [1.0]


def test_allocation_is_the_published_sigmoid_of_mean_importance() -> None:
    importance, keep = [0.10, 0.12, 0.20], 0.5
    mean = sum(importance) / 3
    z = [1 / (1 + math.exp(-(value - mean) * 131072 / 1e4)) for value in importance]
    expected = [value / (sum(z) / 3) * keep for value in z]
    assert max(expected) < 1
    assert cfsp.allocate(importance, 1 - keep, CFSP()) == pytest.approx(expected)


def test_allocation_keeps_its_mean_and_its_bound() -> None:
    importance = [0.9, 0.1, 0.1, 0.1]
    for fraction in (0.05, 0.3, 0.7):
        for bound in (1.0, 0.97):
            shares = cfsp.allocate(importance, fraction, CFSP(max_layer_width=bound))
            assert sum(shares) / 4 == pytest.approx(1 - fraction)
            assert max(shares) <= max(bound, 1 - fraction) + 1e-9
            assert shares[0] > shares[1]
    assert cfsp.allocate(importance, 0.3, CFSP(allocation_strength=0)) == pytest.approx([0.7] * 4)


DOWN = torch.tensor([[1.0, -2.0, 1.0], [3.0, 1.0, 0.0]])  # (D, I) = (2, 3)
UP = torch.tensor([[1.0, 2.0], [0.5, 0.1], [4.0, -4.0]])  # (I, D)
GATE = torch.tensor([[2.0, 2.0], [1.0, -3.0], [0.2, 0.3]])
NORM = torch.tensor([1.0, 2.0, 3.0])


def test_the_papers_fine_importance() -> None:
    # |Wd|·n = [[1, 4, 3], [3, 2, 0]]; each row over its sum: [1/8, 4/8, 3/8] and [3/5, 2/5, 0]
    expected = torch.tensor([1 / 8 + 3 / 5, 4 / 8 + 2 / 5, 3 / 8])
    torch.testing.assert_close(cfsp.fine_importance(DOWN, UP, GATE, NORM, "paper"), expected)


def test_the_combined_fine_importance() -> None:
    root = math.sqrt
    down = [1 / root(26) + 3 / root(13), 4 / root(26) + 2 / root(13), 3 / root(26)]
    up = [3 / root(5), 0.6 / root(0.26), 8 / root(32)]
    gate = [4 / root(8), 4 / root(10), 0.5 / root(0.13)]
    expected = torch.tensor([(d + u + g) * n for d, u, g, n in zip(down, up, gate, NORM.tolist(), strict=True)])
    torch.testing.assert_close(cfsp.fine_importance(DOWN, UP, GATE, NORM, "combined"), expected)


def test_the_released_codes_fine_importance_is_the_activation_norm() -> None:
    # as released: every term is normalised over its own channel before the mean over the hidden dimension
    wd, wu, wg = DOWN.abs().T * NORM[:, None], UP.abs(), GATE.abs()
    released = sum(part / part.sum(1, keepdim=True) for part in (wd, wu, wg)).mean(1) * NORM  # type: ignore[union-attr]  # sum() may give 0
    ours = cfsp.fine_importance(DOWN, UP, GATE, NORM, "code")
    torch.testing.assert_close(ours / ours.sum(), released / released.sum())
