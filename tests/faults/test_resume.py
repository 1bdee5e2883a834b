"""The engine itself, killed with SIGKILL in every phase and at random moments: run again, it ends with the very bytes of an undisturbed run.

A chain is one job in one work directory: attempts that are killed, each after the other, and a last one that may end. Chains run side by side, since most of
an attempt is the import of transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from app.exceptions import EspalierError
from app.report import Report
from tests.models import make_checkpoint, make_text
from worker.state import WalkState

REPOSITORY = Path(__file__).parents[2]
LAYERS = 8
INCREASE = 0.1  # of perplexity

COMMON = {
    "calibration": {"source": "mine", "samples": 16, "sequence_length": 64},
    "evaluation": {"source": "mine", "windows": 2, "sequence_length": 32, "speed": False},
}
RECIPES: dict[str, dict[str, Any]] = {
    "structured": {"method": "cfsp", "sparsity": 0.4, "restoration": "least_squares", "output": {"layout": "per_layer"}},
    "masked": {"method": "wanda", "sparsity": 0.5, "allocation": "owl"},
    "budget": {"method": "cfsp", "sparsity": {"max_perplexity_increase": INCREASE}, "output": {"layout": "per_layer"}},
    "rounds": {"method": {"name": "bonsai", "prune_fraction": 0.1, "masks": 10}, "sparsity": 0.2, "output": {"layout": "per_layer"}},
}
BY_BLOCKS = ("structured", "masked", "budget")  # their progress is in blocks

Event = dict[str, Any]
Moment = Callable[[list[Event]], bool]  # told all events so far: whether to kill now


@dataclass(frozen=True)
class Inputs:
    """What an attempt is given, besides its work directory."""

    code: Path  # holds app/, espalier/ and worker/
    model: Path
    text: Path
    recipe: dict[str, Any]


@dataclass
class Attempt:
    """What an attempt said, when, and what it left."""

    events: list[Event] = field(default_factory=list)
    at: list[float] = field(default_factory=list)  # seconds on a clock, of each event
    walks: dict[str, int] = field(default_factory=dict)  # records after a kill

    @property
    def messages(self) -> list[str]:
        return [event["message"] for event in self.events if event["event"] == "log"]

    @property
    def phases(self) -> list[str]:
        return [event["phase"] for event in self.events if event["event"] == "phase"]

    @property
    def tries(self) -> list[float]:
        """Perplexities that were measured for a budget."""
        return [float(message.rstrip(".").split()[-1]) for message in self.messages if message.startswith("A try")]

    @property
    def finished(self) -> int:
        """Blocks on record after a kill."""
        return sum(self.walks.values()) - self.rounds

    @property
    def rounds(self) -> int:
        return self.walks.get("rounds", 0)

    @property
    def done(self) -> list[str]:
        """What the attempt after a kill should say first."""
        counts = {"round": self.rounds, "block": self.finished}
        parts = [f"{count} {unit}" if count == 1 else f"{count} {unit}s" for unit, count in counts.items() if count]
        return [f"Goes on after {' and '.join(parts)} of an earlier attempt, all verified."] if parts else []

    def seconds_until(self, phase: str) -> float:
        """From the first event on."""
        return next(at for event, at in zip(self.events, self.at, strict=True) if event.get("phase") == phase) - self.at[0]


@dataclass(frozen=True)
class Ended:
    """A chain whose last attempt ended."""

    killed: list[Attempt]
    last: Attempt
    out: Path
    work: Path

    @property
    def report(self) -> Report:
        return Report.model_validate_json((self.out / "report.json").read_bytes())


class Engines:
    """Starts engines as real processes, each the leader of a group of its own, and knows what is left of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def chain(self, name: str, attempts: Sequence[tuple[Inputs, Moment | float]], last: Inputs) -> Ended:
        """`attempts` are what each is given and when it is killed: by what it said, or so many seconds after it first said anything.

        One that ends before its seconds are over is the last.
        """
        place = self._folder / name
        killed: list[Attempt] = []
        for inputs, moment in attempts:
            attempt = Attempt()
            if not self._kill(self._start(inputs, place), attempt, place, moment):
                return Ended(killed, attempt, place / "out", place / "work")
            killed.append(attempt)
        attempt, process = Attempt(), self._start(last, place)
        _listen(process, attempt, lambda events: False)
        assert process.wait() == 0, (place / "stderr").read_text()
        return Ended(killed, attempt, place / "out", place / "work")

    def _start(self, inputs: Inputs, place: Path) -> subprocess.Popen[str]:
        place.mkdir(exist_ok=True)
        recipe = place / "recipe.json"
        recipe.write_text(json.dumps(COMMON | inputs.recipe))
        command = [sys.executable, "-m", "worker.pipeline", str(recipe), str(inputs.model), str(place / "out"), "--work", str(place / "work")]
        with (place / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                [*command, "--text", "mine", str(inputs.text)],
                cwd=inputs.code,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def _kill(self, process: subprocess.Popen[str], attempt: Attempt, place: Path, moment: Moment | float) -> bool:
        """Whether it came in time."""
        if isinstance(moment, float):
            _listen(process, attempt, lambda events: True)
            time.sleep(moment)
        else:
            _listen(process, attempt, moment)
        os.killpg(process.pid, signal.SIGKILL)
        _listen(process, attempt, lambda events: False)
        if process.wait() == 0 and isinstance(moment, float):
            return False
        assert process.returncode == -signal.SIGKILL, attempt.events
        state = place / "work" / "state.json"
        if state.exists():
            attempt.walks = {walk: len(blocks) for walk, blocks in json.loads(state.read_bytes())["walks"].items()}
        return True

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _listen(process: subprocess.Popen[str], attempt: Attempt, enough: Moment) -> None:
    """Take down what an engine says, until it is enough or the engine ends."""
    assert process.stdout is not None
    for line in process.stdout:
        attempt.events.append(json.loads(line))
        attempt.at.append(time.monotonic())
        if enough(attempt.events):
            return


def phase(name: str) -> Moment:
    return lambda events: events[-1]["event"] == "phase" and events[-1]["phase"] == name


def block(number: int) -> Moment:
    """When so many blocks of all walks are finished."""
    return lambda events: events[-1]["event"] == "progress" and events[-1]["phase"] == "prune" and events[-1]["done"] >= number


def tries(count: int) -> Moment:
    return lambda events: sum(event.get("message", "").startswith("A try") for event in events) == count


def sub_model(number: int, done: int) -> Moment:
    """When so many sub-models of a round are evaluated."""
    return lambda events: (events[-1].get("round", 0), events[-1].get("done", 0)) >= (number, done)


KILLS: dict[str, list[Moment]] = {
    "structured": [phase("load"), phase("evaluate_dense"), block(2), block(LAYERS + 2), phase("write"), phase("evaluate"), phase("verify")],
    "masked": [block(2), block(LAYERS + 2), phase("write")],
    "budget": [block(2), tries(2), tries(2)],
    "rounds": [sub_model(1, 0), sub_model(1, 3), sub_model(1, 10), sub_model(2, 4), phase("write")],
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """All inputs but the recipe. The code is a copy, since its version is one of them."""
    folder = tmp_path_factory.mktemp("inputs")
    for package in ("app", "espalier", "worker"):
        shutil.copytree(REPOSITORY / package, folder / "code" / package, ignore=shutil.ignore_patterns("__pycache__"))
    model = make_checkpoint(folder / "model", "llama", layers=LAYERS, hidden=64, ffn=256, heads=8, kv_heads=4)
    return Inputs(folder / "code", model, make_text(folder, words=4000), {})


@pytest.fixture(scope="module")
def chains(given: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Ended]]]:
    """Every chain of this file, on its way."""
    engines = Engines(tmp_path_factory.mktemp("chains"))
    inputs = {name: Inputs(given.code, given.model, given.text, recipe) for name, recipe in RECIPES.items()}
    draw = random.Random(0)
    fractions = {name: [draw.uniform(0, 1.2), draw.uniform(0, 1.2)] for name in RECIPES}

    inputs["side by side"] = Inputs(as_if_blocks_were_read_again(given, tmp_path_factory.mktemp("read again")), given.model, given.text, RECIPES["rounds"])
    fractions["side by side"] = [draw.uniform(0, 1) for _ in range(4)]

    def at_random(name: str) -> Ended:
        # What lies before the first event and after verify began is mostly imports.
        span = futures["rounds" if name == "side by side" else name].result().last.seconds_until("verify")
        return engines.chain(f"{name}-random", [(inputs[name], fraction * span) for fraction in fractions[name]], inputs[name])

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        futures = {name: pool.submit(engines.chain, name, [], inputs[name]) for name in RECIPES}
        futures |= {
            f"{name}-phases": pool.submit(engines.chain, f"{name}-phases", [(inputs[name], kill) for kill in kills], inputs[name])
            for name, kills in KILLS.items()
        }
        others = [(other, block(2)) for other in one_change_after_another(given, RECIPES["structured"], tmp_path_factory.mktemp("others"))]
        futures["others"] = pool.submit(engines.chain, "others", others, inputs["structured"])
        futures |= {f"{name}-random": pool.submit(at_random, name) for name in inputs}
        try:
            yield futures
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            engines.close()


