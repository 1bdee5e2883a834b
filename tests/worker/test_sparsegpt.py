"""SparseGPT against its formulas, written out naively in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worker.pruners.base import Target
from worker.pruners.sparsegpt import factorise, prune


def gram_of(columns: int, tokens: int, seed: int = 0) -> Tensor:
    """The Gram matrix of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) + 2 * torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix * torch.linspace(0.3, 2, columns)
    return x.T @ x / tokens


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def damped(gram: Tensor, damping: float = 0.01) -> Tensor:
    """H in float64."""
    h = gram.double()
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def removal_cost(w: float, h: Tensor, column: int) -> float:
    """w² / [H⁻¹]_cc once all columns to the left are settled, so with the inverse of what is left of H."""
    return w * w / float(torch.linalg.inv(h[column:, column:])[0, 0])


def remove(row: Tensor, h: Tensor, column: int) -> Tensor:
    """Optimal brain surgeon: w - w_c / [H⁻¹]_cc · [H⁻¹]_c: on the columns from c on."""
    inverse = torch.linalg.inv(h[column:, column:])
    row = row.clone()
    row[column:] -= row[column] / inverse[0, 0] * inverse[:, 0]
    row[column] = 0
    return row


def naive_fraction(weight: Tensor, gram: Tensor, fraction: float, block_size: int) -> Tensor:
    h, w = damped(gram), weight.double()
    rows, columns = w.shape
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        costs = sorted((removal_cost(float(w[row, column]), h, column), row, column) for row in range(rows) for column in range(start, end))
        gone = {(row, column) for _, row, column in costs[: round(rows * end * fraction) - round(rows * start * fraction)]}
        for row in range(rows):
            for column in range(start, end):
                if (row, column) in gone:
                    w[row] = remove(w[row], h, column)
    return w


def naive_pattern(weight: Tensor, gram: Tensor, n: int, m: int) -> Tensor:
    h, w = damped(gram), weight.double()
    for row in range(len(w)):
        for start in range(0, w.shape[1], m):
            costs = sorted((removal_cost(float(w[row, column]), h, column), column) for column in range(start, start + m))
            for column in sorted(column for _, column in costs[: m - n]):
                w[row] = remove(w[row], h, column)
    return w


def output_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """(W - W') G (W - W')ᵀ, summed over rows."""
    difference = (weight - pruned).double()
    return float((difference @ gram.double() * difference).sum())


@pytest.mark.parametrize(("columns", "block_size", "fraction"), [(12, 128, 0.5), (12, 4, 0.5), (22, 8, 0.3), (70, 64, 0.75)])
def test_a_fraction_goes_as_the_formulas_say(columns: int, block_size: int, fraction: float) -> None:
    weight, gram = weights(5, columns), gram_of(columns, 4 * columns)
    pruned, mask = prune(weight, factorise(gram), Target(fraction), block_size)
    expected = naive_fraction(weight, gram, fraction, block_size)
    assert torch.equal(mask, expected != 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("pattern", "block_size"), [((2, 4), 128), ((2, 4), 8), ((1, 2), 5), ((3, 6), 8), ((3, 6), 4)])
def test_a_pattern_goes_as_the_formulas_say(pattern: tuple[int, int], block_size: int) -> None:
    weight, gram = weights(4, 24), gram_of(24, 100)
    pruned, mask = prune(weight, factorise(gram), Target(1 - pattern[0] / pattern[1], pattern), block_size)
    expected = naive_pattern(weight, gram, *pattern)
    assert torch.equal(mask, expected != 0)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3), (5, 48)])
def test_every_group_of_m_keeps_n(n: int, m: int) -> None:
    for weight in (weights(6, 144), torch.ones(6, 144)):
        pruned, mask = prune(weight, factorise(gram_of(144, 300)), Target(1 - n / m, (n, m)), block_size=64)
        assert (mask.view(6, -1, m).sum(2) == n).all()
        assert not pruned[~mask].any()
    with pytest.raises(ValueError, match="groups of 5"):
        prune(weights(2, 12), factorise(gram_of(12, 40)), Target(0.4, (3, 5)))


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    gram = gram_of(20, 100)
    factor = factorise(gram, 0.05)
    upper = factor.upper.double()
    torch.testing.assert_close(upper, upper.triu(), rtol=0, atol=0)
    torch.testing.assert_close(upper.T @ upper @ damped(gram, 0.05), torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-3)
    assert (upper.diagonal() > 0).all()
    assert factor.damping == 0.05
    assert not factor.dead.any()


