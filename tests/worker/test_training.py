"""The training loop against a plain one, and a run that is broken off against one that is not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from app.exceptions import RecipeError
from app.recovery import Full
from worker.training import Step, Trained, rate, train

WIDTH = 6


def config(**values: Any) -> Full:
    return Full.model_validate({"sequence_length": 8, "steps": 12, "batch": 4, "micro_batch": 4, "learning_rate": 0.01, "held_out": None} | values)


def network(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, WIDTH))


def windows(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def run(
    model: nn.Module, settings: Full, work: Path, *, held_out: Tensor | None = None, stop_after: int | None = None, told: list[Step] | None = None
) -> Trained:
    """Teach a model to turn its input around; `stop_after` dies like a killed process after that step."""

    def loss(rows: Tensor, first: int = 0) -> Tensor:
        return mse_loss(model(rows), rows.flip(-1))

    def tell(step: Step) -> None:
        if told is not None:
            told.append(step)
        if step.done == stop_after:
            raise KeyboardInterrupt

    data = windows(settings.total_steps * settings.batch)
    return train(model, dict(model.named_parameters()), data, held_out, settings, loss, loss, work, tell)


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_the_rate_rises_and_falls_in_straight_lines() -> None:
    assert [rate(step, 10, 0.2) for step in range(10)] == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert rate(0, 4, 0.0) == 1.0
    assert rate(3, 4, 1.0) == 1.0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_adamw_with_clipped_gradients(weight_decay: float, tmp_path: Path) -> None:
    settings = config(steps=7, warmup=0.3, clip=0.05, weight_decay=weight_decay)
    trained, expected = network().double(), network().double()
    rows = windows(28).double()
    train(
        trained,
        dict(trained.named_parameters()),
        rows,
        None,
        settings,
        lambda part, first: mse_loss(trained(part), part.flip(-1)),
        lambda part: mse_loss(trained(part), part.flip(-1)),
        tmp_path,
    )
    squares = [torch.zeros_like(parameter) for parameter in expected.parameters()]
    means = [torch.zeros_like(parameter) for parameter in expected.parameters()]
    for step in range(7):
        part = rows[4 * step : 4 * step + 4]
        gradients = torch.autograd.grad(mse_loss(expected(part), part.flip(-1)), list(expected.parameters()))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        learning_rate = 0.01 * ((step + 1) / 2 if step < 2 else (7 - step) / 5)
        for parameter, gradient, mean, square in zip(expected.parameters(), gradients, means, squares, strict=True):
            clipped = gradient * min(1.0, 0.05 / (norm + 1e-6))
            mean.mul_(0.9).add_(0.1 * clipped)
            square.mul_(0.999).add_(0.001 * clipped**2)
            with torch.no_grad():
                parameter.mul_(1 - learning_rate * weight_decay * (parameter.dim() > 1))
                parameter.sub_(learning_rate * (mean / (1 - 0.9 ** (step + 1))) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    for got, wanted in zip(weights(trained), weights(expected), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-9)


def test_parts_of_a_step_add_up_to_the_whole(tmp_path: Path) -> None:
    whole, parts = network(), network()
    run(whole, config(), tmp_path / "whole")
    run(parts, config(micro_batch=3), tmp_path / "parts")
    for got, wanted in zip(weights(parts), weights(whole), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stop_after", [1, 4, 7, 12])
def test_a_run_that_is_broken_off_ends_with_the_same_bits(stop_after: int, tmp_path: Path) -> None:
    """With dropout, whose generator must go on too; and with the best parameters, which may be older than the break."""
    settings = config(checkpoint_every=3, learning_rate=0.05)
    held_out = windows(6, seed=2)
    undisturbed, broken, resumed = (network(dropout=0.3) for _ in range(3))
    torch.manual_seed(5)
    expected = run(undisturbed, settings, tmp_path / "one", held_out=held_out)
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        run(broken, settings, tmp_path / "two", held_out=held_out, stop_after=stop_after)
    torch.manual_seed(5 if stop_after < 3 else 99)  # before the first state is written it starts anew
    told: list[Step] = []
    found = run(resumed, settings, tmp_path / "two", held_out=held_out, told=told)
    assert [step.done for step in told] == list(range(stop_after // 3 * 3 + 1 if stop_after < 12 else 10, 13))
    assert [found.steps, found.before, found.best, found.worse] == [expected.steps, expected.before, expected.best, expected.worse]
    for got, wanted in zip(weights(resumed), weights(undisturbed), strict=True):
        assert torch.equal(got, wanted)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first, second = network(), network(seed=3)
    run(first, config(), tmp_path, held_out=windows(4, seed=2))
    told: list[Step] = []
    run(second, config(), tmp_path, held_out=windows(4, seed=2), told=told)
    assert not told
    for got, wanted in zip(weights(second), weights(first), strict=True):
        assert torch.equal(got, wanted)


def test_the_best_parameters_are_kept_and_patience_ends(tmp_path: Path) -> None:
    """A learning rate that ruins the model: nothing beats the start."""
    model = network()
    start = weights(model)
    told: list[Step] = []
    found = run(model, config(learning_rate=1.0, warmup=0.0, checkpoint_every=2, patience=2), tmp_path, held_out=windows(4, seed=2), told=told)
    assert found.steps == len(told) == 4
    assert found.before == found.best
    for got, wanted in zip(weights(model), start, strict=True):
        assert torch.equal(got, wanted)


def test_what_is_told_of_a_step(tmp_path: Path) -> None:
    told: list[Step] = []
    run(network(), config(steps=30, learning_rate=0.03), tmp_path, told=told)
    assert [(step.done, step.total) for step in told] == [(done, 30) for done in range(1, 31)]
    assert told[-1].loss < told[0].loss
    assert all(step.tokens_per_second > 0 for step in told)
    assert told[-1].eta_seconds == 0
    assert told[0].eta_seconds > 0


def test_a_loss_that_is_not_finite_is_said(tmp_path: Path) -> None:
    model = network()
    with pytest.raises(RecipeError) as refused:
        train(
            model,
            dict(model.named_parameters()),
            windows(48),
            None,
            config(),
            lambda rows, first: model(rows).sum() * math.inf,
            lambda rows: rows.sum(),
            tmp_path,
        )
    assert refused.value.code == "training_diverged"
    assert refused.value.pointer == "/recovery/learning_rate"
