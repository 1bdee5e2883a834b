"""Bonsai's maths against plain loops, normal equations and torch's own optimiser."""

from __future__ import annotations

import itertools
import math
from typing import NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worker.calibration import InputStatistics
from worker.pruners import bonsai
from worker.pruners.bonsai import (
    candidates,
    draw_masks,
    fit,
    fit_released,
    kendall_tau,
    likeliest_variances,
    round_fraction,
    sampling,
    score,
    select,
    select_local,
    stable,
    utility,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------- priors


@pytest.mark.parametrize(("kind", "expected"), [("wanda", [2.5 * 2, 1.5 * 3, 0.5]), ("activation", [2, 3, 1]), ("magnitude", [2.5, 1.5, 0.5])])
def test_priors_of_a_linears_inputs(kind: str, expected: list[float]) -> None:
    weight = torch.tensor([[1.0, -3.0, 0.0], [-4.0, 0.0, 1.0]])
    inputs = InputStatistics(3, torch.device("cpu"), frozenset({"norm"}))
    for row in ([2.0, -3.0, 1.0], [-2.0, 3.0, 1.0]):
        inputs.update(torch.tensor([[row]]))
    assert score(weight, inputs, kind).tolist() == pytest.approx(expected)
    weight[0, 0] = math.inf
    assert score(weight, inputs, kind).tolist() == (pytest.approx(expected) if kind == "activation" else [0, 0, 0])


def test_expected_worth_is_parameters_times_the_share_of_the_module_s_units_with_a_smaller_prior() -> None:
    priors = [torch.tensor([1.0, 3.0, 90.0]), torch.tensor([400.0, 200.0]), torch.zeros(2), torch.zeros(0), torch.tensor([5.0, 0.0, 5.0, 7.0])]
    found = bonsai.expected_worth(priors, [6, 100, 100, 100, 8])
    expected = [[1.0, 3.0, 5.0], [75.0, 25.0], [50.0, 50.0], [], [4.0, 1.0, 4.0, 7.0]]
    assert [worth.tolist() for worth in found] == [pytest.approx(values) for values in expected]


def test_relative_worth_is_that_on_average_in_the_proportions_of_the_prior() -> None:
    expected = [torch.tensor([1.0, 3.0, 5.0]).double(), torch.tensor([2.0, 2.0]).double(), torch.tensor([3.0, 4.0]).double(), torch.zeros(0).double()]
    priors = [torch.tensor([1.0, 3.0, 90.0]), torch.zeros(2), torch.tensor([1.0, 2.0]), torch.zeros(0)]
    chosen = [torch.tensor(which, dtype=torch.bool) for which in ([1, 1, 0], [1, 1], [0, 0], [])]
    found = bonsai.relative_worth(expected, priors, chosen)
    assert [worth.tolist() for worth in found] == [[1.0, 3.0, 90.0], [2.0, 2.0], [3.0, 4.0], []]


# ------------------------------------------------------------- drawing masks


@pytest.mark.parametrize(("units", "fixed"), [(1, 0), (3, 2), (9, 8), (10, 9), (32, 28), (1536, 1382)])
def test_candidates_are_the_units_below_the_released_top_set(units: int, fixed: int) -> None:
    prior = torch.rand(units, generator=seeded())
    candidate = candidates(prior, 0.05)
    values = prior.tolist()
    assert candidate.tolist() == [sum(other > one for other in values) >= fixed for one in values]
    assert candidates(prior, 0.5).all()


def test_a_unit_is_drawn_in_proportion_to_what_it_lacks() -> None:
    prior = torch.tensor([1.0, 5.0, 3.0, 2.0])
    assert sampling(prior, torch.tensor([True, False, True, True])).tolist() == pytest.approx([4 / 9, 0, 2 / 9, 3 / 9])
    assert sampling(torch.ones(3), torch.tensor([False, True, True])).tolist() == [0, 0.5, 0.5]
    assert sampling(torch.tensor([7.0]), torch.tensor([True])).tolist() == [1]
    assert sampling(torch.tensor([7.0]), torch.tensor([False])).tolist() == [0]
    assert sampling(torch.zeros(0), torch.zeros(0, dtype=torch.bool)).tolist() == []


@given(data=st.data(), released=st.booleans())
@settings(deadline=None, max_examples=60)
def test_masks_spare_fixed_units_and_pairs_divide_the_candidates(data: st.DataObject, released: bool) -> None:
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    fraction = data.draw(st.floats(0.01, 0.6))
    seed = data.draw(st.integers(0, 1000))
    priors = [torch.randint(0, 4, (size,), generator=seeded(seed + size)).float() for size in sizes]
    chosen = [candidates(prior, fraction) for prior in priors]
    drawn = [sampling(prior, candidate) for prior, candidate in zip(priors, chosen, strict=True)]
    masks = draw_masks(drawn, chosen, fraction, 4, seeded(seed), released)
    assert masks.shape == (8, sum(sizes))
    assert masks.dtype == torch.bool
    assert torch.equal(masks, draw_masks(drawn, chosen, fraction, 4, seeded(seed), released))
    candidate = torch.cat(chosen)
    assert masks[:, ~candidate].all()
    for one, other, which in zip(masks[::2].split(sizes, dim=1), masks[1::2].split(sizes, dim=1), chosen, strict=True):
        parted = (one ^ other)[:, which]
        assert (parted.all(dim=1) | (~parted.any(dim=1) & ~torch.tensor(released) & one.all(dim=1) & other.all(dim=1))).all()
    if released:
        for of_module, which in zip(masks[::2].split(sizes, dim=1), chosen, strict=True):
            assert (~of_module).sum(dim=1).tolist() == [min(int(fraction * len(which)) + 1, int(which.sum()))] * 4


def test_draws_without_replacement_follow_the_probabilities() -> None:
    probability = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    masks = draw_masks([probability], [torch.tensor([True, True, True, False])], 0.25, 20000, seeded(), released=True)
    drawn = (~masks[::2]).double().mean(dim=0)
    expected = [0.0] * 4
    for first, second in itertools.permutations(range(3), 2):  # int(0.25 · 4) + 1 = 2 draws
        chance = float(probability[first] * probability[second] / (1 - probability[first]))
        expected[first] += chance
        expected[second] += chance
    assert drawn.tolist() == pytest.approx(expected, abs=0.01)


def test_only_released_masks_tie_modules_together() -> None:
    single = [torch.tensor([True, False, False])] * 6  # six modules with one candidate each
    probability = [torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)] * 6
    released = draw_masks(probability, single, 0.05, 40, seeded(), released=True)[:, ::3]
    assert (released == released[:, :1]).all()
    masks = draw_masks(probability, single, 0.05, 40, seeded())[:, ::3]
    assert torch.linalg.matrix_rank(masks.double() - 0.5) == 6


