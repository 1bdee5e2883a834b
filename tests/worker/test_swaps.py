"""Swaps against brute force over all pairs in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worker import swaps
from worker.masks import keep_largest, keep_n_of_m
from worker.swaps import refine, row_losses


def problem(rows: int, columns: int, seed: int = 0, factors: int = 3, tokens: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a magnitude mask of half of it, whose rows keep different numbers, and the Gram matrix of inputs with a few common factors."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, factors, generator=generator) @ torch.randn(factors, columns, generator=generator)
    x = (x + torch.randn(tokens, columns, generator=generator)) * torch.linspace(0.2, 2, columns)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, keep_largest(weight.abs(), weight.numel() // 2), x.T @ x / tokens


def loss(row: Tensor, keep: list[bool], gram: Tensor) -> float:
    lost = torch.tensor([0.0 if stays else float(w) for w, stays in zip(row, keep, strict=True)], dtype=torch.float64)
    return float(lost @ gram.double() @ lost)


def best_swap(row: Tensor, keep: list[bool], gram: Tensor, group: int | None) -> tuple[float, list[bool]]:
    """The lowest loss that one swap leads to, and its mask."""
    best = loss(row, keep, gram), keep
    for u in range(len(keep)):
        for p in range(len(keep)):
            if not keep[u] and keep[p] and (group is None or u // group == p // group):
                swapped = [stays if j not in (u, p) else j == u for j, stays in enumerate(keep)]
                best = min(best, (loss(row, swapped, gram), swapped))
    return best


@pytest.fixture(params=[(16, 2**21), (1, 2**21), (2, 20)], ids=["usual", "short", "split"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the shortlist doesn't suffice, and where memory allows only a few pairs at once."""
    monkeypatch.setattr(swaps, "SHORTLIST", request.param[0])
    monkeypatch.setattr(swaps, "ELEMENTS", request.param[1])


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("group", [None, 4])
@pytest.mark.parametrize(("seed", "factors"), [(0, 3), (1, 1), (2, 12)])
def test_every_round_makes_the_best_swap_of_each_row(group: int | None, seed: int, factors: int) -> None:
    weight, mask, gram = problem(4, 12, seed, factors)
    for rounds in range(1, 4):
        refined = refine(weight, mask, gram, rounds, group)
        for row, before, after in zip(weight, mask.tolist(), refined.tolist(), strict=True):
            keep = before
            for _ in range(rounds):
                _, keep = best_swap(row, keep, gram, group)
            assert after == keep


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("group", [None, 4])
def test_it_ends_where_no_swap_improves_a_row(group: int | None) -> None:
    weight, mask, gram = problem(5, 12)
    refined = refine(weight, mask, gram, 1000, group)
    assert torch.equal(refine(weight, refined, gram, 5, group), refined)
    for row, keep in zip(weight, refined.tolist(), strict=True):
        reached = loss(row, keep, gram)
        assert best_swap(row, keep, gram, group)[0] >= reached * (1 - 1e-5)


def test_the_best_pair_is_found_among_many() -> None:
    weight, mask, gram = problem(3, 90, factors=5)
    refined = refine(weight, mask, gram, 1)
    for row, before, after in zip(weight.double(), mask, refined, strict=True):
        lost = row * ~before
        swapped = {}
        for u in (~before).nonzero().flatten().tolist():
            for p in before.nonzero().flatten().tolist():
                new = lost.clone()
                new[u], new[p] = 0, row[p]
                swapped[u, p] = float(new @ gram.double() @ new)
        u, p = min(swapped, key=lambda pair: swapped[pair])
        assert (before ^ after).nonzero().flatten().tolist() == sorted((u, p))
        assert after[u]


@pytest.mark.parametrize("group", [None, 6])
def test_the_loss_never_rises_and_rows_keep_as_many(group: int | None) -> None:
    weight, mask, gram = problem(20, 60, factors=8)
    mask[0], mask[1] = True, False
    losses = [row_losses(weight, mask, gram)]
    for rounds in (1, 2, 5, 20, 60):
        refined = refine(weight, mask, gram, rounds, group)
        assert torch.equal(refined.sum(1), mask.sum(1))
        if group is not None:
            assert torch.equal(refined.view(20, -1, group).sum(2), mask.view(20, -1, group).sum(2))
        losses.append(row_losses(weight, refined, gram))
        assert (losses[-1] <= losses[-2] * (1 + 1e-5)).all()
    assert losses[-1].sum() < 0.8 * losses[0].sum()


def test_a_pattern_stays_a_pattern() -> None:
    weight, _, gram = problem(10, 64)
    mask = keep_n_of_m(weight.abs(), 2, 4)
    refined = refine(weight, mask, gram, 50, 4)
    assert (refined.view(10, 16, 4).sum(2) == 2).all()
    assert row_losses(weight, refined, gram).sum() < row_losses(weight, mask, gram).sum()
    with pytest.raises(ValueError, match="groups of 5"):
        refine(weight, mask, gram, 1, 5)


def test_row_losses() -> None:
    weight, mask, gram = problem(4, 10)
    expected = [loss(row, keep, gram) for row, keep in zip(weight, mask.tolist(), strict=True)]
    torch.testing.assert_close(row_losses(weight, mask, gram).double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)


def test_uncorrelated_inputs_keep_the_largest_and_dead_ones_nothing() -> None:
    weight, mask, _ = problem(6, 16)
    gram = torch.eye(16)
    gram[3, 3] = 0
    mask[:, 3] = True
    refined = refine(weight, mask, gram, 100)
    size = weight.abs() * gram.diagonal()
    assert not refined[:, 3].any()
    for row, kept in zip(size, refined, strict=True):
        assert row[kept].min() > row[~kept].max()
    assert torch.equal(refine(weight, mask, torch.zeros(16, 16), 3), mask)


def test_arguments_are_left_as_they_were() -> None:
    weight, mask, gram = problem(4, 16)
    before = weight.clone(), mask.clone(), gram.clone()
    assert torch.equal(refine(weight, mask, gram, 0), mask)
    assert not torch.equal(refine(weight, mask, gram, 5), mask)
    assert torch.equal(weight, before[0])
    assert torch.equal(mask, before[1])
    assert torch.equal(gram, before[2])
