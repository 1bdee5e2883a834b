"""Bonsai's rounds against a resident model with masks multiplied in; killed at every mask; with clocks and perplexities that are made up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import espalier.loader  # noqa: F401  makes from_pretrained build per-layer widths
from app.counting import count_parameters, sparsities
from app.exceptions import RecipeError
from app.report import LayerReport
from app.source import check_recipe, read_source
from tests.models import load_model, make_text
from tests.rounds import FFN, GROUPS, HEADS, HIDDEN, LAYERS, PER_LAYER, choose, facts_of, left_of, make_dense, open_run, recipe_of
from worker import pipeline, submodels
from worker.blocks import BlockStream
from worker.checkpoint import finish
from worker.choosing import Choice
from worker.evaluation import Variant
from worker.pipeline import target_of
from worker.pruners import bonsai
from worker.pruning import prune
from worker.slicing import slice_blocks
from worker.structured import Keep
from worker.survey import Surveyed
from worker.walk import RoundStep


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"), words=3000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("dense"), "llama")


# ------------------------------------------------- against a resident model


def multiplied(model: Any, left: list[Tensor]) -> list[Any]:
    """Hooks that multiply the masks of all modules into a dense model."""
    handles = []
    for layer, channels, groups in zip(model.model.layers, left[::2], left[1::2], strict=True):
        columns = groups.repeat_interleave(HIDDEN // GROUPS).float()
        for module, mask in ((layer.mlp.down_proj, channels.float()), (layer.self_attn.o_proj, columns)):
            handles.append(module.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,)))
    return handles


@torch.no_grad()
def perplexity_with(model: Any, tokens: Tensor, left: list[Tensor]) -> float:
    handles = multiplied(model, left)
    losses = [float(model(window[None], labels=window[None]).loss) for window in tokens]
    for handle in handles:
        handle.remove()
    return math.exp(sum(losses) / len(losses))


@torch.no_grad()
def priors_with(model: Any, tokens: Tensor, left: list[Tensor]) -> list[Tensor]:
    """Wanda's of each module's units that are left."""
    handles = multiplied(model, left)
    seen: dict[int, Tensor] = {}
    modules = [module for layer in model.model.layers for module in (layer.mlp.down_proj, layer.self_attn.o_proj)]
    watching = [module.register_forward_pre_hook(lambda module, args, place=place: seen.__setitem__(place, args[0])) for place, module in enumerate(modules)]
    model(tokens)
    for handle in [*handles, *watching]:
        handle.remove()
    found = []
    for place, (module, mask) in enumerate(zip(modules, left, strict=True)):
        scores = module.weight.abs().mean(dim=0) * seen[place].flatten(0, 1).square().mean(dim=0).sqrt()
        found.append((scores if place % 2 == 0 else scores.view(GROUPS, -1).mean(dim=1))[mask])
    return found


def test_rounds_are_what_a_resident_model_with_masks_multiplied_in_gives(folder: Path, text: Path, tmp_path: Path) -> None:
    """Three rounds: priors, perplexities of all sub-models, and what goes, with the budget of each round counted in parameters of the model's own."""
    recipe = recipe_of(text, masks=16)
    keeps, _, run = choose(folder, recipe, tmp_path)
    model, tokens = load_model(folder).float(), run.tokens
    assert tokens is not None
    whole = sum(parameter.numel() for name, parameter in model.named_parameters() if "embed" not in name and "head" not in name)
    costs = [3 * HIDDEN, 2 * (HEADS // GROUPS + 1) * (HIDDEN // HEADS) * HIDDEN] * LAYERS
    left = left_of([Keep()] * LAYERS)
    known = bonsai.no_evidence(2 * LAYERS)
    for number in range(3):
        priors = priors_with(model, tokens, left)
        removed = sum(cost * int((~mask).sum()) for cost, mask in zip(costs, left, strict=True))
        budget = int(whole * min(0.3, 0.12 * (number + 1))) - removed
        candidates = []
        for prior, cost in zip(priors, costs, strict=True):
            fixed = int(len(prior) * (1 - 2 * min(budget / (whole - removed), 0.5)))
            order = prior.argsort(descending=True)
            candidate = torch.ones(len(prior), dtype=torch.bool)
            candidate[order[:fixed]] = False
            candidates.append(candidate & (len(prior) > 1) & (cost <= budget))
        generator = torch.Generator().manual_seed(number * 3 + 1)
        masks = bonsai.draw_masks(
            [bonsai.sampling(*each) for each in zip(priors, candidates, strict=True)],
            candidates,
            budget / (whole - removed),
            8,
            generator,
            False,
            [0, 1] * LAYERS,
            [0, 0, 1, 1, 2, 2],
        )
        perplexities = []
        for place, mask in enumerate(masks):
            sub_model = narrowed(left, mask)
            perplexities.append(run.state.figure(f"round {number}, mask {place}", list)[0])
            assert perplexities[-1] == pytest.approx(perplexity_with(model, tokens, sub_model), rel=1e-4)
        chosen = torch.cat(candidates)
        modules = torch.cat([torch.full((len(prior),), place) for place, prior in enumerate(priors)])[chosen]
        shares = [torch.tensor([float((prior < unit).sum()) + float((prior == unit).sum()) / 2 for unit in prior]) / len(prior) for prior in priors]
        relative = [
            prior * (share[which].mean() / prior[which].mean()) if which.any() else share
            for prior, share, which in zip(priors, shares, candidates, strict=True)
        ]
        worth = torch.cat([cost * each for each, cost in zip(relative, costs, strict=True)]).double()[chosen]
        logs = -torch.tensor(perplexities, dtype=torch.float64).log()
        assert not bonsai.broken(logs).any()
        weights = bonsai.fit(masks[:, chosen], logs, worth, modules, modules % 2, known).weights
        gained, lost = masks[::2, chosen].double() * worth, masks[1::2, chosen].double() * worth
        stakes = logs[::2] - logs[1::2]
        of_modules = (gained - lost) / 2 @ torch.nn.functional.one_hot(modules, 2 * LAYERS).double()
        known += bonsai.Evidence(of_modules, stakes / stakes.square().mean().sqrt())
        kept = torch.ones_like(chosen)
        kept[chosen] = ~bonsai.select(weights, torch.tensor(costs)[modules], modules, [len(prior) - 1 for prior in priors], budget)
        before, left = left, narrowed(left, kept)
    for _ in range(8):  # what the candidates of the last round left over goes by the prior: here, channels
        rest = int(whole * 0.3) - sum(cost * int((~mask).sum()) for cost, mask in zip(costs, left, strict=True))
        if rest >= 3 * HIDDEN:
            assert rest < costs[1]
            places = [
                (float(each[unit]), module, unit)
                for module, each in enumerate(shares)
                for unit in range(len(each))
                if not module % 2 and not candidates[module][unit]
            ]
            _, module, unit = min(places)
            candidates[module][unit] = True
            left[module][before[module].nonzero()[unit]] = False
    assert [mask.tolist() for mask in left] == [mask.tolist() for mask in left_of(keeps)]
    removed = sum(cost * int((~mask).sum()) for cost, mask in zip(costs, left, strict=True))
    assert removed / whole == pytest.approx(0.3, abs=3 * HIDDEN / whole)
    assert [facts["masks"] for facts in facts_of(run)] == [16, 16, 16]


def narrowed(left: list[Tensor], mask: Tensor) -> list[Tensor]:
    rest = mask.tolist()
    return [torch.tensor([bool(stays and rest.pop(0)) for stays in module.tolist()]) for module in left]


# --------------------------------------------------------- whole modules that go


@pytest.mark.parametrize(
    ("model_type", "layout"), [("llama", "per_layer"), ("qwen2", "per_layer"), ("phi3", "uniform"), ("opt", "uniform"), ("gpt2", "uniform")]
)
def test_a_module_of_which_nothing_stays_loads_and_adds_nothing(model_type: str, layout: str, text: Path, tmp_path: Path) -> None:
    """Compared with the dense model whose outgoing weights are set to zero."""
    folder = make_dense(tmp_path / "dense", model_type)
    groups_fixed = model_type in ("opt", "gpt2")
    recipe = recipe_of(text, more={"output": {"layout": layout}}, units="ffn" if groups_fixed else "both")
    run = open_run(folder, recipe, tmp_path / "work")
    no_channels, no_groups = (torch.zeros(FFN, dtype=torch.bool),), torch.zeros(GROUPS, dtype=torch.bool)
    gone = Keep(channels=no_channels, groups=None if groups_fixed else no_groups)
    keeps: list[Keep | None] = [gone, Keep(channels=no_channels), gone] if layout == "per_layer" else [gone] * LAYERS
    run.folder.mkdir()
    found = slice_blocks(run, [Surveyed({}, {}, None, None)] * LAYERS, Choice(keeps))
    finish(run.folder, run.stream.source, [LayerReport(**block["layer"]) for block in found], recipe.output.layout, "source")
    model, dense = load_model(run.folder), load_model(folder)
    parameters = dict(dense.named_parameters())
    architecture = run.stream.architecture
    for index, keep in enumerate(keeps):
        assert keep is not None
        for linear, mask in ((architecture.mlp.down, keep.channels), (architecture.attention.output, keep.groups)):
            if mask is not None:
                parameters[f"{architecture.block_prefix(index)}{linear}.weight"].data.zero_()
    tokens = torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, atol=1e-5, rtol=1e-5)
    assert {block["layer"]["ffn_channels"] for block in found} == {1}


def test_the_released_code_may_empty_a_module_and_the_report_says_so(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one KV group a block, every round may take it."""
    monkeypatch.setattr(bonsai, "EPOCHS", 2)
    folder = make_dense(tmp_path / "dense", "llama", kv_heads=1)
    recipe = recipe_of(text, 0.5, mode="code", scope="local")
    run = open_run(folder, recipe, tmp_path / "work")
    pruned = prune(run, bonsai.PRUNER, target_of(recipe, count_parameters(run.stream.source, [])))
    assert [layer.kv_groups for layer in pruned.layers] == [1] * LAYERS
    assert any("groups of block 0, groups of block 1, groups of block 2: one unit is stored" in note for note in pruned.notes)
    finish(pruned.folder, run.stream.source, pruned.kept, "per_layer", "source", pruned.switches)
    model = load_model(pruned.folder)
    assert not any(layer.self_attn.o_proj.weight.any() for layer in model.model.layers)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False, pad_token_id=1).shape[0] == 1


def test_the_last_unit_of_a_module_stays_where_nothing_would_be_saved(folder: Path, text: Path, tmp_path: Path) -> None:
    keeps, _, run = choose(folder, recipe_of(text, 0.84, masks=0, prune_fraction=0.5), tmp_path)
    assert all(mask.any() for mask in left_of(keeps))
    left = sum(int(mask.sum()) * cost for mask, cost in zip(left_of(keeps), [3 * HIDDEN, 6 * HIDDEN * HIDDEN // HEADS] * LAYERS, strict=True))
    whole = count_parameters(run.stream.source, []).non_embedding
    dense = count_parameters(run.stream.source, []).decoder
    assert (dense - left) / whole == pytest.approx(0.84, abs=3 * HIDDEN / whole)
    with pytest.raises(RecipeError) as refused:
        choose(folder, recipe_of(text, 0.99), tmp_path / "too much")
    assert refused.value.code == "target_unreachable"


# ------------------------------------------------------------------ variants


@pytest.mark.parametrize("prior", ["wanda", "activation", "magnitude", "random"])
@pytest.mark.parametrize(("mode", "scope"), [("bayesian", "global"), ("bayesian", "local"), ("code", "global"), ("code", "local")])
def test_every_variant_comes_near_its_target(
    prior: str, mode: str, scope: str, folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bonsai, "EPOCHS", 2)
    masks = 8 if prior == "wanda" else 0
    keeps, notes, run = choose(folder, recipe_of(text, prior=prior, mode=mode, scope=scope, masks=masks), tmp_path)
    counts = [int(mask.sum()) for mask in left_of(keeps)]
    left = sum(count * cost for count, cost in zip(counts, [3 * HIDDEN, 6 * HIDDEN * HIDDEN // HEADS] * LAYERS, strict=True))
    dense = count_parameters(run.stream.source, [])
    reached = (dense.decoder - left) / dense.non_embedding
    if mode == "bayesian":
        assert reached == pytest.approx(0.3, abs=LAYERS * 3 * HIDDEN / dense.non_embedding)
    else:
        assert 0.28 <= reached < 0.3 + 0.12 * (scope == "local")
    if scope == "local":
        assert len(set(counts[::2])) == len(set(counts[1::2])) == 1
    assert bool(notes) == bool(masks)


@pytest.mark.parametrize("units", ["ffn", "attention", "both"])
def test_layers_stay_alike_in_the_uniform_layout(units: str, folder: Path, text: Path, tmp_path: Path) -> None:
    sparsity = {"ffn": 0.2, "attention": 0.12, "both": 0.25}[units]
    keeps, _, run = choose(folder, recipe_of(text, sparsity, {}, units=units, masks=8), tmp_path)
    counts = [int(mask.sum()) for mask in left_of(keeps)]
    assert len(set(counts[::2])) == len(set(counts[1::2])) == 1
    assert (counts[0] == FFN) == (units == "attention")
    assert (counts[1] == GROUPS) == (units == "ffn")
    left = sum(count * cost for count, cost in zip(counts, [3 * HIDDEN, 6 * HIDDEN * HIDDEN // HEADS] * LAYERS, strict=True))
    dense = count_parameters(run.stream.source, [])
    a_unit = 6 * HIDDEN * HIDDEN // HEADS if units == "attention" else 3 * HIDDEN
    assert (dense.decoder - left) / dense.non_embedding == pytest.approx(sparsity, abs=LAYERS * a_unit / 2 / dense.non_embedding + 1e-9)


def test_least_squares_can_follow(folder: Path, text: Path, tmp_path: Path) -> None:
    recipe = recipe_of(text, more=PER_LAYER | {"restoration": "least_squares"}, masks=8)
    run = open_run(folder, recipe, tmp_path)
    pruned = prune(run, bonsai.PRUNER, target_of(recipe, count_parameters(run.stream.source, [])))
    finish(pruned.folder, run.stream.source, pruned.kept, "per_layer", "source", pruned.switches)
    result = read_source(pruned.folder)
    reached = sparsities(count_parameters(read_source(folder), []), count_parameters(result, []))
    assert reached.non_embedding == pytest.approx(0.3, abs=0.01)
    dense, fitted = (BlockStream(source).block_tensors(0)["model.layers.0.mlp.down_proj.weight"] for source in (read_source(folder), result))
    assert not any(fitted[:, 0].equal(column) for column in dense.T)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sparsity": {"target_parameters": 1000}}, "give a fraction"),
        ({"sparsity": "2:4"}, "give a fraction"),
        ({"mode": "code", "more": {}}, "per_layer"),
        ({"masks": 6}, "too few"),
        ({"masks": 9}, "multiple of 2"),
        ({"more": PER_LAYER | {"allocation": "owl"}}, "nothing to allot"),
        ({"more": PER_LAYER | {"restoration": "swaps"}}, "least_squares"),
    ],
)
def test_what_rounds_can_not_do_is_refused(asked: dict[str, Any], message: str, text: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe_of(text, **asked)


def test_mixtures_are_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        check_recipe(recipe_of(text), read_source(make_dense(tmp_path, "mixtral")))
    assert refused.value.code == "method_does_not_fit"


# ------------------------------------------------------------ time, made up


class Clock:
    """Stands in for `time` and for perplexities: a sub-model takes seconds as it has parameters, and is the worse the more it lacks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, value: Callable[[int], float] = lambda parameters: 1e6 / parameters) -> None:
        self.now = 0.0
        self._value = value
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        monkeypatch.setattr(
            submodels, "run_variants", lambda stream, work, variants, done: [torch.tensor(self.perplexity(stream, variant)) for variant in variants]
        )
        monkeypatch.setattr(submodels, "perplexity_of", lambda stream, tokens, hidden, most: float(hidden))

    def perplexity(self, stream: BlockStream, variant: Variant) -> float:
        of_blocks = [sum(tensor.numel() for tensor in (variant.edit(index, stream.block_tensors(index)) or {}).values()) for index in range(len(stream))]
        self.now += (sum(of_blocks[variant.begun.block :]) + 320 * HIDDEN) * 1e-4
        return self._value(sum(of_blocks))


def test_the_eta_after_the_first_round_is_right_within_a_quarter(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = Clock(monkeypatch), []
    recipe = recipe_of(text, 0.5, prune_fraction=0.1, masks=20)
    _, _, run = choose(folder, recipe, tmp_path, lambda step: told.append((clock.now, step)))
    assert [facts["masks"] for facts in facts_of(run)] == [20] * 5
    assert told[-1][1].cost_left == pytest.approx(0)
    after_first = [(now, step) for now, step in told if step.pace is not None and step.number > 1]
    for now, step in after_first:
        assert step.rounds == 5
        assert step.pace is not None
        assert step.pace * step.cost_left == pytest.approx(clock.now - now, rel=0.25, abs=0.05 * clock.now)
    now, step = after_first[0]
    assert step.pace is not None
    assert step.pace * step.cost_left == pytest.approx(clock.now - now, rel=0.1)
    shares = [step.cost_done / (step.cost_done + step.cost_left) for _, step in told]
    assert shares == sorted(shares)
    seconds = [now / clock.now for now, _ in told]
    assert max(abs(share - spent) for share, spent in zip(shares, seconds, strict=True)) < 0.05


def test_a_time_budget_is_divided_among_rounds_by_their_cost(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    budget = 900.0
    keeps, notes, run = choose(folder, recipe_of(text, 0.5, prune_fraction=0.1, masks=400, time_budget=budget), tmp_path / "one")
    taken = [facts["masks"] for facts in facts_of(run)]
    seconds = [facts["seconds"] for facts in facts_of(run)]
    assert all(8 < count < 400 and count % 2 == 0 for count in taken)
    assert clock.now == pytest.approx(budget, rel=0.1)
    assert seconds == sorted(seconds, reverse=True)
    assert ", ".join(map(str, taken)) in notes[0]
    keeps, _, run = choose(folder, recipe_of(text, 0.5, prune_fraction=0.1, masks=400, time_budget=1e-3), tmp_path / "two")
    assert [facts["masks"] for facts in facts_of(run)] == [8] * 5
    assert any(keep.channels is not None for keep in keeps)


def test_a_round_ends_once_half_of_its_masks_choose_the_same(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, lambda parameters: 5.0)  # nothing to learn, so the prior chooses
    _, _, run = choose(folder, recipe_of(text, 0.2, masks=100), tmp_path / "bayesian")
    assert [facts["masks"] for facts in facts_of(run)] == [32, 32]
    _, _, run = choose(folder, recipe_of(text, 0.2, masks=46), tmp_path / "too few would be saved")
    assert [facts["masks"] for facts in facts_of(run)] == [46, 46]
    monkeypatch.setattr(bonsai, "EPOCHS", 1)
    _, _, run = choose(folder, recipe_of(text, 0.1, masks=40, mode="code"), tmp_path / "code")
    assert [facts["masks"] for facts in facts_of(run)] == [40]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_broken_sub_models_do_not_break_a_round(value: float, folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    Clock(monkeypatch, lambda parameters: value if next(calls) % 3 == 0 else 1e6 / parameters)
    _, _, run = choose(folder, recipe_of(text), tmp_path)
    assert [facts["masks"] for facts in facts_of(run)] == [12] * 3


# ---------------------------------------------------------------- durability


@pytest.mark.parametrize("time_budget", [None, 200.0])
def test_killed_at_any_mask_a_job_loses_one_and_ends_bit_identical(
    time_budget: float | None, folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that is made up, so that a time budget ends rounds where it did before."""
    clock, recipe = Clock(monkeypatch), recipe_of(text, masks=14, time_budget=time_budget)

    def bytes_of(work: Path, told: Callable[[RoundStep], None] = lambda step: None) -> tuple[dict[str, bytes], list[int]]:
        run = open_run(folder, recipe, work, told)
        pruned = prune(run, bonsai.PRUNER, target_of(recipe, count_parameters(run.stream.source, [])))
        return {file.name: file.read_bytes() for file in sorted(pruned.folder.iterdir())}, [facts["masks"] for facts in facts_of(run)]

    undisturbed, masks = bytes_of(tmp_path / "one")
    assert (max(masks) < 14) == (time_budget is not None)
    spent, clock.now = clock.now, 0.0

    def die_at(limit: int) -> Callable[[RoundStep], None]:
        count = itertools.count(1)

        def told(step: RoundStep) -> None:
            if next(count) == limit:
                raise KeyboardInterrupt

        return told

    for steps in (1, 2, 5, 9, 14):
        with pytest.raises(KeyboardInterrupt):
            bytes_of(tmp_path / "two", die_at(steps))
    assert bytes_of(tmp_path / "two") == (undisturbed, masks)
    assert clock.now == pytest.approx(spent)  # no sub-model was evaluated twice
    assert not (tmp_path / "two" / "sub-models").exists()


# ------------------------------------------------------------------- a whole job


def test_a_whole_job_runs_without_autograd_and_tells_its_rounds(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a backward pass")

    for owner, name in ((torch.Tensor, "backward"), (torch.autograd, "backward"), (torch.autograd, "grad")):
        monkeypatch.setattr(owner, name, refuse)
    tracked: list[bool] = []
    forward = torch.nn.functional.linear

    def linear(inputs: Tensor, *more: Any, **by_name: Any) -> Tensor:
        output: Tensor = forward(inputs, *more, **by_name)
        tracked.append(output.requires_grad)
        return output

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    events: list[dict[str, Any]] = []
    evaluation = {"source": str(text), "windows": 2, "sequence_length": 24, "speed": False}
    recipe = recipe_of(text, 0.2, {"evaluation": evaluation}, masks=8)
    report = pipeline.run(recipe, folder, tmp_path / "out", tmp_path / "work", events.append)
    assert tracked
    assert not any(tracked)
    assert report.sparsity.non_embedding == pytest.approx(0.2, abs=0.01)
    assert report.notes[0].startswith("Sub-models evaluated in each round: 8, 8. Kendall's tau")
    steps = [event for event in events if event["event"] == "progress" and "round" in event]
    assert {(event["round"], event["rounds"]) for event in steps} == {(1, 2), (2, 2)}
    assert [event["done"] for event in steps if event["round"] == 2 and "eta_seconds" in event][-8:] == list(range(1, 9))
    fractions = [event["fraction"] for event in events if event["event"] == "progress"]
    assert fractions == sorted(fractions)
    assert all(event["eta_seconds"] >= 0 for event in steps if "eta_seconds" in event)
