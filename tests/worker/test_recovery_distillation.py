"""What the dense model teaches, against naive computations."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from app.exceptions import RecipeError
from app.recovery import Distillation, Full
from app.source import read_source
from tests.models import load_model, make_checkpoint
from worker.blocks import BlockStream
from worker.recovery import distillation
from worker.recovery.base import Student
from worker.recovery.distillation import Teacher, check_size, divergence, likeliest, teach
from worker.recovery.retrain import load, training_loss
from worker.state import WalkState

WINDOWS = torch.randint(2, 300, (5, 12), generator=torch.Generator().manual_seed(1))


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def naive_kl(teacher: Tensor, student: Tensor, buckets: list[list[list[int]]], temperature: float) -> float:
    """τ² · KL of two (n, V) logits in float64, a mean over tokens, with each token's vocabulary gathered in buckets."""
    total = 0.0
    for of_teacher, of_student, sets in zip((teacher.double() / temperature).softmax(-1), (student.double() / temperature).softmax(-1), buckets, strict=True):
        for bucket in sets:
            p, q = of_teacher[bucket].sum(), of_student[bucket].sum()
            total += float(p * (p / q).log())
    return total / len(teacher) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 4, 30, 99])
def test_the_divergence_is_kl_with_the_unlikely_as_one(top_k: int, temperature: float) -> None:
    teacher, student = random_logits(2, 3, 30), random_logits(2, 3, 30, seed=1).requires_grad_(True)
    tokens, log_probs = likeliest(teacher, top_k, temperature)
    assert tokens.shape == (2, 3, min(top_k, 30))
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 3))
    buckets = []
    for row in teacher.flatten(0, 1):
        order = row.argsort(descending=True).tolist()
        buckets.append([[token] for token in order[:top_k]] + ([order[top_k:]] if top_k < 30 else []))
    value = divergence(student, tokens, log_probs, temperature)
    assert float(value.detach()) == pytest.approx(naive_kl(teacher.flatten(0, 1), student.detach().flatten(0, 1), buckets, temperature), rel=1e-5)
    value.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    if top_k >= 30:  # exact, its gradient too
        difference = (student.detach() / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
        torch.testing.assert_close(student.grad, difference * temperature / 6, atol=1e-6, rtol=1e-4)


def test_it_is_the_mean_that_the_authors_sum() -> None:
    """Bonsai's `batchmean` on (B, T, V) divides by B alone: T times as much."""
    teacher, student = random_logits(2, 7, 30), random_logits(2, 7, 30, seed=1)
    tokens, log_probs = likeliest(teacher, 30, 1.0)
    summed = torch.nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    assert float(divergence(student, tokens, log_probs, 1.0)) * 7 == pytest.approx(float(summed), rel=1e-5)


@pytest.mark.parametrize(("model_type", "blocks"), [("llama", [0, 1, 2]), ("gpt2", [0, 2])])
def test_the_teacher_is_the_dense_model(model_type: str, blocks: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "TOKENS_AT_ONCE", 24)  # two windows
    folder = make_checkpoint(tmp_path / "dense", model_type, tied=True)
    told: list[tuple[int, int]] = []
    config = Distillation(hidden=0.5, top_k=8)
    teacher = teach(BlockStream(read_source(folder)), WINDOWS, config, blocks, WalkState.open(tmp_path / "work", "job"), lambda *step: told.append(step))
    assert told == [(done, 9) for done in range(1, 10)]
    model = load_model(folder)
    outputs: list[Tensor] = []
    for block in model.get_submodule("transformer.h" if model_type == "gpt2" else "model.layers"):
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        logits = model(WINDOWS).logits
    tokens, log_probs = likeliest(logits, 8, 1.0)
    assert torch.equal(teacher.tokens.long(), tokens)
    torch.testing.assert_close(teacher.log_probs, log_probs, atol=1e-5, rtol=1e-5)
    assert teacher.hidden is not None
    torch.testing.assert_close(teacher.hidden, torch.stack([outputs[index] for index in blocks]), atol=1e-5, rtol=1e-5)


def test_a_teacher_that_is_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "TOKENS_AT_ONCE", 24)
    stream = BlockStream(read_source(make_checkpoint(tmp_path / "dense", "llama")))
    config, told = Distillation(hidden=1.0, top_k=4), []

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teach(stream, WINDOWS, config, [0, 1, 2], WalkState.open(tmp_path / "two", "job"), stop)
    resumed = teach(stream, WINDOWS, config, [0, 1, 2], WalkState.open(tmp_path / "two", "job"), lambda *step: told.append(step))
    assert told == [(done, 9) for done in range(4, 10)]  # the first two windows are not run again
    undisturbed = teach(stream, WINDOWS, config, [0, 1, 2], WalkState.open(tmp_path / "one", "job"), lambda done, total: None)
    assert torch.equal(resumed.tokens, undisturbed.tokens)
    assert torch.equal(resumed.log_probs, undisturbed.log_probs)
    assert resumed.hidden is not None
    assert undisturbed.hidden is not None
    assert torch.equal(resumed.hidden, undisturbed.hidden)