def as_if_blocks_were_read_again(given: Inputs, folder: Path) -> Path:
    """Code that runs sub-models side by side, as where a GPU can't hold the model."""
    code = shutil.copytree(given.code, folder / "code", ignore=shutil.ignore_patterns("__pycache__"))
    module = code / "worker" / "perturbing.py"
    source = module.read_text()
    assert source.count("side_by_side=reads_again") == 1
    module.write_text(source.replace("side_by_side=reads_again", "side_by_side=True"))
    return code


def one_change_after_another(given: Inputs, recipe: dict[str, Any], folder: Path) -> list[Inputs]:
    """Inputs of which each differs from the next in one thing: a comment in the code, what is evaluated, the text, the method; the last has another model."""
    model = make_checkpoint(folder / "model", "llama", layers=LAYERS, hidden=64, ffn=256, heads=8, kv_heads=4, seed=1)
    text = make_text(folder, words=4000, seed=1)
    code = shutil.copytree(given.code, folder / "code", ignore=shutil.ignore_patterns("__pycache__"))
    with (code / "app" / "architecture.py").open("a") as stream:
        stream.write("# Another version.\n")
    method = recipe | {"method": {"name": "cfsp", "mode": "code"}}
    evaluation = method | {"evaluation": {"source": "mine", "windows": 1, "sequence_length": 16, "speed": False}}
    return [
        Inputs(code, model, text, evaluation),
        Inputs(given.code, model, text, evaluation),
        Inputs(given.code, model, text, method),
        Inputs(given.code, model, given.text, method),
        Inputs(given.code, model, given.text, recipe),
    ]


