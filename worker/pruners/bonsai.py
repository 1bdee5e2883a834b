"""Bonsai (Dery et al. 2024, arXiv 2402.05406): what a unit is worth is read off the perplexities of random sub-models, from forward passes only.

A unit is an FFN channel or a KV group of attention; a module is all units of one kind in one block. In a round, each module's least units by a prior are its
candidates; masks remove some of them; a linear model from masks to utilities gives each candidate a weight; the least worthy go.

`released=True` is the authors' code. What differs by default, and why:

- Any number of a module's candidates is removed together, drawn anew for each module and pair, and in some pairs most modules of a kind lose more in the same
  mask. The released masks remove half of each module's candidates each time, so no linear model can tell one module's units, or one kind's, from another's; and
  where a module has one candidate, as attention with few KV groups has, all such modules lose theirs in the same masks.
- The utility is -log perplexity; -perplexity is a regression on its outliers.
- A pair of masks touches one part of the model, a run of its blocks, and the parts take turns: what the blocks before a part give is computed once a round, and
  what one part's modules are worth doesn't blur what another's are.
- Where a module's candidates are more than 2p of it, as one of three KV groups is, most masks spare it: a sub-model without half of all those is too far from
  what a round may leave for its utility to tell of anything else.
- Sub-models that are broken, as they lack what the model can't do without, tell of nothing else: the linear model leaves them out, and what only they lack goes last.
- The linear model shrinks towards the prior as far as the masks are silent, and doubts what they hardly say: masks are far fewer than candidates.
- What earlier rounds told of whole modules is not forgotten: one that was needed still is.
- Candidates are ranked by weight per parameter: a KV group holds a hundred times what a channel does.
- A module keeps its last unit: one has to be stored for the model to load, so nothing would be saved.

Departures in both modes: norms are over all tokens at once, where the authors average those of batches, and the prior `activation` is the root mean square,
where theirs (named magnitude) is the mean size; groups of grouped-query attention instead of heads; one set of sequences serves all rounds. The rounds
themselves are in worker/perturbing.py.

Notation: n units of a module, U units of all modules, C candidates of all modules, M masks, S settings tried at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.estimate import RELEASED_TOLERANCE
from app.recipe import Bonsai
from worker.calibration import InputStatistics, Statistic
from worker.masks import keep_largest
from worker.pruners.base import DenseBlock, StructuredPruner, Unit, units_of

FOLDS = 5
MOST_PERPLEXITY = 1e8  # a broken sub-model's
LEAST_PAIRS = 8  # tell something of kinds and modules; with fewer, the prior ranks
EARLIER_PAIRS = 200  # of earlier rounds count at most, the latest ones; the time of a fit grows with their cube
BROKEN, LEAST_GAP = 4.0, 0.5  # standard deviations, and of log perplexity, see `broken`
SLOPE_SPREAD = 100.0  # variance of the common slope before anything is known, in variances of the utilities: any slope is possible
EVIDENCE_STEPS = 400
SETTLING = 20  # steps after which a module may get a variance of its own …
OUTLIER = 9.0  # … if so many times what its kind's explains is in the utilities
LEAST_NOISE = 1e-9  # of the utilities' variance

# The authors' grid and training.
RATE_FACTORS = (100.0, 10.0, 1.0, 0.1)
L1_STRENGTHS = (1e2, 1e-4, 0.0)
BATCH_SIZES = (32, 64, 128)
EPOCHS, PATIENCE = 50, 10
PLATEAU_PATIENCE, LEAST_RATE = 3, 1e-5


@dataclass(frozen=True)
class Fit:
    """A linear model from masks to utilities."""

    weights: Tensor  # (C,): what the utility gains by each candidate
    tau: float  # Kendall's, between utilities and their predictions from other masks; of the released fit, the mean of each fold's best epoch


@dataclass(frozen=True)
class Evidence:
    """What pairs of masks tell of whole modules, of as many as were numbered."""

    kept: Tensor  # (P, modules) float64: half of what the first of a pair keeps more of each module's expected worth than the second
    utility: Tensor  # (P,) float64: half of what it is more useful, over the root mean square of its round

    def __add__(self, later: Evidence) -> Evidence:
        return Evidence(torch.cat((self.kept, later.kept))[-EARLIER_PAIRS:], torch.cat((self.utility, later.utility))[-EARLIER_PAIRS:])


def no_evidence(modules: int) -> Evidence:
    return Evidence(torch.zeros(0, modules, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))


# --------------------------------------------------------------------- priors


def score(weight: Tensor, inputs: InputStatistics, kind: str) -> Tensor:
    """Prior of each input of a linear (C_out, C_in) -> (C_in,): mean_o |W_oc| · ‖x_c‖ (`wanda`), ‖x_c‖ (`activation`) or mean_o |W_oc| (`magnitude`).

    0 for all where any is NaN or infinite, as released.
    """
    size = weight.abs().mean(dim=0)
    values = size if kind == "magnitude" else inputs.norm if kind == "activation" else size * inputs.norm
    return values if values.isfinite().all() else torch.zeros_like(values)


def expected_worth(priors: Sequence[Tensor], costs: Sequence[int]) -> list[Tensor]:
    """What units are worth before any sub-model tells: their parameters times the share of their module's units that have a smaller prior. (n,) -> (n,) float64 each.

    So every module loses the same share of its units. Priors as they are would say that the first blocks are worthless, where hidden states are small, and by a
    module's mean the last ones are, where a few large units make it: by the prior alone, SmolLM2-135M without 20 % has a perplexity of 73.5 by means and of 64.1
    by shares. Units of equal priors count half of each other.
    """
    found = []
    for own, cost in zip(priors, costs, strict=True):
        ordered = own.sort().values
        below = torch.searchsorted(ordered, own) + torch.searchsorted(ordered, own, right=True)
        found.append(cost * below.double() / (2 * max(len(own), 1)))
    return found


def relative_worth(expected: Sequence[Tensor], priors: Sequence[Tensor], candidates: Sequence[Tensor]) -> list[Tensor]:
    """The same for the linear model to correct: as much on average of a module's candidates, but within the module in the proportions of the prior. (n,) each.

    Shares rise from 0 whatever the priors are, so that evidence about a whole module would move few of its units over the line between those that go and those
    that stay.
    """
    found = []
    for own, prior, which in zip(expected, priors, candidates, strict=True):
        mean = float(prior[which].double().mean()) if which.any() else 0.0
        found.append(prior.double() * (own[which].mean() / mean) if mean else own)
    return found


def _score(block: DenseBlock, config: Bonsai) -> dict[Unit, Tensor]:
    scores: dict[Unit, Tensor] = {}
    if config.units != "attention":
        scores["channels"] = torch.stack([score(block.weights[mlp.down], block.inputs[mlp.down], config.prior) for mlp in block.mlps])
    if config.units != "ffn":
        output = block.attention.output
        scores["columns"] = score(block.weights[output], block.inputs[output], config.prior)
    return scores


def _statistics(config: Bonsai) -> frozenset[Statistic]:
    return frozenset({"norm"}) if config.prior in ("wanda", "activation") else frozenset()


PRUNER = StructuredPruner(score=_score, units=units_of, statistics=_statistics)


# ------------------------------------------------------------- drawing masks


def candidates(prior: Tensor, prune_fraction: float) -> Tensor:
    """Which units of a module can be removed in this round: all but the int(n·(1 - 2p)) of largest prior. (n,) -> (n,) bool.

    At least one unit can be as long as p > 0: one of three KV groups at p = 0.05. In the released code p is a fraction of the first model, though n shrinks:
    at half the model left, a round's budget is all candidates together. With p relative to what is left the regression keeps its say.
    """
    return ~keep_largest(prior, int(len(prior) * (1 - 2 * prune_fraction)))


def sampling(prior: Tensor, candidates: Tensor) -> Tensor:
    """Probability of each unit of a module to be drawn for removal: in proportion to (max prior - prior), the maximum over all units, and 0 for fixed ones.

    (n,), (n,) bool -> (n,) float64. Uniform where all candidates are at the maximum.
    """
    if not candidates.any():
        return torch.zeros_like(prior, dtype=torch.float64)
    below = torch.where(candidates, prior.max() - prior, 0).double()
    return below / below.sum() if float(below.sum()) > 0 else candidates / candidates.sum(dtype=torch.float64)


def draw_masks(
    probabilities: Sequence[Tensor],
    candidates: Sequence[Tensor],
    prune_fraction: float,
    pairs: int,
    generator: torch.Generator,
    released: bool = False,
    kinds: Sequence[int] | None = None,
    parts: Sequence[int] | None = None,
) -> Tensor:
    """Random masks in pairs: of each module's candidates, what one of a pair removes, the other keeps. Each (n,), each (n,) bool -> (2·pairs, U) bool.

    A pair draws k of a module's candidates without replacement. By default k is anything from half to all, and a coin decides which of the two loses them. The
    coins of one kind of module (`kinds`: each module's number; None: all are alike) are equally unfair within a pair, by a share drawn for it from 0 to 1: with
    fair ones both masks would remove about as much of a kind as a whole, and nothing would tell what it is worth. Where the candidates are more than 2p of a
    module, as one of three KV groups is, only so many pairs touch it that p of it is removed on average. The parts of the model (`parts`: each module's; None: there
    is one) take turns: a pair touches one. As released, k = int(p·n) + 1, at most all candidates, and the first of each pair loses them. Fixed units always stay.
    All tensors are the CPU's.
    """
    kinds, parts = kinds or [0] * len(candidates), parts or [0] * len(candidates)
    turn = torch.arange(pairs) % (max(parts) + 1)
    lean = torch.rand(pairs, max(kinds) + 1, generator=generator)
    columns = []
    for probability, candidate, kind, part in zip(probabilities, candidates, kinds, parts, strict=True):
        count = int(candidate.sum())
        # The k smallest of Exp(1) / q are k draws without replacement (Efraimidis and Spirakis 2006).
        keys = torch.empty(pairs, count, dtype=torch.float64).exponential_(generator=generator) / probability[candidate]
        rank = keys.argsort(dim=1).argsort(dim=1)
        masks = torch.ones(2 * pairs, len(candidate), dtype=torch.bool)
        if released:
            keep = rank >= int(prune_fraction * len(candidate)) + 1  # (pairs, candidates of the module)
        else:
            keep = rank >= torch.randint((count + 1) // 2, count + 1, (pairs, 1), generator=generator)
            keep ^= torch.rand(pairs, 1, generator=generator) >= lean[:, kind : kind + 1]
        both = torch.stack((keep, ~keep), dim=1)  # (pairs, 2, candidates of the module)
        touched = 2 * prune_fraction * len(candidate) / max(count, 1)
        if not released and touched < 1:
            both |= torch.rand(pairs, 1, 1, generator=generator) >= touched
        both |= (turn != part).view(-1, 1, 1)
        masks[:, candidate] = both.view(2 * pairs, count)
        columns.append(masks)
    return torch.cat(columns, dim=1)


def utility(perplexity: Tensor, released: bool = False) -> Tensor:
    """-log perplexity, or -perplexity as released, of any shape. Perplexities that are NaN or above 1e8 count as 1e8."""
    bounded = torch.where(perplexity < MOST_PERPLEXITY, perplexity.double(), MOST_PERPLEXITY)
    return -bounded if released else -bounded.log()


# ------------------------------------------------------------ linear models


def kendall_tau(one: Tensor, other: Tensor) -> Tensor:
    """Kendall's τ-b between rows (S, M) and one vector (M,) -> (S,); NaN where all entries are equal."""
    signs, reference = (one.unsqueeze(-1) - one.unsqueeze(-2)).sign(), (other.unsqueeze(-1) - other.unsqueeze(-2)).sign()
    norms = signs.square().sum(dim=(-2, -1)).sqrt() * reference.square().sum().sqrt()
    return (signs * reference).sum(dim=(-2, -1)) / norms


def broken(utility: Tensor) -> Tensor:
    """Which sub-models lack what the model can't do without: those below a gap of LEAST_GAP and of BROKEN deviations of the better ones, at most half. (M,) -> (M,) bool."""
    ordered = utility.sort(descending=True).values
    for better in range((len(ordered) + 1) // 2, len(ordered)):
        if ordered[better - 1] - ordered[better] > max(LEAST_GAP, BROKEN * float(ordered[:better].std())):
            return utility < ordered[better - 1]
    return torch.zeros_like(utility, dtype=torch.bool)


def suspects(masks: Tensor, broken: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates that only broken sub-models lack, and those of them that each broken one lacks: (M, C) bool, (M,) bool -> twice (C,) bool."""
    lacking = ~masks
    only = lacking[broken].any(dim=0) & ~lacking[~broken].any(dim=0)
    return only, only & lacking[broken].all(dim=0)


def evidence(masks: Tensor, utility: Tensor, prior: Tensor, modules: Tensor, numbered: int) -> Evidence:
    """What a round tells the later ones: (M, C) bool, (M,), (C,), (C,) long, complements adjacent as for `fit`; of so many modules."""
    x, y = _halved_differences(masks.double()) * prior.double(), _halved_differences(utility.double())
    return Evidence(_sums(x, modules, numbered), y / y.square().mean().sqrt().clamp_min(torch.finfo(y.dtype).tiny))


def fit(masks: Tensor, utility: Tensor, prior: Tensor, modules: Tensor, kinds: Tensor, earlier: Evidence | None = None) -> Fit:
    """Linear regression of utilities on masks that shrinks towards the prior: (M, C) bool, (M,), (C,), (C,) long, (C,) long -> what each candidate is worth.

    weight = prior · (a + d_kind + d_module + d_own + s_module): a slope, not penalised but, with that of its kind, never negative; then deviations of kinds, of whole
    modules and of single units from it, normal with mean 0; last, one standard deviation of a + d_kind + d_module, so that no module goes because noise makes it
    look worthless: the least of many uncertain estimates is mostly the luckiest. Deviations have one variance for the kinds, one for the modules of each kind and
    one for all units, those that make the utilities likeliest (sparse Bayesian learning; Tipping 2001). A module that the model can hardly do without has a
    variance of its own besides. No weight is negative: to lose a unit hardly ever helps, and where it seems to, that is mostly noise.

    Only differences within pairs count: as one mask is the other's complement, all that is linear in the masks is in them, and what two removals do only
    together, which is no candidate's own worth, cancels. Pairs of earlier rounds tell of kinds and modules as much as this round's do, in proportion to what
    was at stake in their round: which modules a model needs changes little from round to round, and 20 pairs know little of 60 modules.

    masks: only the candidates' columns, complements adjacent. prior: what a unit is expected to be worth, not negative and comparable across modules; one of
    0 stays at 0. modules, kinds: the numbers of each candidate's module and kind; with one module this is the local fit. Without evidence the prior alone ranks.
    `tau` is of the differences of pairs that were left out.

    Raises ValueError with fewer than two pairs.
    """
    pairs = len(masks) // 2
    if pairs < 2 or len(masks) % 2:
        raise ValueError(f"{len(masks)} masks are not two or more pairs")
    x, y, scale = _halved_differences(masks.double()), _halved_differences(utility.double()), prior.double()
    fold = torch.arange(pairs, device=masks.device) % min(FOLDS, pairs)
    predicted = torch.empty_like(y)
    for number in range(min(FOLDS, pairs)):
        predicted[fold == number] = x[fold == number] @ _likeliest(x[fold != number], y[fold != number], scale, modules, kinds, earlier)
    tau = kendall_tau(torch.cat((predicted, -predicted)), torch.cat((y, -y)))
    return Fit(_likeliest(x, y, scale, modules, kinds, earlier), float(tau.nan_to_num(0)))


def _halved_differences(values: Tensor) -> Tensor:
    """(2·P, …) -> (P, …): half of what the first of each pair has more than the second."""
    return (values[::2] - values[1::2]) / 2


def _sums(x: Tensor, groups: Tensor, count: int) -> Tensor:
    """(P, C) and the numbers (C,) of groups of columns -> sums over each group, (P, count)."""
    return x.new_zeros(len(x), count).index_add_(1, groups, x)


def _likeliest(x: Tensor, y: Tensor, prior: Tensor, modules: Tensor, kinds: Tensor, earlier: Evidence | None) -> Tensor:
    """Differences (P, C) and (P,), then (C,), (C,), (C,) -> each candidate's weight, (C,)."""
    tiny = torch.finfo(x.dtype).tiny
    x = x * prior
    spread = y.square().mean().sqrt()
    if not spread:
        return prior
    y = y / spread

    by_module = _sums(x, modules, int(modules.max()) + 1)
    kind_of = torch.zeros(by_module.shape[1], dtype=torch.long, device=x.device).index_copy_(0, modules, kinds)
    if earlier is not None:
        numbers = modules.unique()  # of the others there is nothing to tell
        before = torch.zeros(len(earlier.kept), by_module.shape[1]).to(x).index_copy_(1, numbers, earlier.kept[:, numbers])
        by_module, y = torch.cat((before, by_module)), torch.cat((earlier.utility, y))
        x = torch.cat((x.new_zeros(len(before), x.shape[1]), x))  # of single units they tell nothing
    by_kind = _sums(by_module, kind_of, int(kinds.max()) + 1)
    # What each component is divided by gives it a mean square of 1, so that its variance is its share in that of y.
    total = by_module.sum(dim=1)  # (P,)
    wide = SLOPE_SPREAD / total.square().mean().clamp_min(tiny)
    of_kinds = by_kind.square().sum(dim=1).mean().clamp_min(tiny)
    alone = by_module.square().mean(dim=0).clamp_min(tiny)  # (modules,)
    together = alone.new_zeros(by_kind.shape[1]).index_add_(0, kind_of, alone)[kind_of]  # (modules,), of all of the module's kind
    of_own = x.square().sum(dim=1).mean().clamp_min(tiny)
    parts = [(by_module * (kind_of == kind) / together) @ by_module.T for kind in range(by_kind.shape[1])]
    parts += [by_kind @ by_kind.T / of_kinds, x @ x.T / of_own]
    common = wide * total.outer(total)
    of_parts, of_modules, noise = likeliest_variances(y, common, torch.stack(parts), by_module / alone.sqrt())

    deviation = of_parts[:-2][kind_of] / together + of_modules / alone  # (modules,), variances from here on
    of_kind = of_parts[-2] / of_kinds
    covariance = common + torch.einsum("s,spq->pq", of_parts, torch.stack(parts)) + (by_module * (of_modules / alone)) @ by_module.T
    inverse = torch.linalg.inv(covariance + noise * torch.eye(len(y)).to(y))
    dual = inverse @ y  # (P,)
    slope = (wide * (total @ dual) + of_kind * (by_kind.T @ dual)).clamp_min(0)  # (kinds,)
    relative = slope[kinds] + (deviation * (by_module.T @ dual))[modules] + of_parts[-1] / of_own * (dual @ x)
    # Covariances of the differences with a module's slope, (P, modules).
    with_module = wide * total.unsqueeze(1) + of_kind * by_kind[:, kind_of] + by_module * deviation
    unsure = (wide + of_kind + deviation - (with_module * (inverse @ with_module)).sum(dim=0)).clamp_min(0).sqrt()  # (modules,)
    weights: Tensor = spread * prior * (relative.clamp_min(0) + unsure[modules] + 1e-12)  # where nothing is learned, the prior ranks
    return weights


def likeliest_variances(y: Tensor, wide: Tensor, parts: Tensor, by_module: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Variances v (S,), u (modules,) and σ² under which y (P,), of mean square 1 and covariance wide + Σ v_s K_s + Σ u_m x_m x_mᵀ + σ²·I, is likeliest.

    wide: (P, P); parts: (S, P, P), the K_s; by_module: (P, modules), the x_m. u is 0 but for modules of which y holds more than OUTLIER times what is expected of
    their kind: as many variances as modules would be fitted to noise. In every step a variance grows by the root of how much more of its component y holds
    than is expected, which is 1 where the likelihood no longer rises (MacKay 1992).
    """
    tiny = torch.finfo(y.dtype).tiny
    noise, of_parts, of_modules = y.new_tensor(0.5), y.new_full((len(parts),), 0.25), y.new_zeros(by_module.shape[1])
    for step in range(EVIDENCE_STEPS):
        covariance = wide + torch.einsum("s,spq->pq", of_parts, parts) + (by_module * of_modules) @ by_module.T + noise * torch.eye(len(y)).to(y)
        inverse = torch.linalg.inv(covariance)
        dual = inverse @ y  # (P,)
        excess = (by_module.T @ dual).square() / ((inverse @ by_module) * by_module).sum(dim=0).clamp_min(tiny)
        of_modules = of_modules * excess.sqrt()
        if step % SETTLING == SETTLING - 1 and step < EVIDENCE_STEPS - SETTLING:
            excess = torch.where(of_modules > 0, 0, excess)
            of_modules[excess.argmax()] += excess.max() > OUTLIER
        of_parts = of_parts * (torch.einsum("p,spq,q->s", dual, parts, dual) / (inverse * parts).sum(dim=(1, 2)).clamp_min(tiny)).sqrt()
        noise = (noise * (dual @ dual / inverse.diagonal().sum()).sqrt()).clamp_min(LEAST_NOISE)
    return of_parts, of_modules, noise


def fit_released(masks: Tensor, utility: Tensor, generator: torch.Generator, prior: Tensor | None = None) -> Fit:
    """The authors' linear model, (M, C) bool, (M,) -> what each candidate is worth: mean squared error + λ‖w‖₁ by Adam, all settings of their grid.

    The setting of best mean Kendall τ over five contiguous folds is fitted anew to all masks, and of each fit the epoch of best τ is kept, both judged by the
    masks left out, or by all in the last fit. Without `prior` it is the global model, which starts at 0; with the prior of one module's candidates (C,) the
    local one, which starts there, scaled to the sum 1. masks: only the candidates' columns; the bias takes up that they aren't centred.

    Departures: gradients are written out, so that no autograd is needed; settings that differ in rate and λ alone see batches in the same order.

    Raises ValueError with fewer than five masks.
    """
    size = len(masks) // FOLDS
    if not size:
        raise ValueError(f"{len(masks)} masks are too few for {FOLDS} folds")
    start = (
        masks.new_zeros(masks.shape[1], dtype=torch.float32)
        if prior is None
        else prior.float() / prior.float().sum().clamp_min(torch.finfo(torch.float32).tiny)
    )
    norm = math.sqrt(float(start.sum()) + 1)
    x, y = masks.float() / norm, utility.float()
    rates = torch.tensor([1 / factor for factor in RATE_FACTORS for _ in L1_STRENGTHS], device=x.device)
    strengths = torch.tensor([strength / norm for _ in RATE_FACTORS for strength in L1_STRENGTHS], device=x.device)

    def train(kept: Tensor, judged: Tensor, settings: slice, batch_size: int) -> tuple[Tensor, Tensor]:
        centre = y[kept].mean()
        nonzero = int((start if start.any() else x[kept].mean(dim=0)).count_nonzero())
        data = x[kept], y[kept] - centre, x[judged], y[judged] - centre
        return _descend(*data, start, rates[settings] / max(nonzero, 1), strengths[settings], batch_size, generator)

    everything = torch.ones(len(masks), dtype=torch.bool, device=x.device)
    taus = torch.zeros(len(BATCH_SIZES), len(rates), device=x.device)
    for batch, batch_size in enumerate(BATCH_SIZES):
        for number in range(FOLDS):
            left_out = torch.zeros_like(everything)
            left_out[number * size : (number + 1) * size] = True
            taus[batch] += train(~left_out, left_out, slice(None), batch_size)[1] / FOLDS
    best, setting = divmod(int(taus.argmax()), len(rates))
    weights, _ = train(everything, everything, slice(setting, setting + 1), BATCH_SIZES[best])
    return Fit(weights[0].double(), float(taus[best, setting]))


def _descend(
    x: Tensor, y: Tensor, x_judged: Tensor, y_judged: Tensor, start: Tensor, rates: Tensor, strengths: Tensor, batch_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Weights (S, C) of the epoch with the best τ on the judged masks, and that τ (S,): one linear model for each rate and λ (S,), side by side."""
    x, x_judged = (torch.cat((masks, torch.ones_like(masks[:, :1])), dim=1) for masks in (x, x_judged))  # the last column's weight is the bias
    weights = torch.cat((start, start.new_zeros(1))).repeat(len(rates), 1)
    l1 = strengths.unsqueeze(1).repeat(1, weights.shape[1])
    l1[:, -1] = 0
    first, second, kept = torch.zeros_like(weights), torch.zeros_like(weights), weights.clone()
    best, plateau = torch.full_like(rates, -1e5), torch.full_like(rates, -torch.inf)
    since_best, since_plateau = torch.zeros_like(rates), torch.zeros_like(rates)
    step = 0
    for _ in range(EPOCHS):
        running = since_best <= PATIENCE
        if not running.any():
            break
        for rows in torch.randperm(len(y), generator=generator).to(x.device).split(batch_size):
            error = weights @ x[rows].T - y[rows]  # (S, batch)
            gradient = 2 / len(rows) * error @ x[rows] + l1 * weights.sign()
            step += 1
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.001)
            weights = weights - rates.unsqueeze(1) * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        tau = kendall_tau(weights @ x_judged.T, y_judged)
        better = running & (tau >= best)
        best, kept = torch.where(better, tau, best), torch.where(better.unsqueeze(1), weights, kept)
        since_best = torch.where(better, 1, since_best + 1)
        rises = tau > plateau * 1.0001
        plateau, since_plateau = torch.where(rises, tau, plateau), torch.where(rises, 0, since_plateau + 1)
        stuck = since_plateau > PLATEAU_PATIENCE
        rates = torch.where(stuck, torch.minimum(rates, (rates / 2).clamp_min(LEAST_RATE)), rates)
        since_plateau = torch.where(stuck, 0, since_plateau)
    return kept[:, :-1], best


# ------------------------------------------------------------ what is removed


def select(weights: Tensor, costs: Tensor, modules: Tensor, removable: Sequence[int], budget: int, released: bool = False) -> Tensor:
    """Which candidates go: the least worthy first, as long as their parameters fit `budget` together. (C,), (C,) ints, (C,) ints -> (C,) bool.

    modules: each candidate's module; removable: how many units each module may lose at most, its n for all. Ranked by weight per parameter, and a unit
    that no longer fits is passed over for cheaper ones; as released, ranked by weight, and the first that doesn't fit is the end.
    """
    ranked = weights if released else weights / costs
    cost, module, left = costs.tolist(), modules.tolist(), list(removable)
    removed: list[int] = []
    for unit in ranked.argsort(stable=True).tolist():
        if not left[module[unit]]:
            continue
        if cost[unit] <= budget:
            budget -= cost[unit]
            left[module[unit]] -= 1
            removed.append(unit)
        elif released:
            break
    chosen = torch.zeros_like(weights, dtype=torch.bool)
    chosen[removed] = True
    return chosen


def select_local(weights: Tensor, candidates: Tensor, prune_fraction: float) -> Tensor:
    """Which units of one module go in the local model: weights of its candidates (c,), (n,) bool -> (n,) bool.

    As released: those up to the p-quantile of all weights, with 1e8 for fixed units; so a module of few units loses one in each round.
    """
    worth = torch.full(candidates.shape, 1e8, dtype=torch.float64, device=weights.device)
    worth[candidates] = weights.double()
    return worth <= worth.quantile(prune_fraction)


def stable(previous: Tensor, current: Tensor, costs: Tensor, overlap: float = 0.98) -> bool:
    """Whether two selections (C,) share `overlap` of the parameters of the larger one. Compare those of half and of all masks: one mask more changes little."""
    common, larger = int(costs[previous & current].sum()), max(int(costs[previous].sum()), int(costs[current].sum()))
    return common >= overlap * larger


def round_fraction(target: float, reached: float, prune_fraction: float, tolerance: float = RELEASED_TOLERANCE) -> float:
    """The fraction of the first model that the next round removes: p, less where the target is nearer; 0 within `tolerance` of the target or beyond it.

    A tolerance below the cheapest unit's share lands as near as units allow.
    """
    left = target - reached
    return 0.0 if left < tolerance else min(prune_fraction, left)