def test_a_teacher_that_stayed_on_another_machine_is_asked_again(tmp_path: Path) -> None:
    stream, config = BlockStream(read_source(make_checkpoint(tmp_path / "dense", "llama"))), Distillation(hidden=0.5, top_k=8)
    first = teach(stream, WINDOWS, config, [0, 1, 2], WalkState.open(tmp_path / "work", "job"), lambda done, total: None)
    shutil.rmtree(tmp_path / "work" / "teacher")
    with pytest.raises(KeyboardInterrupt):
        teach(stream, WINDOWS, config, [0, 1, 2], WalkState.open(tmp_path / "work", "job"), interrupt)
    again = teach(stream, WINDOWS, config, [0, 1, 2], WalkState.open(tmp_path / "work", "job"), lambda done, total: None)
    assert torch.equal(again.tokens, first.tokens)
    assert torch.equal(again.log_probs, first.log_probs)


def interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_the_loss_is_the_weighted_sum_of_its_terms(tmp_path: Path) -> None:
    """Of the right windows, the second micro-batch's too; and the gradient reaches the model through all of them."""
    dense = load_model(make_checkpoint(tmp_path / "dense", "llama", tied=True))
    source = read_source(make_checkpoint(tmp_path / "other", "llama", tied=True, seed=1))
    config = Full(distillation=Distillation(kl=0.7, hidden=0.3, top_k=320))
    assert config.distillation is not None
    teacher = teach(
        BlockStream(read_source(tmp_path / "dense")), WINDOWS, config.distillation, [0, 1, 2], WalkState.open(tmp_path / "work", "job"), lambda *_: None
    )
    student = Student(load(source, torch.device("cpu"), gradient_checkpointing=True), source, {}, list)
    student.model.train().requires_grad_(True)
    part = WINDOWS[2:4]
    loss = training_loss(student, config, teacher, part, 2)

    outputs: dict[str, list[Tensor]] = {"dense": [], "student": []}
    plain = load_model(tmp_path / "other")
    for name, model in (("dense", dense), ("student", plain)):
        for block in model.model.layers:
            block.register_forward_hook(lambda module, inputs, output, name=name: outputs[name].append(output))
    logits = plain(part).logits
    with torch.no_grad():
        of_teacher = dense(part).logits.log_softmax(-1)
    kl = (of_teacher.exp() * (of_teacher - logits.log_softmax(-1))).sum(-1).mean()
    hidden = sum((given - wanted).square().mean() for given, wanted in zip(outputs["student"], outputs["dense"], strict=True))
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()) + 0.7 * kl + 0.3 * hidden
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    loss.backward()
    expected.backward()
    for given, wanted in zip(student.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(given.grad, wanted.grad, atol=1e-4, rtol=1e-3)


def test_without_hidden_states_none_are_kept(tmp_path: Path) -> None:
    stream = BlockStream(read_source(make_checkpoint(tmp_path / "dense", "llama")))
    teacher = teach(stream, WINDOWS, Distillation(), [0, 1, 2], WalkState.open(tmp_path / "work", "job"), lambda done, total: None)
    assert isinstance(teacher, Teacher)
    assert teacher.hidden is None
    assert sorted(file.name for file in (tmp_path / "work" / "teacher").iterdir()) == ["log_probs.bin", "tokens.bin"]
    assert (tmp_path / "work" / "teacher" / "log_probs.bin").stat().st_size == 5 * 12 * 65 * 4


def test_too_much_to_keep_is_refused(tmp_path: Path) -> None:
    stream = BlockStream(read_source(make_checkpoint(tmp_path / "dense", "llama")))
    many = torch.zeros(1, dtype=torch.int64).expand(1 << 24, 16)
    check_size(stream, many, Distillation(top_k=16))
    with pytest.raises(RecipeError) as refused:
        check_size(stream, many, Distillation(top_k=16, hidden=0.01))
    assert refused.value.code == "teacher_too_large"
    assert "hidden to 0" in refused.value.hint
