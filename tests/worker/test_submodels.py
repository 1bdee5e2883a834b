"""Sub-models, one by one and side by side: what they are, that nothing is computed twice, and what a kill loses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models import make_text
from tests.rounds import HIDDEN, LAYERS, choose, left_of, make_dense, open_run, recipe_of
from worker import submodels
from worker.blocks import BlockStream
from worker.evaluation import Variant, embed, perplexity, perplexity_of, run_up_to, run_variants
from worker.pruners import bonsai
from worker.slicing import slice_aligned, slice_kept
from worker.structured import Keep
from worker.submodels import SubModel, evaluated
from worker.walk import Pruning, RoundStep


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"), words=3000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense(tmp_path_factory.mktemp("dense"), "llama")


def perplexities(run: Pruning, work: Path, variants: Sequence[Variant], most: float = math.inf) -> list[float]:
    assert run.tokens is not None
    return [perplexity_of(run.stream, run.tokens, hidden, most) for hidden in run_variants(run.stream, work, variants)]


def test_what_is_embedded_once_serves_every_sub_model_and_a_broken_one_ends_early(folder: Path, text: Path, tmp_path: Path) -> None:
    run = open_run(folder, recipe_of(text), tmp_path / "work")
    tokens, passed = run.tokens, []
    assert tokens is not None
    (tmp_path / "embedded").mkdir()
    embedded = embed(run.stream, tokens, tmp_path / "embedded")
    dense = Variant(lambda index, tensors: tensors, embedded)
    alone = perplexity(run.stream, tokens, tmp_path / "work")
    for _ in range(2):
        assert perplexities(run, tmp_path, [dense]) == [alone]

    def broken(index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        passed.append(index)
        return {name: tensor * (math.inf if index == 1 and "down" in name else 1) for name, tensor in tensors.items()}

    found = perplexities(run, tmp_path, [Variant(broken, embedded), dense])
    assert math.isnan(found[0])
    assert found[1] == alone
    assert passed == [0, 1]
    without_blocks = Variant(lambda index, tensors: None, embedded)
    assert run_up_to(LAYERS, run.stream, without_blocks, tmp_path / "work", tmp_path).hidden.equal(embedded.hidden)


def test_what_is_certain_to_be_beyond_a_limit_is_not_computed_to_its_end(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(folder, recipe_of(text), tmp_path / "work")
    tokens, parts = run.tokens, []
    assert tokens is not None
    of_stream = run.stream.logits

    def counted(hidden: Tensor) -> Tensor:
        parts.append(len(hidden))
        return of_stream(hidden)

    (tmp_path / "embedded").mkdir()
    dense = Variant(lambda index, tensors: tensors, embed(run.stream, tokens, tmp_path / "embedded"))
    value = perplexity(run.stream, tokens, tmp_path / "work")
    monkeypatch.setattr(run.stream, "logits", counted)
    assert perplexities(run, tmp_path, [dense], value * 1.001) == [value]
    assert len(parts) == len(tokens)
    assert perplexities(run, tmp_path, [dense], value * 0.999) == [math.inf]  # which shows at the last window
    assert len(parts) == 2 * len(tokens)
    assert perplexities(run, tmp_path, [dense], value**0.2) == [math.inf]
    assert len(parts) == 2 * len(tokens) + 1


def test_what_blocks_before_a_part_give_is_computed_once_for_all_its_sub_models(folder: Path, text: Path, tmp_path: Path) -> None:
    run = open_run(folder, recipe_of(text), tmp_path / "work")
    tokens, passed = run.tokens, []
    assert tokens is not None

    def edit(index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        passed.append(index)
        return {name: tensor * (index + 1) / LAYERS for name, tensor in tensors.items()}

    for name in ("embedded", "begun"):
        (tmp_path / name).mkdir()
    embedded = Variant(edit, embed(run.stream, tokens, tmp_path / "embedded"))
    begun = Variant(edit, run_up_to(2, run.stream, embedded, tmp_path / "begun", tmp_path))
    assert passed == [0, 1]
    [value] = perplexities(run, tmp_path, [begun])
    assert passed == [0, 1, 2]
    assert perplexities(run, tmp_path, [embedded]) == [value]
    assert perplexities(run, tmp_path, [begun]) == [value]


def test_a_block_is_read_once_for_sub_models_that_run_side_by_side(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a GPU can't hold the model: the same perplexities and the same choice; what an attempt that ran them one by one had measured isn't measured again."""
    read: list[int] = []
    block_tensors = BlockStream.block_tensors

    def counted(stream: BlockStream, index: int) -> dict[str, Tensor]:
        read.append(index)
        return block_tensors(stream, index)

    def chosen(work: Path, told: Callable[[RoundStep], None] = lambda step: None) -> tuple[list[Tensor], list[list[float]], int]:
        read.clear()
        keeps, _, run = choose(folder, recipe_of(text), work, told)
        return left_of(keeps), perplexities_of(work, run), len(read)

    def perplexities_of(work: Path, run: Pruning) -> list[list[float]]:
        names = [[f"round {number}, mask {place}" for place in range(12)] for number in range(3)]
        return [[run.state.figure(name, lambda: pytest.fail("not measured"))[0] for name in of_round] for of_round in names]

    def die(step: RoundStep) -> None:
        if step.number == 2 and step.done == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(BlockStream, "block_tensors", counted)
    alone, values, reads = chosen(tmp_path / "alone")
    with pytest.raises(KeyboardInterrupt):
        chosen(tmp_path / "killed", die)
    holding = BlockStream.holding_blocks
    monkeypatch.setattr(BlockStream, "holding_blocks", lambda stream: holding(stream, room=0))
    together, same, fewer = chosen(tmp_path / "together")
    assert same == values
    assert fewer < 0.6 * reads  # those of the priors among them; three at once, as there are three blocks
    again, same, fewest = chosen(tmp_path / "killed")
    assert same == values
    assert fewest < fewer
    for mask, other, third in zip(together, again, alone, strict=True):
        assert mask.equal(other)
        assert mask.equal(third)


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "phi3"])
def test_sub_models_have_widths_that_are_quick_to_multiply_and_compute_the_same(model_type: str, text: Path, tmp_path: Path) -> None:
    run = open_run(make_dense(tmp_path / "dense", model_type), recipe_of(text, more={}, units="ffn"), tmp_path / "work")
    tokens, stream, architecture = run.tokens, run.stream, run.stream.architecture
    assert tokens is not None
    (tmp_path / "embedded").mkdir()
    embedded, dense = embed(stream, tokens, tmp_path / "embedded"), stream.block_tensors(0)
    width, down = architecture.ffn_width(stream.source.config, 0), f"{architecture.block_prefix(0)}{architecture.mlp.down}.weight"
    for lost in (1, 5, 9, width - 3, width):
        keep = Keep(channels=(torch.arange(width) * 7 % width >= lost,))
        exact, aligned = (Variant(functools.partial(cut, run, keep=keep), embedded) for cut in (slice_kept, slice_aligned))
        whole = Variant(lambda index, tensors: tensors, embedded)
        values = perplexities(run, tmp_path, [exact, aligned, whole])
        assert values[1] == pytest.approx(values[0], rel=1e-6)
        assert values[2] != pytest.approx(values[0], rel=1e-5)
        found = slice_aligned(run, 0, dense, keep)[down].numel() // HIDDEN
        assert found == (min(math.ceil((width - lost) / 8) * 8, width) if lost < width else 1)