def check_ended_as_undisturbed(chain: Ended, undisturbed: Ended) -> None:
    """The same files, the same report but for time and memory; each attempt went on where the one before it was; nothing is left."""
    assert hashes(chain.out / "checkpoint") == hashes(undisturbed.out / "checkpoint")
    varying = {"seconds", "resumed_at_block", "resumed_at_round", "peak_memory_bytes"}
    assert chain.report.model_dump(exclude=varying) == undisturbed.report.model_dump(exclude=varying)
    before = chain.killed[-1] if chain.killed else Attempt()
    assert chain.report.resumed_at_block == (before.finished or None)
    assert chain.report.resumed_at_round == (before.rounds or None)
    for earlier, later in zip(chain.killed, [*chain.killed[1:], chain.last], strict=True):
        assert [message for message in later.messages if not message.startswith("A try")] in (earlier.done, [])
        assert not earlier.done or len(later.phases) < 2 or earlier.done[0] in later.messages
        assert "evaluate_dense" not in later.phases or "prune" not in earlier.phases  # what was measured is not measured again
    assert not chain.work.exists()
    assert sorted(entry.name for entry in chain.out.iterdir()) == ["checkpoint", "report.json"]


def hashes(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", BY_BLOCKS)
def test_an_undisturbed_run_goes_on_from_nothing(name: str, chains: dict[str, Future[Ended]]) -> None:
    chain = chains[name].result()
    assert chain.last.phases == ["load", "evaluate_dense", "prune", "write", "evaluate", "verify"]
    check_walks = [event["done"] for event in chain.last.events if event["event"] == "progress" and event["phase"] == "prune"]
    assert check_walks == list(range(1, LAYERS * (1 if name == "budget" else 2) + 1))
    assert chain.report.resumed_at_block is None
    assert not chain.work.exists()


@pytest.mark.parametrize("name", BY_BLOCKS)
def test_a_run_that_is_killed_in_every_phase_ends_as_an_undisturbed_one(name: str, chains: dict[str, Future[Ended]]) -> None:
    chain = chains[f"{name}-phases"].result()
    check_ended_as_undisturbed(chain, chains[name].result())
    finished = [attempt.finished for attempt in chain.killed]
    first, second = {"structured": (2, 3), "masked": (0, 1), "budget": (0, 1)}[name]
    assert finished == sorted(finished)
    assert finished[first] >= 2  # or more, as an engine goes on until the signal comes
    assert finished[second:] == [LAYERS] * len(finished[second:]) if name == "budget" else LAYERS + 2 <= finished[second] <= 2 * LAYERS
    assert name == "budget" or finished[second + 1 :] == [2 * LAYERS] * len(finished[second + 1 :])


def test_rounds_that_are_killed_end_as_undisturbed_ones(chains: dict[str, Future[Ended]]) -> None:
    chain, undisturbed = chains["rounds-phases"].result(), chains["rounds"].result()
    check_ended_as_undisturbed(chain, undisturbed)
    told = [(event["round"], event["done"]) for event in undisturbed.last.events if "eta_seconds" in event]
    assert [each for each in told if each[1]] == [(number, done) for number in (1, 2) for done in range(1, 11)]
    of_rounds = [attempt.rounds for attempt in chain.killed]
    assert of_rounds == sorted(of_rounds)  # an engine goes on until the signal comes
    assert of_rounds[3] >= 1
    assert of_rounds[4] == 2


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_is_killed_at_random_ends_as_an_undisturbed_one(name: str, chains: dict[str, Future[Ended]]) -> None:
    check_ended_as_undisturbed(chains[f"{name}-random"].result(), chains[name].result())


def test_sub_models_side_by_side_that_are_killed_at_random_end_as_one_by_one(chains: dict[str, Future[Ended]]) -> None:
    check_ended_as_undisturbed(chains["side by side-random"].result(), chains["rounds"].result())


def test_a_perplexity_budget_holds_and_one_walk_serves_all_tries(chains: dict[str, Future[Ended]]) -> None:
    undisturbed, chain = chains["budget"].result(), chains["budget-phases"].result()
    before, after = undisturbed.report.before, undisturbed.report.after
    assert before is not None
    assert before.perplexity is not None
    assert after is not None
    assert after.perplexity is not None
    assert after.perplexity.value <= before.perplexity.value * (1 + INCREASE)
    assert any(value > before.perplexity.value * (1 + INCREASE) for value in undisturbed.last.tries)  # more would have been too much
    assert undisturbed.report.sparsity.ffn > 0.05
    of_tries = [event["event"] for event in undisturbed.last.events if event.get("phase") == "prune" or event.get("message", "").startswith("A try")]
    assert of_tries == ["phase"] + ["progress"] * LAYERS + ["log"] * len(undisturbed.last.tries)
    assert [attempt.walks for attempt in chain.killed[1:]] == [{"survey": LAYERS}] * 2
    measured = [value for attempt in [*chain.killed, chain.last] for value in attempt.tries]
    assert list(dict.fromkeys(measured)) == list(dict.fromkeys(undisturbed.last.tries))
    assert len(measured) <= len(undisturbed.last.tries) + 2  # a kill may come between a measurement and its record


def test_what_other_inputs_left_is_not_gone_on_with(chains: dict[str, Future[Ended]]) -> None:
    chain, undisturbed = chains["others"].result(), chains["structured"].result()
    for attempt in [*chain.killed[1:], chain.last]:
        assert attempt.messages == ["Started anew, because of the earlier attempt the model, the recipe, the text or the code is another one."]
        assert next(event["done"] for event in attempt.events if event["event"] == "progress" and event["phase"] == "prune") == 1
        assert attempt.phases[:2] == ["load", "evaluate_dense"]
    assert all(attempt.finished >= 2 for attempt in chain.killed)
    assert hashes(chain.out / "checkpoint") == hashes(undisturbed.out / "checkpoint")
    varying = {"seconds", "peak_memory_bytes"}
    assert chain.report.model_dump(exclude=varying) == undisturbed.report.model_dump(exclude=varying)
    assert not chain.work.exists()


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "checkpoint" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("Not to be removed.")
    with pytest.raises(EspalierError) as refused:
        WalkState.open(tmp_path, "job")
    assert refused.value.code == "work_not_empty"
    assert mine.read_text() == "Not to be removed."


def test_a_removal_that_is_broken_off_can_be_gone_on_with(tmp_path: Path) -> None:
    """Whatever part of it is gone, the directory is known as the engine's."""
    work = tmp_path / "work"
    state = WalkState.open(work, "job")
    shard = work / "checkpoint" / "shard"
    shard.parent.mkdir()
    shard.write_bytes(b"weights")
    state.finish_block("prune", [shard], {})
    shutil.rmtree(shard.parent)
    again = WalkState.open(work, "job")
    assert again.refused == "checkpoint/shard is damaged"
    assert again.finished == 0
    again.remove()
    assert not work.exists()
