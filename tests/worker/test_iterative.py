"""Magnitude pruning in rounds: each prunes what the one before trained; killed anywhere, it ends as an undisturbed one."""

from __future__ import annotations

import json
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from app.estimate import estimate, phase_costs
from app.exceptions import RecipeError
from app.recipe import Recipe
from app.recovery import Full, LoRA, RecoveryConfig
from app.report import Report
from app.source import read_source
from tests.models import load_model, make_checkpoint, make_text
from tests.worker.test_pipeline import engine, finished, hashes
from worker.checkpoint import read_masks
from worker.data import tokenize
from worker.pipeline import run
from worker.progress import Progress
from worker.pruners.magnitude import fractions_of_rounds
from worker.recovery.retrain import require_room
from worker.recovery.text import training_text
from worker.training import Step

ROUNDS, SPARSITY = 3, 0.6
TRAINING: dict[str, Any] = {"source": "mine", "sequence_length": 16, "steps": 4, "batch": 4, "checkpoint_every": 2, "learning_rate": 0.01, "held_out": 4}
RECOVERIES: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "taught": {"name": "full", "distillation": {"kl": 0.5, "top_k": 16}},
    "perp": {"name": "perp", "train": "all", "rank": 2},
    "lora": {"name": "lora", "rank": 2, "dropout": 0.1, "head": True},
    "reconstruct": {"name": "perp", "train": "published", "mode": "reconstruct", "samples": 8, "rank": 2},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"), words=3000)


def recipe_of(recovery: dict[str, Any] | None = None, rounds: int = ROUNDS, **more: Any) -> dict[str, Any]:
    recovery = {"name": "full"} if recovery is None else recovery
    return {"method": {"name": "magnitude", "rounds": rounds}, "sparsity": SPARSITY, "recovery": TRAINING | recovery, "evaluation": None, **more}


def linears_of(folder: Path) -> dict[str, Tensor]:
    tensors = {name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()}
    return {name: tensor for name, tensor in tensors.items() if name.endswith("proj.weight")}


def masks_of(folder: Path) -> dict[str, Tensor]:
    return {name: mask for file in sorted(folder.glob("masks-*")) for name, mask in read_masks(file).items()}


@pytest.mark.parametrize(("fraction", "rounds"), [(0.5, 1), (0.5, 2), (0.875, 3), (0.9, 7)])
def test_every_round_removes_the_same_share_of_what_is_left(fraction: float, rounds: int) -> None:
    fractions = fractions_of_rounds(fraction, rounds)
    assert (len(fractions), fractions[-1]) == (rounds, fraction)
    left = [1.0, *(1 - gone for gone in fractions)]
    shares = [after / before for before, after in pairwise(left)]
    assert shares == pytest.approx([shares[0]] * rounds)


def test_it_is_what_pruning_and_training_in_turn_give(unverified: None, text: Path, tmp_path: Path) -> None:
    """A whole model of transformers, pruned by sorting each matrix and trained by hand, three times over."""
    dense = make_checkpoint(tmp_path / "dense", "llama", layers=2)
    recovery = {"held_out": None, "micro_batch": 2, "weight_decay": 0.1}
    recipe = Recipe.model_validate(recipe_of({"name": "full"} | recovery))
    assert recipe.recovery is not None
    report = run(recipe, dense, tmp_path / "out", tmp_path / "work", lambda event: None, {"mine": text})
    windows = training_text(tokenize(dense, "mine", {"mine": text}), recipe.recovery).windows

    model = load_model(dense).float()
    linears = {name: parameter for name, parameter in model.named_parameters() if name.endswith("proj.weight")}
    zeros: list[float] = []
    for number in range(1, ROUNDS + 1):
        sparsity = 1 - (1 - SPARSITY) ** (number / ROUNDS)
        masks = {}
        for name, weight in linears.items():
            gone = weight.detach().abs().flatten().argsort()[: round(weight.numel() * sparsity)]
            masks[name] = torch.ones(weight.numel(), dtype=torch.bool).index_fill(0, gone, False).view(weight.shape)
            weight.data *= masks[name]
        train_by_hand(model, {name: (linears[name], mask) for name, mask in masks.items()}, windows)
        zeros.append(sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values()))

    result = linears_of(tmp_path / "out" / "checkpoint")
    assert result.keys() == linears.keys()
    for name, weight in linears.items():
        torch.testing.assert_close(result[name], weight.detach(), atol=2e-5, rtol=1e-4)
        assert torch.equal(result[name] == 0, weight == 0)
    assert report.rounds is not None
    assert [each.sparsity for each in report.rounds] == zeros
    assert report.sparsity.decoder == zeros[-1]


