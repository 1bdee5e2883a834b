"""The kept inputs take over what the removed ones did."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from worker.restoration import RIDGE, RIDGES, SKETCH, best_ridge, choose_inputs, refit


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


@pytest.mark.parametrize(("tokens", "count", "protected"), [(200, 6, None), (200, 6, 0), (200, 1, 3), (12, 4, 1), (200, 10, None)])
def test_what_is_given_up_next_is_what_the_others_make_up_for_best(tokens: int, count: int, protected: int | None) -> None:
    """Each time all that may go are tried, and everything is fitted anew to what the dense linear gives."""
    x, weight = correlated(tokens, 10).double(), weight_of(6, 10).double()
    penalty = 10 / tokens * float(x.square().mean())
    may_go = torch.ones(10, dtype=torch.bool)
    if protected is not None:
        may_go[protected] = False

    def error(gone: list[int]) -> float:
        """The least ‖(W - W') x‖² / tokens + penalty · ‖W - W'‖² of those W' that have zeros where inputs are gone."""
        keep = torch.ones(10, dtype=torch.bool)
        keep[gone] = False
        new = torch.zeros_like(weight)
        new[:, keep] = least_squares(weight, x, keep, penalty)
        return float(((weight - new) @ x.T).square().sum() / tokens + penalty * (weight - new).square().sum())

    gone: list[int] = []
    while len(gone) < 10 - count:
        gone.append(min((number for number in range(10) if number not in {*gone, protected}), key=lambda number: error([*gone, number])))
    kept = choose_inputs(weight.float(), gram_of(x), may_go, count, tokens)
    assert (~kept).nonzero().flatten().tolist() == sorted(gone)


def test_of_two_copies_one_goes_however_large() -> None:
    x = torch.randn(400, 4, generator=torch.Generator().manual_seed(2)) * torch.tensor([9.0, 1.0, 1.0, 1.0])
    x = torch.cat([x, x[:, :1]], dim=1)  # input 4 is input 0
    kept = choose_inputs(weight_of(3, 5), gram_of(x), torch.ones(5, dtype=torch.bool), 4, 10**9)
    assert kept.tolist() in ([False, True, True, True, True], [True, True, True, True, False])


def test_inputs_that_are_always_zero_go_first() -> None:
    x, weight = correlated(200, 10), weight_of(6, 10)
    x[:, 7:] = 0
    may_go = torch.arange(10) > 1
    assert choose_inputs(weight, gram_of(x), may_go, 7, 10**9).tolist() == [True] * 7 + [False] * 3
    assert choose_inputs(weight, torch.zeros(10, 10), may_go, 4, 0).tolist() == [True] * 4 + [False] * 6
    assert choose_inputs(weight, torch.zeros(10, 10), may_go, 10, 0).all()


def halves_of(x: Tensor) -> tuple[Tensor, list[int]]:
    parts = x.double().tensor_split(2)
    return torch.stack([part.T @ part for part in parts]).float(), [len(part) for part in parts]


def error_unseen(weight: Tensor, x: Tensor, keep: Tensor, ridge: float) -> float:
    """The squared error of a fit on each half on the tokens of the other."""
    error = 0.0
    first, last = x.tensor_split(2)
    for seen, unseen in ((first, last), (last, first)):
        penalty = ridge * int(keep.sum()) / len(seen) * float(seen.double().square().mean())
        error += float((unseen.double() @ weight.double().T - unseen[:, keep].double() @ least_squares(weight, seen, keep, penalty).T).square().sum())
    return error


def partly_common(tokens: int, common: float) -> Tensor:
    """(tokens, 40) activations, of which this share of the size is a mixture of four causes."""
    generator = torch.Generator().manual_seed(5)
    causes = torch.randn(tokens, 4, generator=generator) @ torch.randn(4, 40, generator=generator)
    return common * causes + (1 - common) * torch.randn(tokens, 40, generator=generator)


def test_the_best_ridge_is_the_one_that_errs_least_on_the_other_half() -> None:
    keep = torch.arange(40) % 4 != 0
    found = []
    for common in (0.05, 0.2, 0.5, 0.8):
        x, weight = partly_common(100, common), weight_of(8, 40)
        errors = [error_unseen(weight, x, keep, ridge) for ridge in RIDGES]
        found.append(best_ridge(weight, *halves_of(x), keep))
        assert found[-1] == RIDGES[errors.index(min(errors))]
    assert found == sorted(found, reverse=True)  # the less the kept inputs know of the removed ones, the more is noise
    assert len(set(found)) > 2


def test_random_sums_of_many_outputs_find_a_ridge_that_is_hardly_worse_than_the_best() -> None:
    x, weight, keep = partly_common(100, 0.4), weight_of(4 * SKETCH, 40), torch.arange(40) % 4 != 0
    errors = {ridge: error_unseen(weight, x, keep, ridge) for ridge in RIDGES}
    found = errors[best_ridge(weight, *halves_of(x), keep)]
    assert found <= 1.01 * min(errors.values()) < 0.9 * max(errors.values())


def test_without_text_in_both_halves_the_ridge_is_a_fixed_one() -> None:
    x, weight = correlated(1, 10), weight_of(6, 10)
    assert best_ridge(weight, *halves_of(x), KEEP) == RIDGE
    assert best_ridge(weight, *halves_of(correlated(50, 10)), torch.ones(10, dtype=torch.bool)) == RIDGE
    assert best_ridge(weight, *halves_of(torch.zeros(50, 10)), KEEP) == RIDGE
    with pytest.raises(ValueError, match="not finite"):
        best_ridge(weight, torch.full((2, 10, 10), torch.nan), [50, 50], KEEP)


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
    choose_inputs(weight, gram, torch.ones(10, dtype=torch.bool), 5, 50)
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