def test_what_a_pair_differs_in_tells_what_each_kind_is_worth() -> None:
    modules, kinds = 20, [0, 1] * 10
    chosen = [torch.ones(6, dtype=torch.bool)] * modules
    uniform = [torch.full((6,), 1 / 6, dtype=torch.float64)] * modules
    masks = draw_masks(uniform, chosen, 0.5, 4000, seeded(), kinds=kinds)
    differences = (masks[1::2].double() - masks[::2].double()).view(4000, modules, 6).sum(dim=2)  # (pairs, modules)
    of_kinds = torch.stack([differences[:, kind::2].sum(dim=1) for kind in (0, 1)])
    assert differences.mean(dim=0).abs().max() < 0.3
    assert (of_kinds.var(dim=1) / differences.var(dim=0).view(10, 2).sum(dim=0)).min() > 2  # 1 if modules were drawn one by one
    assert abs(float(torch.corrcoef(of_kinds)[0, 1])) < 0.06


def test_a_module_with_few_units_loses_the_share_of_a_round_on_average() -> None:
    single = torch.tensor([False, False, True])
    masks = draw_masks([single.double()], [single], 0.05, 20_000, seeded())
    assert float((~masks).double().mean()) == pytest.approx(0.05, abs=0.003)


def test_utility_bounds_what_is_broken() -> None:
    perplexity = torch.tensor([1.0, 20.0, 1e12, math.inf, math.nan])
    assert utility(perplexity, released=True).tolist() == [-1, -20, -1e8, -1e8, -1e8]
    assert utility(perplexity).tolist() == pytest.approx([0, -math.log(20)] + [-math.log(1e8)] * 3)


