"""Exactly the asked number stays."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.masks import keep_by_row_share, keep_largest, keep_largest_per_row, keep_n_of_m


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=40), data=st.data())
@settings(deadline=None)
def test_keep_largest_keeps_exactly_k_and_never_a_smaller_one(values: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values, dtype=torch.float32)
    mask = keep_largest(scores, keep)
    assert int(mask.sum()) == keep
    if 0 < keep < len(values):
        assert scores[mask].min() >= scores[~mask].max()


def test_keep_largest_keeps_the_shape_and_the_first_of_equals() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0], [2.0, 0.0, 3.0]])
    assert keep_largest(scores, 3).tolist() == [[False, True, True], [False, False, True]]


def test_rows_compete_within_themselves() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [40.0, 30.0, 20.0, 10.0]])
    assert keep_largest_per_row(scores, 2).tolist() == [[False, False, True, True], [True, True, False, False]]


def test_n_of_m_groups_run_along_the_inputs() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0, 5.0, 6.0, 7.0, 8.0]])
    assert keep_n_of_m(scores, 2, 4).tolist() == [[True, True, False, False, False, False, True, True]]
    assert keep_n_of_m(torch.zeros(3, 8), 1, 4).view(-1, 4).sum(1).tolist() == [1] * 6  # ties too
    with pytest.raises(ValueError, match="groups of 4"):
        keep_n_of_m(torch.zeros(2, 6), 2, 4)


def test_row_share_meets_the_target_and_spares_the_even_row() -> None:
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(40, 400, generator=generator) * 0.1 + 1
    peaked = torch.rand(40, 400, generator=generator) ** 8
    mask = keep_by_row_share(torch.cat([even, peaked]), 0.5)
    assert 1 - float(mask.float().mean()) == pytest.approx(0.5, abs=0.001)
    assert mask[:40].float().mean() > mask[40:].float().mean()  # a row of few large scores loses more entries


def test_row_share_drops_each_rows_smallest() -> None:
    scores = torch.rand(8, 64, generator=torch.Generator().manual_seed(1))
    mask = keep_by_row_share(scores, 0.3)
    for row, kept in zip(scores, mask, strict=True):
        assert row[kept].min() >= row[~kept].max()