def train_by_hand(model: Any, masked: dict[str, tuple[Tensor, Tensor]], windows: Tensor) -> None:
    """Four steps of four windows, the first of which warms up over nothing: 10 % of four steps are none."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01)
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (4 - step) / 4
        batch = windows[step * 4 : step * 4 + 4]
        logits = model(batch).logits
        cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1)).backward()
        for weight, mask in masked.values():
            assert weight.grad is not None
            weight.grad *= mask
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("compare", ["matrix", "row"])
@pytest.mark.parametrize(
    ("model_type", "recovery", "dtype"),
    [("llama", "perp", "float32"), ("opt", "lora", "float32"), ("gpt2", "full", "float16"), ("qwen3", "reconstruct", "bfloat16")],
)
def test_every_round_has_its_sparsity_and_what_went_stays_away(
    model_type: str, recovery: str, dtype: str, compare: str, unverified: None, text: Path, tmp_path: Path
) -> None:
    dense = make_checkpoint(tmp_path / "dense", model_type, tied=True, layers=2)
    recipe = Recipe.model_validate(
        recipe_of(RECOVERIES[recovery], output={"dtype": dtype}) | {"method": {"name": "magnitude", "rounds": 3, "compare": compare}}
    )
    masks: list[dict[str, Tensor]] = []

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "phase" and event["phase"] == "recover":
            number = len(masks) + 1
            masks.append(masks_of((tmp_path / "out" if number == ROUNDS else tmp_path / "work" / f"round-{number}") / "checkpoint"))

    report = run(recipe, dense, tmp_path / "out", tmp_path / "work", emit, {"mine": text})
    assert len(masks) == ROUNDS
    for number, of_round in enumerate(masks, 1):
        sparsity = 1 - (1 - SPARSITY) ** (number / ROUNDS)
        for name, mask in of_round.items():
            rows = mask.T if model_type == "gpt2" else mask
            if compare == "row":
                assert (~rows).sum(dim=1).unique().tolist() == [round(rows.shape[1] * sparsity)]
            else:
                assert int((~mask).sum()) == round(mask.numel() * sparsity)
            assert number == 1 or not (mask & ~masks[number - 2][name]).any()
    assert report.rounds is not None
    counted = [sum(int((~mask).sum()) for mask in of_round.values()) / sum(mask.numel() for mask in of_round.values()) for of_round in masks]
    assert [each.sparsity for each in report.rounds] == pytest.approx(counted, abs=2e-4)  # float16 may round a weight to zero
    assert report.parameters_before.decoder_zeros == 0
    assert report.parameters_after.decoder_zeros >= sum(int((~mask).sum()) for mask in masks[-1].values())
    assert all(each.recovery.steps == 4 for each in report.rounds)
    assert [note for note in report.notes if note.startswith("After round ")] == [
        note for note in report.notes if "of the decoder's linear weights are zero" in note
    ]
    assert not (tmp_path / "work").exists()


# ---------------------------------------------------------------------------- kills

Moment = tuple[str, int]  # (phase, 0): it begins; (phase, done): so much of it is done


class Killed(BaseException):
    """Ends a run as nothing that it handles."""


def attempt(recipe: Recipe, dense: Path, out: Path, texts: dict[str, Path], moments: list[Moment]) -> tuple[list[dict[str, Any]], Report | None]:
    """Run until the last of moments that come after each other, or to the end where there are none; what was told, and the report."""
    left, events = list(moments), list[dict[str, Any]]()

    def emit(event: dict[str, Any]) -> None:
        events.append(event)
        if left and event["event"] in ("phase", "progress") and (event["phase"], event.get("done", 0)) == left[0]:
            left.pop(0)
            if not left:
                raise Killed

    try:
        report = run(recipe, dense, out, out / ".work", emit, texts)
    except Killed:
        return events, None
    assert not moments
    return events, report


def logged(events: list[dict[str, Any]]) -> list[str]:
    return [event["message"] for event in events if event["event"] == "log"]


def done_in(events: list[dict[str, Any]], phase: str) -> list[int]:
    return [event["done"] for event in events if event["event"] == "progress" and event["phase"] == phase]


KILLS: list[list[Moment]] = [
    [("prune", 1)],
    [("recover", 3)],
    [("recover", 4), ("prune", 2)],
    [("write", 0)],
    [("recover", 3)],
    [("recover", 4), ("prune", 1)],
    [("evaluate_pruned", 0)],
    [("recover", 3)],
]
FEW_KILLS: list[list[Moment]] = [[("recover", 4), ("recover", 3)], [("recover", 4), ("recover", 3)]]  # in the second round and in the third
TOLD = [  # by the attempts that are killed so, and by the last
    ["1 of 3 prunes to 26.32%."],
    ["1 of 3 prunes to 26.32%.", "1 block"],
    ["1 of 3 prunes to 26.32%.", "2 blocks", "2 of 3 prunes to 45.71%."],
    ["1 round", "2 of 3 prunes to 45.71%.", "2 blocks"],
    ["1 round", "2 of 3 prunes to 45.71%.", "2 blocks"],
    ["1 round", "2 of 3 prunes to 45.71%.", "2 blocks", "3 of 3 prunes to 60.00%."],
    ["2 rounds and 1 block", "3 of 3 prunes to 60.00%."],
    ["2 rounds and 2 blocks", "3 of 3 prunes to 60.00%."],
    ["2 rounds and 2 blocks", "3 of 3 prunes to 60.00%."],
]


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_a_job_that_is_broken_off_in_every_round_ends_as_an_undisturbed_one(recovery: str, unverified: None, text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", "llama", tied=True, layers=2, dtype=torch.bfloat16)
    evaluation = {"source": "other", "windows": 2, "sequence_length": 16, "speed": False}
    recipe = Recipe.model_validate(recipe_of(RECOVERIES[recovery], evaluation=evaluation))
    texts = {"mine": text, "other": make_text(tmp_path, words=500, seed=1)}
    events, report = attempt(recipe, dense, tmp_path / "one", texts, [])
    in_round = ["prune", "write", *(["teach"] if recovery == "taught" else []), "recover"]
    last = [phase for name in in_round for phase in ((name, "evaluate_pruned") if name == "write" else (name,))]
    phases = ["load", "evaluate_dense", *in_round, *in_round, *last, "evaluate"]
    assert [event["phase"] for event in events if event["event"] == "phase"] == [*phases, "verify"]
    fractions = [event["fraction"] for event in events if event["event"] == "progress"]
    assert fractions == sorted(fractions)
    steps = [event for event in events if event["event"] == "progress" and event["phase"] == "recover"]
    assert len(steps) == ROUNDS * steps[0]["total"]
    seconds = [step["eta_seconds"] for step in steps]  # in tenths, of which the last step of so small a model may leave none
    assert min(seconds) >= 0
    assert max(seconds) > 0
    assert report is not None
    assert report.rounds is not None
    assert report.rounds[-1].recovery == report.recovery

    told = []
    for moments in KILLS if recovery == "full" else FEW_KILLS:
        events, _ = attempt(recipe, dense, tmp_path / "two", texts, moments)
        told.append(logged(events))
    events, again = attempt(recipe, dense, tmp_path / "two", texts, [])
    told.append(logged(events))
    if recovery == "full":
        parts = [
            [part.removeprefix("Round ").removeprefix("Goes on after ").removesuffix(" of an earlier attempt, all verified.") for part in each] for each in told
        ]
        assert parts == TOLD
    assert done_in(events, "recover")[0] > 1
    assert done_in(events, "teach") == []
    assert again is not None
    assert again.resumed_at_round == 2
    varying = {"seconds", "peak_memory_bytes", "resumed_at_block", "resumed_at_round", "recovery", "rounds"}
    assert again.model_dump(exclude=varying) == report.model_dump(exclude=varying)
    assert again.rounds is not None
    timed = {"recovery": {"seconds", "peak_memory_bytes"}}
    assert [each.model_dump(exclude=timed) for each in again.rounds] == [each.model_dump(exclude=timed) for each in report.rounds]
    assert hashes(tmp_path / "two" / "checkpoint") == hashes(tmp_path / "one" / "checkpoint")
    assert not (tmp_path / "two" / ".work").exists()


def test_an_engine_that_is_killed_in_the_second_round_ends_as_an_undisturbed_one(unverified: None, text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", "llama", layers=2)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_of()))
    run(Recipe.model_validate(recipe_of()), dense, tmp_path / "one", tmp_path / "work", lambda event: None, {"mine": text})
    killed, rounds = engine(recipe, dense, tmp_path / "two", text), 0
    assert killed.stdout is not None
    for line in killed.stdout:
        event = json.loads(line)
        rounds += event["event"] == "log" and event["message"].startswith("Round ")
        if rounds == 2 and event["event"] == "progress" and event["phase"] == "recover" and event["done"] == 3:
            killed.send_signal(signal.SIGKILL)
            break
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    code, events, stderr = finished(engine(recipe, dense, tmp_path / "two", text))
    assert code == 0, stderr
    assert done_in(events, "recover") == [3, 4, 1, 2, 3, 4]
    assert hashes(tmp_path / "two" / "checkpoint") == hashes(tmp_path / "one" / "checkpoint")
    assert "After round 3, 60.0" in (tmp_path / "two" / "checkpoint" / "README.md").read_text()


def test_a_damaged_round_is_not_gone_on_with(unverified: None, text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", "llama", layers=1)
    recipe = Recipe.model_validate(recipe_of(rounds=2))
    run(recipe, dense, tmp_path / "one", tmp_path / "work", lambda event: None, {"mine": text})
    texts = {"mine": text}
    attempt(recipe, dense, tmp_path / "two", texts, [("recover", 4), ("prune", 0)])
    shard = next((tmp_path / "two" / ".work" / "round-1" / "checkpoint").glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    events, _ = attempt(recipe, dense, tmp_path / "two", texts, [])
    assert logged(events)[0] == f"Started anew, because of the earlier attempt round-1/checkpoint/{shard.name} is damaged."
    assert hashes(tmp_path / "two" / "checkpoint") == hashes(tmp_path / "one" / "checkpoint")


# -------------------------------------------------------------- what is told, and refused


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"recovery": None}, "give recovery"),
        ({"sparsity": "2:4"}, "no steps lead to the pattern 2:4"),
        ({"allocation": "owl"}, "leave allocation out"),
        ({"allocation": {"name": "given", "sparsities": [0.6]}}, "leave allocation out"),
        ({"restoration": "swaps"}, "leave restoration out"),
        ({"sparsity": {"target_bytes": 1000}}, "no budget bounds its result"),
        ({"method": {"name": "magnitude", "rounds": 0}}, "greater than or equal to 1"),
        ({"method": {"name": "wanda", "rounds": 2}}, "Extra inputs"),
    ],
)
def test_what_rounds_can_not_do_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate(recipe_of() | values)


def test_one_round_asks_for_no_recovery() -> None:
    assert Recipe.model_validate(recipe_of(rounds=1) | {"recovery": None, "sparsity": "2:4", "restoration": "swaps"}).rounds == 1


def test_all_rounds_are_counted_beforehand(tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "model", "llama"))
    evaluation = {"windows": 2, "sequence_length": 16, "speed": False}
    one, three = (Recipe.model_validate(recipe_of(RECOVERIES["taught"], rounds, evaluation=evaluation)) for rounds in (1, 3))
    repeated = {phase: cost / phase_costs(one, source)[phase] for phase, cost in phase_costs(three, source).items()}
    assert repeated == dict.fromkeys(repeated, 1) | {"prune": 3, "write": 3, "recover": 3}
    assert (estimate(one, source).rounds, estimate(three, source).rounds, estimate(three, source).sub_models) == (None, 3, None)


def test_progress_counts_phases_that_come_again() -> None:
    events: list[dict[str, Any]] = []
    progress = Progress(events.append)
    progress.plan({"prune": 3.0, "recover": 6.0, "evaluate": 1.0})
    progress.skip("prune", 1 / 3)
    progress.skip("recover", 1 / 3)
    for _ in range(2):
        with progress.phase("prune", 1 / 3):
            progress.step(1, 1)
        with progress.phase("recover", 1 / 3):
            progress.train_step(Step(done=1, total=2, loss=1.0, tokens_per_second=1.0, seconds=1.0))
    with progress.phase("evaluate"):
        progress.step(1, 1)
    told = [event for event in events if event["event"] == "progress"]
    assert [event["fraction"] for event in told] == [0.4, 0.5, 0.7, 0.8, 1.0]
    # A step costs 1 and takes a second: one is left of this round, then a round (3) and the evaluation (1).
    assert [event["eta_seconds"] for event in told if "eta_seconds" in event] == [5, 2]


# ------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("method", "sparsity", "recovery", "needed"),
    [
        ("magnitude", 0.5, Full(), lambda all_, decoder, rest: 16 * all_ - 6 * decoder),  # gradients and moments of zeros don't count
        ("wanda", "2:4", Full(), lambda all_, decoder, rest: 16 * all_ - 6 * decoder),
        ("depth", 0.25, Full(), lambda all_, decoder, rest: 16 * (all_ - rest / 2)),
        ("flap", 0.9, Full(), lambda all_, decoder, rest: 16 * (all_ - rest)),
        ("depth", 0.25, LoRA(), lambda all_, decoder, rest: 4 * (all_ - rest / 2)),
    ],
)
def test_a_training_that_can_not_fit_is_refused_before_anything_is_pruned(
    method: str, sparsity: Any, recovery: RecoveryConfig, needed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read_source(make_checkpoint(tmp_path / "model", "llama"))
    recipe = Recipe.model_validate({"method": method, "sparsity": sparsity, "recovery": recovery.model_dump(), "evaluation": None})
    decoder = 3 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48)
    rest = decoder + 3 * 2 * 32 + 32
    bytes_needed = round(needed(rest + 2 * 320 * 32, decoder, rest))
    monkeypatch.setattr("worker.recovery.retrain.anonymous_bytes", lambda: 0)
    require_room(recipe, source, bytes_needed)
    with pytest.raises(RecipeError) as refused:
        require_room(recipe, source, bytes_needed - 1)
    assert refused.value.code == "training_does_not_fit"


def test_what_streams_or_is_bounded_otherwise_needs_no_room(tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "model", "llama"))
    base = {"method": "cfsp", "sparsity": 0.3, "evaluation": None}
    for more in ({}, {"recovery": RECOVERIES["reconstruct"]}, {"recovery": "full", "sparsity": {"target_bytes": 100_000}}):
        require_room(Recipe.model_validate(base | more), source, 0)


def test_a_job_whose_training_can_not_fit_ends_at_once(text: Path, tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "dense", "llama")
    events: list[dict[str, Any]] = []
    with pytest.raises(RecipeError) as refused:
        run(Recipe.model_validate(recipe_of()), dense, tmp_path / "out", tmp_path / "work", events.append, {"mine": text}, memory_allowed=1000)
    assert refused.value.code == "training_does_not_fit"
    assert [event["phase"] for event in events] == ["load"]
