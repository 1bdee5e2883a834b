"""The kept inputs take over what the removed ones did."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worker.restoration import refit


def correlated(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    """(tokens, inputs) activations of very different sizes that explain one another in part."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, inputs // 2, generator=generator) @ torch.randn(inputs // 2, inputs, generator=generator)
    own = torch.randn(tokens, inputs, generator=generator)
    return (common + own) * torch.logspace(-1, 1, inputs)


def gram_of(x: Tensor) -> Tensor:
    return (x.double().T @ x.double() / len(x)).float()


def weight_of(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))


KEEP = torch.tensor([True, False, True, True, False, True, True, False, True, True])


def least_squares(weight: Tensor, x: Tensor, keep: Tensor, penalty: float, besides: Tensor | float = 0.0) -> Tensor:
    """argmin ‖W x + besides - W' x_K‖² / tokens + penalty · ‖W' - W_K‖², as one least-squares problem with extra rows, in float64."""
    x, weight = x.double(), weight.double()
    kept = x[:, keep] / len(x) ** 0.5
    rows = torch.cat([kept, penalty**0.5 * torch.eye(kept.shape[1], dtype=torch.float64)])
    values = torch.cat([(x @ weight.T + besides) / len(x) ** 0.5, penalty**0.5 * weight[:, keep].T])
    solution: Tensor = torch.linalg.lstsq(rows, values).solution
    return solution.T


@pytest.mark.parametrize("ridge", [0.0, 0.5, 3.0, 50.0])
def test_refit_solves_the_penalised_least_squares_problem(ridge: float) -> None:
    x, weight = correlated(200, 10), weight_of(6, 10)
    penalty = ridge * 7 / 200 * float(x.double().square().mean())
    torch.testing.assert_close(refit(weight, gram_of(x), KEEP, 200, ridge).double(), least_squares(weight, x, KEEP, penalty), rtol=1e-3, atol=1e-3)


def test_what_should_come_out_besides_is_fitted_too() -> None:
    x, weight = correlated(200, 10), weight_of(6, 10)
    besides = (x[:, :4] @ torch.randn(4, 6, generator=torch.Generator().manual_seed(3)) + torch.randn(200, 6)).double()
    more = (besides.T @ x.double() / 200).float()
    penalty = 0.5 * 7 / 200 * float(x.double().square().mean())
    restored = refit(weight, gram_of(x), KEEP, 200, 0.5, more)
    torch.testing.assert_close(restored.double(), least_squares(weight, x, KEEP, penalty, besides), rtol=1e-3, atol=1e-3)


def test_whole_groups_of_inputs_can_go() -> None:
    x, weight = correlated(300, 12), weight_of(5, 12)
    keep = torch.tensor([True, False, True]).repeat_interleave(4)  # three heads of size 4
    penalty = 2.0 * 8 / 300 * float(x.double().square().mean())
    restored = refit(weight, gram_of(x), keep, 300, 2.0)
    torch.testing.assert_close(restored.double(), least_squares(weight, x, keep, penalty), rtol=1e-3, atol=1e-3)
    missing = (x @ weight.T - x[:, keep] @ weight[:, keep].T).square().sum()
    assert (x @ weight.T - x[:, keep] @ restored.T).square().sum() < 0.9 * missing


def test_a_copy_of_a_removed_input_takes_its_weight() -> None:
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(2))
    x = torch.cat([x, x[:, :1]], dim=1)  # input 4 is input 0
    weight = weight_of(3, 5)
    restored = refit(weight, gram_of(x), torch.tensor([False, True, True, True, True]), 400, ridge=0.0)
    expected = weight[:, 1:].clone()
    expected[:, 3] += weight[:, 0]
    torch.testing.assert_close(restored, expected, rtol=1e-4, atol=1e-4)


def test_uncorrelated_inputs_leave_the_weights_as_they_are() -> None:
    weight = weight_of(6, 10)
    assert torch.equal(refit(weight, torch.diag(torch.arange(1.0, 11.0)), KEEP, 100), weight[:, KEEP])


def test_the_fewer_tokens_the_less_changes() -> None:
    x, weight = correlated(400, 10), weight_of(6, 10)
    changes = [float((refit(weight, gram_of(x), KEEP, tokens) - weight[:, KEEP]).norm()) for tokens in (400, 40, 4, 0)]
    assert changes == sorted(changes, reverse=True)
    assert changes[-1] < 0.2 * changes[0]


def test_an_expert_without_tokens_and_a_complete_mask_change_nothing() -> None:
    weight, gram = weight_of(6, 10), gram_of(correlated(50, 10))
    assert torch.equal(refit(weight, torch.zeros(10, 10), KEEP, 0), weight[:, KEEP])
    assert torch.equal(refit(weight, gram, torch.ones(10, dtype=torch.bool), 50), weight)
    assert refit(weight, gram, torch.zeros(10, dtype=torch.bool), 50).shape == (6, 0)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    x, weight = correlated(200, 10), weight_of(6, 10)
    x[:, :3] = 0
    restored = refit(weight, gram_of(x), KEEP, 200, ridge=0.0)
    assert torch.equal(restored[:, :2], weight[:, KEEP][:, :2])
    alive = torch.arange(10) > 2
    torch.testing.assert_close(restored[:, 2:].double(), least_squares(weight[:, alive], x[:, alive], KEEP[alive], 0.0), rtol=1e-2, atol=1e-2)


def test_fewer_tokens_than_inputs_and_no_ridge_is_solved_all_the_same() -> None:
    x, weight = correlated(5, 10), weight_of(6, 10)
    restored = refit(weight, gram_of(x), KEEP, 5, ridge=0.0)
    assert restored.isfinite().all()
    torch.testing.assert_close(x[:, KEEP] @ restored.T, x @ weight.T, rtol=0.02, atol=0.05 * float((x @ weight.T).abs().max()))


def test_the_gram_matrix_and_the_weight_are_left_as_they_are() -> None:
    weight, gram = weight_of(6, 10), gram_of(correlated(50, 10))
    before = weight.clone(), gram.clone()
    refit(weight, gram, KEEP, 50)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])


def test_what_is_no_gram_matrix_is_refused() -> None:
    weight = weight_of(6, 10)
    with pytest.raises(ValueError, match="not finite"):
        refit(weight, torch.full((10, 10), torch.nan), KEEP, 50)
    indefinite = torch.eye(10)
    indefinite[0, 2] = indefinite[2, 0] = 1e9
    with pytest.raises(ValueError, match="not positive semidefinite"):
        refit(weight, indefinite, KEEP, 50)