def test_uncorrelated_inputs_leave_magnitude_within_blocks_and_no_update() -> None:
    weight = weights(6, 20)
    pruned, mask = prune(weight, factorise(torch.eye(20) * 7), Target(0.5), block_size=8)
    for columns in (slice(0, 8), slice(8, 16), slice(16, 20)):
        size = weight[:, columns].abs()
        assert mask[:, columns].sum() == size.numel() / 2
        assert size[mask[:, columns]].min() > size[~mask[:, columns]].max()
    assert torch.equal(pruned, torch.where(mask, weight, 0))


@pytest.mark.parametrize("fraction", [0.1, 1 / 3, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("equal", [True, False])
def test_exactly_the_fraction_goes(fraction: float, equal: bool) -> None:
    weight = torch.ones(7, 45) if equal else weights(7, 45)
    gram = torch.eye(45) if equal else gram_of(45, 90)
    pruned, mask = prune(weight, factorise(gram), Target(fraction), block_size=16)
    assert (~mask).sum() == round(7 * 45 * fraction)
    assert not pruned[~mask].any()
    assert pruned[mask].all()


def test_dead_inputs_lose_their_weights_first_and_change_nothing_else() -> None:
    living = [0, 1, 3, 4, 6, 7, 8, 9]
    weight, gram = weights(5, 10), torch.zeros(10, 10)
    gram[torch.tensor(living)[:, None], torch.tensor(living)] = gram_of(8, 40) * 1e-6  # a dead input's 1 mustn't count for the damping
    factor = factorise(gram)
    assert factor.dead.nonzero().flatten().tolist() == [2, 5]
    pruned, mask = prune(weight, factor, Target(0.5))
    assert not mask[:, [2, 5]].any()
    alone, alone_mask = prune(weight[:, living], factorise(gram[living][:, living]), Target(15 / 40))
    assert torch.equal(mask[:, living], alone_mask)
    torch.testing.assert_close(pruned[:, living], alone)
    lightly, mask = prune(weight, factor, Target(0.04))
    assert not lightly[:, [2, 5]].any()
    assert (~mask).sum() == 2
    nothing, _ = prune(weight, factorise(torch.zeros(10, 10)), Target(0.5))
    assert not nothing.any()


def test_fewer_tokens_than_inputs_raise_the_damping() -> None:
    weight, gram = weights(6, 40), gram_of(40, 6)
    factor = factorise(gram, 1e-9)
    assert 1e-9 < factor.damping <= 0.01
    pruned, mask = prune(weight, factor, Target(0.5))
    assert pruned.isfinite().all()
    assert (~mask).sum() == 120
    assert output_error(weight, pruned, gram) < 0.9 * output_error(weight, weight * mask, gram)
    enough = factorise(gram)
    assert enough.damping == 0.01
    torch.testing.assert_close((enough.upper.T @ enough.upper).double(), torch.linalg.inv(damped(gram)), rtol=1e-3, atol=1e-3)
    assert factorise(torch.ones(8, 8), 0).damping > 0
    assert factorise(torch.eye(8), 0).damping == 0
    with pytest.raises(ValueError, match="not positive definite"):
        factorise(torch.tensor([[1.0, 9.0], [9.0, 1.0]]))
    with pytest.raises(ValueError, match="not finite"):
        factorise(torch.tensor([[1.0, torch.inf], [torch.inf, 1.0]]))


@pytest.mark.parametrize("target", [Target(0.5), Target(0.5, (2, 4))])
def test_the_update_lowers_the_output_error(target: Target) -> None:
    weight, gram = weights(16, 64), gram_of(64, 400)
    pruned, mask = prune(weight, factorise(gram), target)
    assert output_error(weight, pruned, gram) < 0.9 * output_error(weight, weight * mask, gram)


@pytest.mark.parametrize("target", [Target(0.5), Target(0.5, (2, 4))])
def test_arguments_are_left_as_they_were(target: Target) -> None:
    weight, gram = weights(4, 16), gram_of(16, 8)
    gram[3] = gram[:, 3] = 0
    before = weight.clone(), gram.clone()
    factor = factorise(gram, 1e-9)
    upper = factor.upper.clone()
    prune(weight, factor, target)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])
    assert torch.equal(factor.upper, upper)