@pytest.mark.parametrize(("method", "parts"), [({}, 4), ({"mode": "code"}, 1), ({"scope": "local", "units": "ffn"}, 1)])
def test_a_pair_of_sub_models_lacks_units_of_one_part_of_the_model(
    method: dict[str, Any], parts: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part in its turn, and no block before it runs again."""
    monkeypatch.setattr(bonsai, "EPOCHS", 1)
    begun_at: list[int] = []
    recipe = recipe_of(text, 0.1, masks=16, **method)

    def watched(stream: BlockStream, work: Path, variants: list[Variant], done: Callable[[int, Sequence[Tensor]], None]) -> list[Tensor]:
        [variant] = variants

        def lacks_units(index: int) -> bool:
            dense = stream.block_tensors(index)
            return any(not torch.equal(tensor, dense[name]) for name, tensor in (variant.edit(index, dense) or {}).items())

        lacks = [index for index in range(6) if lacks_units(index)]
        begun_at.append(variant.begun.block)
        assert {index * parts // 6 for index in lacks} == {variant.begun.block * parts // 6}
        return run_variants(stream, work, variants, done)

    monkeypatch.setattr(submodels, "run_variants", watched)
    choose(make_dense(tmp_path / "dense", "llama", layers=6), recipe, tmp_path / "work")
    assert begun_at == ([0, 0, 2, 2, 3, 3, 5, 5] * 2 if parts == 4 else [0] * 16)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_kill_loses_the_work_of_one_sub_model_at_most(side_by_side: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at every block and at every head of six sub-models, of which four, then two, run side by side; what it goes on with gives the same perplexities."""
    layers, starts = 9, [0, 2, 4, 7]
    monkeypatch.setattr(submodels, "SIDE_BY_SIDE", 4)
    dense = make_dense(tmp_path / "dense", "llama", layers=layers)
    done: list[str] = []
    last = math.inf  # of what is done before the kill

    def do(what: str) -> None:
        if len(done) == last:
            raise KeyboardInterrupt
        done.append(what)

    def head(*given: Any) -> float:
        do("head")
        return perplexity_of(*given)

    def less(number: int, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        do("block")
        return {name: tensor * (1 - (number + 1) / 50 if index >= starts[number % 4] else 1) for name, tensor in tensors.items()}

    def perplexities_in(work: Path) -> list[float]:
        done.clear()
        run = open_run(dense, recipe_of(text), work)
        sub_models = (SubModel(str(number), functools.partial(less, number), number % 4) for number in range(6))
        return [value for value, _ in evaluated(run, lambda index, tensors: tensors, sub_models, starts, side_by_side=side_by_side)]

    monkeypatch.setattr(submodels, "perplexity_of", head)
    undisturbed = perplexities_in(tmp_path / "undisturbed")
    assert len(set(undisturbed)) == 6
    work, lost = [*done], []
    for moment in range(len(work)):
        last = moment
        with pytest.raises(KeyboardInterrupt):
            perplexities_in(tmp_path / str(moment))
        before, last = [*done], math.inf
        assert perplexities_in(tmp_path / str(moment)) == undisturbed
        both = before + done
        lost.append((both.count("block") - work.count("block"), both.count("head") - work.count("head")))
    assert all(0 <= blocks <= layers for blocks, _ in lost)
    assert max(lost) >= (layers // 4, 0)
    assert {heads for _, heads in lost} == {0}
