"""How layers share the sparsity, against values worked out independently."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.recipe import Coarse, Owl
from worker.allocation import angular, coarse_shares, cosine, mae, mse, outlier_ratio, owl_shares, standardised, units_kept_by_rank


def test_angular_distance_is_in_half_turns_and_survives_rounding() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    y = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(angular(x, y), torch.tensor([0.0, 0.5, 1.0, 0.25]), atol=1e-4, rtol=0)
    same = torch.randn(1000, 577, generator=torch.Generator().manual_seed(0))
    assert angular(same, same).isfinite().all()  # a cosine of 1 + 1e-7 would give NaN


def test_other_coarse_distances() -> None:
    x, y = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    assert cosine(x, y).item() == pytest.approx(1.0)
    assert mse(x, y).item() == pytest.approx((9 + 16) / 2)
    assert mae(x, y).item() == pytest.approx(3.5)


def test_allocation_is_the_published_sigmoid_of_mean_importance() -> None:
    importance, keep = [0.10, 0.12, 0.20], 0.5
    mean = sum(importance) / 3
    z = [1 / (1 + math.exp(-(value - mean) * 131072 / 1e4)) for value in importance]
    expected = [value / (sum(z) / 3) * keep for value in z]
    assert max(expected) < 1
    assert coarse_shares(importance, 1 - keep, Coarse()) == pytest.approx(expected)


def test_allocation_keeps_its_mean_and_its_bound() -> None:
    importance = [0.9, 0.1, 0.1, 0.1]
    for fraction in (0.05, 0.3, 0.7):
        for bound in (1.0, 0.97):
            shares = coarse_shares(importance, fraction, Coarse(max_layer_share=bound))
            assert sum(shares) / 4 == pytest.approx(1 - fraction)
            assert max(shares) <= max(bound, 1 - fraction) + 1e-9
            assert shares[0] > shares[1]
    assert coarse_shares(importance, 0.3, Coarse(strength=0)) == pytest.approx([0.7] * 4)


def test_outliers_are_counted_over_all_scores_of_a_layer() -> None:
    scores = [torch.tensor([[1.0, 1.0], [1.0, 21.0]]), torch.tensor([[0.0, 0.0, 24.0, 0.0]])]  # mean 6
    assert outlier_ratio(scores, 3.0) == 2 / 8
    assert outlier_ratio(scores, 3.9) == 1 / 8
    assert outlier_ratio(scores, 4.0) == 0


def test_owl_is_the_published_scaling() -> None:
    outliers, sparsity, bound = [0.01, 0.03, 0.02], 0.6, 0.08
    scaled = [(value - 0.01) / 0.02 * 2 * bound for value in outliers]
    expected = [value - sum(scaled) / 3 + 1 - sparsity for value in scaled]
    assert owl_shares(outliers, sparsity, Owl(bound=bound)) == pytest.approx(expected)
    assert owl_shares([0.1, 0.1], 0.5, Owl()) == pytest.approx([0.5, 0.5])


@given(outliers=st.lists(st.floats(0, 1), min_size=1, max_size=10), fraction=st.floats(0.01, 0.99), bound=st.floats(0, 0.5))
@settings(deadline=None)
def test_owl_keeps_its_mean_and_stays_possible(outliers: list[float], fraction: float, bound: float) -> None:
    shares = owl_shares(outliers, fraction, Owl(bound=bound))
    assert sum(shares) / len(shares) == pytest.approx(1 - fraction)
    assert all(-1e-9 <= share <= 1 + 1e-9 for share in shares)


def test_standardised_scores_have_mean_0_and_deviation_1() -> None:
    scores = standardised(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-6)
    assert float(scores.std()) == pytest.approx(1)
    assert standardised(torch.ones(4)).tolist() == [0.0] * 4


def test_units_are_ranked_together_by_score_and_paid_by_cost() -> None:
    scores = [torch.tensor([5.0, 1.0, 3.0]), torch.tensor([4.0, 2.0])]
    assert units_kept_by_rank(scores, [1, 10], 12) == [2, 1]
    assert units_kept_by_rank(scores, [1, 10], 13) == [3, 1]  # the next one would cost 10, so the one after it stays
    assert units_kept_by_rank(scores, [1, 10], 22) == [2, 2]
    assert units_kept_by_rank(scores, [1, 10], 23) == [3, 2]
    assert units_kept_by_rank(scores, [1, 10], 0) == [1, 1]  # no set is emptied
