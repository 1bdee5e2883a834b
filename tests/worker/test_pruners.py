"""The maths of each method, against values worked out independently."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from app.architecture import ARCHITECTURES
from app.recipe import FLAP, METHODS, MethodName
from worker.calibration import InputStatistics, Statistic
from worker.pruners import PRUNERS, cfsp, flap, magnitude, wanda
from worker.pruners.base import MaskPruner, StructuredPruner, Target


def test_every_method_has_a_config_facts_and_a_pruner() -> None:
    assert set(PRUNERS) == set(METHODS) == set(get_args(MethodName))
    for name, (config, facts) in METHODS.items():
        assert config.model_fields["name"].default == name
        assert set(facts.model_types) <= set(ARCHITECTURES)
        assert isinstance(PRUNERS[name], StructuredPruner if facts.structured else MaskPruner)


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


DOWN = torch.tensor([[1.0, -2.0, 1.0], [3.0, 1.0, 0.0]])  # (D, I) = (2, 3)
UP = torch.tensor([[1.0, 2.0], [0.5, 0.1], [4.0, -4.0]])  # (I, D)
GATE = torch.tensor([[2.0, 2.0], [1.0, -3.0], [0.2, 0.3]])
NORM = torch.tensor([1.0, 2.0, 3.0])


def test_the_papers_fine_importance() -> None:
    # |Wd|·n = [[1, 4, 3], [3, 2, 0]]; each row over its sum: [1/8, 4/8, 3/8] and [3/5, 2/5, 0]
    expected = torch.tensor([1 / 8 + 3 / 5, 4 / 8 + 2 / 5, 3 / 8])
    torch.testing.assert_close(cfsp.fine_importance(DOWN, (UP, GATE), NORM, "paper"), expected)


def test_the_combined_fine_importance() -> None:
    root = math.sqrt
    down = [1 / root(26) + 3 / root(13), 4 / root(26) + 2 / root(13), 3 / root(26)]
    up = [3 / root(5), 0.6 / root(0.26), 8 / root(32)]
    gate = [4 / root(8), 4 / root(10), 0.5 / root(0.13)]
    expected = torch.tensor([(d + u + g) * n for d, u, g, n in zip(down, up, gate, NORM.tolist(), strict=True)])
    torch.testing.assert_close(cfsp.fine_importance(DOWN, (UP, GATE), NORM, "combined"), expected)


def test_the_released_codes_fine_importance_is_the_activation_norm() -> None:
    # as released: every term is normalised over its own channel before the mean over the hidden dimension
    wd, wu, wg = DOWN.abs().T * NORM[:, None], UP.abs(), GATE.abs()
    released = sum(part / part.sum(1, keepdim=True) for part in (wd, wu, wg)).mean(1) * NORM  # type: ignore[union-attr]  # sum() may give 0
    ours = cfsp.fine_importance(DOWN, (UP, GATE), NORM, "code")
    torch.testing.assert_close(ours / ours.sum(), released / released.sum())


def test_a_matrix_without_a_gate_is_scored_by_what_it_has() -> None:
    down = torch.tensor([1 / math.sqrt(26) + 3 / math.sqrt(13), 4 / math.sqrt(26) + 2 / math.sqrt(13), 3 / math.sqrt(26)])
    torch.testing.assert_close(cfsp.fine_importance(DOWN, (), NORM, "combined"), down * NORM)


# ----------------------------------------------------------------------- FLAP


def measured(batches: list[torch.Tensor], *wanted: Statistic) -> InputStatistics:
    statistics = InputStatistics(batches[0].shape[-1], torch.device("cpu"), frozenset(wanted))
    for batch in batches:
        statistics.update(batch)
    return statistics


BATCHES = [torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(seed)) + torch.tensor([0.0, 100.0, -3.0]) for seed in range(3)]


def test_flaps_scores_are_its_formulas() -> None:
    rows = torch.cat([batch.flatten(0, 1) for batch in BATCHES]).double()
    statistics = measured(BATCHES, "variance", "norm")
    variance = rows.var(dim=0)
    torch.testing.assert_close(flap.score(DOWN, statistics, FLAP(metric="ifv")), variance.float())
    torch.testing.assert_close(flap.score(DOWN, statistics, FLAP()), (variance * torch.tensor([10.0, 5.0, 1.0])).float())
    norm = rows.square().mean(0).sqrt()
    torch.testing.assert_close(flap.score(DOWN, statistics, FLAP(metric="wifn")), (norm * torch.tensor([2.0, 1.5, 0.5])).float())


def test_flaps_released_fluctuation_forgets_the_first_sequence() -> None:
    """The released loop, sequence by sequence, with its alias: both factors are deviations from the mean that has been updated."""
    baseline, fluctuation = torch.zeros(3).double(), torch.zeros(3).double()
    for seen, sequence in enumerate(torch.cat(BATCHES).double()):
        alias = baseline
        baseline *= seen / (seen + 1)
        baseline += sequence.mean(0) / (seen + 1)
        if seen == 0:
            fluctuation = torch.zeros(3).double()
        else:
            fluctuation *= (seen - 1) / seen
            fluctuation += ((sequence - baseline) * (sequence - alias)).sum(0) / (seen + 1)
    released = flap.score(DOWN, measured(BATCHES, "fluctuation"), FLAP(metric="ifv", mode="code"))
    torch.testing.assert_close(released, fluctuation.float(), rtol=1e-4, atol=1e-4)
    alone = measured([BATCHES[0][:1]], "fluctuation")
    assert alone.fluctuation.tolist() == [1.0, 1.0, 1.0]  # nothing is known of a single sequence


def test_compensation_gives_back_what_removed_inputs_gave_on_average() -> None:
    rows = torch.cat([batch.flatten(0, 1) for batch in BATCHES])
    keep = torch.tensor([True, False, True])
    bias = flap.compensation(DOWN, DOWN[:, keep], measured(BATCHES, "variance").mean, keep)
    lost = (rows @ DOWN.T - rows[:, keep] @ DOWN[:, keep].T).mean(0)
    torch.testing.assert_close(bias, lost, rtol=1e-4, atol=1e-3)


# ----------------------------------------------------------------- statistics


def test_statistics_are_those_of_all_tokens_together() -> None:
    rows = torch.cat([batch.flatten(0, 1) for batch in BATCHES]).double()
    statistics = measured(BATCHES, "norm", "variance", "gram")
    assert statistics.tokens == 30
    torch.testing.assert_close(statistics.norm, rows.square().mean(0).sqrt().float())
    torch.testing.assert_close(statistics.mean, rows.mean(0).float())
    torch.testing.assert_close(statistics.variance, rows.var(0).float())
    torch.testing.assert_close(statistics.gram, (rows.T @ rows / 30).float())


def test_halves_are_of_the_first_and_the_last_tokens_of_each_batch() -> None:
    halves = [torch.cat([batch.flatten(0, 1).tensor_split(2)[number] for batch in BATCHES]).double() for number in range(2)]
    statistics = measured(BATCHES, "halves")
    sums, tokens = statistics.halves
    assert tokens == [len(half) for half in halves]
    torch.testing.assert_close(sums, torch.stack([half.T @ half for half in halves]).float())
    torch.testing.assert_close(statistics.gram, measured(BATCHES, "gram").gram)


def test_a_linear_that_no_token_reached_is_judged_by_its_weights() -> None:
    statistics = measured([torch.empty(0, 4)], "norm", "variance", "gram", "fluctuation")
    assert statistics.norm.tolist() == statistics.variance.tolist() == statistics.fluctuation.tolist() == [1.0] * 4
    assert torch.equal(statistics.gram, torch.eye(4))
    assert statistics.mean.tolist() == [0.0] * 4