# ------------------------------------------------------------- linear models


def naive_tau(one: list[float], other: list[float]) -> float:
    concordant, untied_one, untied_other = 0, 0, 0
    for i, j in itertools.combinations(range(len(one)), 2):
        a, b = (one[i] > one[j]) - (one[i] < one[j]), (other[i] > other[j]) - (other[i] < other[j])
        concordant, untied_one, untied_other = concordant + a * b, untied_one + a * a, untied_other + b * b
    return concordant / math.sqrt(untied_one * untied_other) if untied_one * untied_other else math.nan


@given(rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
@settings(deadline=None)
def test_kendall_tau_counts_pairs(rows: list[tuple[int, int, int]]) -> None:
    reference, *vectors = (list(map(float, column)) for column in zip(*rows, strict=True))
    taus = kendall_tau(torch.tensor(vectors), torch.tensor(reference))
    assert taus.tolist() == pytest.approx([naive_tau(vector, reference) for vector in vectors], nan_ok=True)


def problem(pairs: int, sizes: tuple[int, ...] = (20, 12, 1, 1), seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Masks, utilities, prior, modules and the true worth of every candidate."""
    generator = seeded(seed)
    modules = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    prior = torch.rand(len(modules), generator=generator, dtype=torch.float64) + 0.2
    of_module = torch.rand(len(sizes), generator=generator, dtype=torch.float64) * 3
    true = prior * (of_module[modules] + torch.rand(len(modules), generator=generator, dtype=torch.float64))
    columns = []
    for size in sizes:  # what a pair shares is drawn for each module alone
        rank = torch.rand(pairs, size, generator=generator, dtype=torch.float64).argsort(dim=1).argsort(dim=1)
        keep = rank >= torch.randint(size + 1, (pairs, 1), generator=generator)
        keep ^= torch.randint(2, (pairs, 1), generator=generator).bool()
        columns.append(torch.stack((keep, ~keep), dim=1).flatten(0, 1))
    masks = torch.cat(columns, dim=1)
    noise = 0.05 * torch.randn(2 * pairs, generator=generator, dtype=torch.float64)
    return masks, masks.double() @ true + noise - 3, prior, modules, true


def test_variances_are_those_under_which_the_utilities_are_likeliest() -> None:
    generator = seeded()
    by_module, units = (torch.randn(24, count, generator=generator, dtype=torch.float64) for count in (20, 40))
    wide, own = torch.full((24, 24), 50.0, dtype=torch.float64), units @ units.T / 40
    modules = by_module @ by_module.T / 20
    noise = torch.randn(24, generator=generator, dtype=torch.float64)
    of_units = torch.randn(40, generator=generator, dtype=torch.float64) / 10
    y = by_module @ torch.tensor([9.0, *[0.4, -0.3, 0.2, 0.5] * 4, 0.1, 0.3, -0.4], dtype=torch.float64) + units @ of_units + 0.3 * noise
    y = y / y.square().mean().sqrt()

    def likelihood(of_parts: Tensor, of_modules: Tensor, of_noise: Tensor) -> float:
        parts = of_parts[0] * modules + of_parts[1] * own
        covariance = wide + parts + (by_module * of_modules) @ by_module.T + of_noise * torch.eye(24, dtype=torch.float64)
        return float(torch.distributions.MultivariateNormal(torch.zeros(24, dtype=torch.float64), covariance).log_prob(y))

    of_parts, of_modules, of_noise = likeliest_variances(y, wide, torch.stack((modules, own)), by_module)
    assert of_modules[0] > 0.3
    assert not of_modules[1:].any()
    best = likelihood(of_parts, of_modules, of_noise)
    assert best > likelihood(of_parts, torch.zeros(20, dtype=torch.float64), of_noise) + 5
    for factor in (0.8, 1.25):
        for part in (0, 1):
            other = of_parts.clone()
            other[part] *= factor
            assert likelihood(other, of_modules, of_noise) <= best + 1e-3
        assert likelihood(of_parts, of_modules * factor, of_noise) <= best + 1e-3
        assert likelihood(of_parts, of_modules, of_noise * factor) <= best + 1e-3


def test_a_module_that_breaks_the_model_does_not_unsettle_the_others() -> None:
    """As in SmolLM2-135M, where one KV group makes nearly all of the variance: the others keep the order of the prior."""
    generator = seeded()
    sizes = torch.tensor([30] * 10 + [1] * 10)
    modules, kinds = torch.arange(20).repeat_interleave(sizes), torch.tensor([0] * 10 + [1] * 10).repeat_interleave(sizes)
    prior = torch.rand(len(modules), generator=generator, dtype=torch.float64) + 0.2
    chosen = [torch.ones(size, dtype=torch.bool) for size in sizes.tolist()]
    masks = draw_masks([mask / mask.sum(dtype=torch.float64) for mask in chosen], chosen, 0.5, 20, generator, kinds=[0] * 10 + [1] * 10)
    true = 0.01 * prior
    breaks = int((modules == 13).nonzero())
    true[breaks] = 2.0
    y = masks.double() @ true + 0.1 * torch.randn(40, generator=generator, dtype=torch.float64)
    weights = fit(masks, y, prior, modules, kinds).weights
    assert float(weights[breaks]) == pytest.approx(2.0, abs=0.2)
    channels = kinds == 0
    assert float(kendall_tau(weights[channels].unsqueeze(0), true[channels])) > 0.7


@pytest.mark.parametrize("earlier_pairs", [0, 3])
def test_weights_are_the_posterior_s_mean_and_what_is_doubted_of_the_module(earlier_pairs: int) -> None:
    """Against the same normal prior written out with one coefficient for the slope, a kind, a module and a unit."""
    masks, y, prior, modules, _ = problem(6)
    kinds, kind_of = (modules > 1).long(), torch.tensor([0, 0, 1, 1])
    generator = seeded()
    earlier = bonsai.Evidence(*(torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((earlier_pairs, 4), (earlier_pairs,))))
    x = (masks[::2].double() - masks[1::2].double()) / 2 * prior
    differences = (y[::2] - y[1::2]) / 2
    spread = differences.square().mean().sqrt()
    differences = torch.cat((earlier.utility * spread, differences))
    by_module = torch.cat((earlier.kept, x @ torch.nn.functional.one_hot(modules).double()))
    by_kind, total = by_module @ torch.nn.functional.one_hot(kind_of).double(), by_module.sum(dim=1, keepdim=True)
    x = torch.cat((torch.zeros(earlier_pairs, x.shape[1], dtype=torch.float64), x))  # earlier units are others
    of_total, of_module = total.square().mean(), by_module.square().mean(dim=0)
    together = torch.stack((of_module[:2].sum(), of_module[2:].sum()))
    of_kinds, own = (by_kind @ by_kind.T).diagonal().mean(), (x @ x.T).diagonal().mean()
    parts = [by_module[:, :2] @ by_module[:, :2].T / together[0], by_module[:, 2:] @ by_module[:, 2:].T / together[1]]
    parts += [by_kind @ by_kind.T / of_kinds, x @ x.T / own]
    found, alone, noise = likeliest_variances(differences / spread, 100 * total @ total.T / of_total, torch.stack(parts), by_module / of_module.sqrt())
    of_modules = found[kind_of] / together[kind_of] + alone / of_module
    variances = torch.cat(((100 / of_total).expand(1), (found[2] / of_kinds).expand(2), of_modules, (found[3] / own).expand(len(prior))))
    features = torch.cat((total, by_kind, by_module, x), dim=1)
    covariance = torch.linalg.inv(features.T @ features / noise + torch.diag(1 / variances.clamp_min(1e-30)))
    slope, of_kind, of_module, of_unit = (covariance @ features.T @ differences / spread / noise).split((1, 2, 4, len(prior)))
    of_slopes = [[0, 1 + kind, 3 + module] for module, kind in enumerate(kind_of.tolist())]
    doubt = torch.stack([covariance[which][:, which].sum().sqrt() for which in of_slopes])
    relative = (slope + of_kind).clamp_min(0)[kinds] + of_module[modules] + of_unit
    expected = spread * prior * (relative.clamp_min(0) + doubt[modules])
    torch.testing.assert_close(fit(masks, y, prior, modules, kinds, earlier).weights, expected, rtol=1e-4, atol=1e-6)
    if not earlier_pairs:
        assert torch.equal(fit(masks, y, prior, modules, kinds, earlier).weights, fit(masks, y, prior, modules, kinds).weights)


def test_a_module_that_earlier_rounds_needed_is_still_worth_more() -> None:
    masks, _, prior, modules, _ = problem(6)
    earlier_masks, _, _, _, _ = problem(60)
    true = prior * torch.tensor([1.0, 1.0, 4.0, 1.0], dtype=torch.float64)[modules]
    y = 0.1 * masks.double() @ prior + torch.randn(len(masks), generator=seeded(), dtype=torch.float64)
    found = bonsai.evidence(earlier_masks, earlier_masks.double() @ true, prior, modules, 4)

    def share(weights: Tensor) -> float:
        """Of the third module's worth, for what the prior expects of it, in that of all."""
        relative = torch.stack([(weights / prior)[modules == module].mean() for module in range(4)])
        return float(relative[2] / relative.sum())

    kinds = torch.zeros_like(modules)
    assert share(fit(masks, y, prior, modules, kinds, found).weights) > share(fit(masks, y, prior, modules, kinds).weights) + 0.1


def test_evidence_is_of_whole_modules_in_proportion_to_what_was_at_stake() -> None:
    masks = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    prior, modules = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([0, 0, 2])
    found = bonsai.evidence(masks, torch.tensor([-1.0, -3.0, -2.0, -2.0]), prior, modules, 4)
    assert found.kept.tolist() == [[-0.5, 0.0, 2.5, 0.0], [1.5, 0.0, -2.5, 0.0]]
    torch.testing.assert_close(found.utility, torch.tensor([2**0.5, 0.0], dtype=torch.float64))
    assert not bonsai.evidence(masks, torch.full((4,), -2.0), prior, modules, 4).utility.any()
    many = bonsai.no_evidence(4)
    for _ in range(bonsai.EARLIER_PAIRS):
        many += found
    assert len(many.kept) == len(many.utility) == bonsai.EARLIER_PAIRS
    assert many.kept[-2:].tolist() == found.kept.tolist()


def test_sub_models_below_a_gap_are_broken() -> None:
    sound = [-4.2, -4.3, -4.25, -4.4, -4.5, -4.35]
    assert bonsai.broken(torch.tensor([*sound, -6.9, -4.28, -7.1, -4.31])).nonzero().flatten().tolist() == [6, 8]
    assert not bonsai.broken(torch.tensor([*sound, -4.55])).any()
    assert not bonsai.broken(torch.tensor([-4.2, -4.3, -7.0, -7.1, -7.2])).any()  # more than half: nothing tells which are sound
    assert bonsai.broken(torch.tensor([-4.2, -4.2, -4.2, -4.8])).tolist() == [False] * 3 + [True]
    assert not bonsai.broken(torch.tensor([-4.2, -4.2, -4.2, -4.6])).any()


def test_suspects_are_lacking_in_broken_sub_models_alone() -> None:
    masks = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)
    only, each = bonsai.suspects(masks, torch.tensor([True, True, False, False]))
    assert only.tolist() == [True, True, False, False]
    assert each.tolist() == [True, False, False, False]
    assert not torch.stack(bonsai.suspects(masks, torch.zeros(4, dtype=torch.bool))).any()


def test_what_removals_do_only_together_cancels() -> None:
    masks, y, prior, modules, _ = problem(20)
    kinds = torch.zeros_like(modules)
    signs = masks.double() * 2 - 1
    together = signs[:, 0] * signs[:, 1] - 3 * signs[:, 5] * signs[:, 25]
    torch.testing.assert_close(fit(masks, y + together, prior, modules, kinds).weights, fit(masks, y, prior, modules, kinds).weights)


def test_masks_add_what_the_prior_does_not_know() -> None:
    masks, y, prior, modules, true = problem(60)

    def rank_agreement(weights: Tensor) -> float:
        return float(kendall_tau(weights.unsqueeze(0), true))

    found = fit(masks, y, prior, modules, torch.zeros_like(modules))
    assert found.tau > 0.9
    assert rank_agreement(found.weights) > max(0.85, rank_agreement(prior) + 0.2)
    alone = torch.zeros(20, dtype=torch.long)
    local = fit(masks[:, :20], masks[:, :20].double() @ true[:20], prior[:20], alone, alone)
    assert float(kendall_tau(local.weights.unsqueeze(0), true[:20])) > float(kendall_tau(prior[:20].unsqueeze(0), true[:20]))


def test_without_evidence_the_prior_ranks() -> None:
    masks, y, prior, modules, _ = problem(4)
    weights = fit(masks, torch.zeros_like(y), prior, modules, torch.zeros_like(modules)).weights
    assert torch.equal(weights.argsort(), prior.argsort())


@pytest.mark.parametrize("count", [2, 5])
def test_the_fit_wants_pairs(count: int) -> None:
    masks, y, prior, modules, _ = problem(4)
    with pytest.raises(ValueError, match="not two or more pairs"):
        fit(masks[:count], y[:count], prior, modules, torch.zeros_like(modules))


def trained_by_torch(x: Tensor, y: Tensor, x_judged: Tensor, y_judged: Tensor, start: Tensor, rate: float, strength: float) -> tuple[Tensor, float]:
    """The released training, all masks in one batch, with torch's optimiser and autograd."""
    weights, bias = start.clone().requires_grad_(), torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.Adam([weights, bias], lr=rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, mode="max", factor=0.5, patience=3, min_lr=1e-5)
    best, kept, since_best = -1e5, start, 0
    for _ in range(50):
        loss = torch.nn.functional.mse_loss(x @ weights + bias, y) + strength * weights.abs().sum()
        optimiser.zero_grad()
        torch.autograd.backward([loss])
        optimiser.step()
        tau = naive_tau((x_judged @ weights + bias).tolist(), y_judged.tolist())
        if tau >= best:
            best, kept, since_best = tau, weights.detach().clone(), 0
        schedule.step(tau)
        since_best += 1
        if since_best > 10:
            break
    return kept, best


def test_the_released_training_is_adam_with_its_schedule() -> None:
    masks, y, prior, _, _ = problem(15)
    x, y = masks.float(), (y - y.mean()).float()
    start = (prior / prior.sum()).float()
    rates, strengths = torch.tensor([0.05, 0.01, 0.0004, 0.3]), torch.tensor([0.0, 1e-2, 1e-4, 1.0])
    weights, taus = bonsai._descend(x[6:], y[6:], x[:6], y[:6], start, rates, strengths, 64, seeded())
    for found, tau, rate, strength in zip(weights, taus, rates.tolist(), strengths.tolist(), strict=True):
        expected, best = trained_by_torch(x[6:], y[6:], x[:6], y[:6], start, rate, strength)
        assert float(tau) == pytest.approx(best)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_the_released_grid_chooses_by_contiguous_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """All masks in one batch, so that the order of batches doesn't matter."""
    monkeypatch.setattr(bonsai, "BATCH_SIZES", (64,))
    masks, y, prior, _, _ = problem(10, sizes=(6,))

    def expected(start: Tensor, norm: float) -> Tensor:
        scores = {}
        x = masks.float() / norm
        for factor, strength in itertools.product((100.0, 10.0, 1.0, 0.1), (1e2, 1e-4, 0.0)):
            taus = []
            for number in range(5):
                test = torch.tensor([row // 4 == number for row in range(20)])
                centred = (y - y[~test].mean()).float()
                taus.append(trained_by_torch(x[~test], centred[~test], x[test], centred[test], start, 1 / (6 * factor), strength / norm)[1])
            scores[factor, strength] = sum(taus) / 5
        factor, strength = max(scores, key=lambda setting: scores[setting])
        assert fit_released(masks, y, seeded(), None if norm == 1 else prior).tau == pytest.approx(scores[factor, strength])
        centred = (y - y.mean()).float()
        return trained_by_torch(x, centred, x, centred, start, 1 / (6 * factor), strength / norm)[0]

    torch.testing.assert_close(fit_released(masks, y, seeded()).weights.float(), expected(torch.zeros(6), 1), atol=1e-4, rtol=1e-3)
    start = (prior / prior.sum()).float()
    torch.testing.assert_close(fit_released(masks, y, seeded(), prior).weights.float(), expected(start, math.sqrt(2)), atol=1e-4, rtol=1e-3)


def test_the_released_fit_wants_a_mask_for_each_fold() -> None:
    masks, y, *_ = problem(2)
    with pytest.raises(ValueError, match="too few"):
        fit_released(masks, y, seeded())


def test_nothing_goes_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a backward pass")

    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(bonsai, "EPOCHS", 3)
    with torch.inference_mode():
        masks, y, prior, modules, _ = problem(5)
        weights = fit(masks, y, prior, modules, torch.zeros_like(modules)).weights
        released = fit_released(masks, y, seeded()).weights
        assert torch.equal(weights, fit(masks, y, prior, modules, torch.zeros_like(modules)).weights)
        assert torch.equal(released, fit_released(masks, y, seeded()).weights)
        assert not weights.requires_grad
        assert not released.requires_grad


# ------------------------------------------------------------ what is removed


@given(data=st.data(), released=st.booleans())
@settings(deadline=None)
def test_selection_is_the_loop_over_ranked_units(data: st.DataObject, released: bool) -> None:
    count = data.draw(st.integers(1, 25))
    weights = data.draw(st.lists(st.integers(-5, 5), min_size=count, max_size=count))
    modules = sorted(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    costs = [(3, 40, 7)[module] for module in modules]
    removable = data.draw(st.lists(st.integers(0, 25), min_size=3, max_size=3)) if not released else [25] * 3
    budget = data.draw(st.integers(0, 300))
    chosen = select(torch.tensor(weights).double(), torch.tensor(costs), torch.tensor(modules), removable, budget, released)
    spent, expected, taken = 0, set(), [0, 0, 0]
    for unit in sorted(range(count), key=lambda unit: weights[unit] / (1 if released else costs[unit])):
        allowed = taken[modules[unit]] < removable[modules[unit]]
        if released:
            spent += costs[unit]
            if spent <= budget:
                expected.add(unit)
        elif allowed and spent + costs[unit] <= budget:
            spent, taken[modules[unit]] = spent + costs[unit], taken[modules[unit]] + 1
            expected.add(unit)
    assert set(chosen.nonzero().squeeze(1).tolist()) == expected
    assert int(torch.tensor(costs)[chosen].sum()) <= budget


def test_the_local_model_cuts_at_the_quantile() -> None:
    candidate = torch.tensor([True, False, True, True, False, False, False, False, False, True, False])
    removed = select_local(torch.tensor([0.3, -0.1, 0.2, 0.9]), candidate, 0.2)  # the quantile is the third of eleven
    assert removed.nonzero().squeeze(1).tolist() == [0, 2, 3]
    assert select_local(torch.tensor([5.0]), torch.tensor([False, True, False]), 0.05).tolist() == [False, True, False]


def test_stable_compares_parameters_not_units() -> None:
    costs = torch.tensor([100, 1, 1])
    dear, cheap = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    assert stable(dear, cheap, costs)
    assert not stable(dear, cheap, costs, overlap=0.995)
    assert not stable(dear, ~dear, costs)
    assert stable(~dear & dear, ~dear & dear, costs)


def test_rounds_stop_at_the_target() -> None:
    assert round_fraction(0.5, 0.1, 0.05) == 0.05
    assert round_fraction(0.5, 0.47, 0.05) == pytest.approx(0.03)
    assert round_fraction(0.5, 0.485, 0.05) == 0
    assert round_fraction(0.5, 0.6, 0.05) == 0
    assert round_fraction(0.5, 0.485, 0.05, tolerance=1e-5) == pytest.approx(0.015)
