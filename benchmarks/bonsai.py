"""Bonsai on SmolLM2-135M: quality beside its prior alone, FLAP and CFSP; time beside a naive implementation; memory beside inference and a gradient.

    python -m benchmarks.bonsai [--data FOLDER] [--only quality|speed|memory] [--rows REGEX] [--masks 40]

FOLDER holds `wiki.valid.raw` (calibration) and `wiki.test.raw` (evaluation) of WikiText-2. Results go to `benchmarks/engine.json`, and from there into
`benchmarks/README.md`, row by row as soon as they are there. With `--rows`, rows with other names stay as they were measured before.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from app.counting import count_parameters
from app.recipe import Bonsai, Evaluation, Recipe
from app.source import read_source
from benchmarks.results import HERE, keep, stored
from espalier.demo import converted_model
from worker.blocks import BlockStream
from worker.checkpoint import finish
from worker.data import leading_windows, random_windows, tokenize
from worker.evaluation import perplexity
from worker.memory import PeakMemory
from worker.pipeline import target_of
from worker.pruners import PRUNERS, bonsai
from worker.pruning import prune
from worker.state import WalkState
from worker.walk import Pruning, RoundStep

REPOSITORY = HERE.parent
SAMPLES, LENGTH = 4, 256
FRACTIONS = (0.2, 0.5)
TIMED_FRACTION = 0.2
WATCHED = ("inference", "pruning", "gradient")


@dataclass(frozen=True)
class Contender:
    """A way to remove a share of all parameters but embedding and head."""

    name: str
    method: dict[str, Any]
    perturbs: bool = False


CONTENDERS = [
    Contender("Bonsai", {"name": "bonsai"}, perturbs=True),
    Contender("Bonsai, authors' mode", {"name": "bonsai", "mode": "code"}, perturbs=True),
    Contender("Bonsai, prior alone", {"name": "bonsai", "masks": 0}),
    Contender("FLAP", {"name": "flap"}),
    Contender("CFSP, FFN and KV groups", {"name": "cfsp", "units": "both"}),
]


@dataclass(frozen=True)
class Setting:
    """What all parts work on."""

    model: Path
    data: Path
    masks: int
    rows: re.Pattern[str]

    def recipe(self, contender: Contender, fraction: float) -> Recipe:
        return Recipe.model_validate(
            {
                "method": contender.method | ({"masks": self.masks} if contender.perturbs else {}),
                "sparsity": {"fraction": fraction, "of": "non_embedding"},
                "calibration": {"source": str(self.data / "wiki.valid.raw"), "samples": SAMPLES, "sequence_length": LENGTH},
                "evaluation": {"source": str(self.data / "wiki.test.raw"), "windows": 24, "sequence_length": 512, "speed": False},
                "output": {"layout": "per_layer"},
            }
        )

    def tokens(self, recipe: Recipe) -> Tensor:
        return random_windows(tokenize(self.model, recipe.calibration.source, {}), recipe.calibration)

    def windows(self, recipe: Recipe) -> Tensor:
        assert isinstance(recipe.evaluation, Evaluation)
        return leading_windows(tokenize(self.model, recipe.evaluation.source, {}), recipe.evaluation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "wikitext-2")
    parser.add_argument("--model", type=Path, help="another checkpoint folder")
    parser.add_argument("--only", choices=["quality", "speed", "memory"])
    parser.add_argument("--rows", type=re.compile, default=re.compile(""), help="measure only the rows whose names this finds")
    parser.add_argument("--masks", type=int, default=40, help="sub-models a round")
    parser.add_argument("--watch", choices=WATCHED, help="only print the peak memory of this, in this process")
    asked = parser.parse_args()
    if not (asked.data / "wiki.test.raw").is_file():
        parser.error(f"{asked.data} has no wiki.test.raw; name the folder of WikiText-2 raw with --data")
    setting = Setting(asked.model or converted_model(REPOSITORY / "var" / "cache"), asked.data, asked.masks, asked.rows)
    if asked.watch:
        print(json.dumps(peak_of(setting, asked.watch)))
        return
    parts: dict[str, Callable[[Setting], None]] = {"memory": memory, "speed": speed, "quality": quality}
    for name, measure in parts.items():
        if asked.only in (None, name):
            measure(setting)
    print((HERE / "README.md").read_text(encoding="utf-8"))


def keep_row(part: str, row: dict[str, Any]) -> None:
    """Put a row in the place of the one of its name, or behind all."""
    print(part, {name: value for name, value in row.items() if name != "rounds"}, flush=True)
    before = stored().get("bonsai", {})
    rows = {kept["name"]: kept for kept in before.get(part, [])} | {row["name"]: row}
    keep("bonsai", before | {part: list(rows.values())})


# -------------------------------------------------------------------- quality


def quality(setting: Setting) -> None:
    """What each contender leaves at equal numbers of parameters."""
    for fraction in FRACTIONS:
        for contender in CONTENDERS:
            name = f"{contender.name}, {fraction:.0%}"
            if setting.rows.search(name):
                recipe = setting.recipe(contender, fraction)
                with tempfile.TemporaryDirectory() as folder:
                    rounds = prune_into(Path(folder, "work"), setting, recipe)
                    keep_row("quality", {"name": name, "rounds": rounds.seconds, "masks": rounds.masks, **measured(Path(folder, "work"), setting, recipe)})


def measured(work: Path, setting: Setting, recipe: Recipe) -> dict[str, Any]:
    """What is told of a result. Every row of quality has these figures."""
    source = read_source(work / "checkpoint")
    value = perplexity(BlockStream(source), setting.windows(recipe), work)
    return {"perplexity": value, "parameters": count_parameters(source, []).non_embedding}


@dataclass
class Clock:
    """Seconds and sub-models of each round, told by the engine; the writing of shards counts to the last."""

    seconds: list[float] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    _last: float = field(default_factory=time.perf_counter)

    def step(self, step: RoundStep) -> None:
        if step.number > len(self.masks):
            self.stop()
            self.masks.append(0)
        self.masks[-1] = step.done

    def stop(self) -> None:
        now = time.perf_counter()
        if self.masks:
            self.seconds.append(now - self._last)
            self._last = now


def prune_into(work: Path, setting: Setting, recipe: Recipe) -> Clock:
    """Prune and finish the checkpoint in `work`."""
    source = read_source(setting.model)
    stream = BlockStream(source)
    tokens = setting.tokens(recipe)
    clock = Clock()
    run = Pruning(stream, recipe, tokens, WalkState.open(work, "benchmark"), lambda done, total: None, round_step=clock.step)
    pruned = prune(run, PRUNERS[recipe.method.name], target_of(recipe, count_parameters(source, [])))
    clock.stop()
    finish(pruned.folder, source, pruned.kept, recipe.output.layout, "source", pruned.switches)
    return clock


# ---------------------------------------------------------------------- speed


def speed(setting: Setting) -> None:
    """Seconds of each round, at equal numbers of sub-models: the engine in both modes, and the released algorithm on a resident model."""
    code, bayesian = (next(each for each in CONTENDERS if each.name == name) for name in ("Bonsai, authors' mode", "Bonsai"))
    for name, contender in (("engine, authors' mode", code), ("engine", bayesian)):
        if setting.rows.search(name):
            recipe = setting.recipe(contender, TIMED_FRACTION)
            with tempfile.TemporaryDirectory() as folder:
                clock = prune_into(Path(folder, "work"), setting, recipe)
                keep_row("speed", {"name": name, "rounds": clock.seconds, "masks": clock.masks, **measured(Path(folder, "work"), setting, recipe)})
    if setting.rows.search("naive"):
        recipe = setting.recipe(code, TIMED_FRACTION)
        model = transformers.AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32).eval()
        seconds = prune_naively(model, setting.tokens(recipe), recipe, TIMED_FRACTION)
        kept = sum(parameter.numel() for name, parameter in model.named_parameters() if "embed" not in name and "head" not in name)
        value = perplexity_of(model, setting.windows(recipe))
        row = {"name": "naive", "rounds": seconds, "masks": [setting.masks] * len(seconds), "perplexity": value, "parameters": kept}
        keep_row("speed", row)


@torch.no_grad()
def prune_naively(model: Any, tokens: Tensor, recipe: Recipe, target: float) -> list[float]:
    """The released algorithm on a resident Llama, which is pruned in place: masks multiplied in by hooks, every sub-model a full forward with logits.

    -> seconds of each round.
    """
    method, layers = recipe.method, model.model.layers
    assert isinstance(method, Bonsai)
    head_dim, queries = layers[0].self_attn.head_dim, layers[0].self_attn.num_key_value_groups
    hidden, whole = model.config.hidden_size, _non_embedding(model)
    unit_costs = [3 * hidden, (2 * queries + 2) * head_dim * hidden] * len(layers)
    seconds: list[float] = []
    while fraction := bonsai.round_fraction(target, 1 - _non_embedding(model) / whole, method.prune_fraction):
        start, generator = time.perf_counter(), torch.Generator().manual_seed(3 * len(seconds) + 1)  # the engine's, with which it agrees
        priors = _naive_priors(model, tokens, head_dim * queries)
        candidates = [bonsai.candidates(prior, fraction) if len(prior) else torch.zeros(0, dtype=torch.bool) for prior in priors]
        sampled = [bonsai.sampling(prior, candidate) for prior, candidate in zip(priors, candidates, strict=True)]
        masks = bonsai.draw_masks(sampled, candidates, fraction, method.masks // 2, generator, released=True)
        perplexities = torch.tensor([_masked_perplexity(model, tokens, mask, head_dim * queries) for mask in masks], dtype=torch.float64)
        candidate = torch.cat(candidates)
        modules = torch.arange(len(priors)).repeat_interleave(torch.tensor([len(prior) for prior in priors]))[candidate]
        weights = bonsai.fit_released(masks[:, candidate], bonsai.utility(perplexities, released=True), generator).weights
        removable, costs = [len(prior) for prior in priors], torch.tensor(unit_costs)[modules]
        keep_units = torch.ones_like(candidate)
        keep_units[candidate] = ~bonsai.select(weights, costs, modules, removable, int(whole * fraction), released=True)
        if keep_units.all():
            break
        _slice(layers, keep_units.split([len(prior) for prior in priors]), head_dim, queries)
        seconds.append(time.perf_counter() - start)
        print(f"naive, round {len(seconds)}: {seconds[-1]:.1f} s", flush=True)
    return seconds


def _non_embedding(model: Any) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if "embed" not in name and "head" not in name)


def _outputs(model: Any) -> list[nn.Linear]:
    """The linears whose inputs are the units, FFN before attention, block by block."""
    return [linear for layer in model.model.layers for linear in (layer.mlp.down_proj, layer.self_attn.o_proj)]


def _naive_priors(model: Any, tokens: Tensor, group: int) -> list[Tensor]:
    sums: dict[int, Tensor] = {}
    handles = [
        linear.register_forward_pre_hook(lambda module, args, place=place: sums.__setitem__(place, args[0].square().mean(dim=(0, 1))))
        for place, linear in enumerate(_outputs(model))
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    scores = [linear.weight.abs().mean(dim=0) * sums[place].sqrt() for place, linear in enumerate(_outputs(model))]
    return [score.view(-1, group).mean(dim=1) if place % 2 else score for place, score in enumerate(scores)]


def _masked_perplexity(model: Any, tokens: Tensor, mask: Tensor, group: int) -> float:
    outputs = _outputs(model)
    widths = [linear.in_features // group if place % 2 else linear.in_features for place, linear in enumerate(outputs)]
    handles = []
    for place, (linear, own) in enumerate(zip(outputs, mask.split(widths), strict=True)):
        columns = (own.repeat_interleave(group) if place % 2 else own).float()
        handles.append(linear.register_forward_pre_hook(lambda module, args, columns=columns: (args[0] * columns,)))
    value = perplexity_of(model, tokens)
    for handle in handles:
        handle.remove()
    return value


@torch.no_grad()
def perplexity_of(model: Any, windows: Tensor) -> float:
    """exp of the mean loss over windows, one forward with all logits for about 1024 tokens."""
    losses = []
    for rows in windows.split(max(1, 1024 // windows.shape[1])):
        losses += [float(model(rows, labels=rows, use_cache=False).loss)] * len(rows)
    return math.exp(min(sum(losses) / len(losses), 700))


def _slice(layers: nn.ModuleList, keeps: tuple[Tensor, ...], head_dim: int, queries: int) -> None:
    for layer, channels, groups in zip(layers, keeps[::2], keeps[1::2], strict=True):
        mlp: Any = layer.mlp
        attention: Any = layer.self_attn
        keys, columns = groups.repeat_interleave(head_dim), groups.repeat_interleave(head_dim * queries)
        rows = {mlp.gate_proj: channels, mlp.up_proj: channels, attention.q_proj: columns, attention.k_proj: keys, attention.v_proj: keys}
        for linear, mask in rows.items():
            linear.weight = nn.Parameter(linear.weight[mask], requires_grad=False)
            linear.out_features = len(linear.weight)
        for linear, mask in ((mlp.down_proj, channels), (attention.o_proj, columns)):
            linear.weight = nn.Parameter(linear.weight[:, mask].contiguous(), requires_grad=False)
            linear.in_features = linear.weight.shape[1]


# --------------------------------------------------------------------- memory


def memory(setting: Setting) -> None:
    """Peak memory of a fresh process each: plain inference, the pruning phase, one gradient, all on the same batch."""
    for kind in WATCHED:
        if setting.rows.search(kind):
            command = [sys.executable, "-m", "benchmarks.bonsai", "--watch", kind, "--model", str(setting.model), "--data", str(setting.data)]
            ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
            keep_row("memory", {"name": kind, "bytes": json.loads(ended.stdout.splitlines()[-1])})


def peak_of(setting: Setting, kind: str) -> int:
    """Highest anonymous memory of this process while it loads the model and does one thing."""
    bonsai_in_one_round = Contender("", {"name": "bonsai", "prune_fraction": TIMED_FRACTION, "masks": 8})
    recipe = setting.recipe(bonsai_in_one_round, TIMED_FRACTION)
    tokens = setting.tokens(recipe)
    with PeakMemory() as peak, tempfile.TemporaryDirectory() as folder:
        if kind == "pruning":
            prune_into(Path(folder, "work"), setting, recipe)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32).eval()
            if kind == "inference":
                with torch.no_grad():
                    model(tokens, use_cache=False)
            else:
                model(tokens, labels=tokens, use_cache=False).loss.backward()
                importance = [(parameter * parameter.grad).abs().sum() for parameter in model.parameters() if parameter.grad is not None]  # first-order Taylor
                assert len(importance)
    return peak.bytes


if __name__ == "__main__":
    main()
