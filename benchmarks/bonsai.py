"""Bonsai on SmolLM2-135M: quality beside its prior alone, FLAP and CFSP; time beside a naive implementation; memory beside inference and a gradient.

    python -m benchmarks.bonsai [--data FOLDER] [--only quality|draws|adaptation|decoding|speed|memory] [--rows REGEX] [--masks 40] [--winogrande FILE] [--items 400]

FOLDER holds `wiki.valid.raw` (calibration, adaptation) and `wiki.test.raw` (evaluation) of WikiText-2; FILE is as `benchmarks.winogrande` reads it, and without one
there is no zero-shot accuracy. Results go to `benchmarks/engine.json`, and from there into `benchmarks/README.md`, row by row as soon as they are there. With
`--rows`, rows with other names stay as they were measured before.

What quality prunes stays in `var/bench/bonsai/`, a folder a row. It is pruned again only when the model or the recipe is another one; after changes to the
engine, remove the folder. Adaptation trains copies of what is kept there, and decoding times it. Draws prunes anew with other calibration text, and runs only when
it is named.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from app.counting import count_parameters
from app.recipe import Bonsai, Evaluation, Recipe
from app.recovery import RECOVERY_PRESETS, LoRA
from app.report import LayerReport
from app.source import read_source
from benchmarks.results import HERE, ON_CPU, keep, stored
from benchmarks.winogrande import accuracy
from espalier.demo import converted_model
from worker.blocks import BlockStream, default_device
from worker.checkpoint import finish
from worker.data import leading_windows, random_windows, tokenize
from worker.evaluation import perplexity
from worker.memory import PeakMemory
from worker.pipeline import target_of, weights_sha256
from worker.pruners import PRUNERS, bonsai
from worker.pruning import prune
from worker.recovery.distillation import Teacher, teach
from worker.recovery.retrain import retrain
from worker.recovery.text import TrainingText, training_text
from worker.state import WalkState
from worker.trial import load
from worker.walk import Pruned, Pruning, RoundStep

REPOSITORY = HERE.parent
SAMPLES, LENGTH = 4, 256
FRACTIONS = (0.2, 0.5)
OTHER_SEEDS = (1, 2)
TIMED_FRACTION = 0.2
FEWER_MASKS = 16
WATCHED = ("inference", "pruning", "gradient")
PREFILL_TOKENS, CONTEXT_TOKENS, DECODE_TOKENS, TURNS = 512, 128, 64, 3

# The published adaptation at a CPU's size: LoRA at the published scale, alpha / rank, and the published weight of the divergence from the dense model; a smaller
# rank, shorter and fewer sequences, and for 30 steps instead of 118 a higher learning rate, which was not tuned. The head is trained too, as published: tied here,
# it becomes 28 million parameters of its own, which make a training a quarter longer (26.8 s of one core instead of 21.1 for two steps at 50%), so it may stay.
ADAPTATION = LoRA.model_validate(
    RECOVERY_PRESETS["bonsai"].model_dump()
    | {
        "rank": 16,
        "alpha": 64,
        "learning_rate": 5e-4,
        "sequence_length": LENGTH,
        "tokens": None,
        "steps": 30,
        "batch": SAMPLES,
        "warmup": 0.1,
        "checkpoint_every": 10,
        "gradient_checkpointing": False,
    }
)


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
    winogrande: Path
    items: int
    checkpoints: Path  # where what is pruned stays

    def recipe(self, contender: Contender, fraction: float) -> Recipe:
        method = contender.method | ({"masks": self.masks} if contender.perturbs else {})
        return self.recipe_of(method=method, sparsity={"fraction": fraction, "of": "non_embedding"}, output={"layout": "per_layer"})

    def recipe_of(self, **more: Any) -> Recipe:
        calibration = {"source": str(self.data / "wiki.valid.raw"), "samples": SAMPLES, "sequence_length": LENGTH}
        return Recipe.model_validate({"calibration": calibration, "evaluation": None, **more})

    def contenders(self) -> Iterator[tuple[str, Recipe]]:
        """Names and recipes of the rows of quality that are asked for."""
        for fraction in FRACTIONS:
            for contender in CONTENDERS:
                if self.rows.search(name := row_name(contender, fraction)):
                    yield name, self.recipe(contender, fraction)

    def tokens(self, recipe: Recipe) -> Tensor:
        return random_windows(tokenize(self.model, recipe.calibration.source, {}), recipe.calibration)

    def windows(self) -> Tensor:
        """What all perplexities are of, (B, T)."""
        evaluation = Evaluation(source=str(self.data / "wiki.test.raw"), windows=24, sequence_length=512)
        return leading_windows(tokenize(self.model, evaluation.source, {}), evaluation)


def row_name(contender: Contender, fraction: float) -> str:
    return f"{contender.name}, {fraction:.0%}"


def named(name: str) -> Contender:
    return next(contender for contender in CONTENDERS if contender.name == name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "wikitext-2")
    parser.add_argument("--model", type=Path, help="another checkpoint folder")
    parser.add_argument("--only", choices=["quality", "draws", "adaptation", "decoding", "speed", "memory"])
    parser.add_argument("--rows", type=re.compile, default=re.compile(""), help="measure only the rows whose names this finds")
    parser.add_argument("--masks", type=int, default=40, help="sub-models a round")
    parser.add_argument("--winogrande", type=Path, help="the questions (default: ../zeroshot/winogrande.jsonl beside the folder of --data)")
    parser.add_argument("--items", type=int, default=400, help="questions asked")
    parser.add_argument("--watch", choices=WATCHED, help="only print the peak memory of this, in this process")
    asked = parser.parse_args()
    if not (asked.data / "wiki.test.raw").is_file():
        parser.error(f"{asked.data} has no wiki.test.raw; name the folder of WikiText-2 raw with --data")
    if asked.winogrande and not asked.winogrande.is_file():
        parser.error(f"there is no file {asked.winogrande}")
    setting = Setting(
        model=asked.model or converted_model(REPOSITORY / "var" / "cache"),
        data=asked.data,
        masks=asked.masks,
        rows=asked.rows,
        winogrande=asked.winogrande or asked.data.parent / "zeroshot" / "winogrande.jsonl",
        items=asked.items,
        checkpoints=REPOSITORY / "var" / "bench" / "bonsai",
    )
    if asked.watch:
        print(json.dumps(peak_of(setting, asked.watch)))
        return
    parts: dict[str, Callable[[Setting], None]] = {"memory": memory, "speed": speed, "quality": quality, "decoding": decoding, "adaptation": adaptation}
    for measure in parts.values() if asked.only is None else [(parts | {"draws": draws})[asked.only]]:
        measure(setting)
    print((HERE / "README.md").read_text(encoding="utf-8"))


def kept_rows(part: str) -> dict[str, dict[str, Any]]:
    """The rows of a part that were measured so far, by name."""
    return {row["name"]: row for row in stored().get("bonsai", {}).get(part, [])}


def keep_row(part: str, row: dict[str, Any]) -> None:
    """Put a row in the place of the one of its name, or behind all."""
    print(part, {name: value for name, value in row.items() if name != "rounds"}, flush=True)
    rows = kept_rows(part) | {row["name"]: row}
    keep("bonsai", stored().get("bonsai", {}) | {part: list(rows.values())})


# -------------------------------------------------------------------- quality


def quality(setting: Setting) -> None:
    """What each contender leaves at equal numbers of parameters, and the dense model."""
    if setting.rows.search("dense"):
        keep_row("quality", {"name": "dense", "rounds": [], "masks": [], **measured(setting.model, setting), **zero_shot(setting.model, setting)})
    for name, recipe in setting.contenders():
        kept = find_kept(setting, name, recipe)
        known = kept_rows("quality").get(name, {}) if kept else {}  # of what is pruned anew it would not be true
        kept = kept or prune_and_keep(setting, name, recipe)
        row = {"name": name, **kept.rounds, **measured(kept.checkpoint, setting), **zero_shot(kept.checkpoint, setting)}
        keep_row("quality", row | {part: known[part] for part in ("draws", "adapted") if part in known})


def draws(setting: Setting) -> None:
    """Perplexities of rows of quality with other calibration text: a round's sub-models are few, so that one draw says little."""
    for name, recipe in setting.contenders():
        row, found = kept_rows("quality").get(name), []
        for seed in OTHER_SEEDS if row else ():
            other = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"seed": seed})})
            with tempfile.TemporaryDirectory() as folder:
                found.append(measured(prune_into(Path(folder), setting, other)[0].folder, setting)["perplexity"])
        if row:
            keep_row("quality", row | {"draws": [row["perplexity"], *found]})


def measured(checkpoint: Path, setting: Setting) -> dict[str, Any]:
    """What is told of a result. Every row of quality and of speed has these figures."""
    source = read_source(checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        value = perplexity(BlockStream(source), setting.windows(), Path(scratch))
    return {"perplexity": value, "parameters": count_parameters(source, []).non_embedding}


def zero_shot(checkpoint: Path, setting: Setting) -> dict[str, Any]:
    """Accuracy on WinoGrande and of how many questions, where there are any."""
    if not setting.winogrande.is_file():
        return {}
    share, items = accuracy(checkpoint, setting.winogrande, setting.items)
    return {"winogrande": share, "items": items}


@dataclass
class Clock:
    """Seconds and sub-models of each round, told by the engine; the writing of shards counts to the last."""

    seconds: list[float] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    _last: float = field(default_factory=time.perf_counter)
    _eta: float | None = None  # seconds still to go, by the engine's first word after the first round

    def step(self, step: RoundStep) -> None:
        if step.number > len(self.masks):
            self.stop()
            self.masks.append(0)
            if step.number == 2 and step.pace is not None:
                self._eta = step.pace * step.cost_left
        self.masks[-1] = step.done

    def stop(self) -> None:
        now = time.perf_counter()
        if self.masks:
            self.seconds.append(now - self._last)
            self._last = now

    def rounds(self) -> dict[str, Any]:
        """What is told of the rounds; `eta_error` is the time left after the first as the engine told it over what it was, less 1; None where it told none."""
        return {"rounds": self.seconds, "masks": self.masks, "eta_error": None if self._eta is None else self._eta / sum(self.seconds[1:]) - 1}


def prune_into(work: Path, setting: Setting, recipe: Recipe) -> tuple[Pruned, Clock]:
    """Prune and finish the checkpoint in `work`."""
    source = read_source(setting.model)
    stream = BlockStream(source)
    tokens = setting.tokens(recipe)
    clock = Clock()
    run = Pruning(stream, recipe, tokens, WalkState.open(work, "benchmark"), lambda done, total: None, round_step=clock.step)
    pruned = prune(run, PRUNERS[recipe.method.name], target_of(recipe, count_parameters(source, [])))
    clock.stop()
    finish(pruned.folder, source, pruned.kept, recipe.output.layout, "source", pruned.switches)
    return pruned, clock


# ----------------------------------------------------- checkpoints between runs


@dataclass(frozen=True)
class Kept:
    """A pruned checkpoint that stays, and what was told when it was pruned."""

    checkpoint: Path
    layers: list[LayerReport]
    rounds: dict[str, Any]


def find_kept(setting: Setting, name: str, recipe: Recipe) -> Kept | None:
    """The checkpoint of a name, where one was kept that this recipe makes of this model."""
    folder = folder_of(setting, name)
    if not (folder / "pruning.json").is_file():
        return None
    told = json.loads((folder / "pruning.json").read_text(encoding="utf-8"))
    if told["made_of"] != made_of(setting, recipe):
        return None
    return Kept(folder / "checkpoint", [LayerReport(**layer) for layer in told["layers"]], told["rounds"])


def prune_and_keep(setting: Setting, name: str, recipe: Recipe) -> Kept:
    """Prune, in the place of what was kept under the name; `pruning.json` comes last, so what it lies beside is whole."""
    folder = folder_of(setting, name)
    shutil.rmtree(folder, ignore_errors=True)
    pruned, clock = prune_into(folder / "work", setting, recipe)
    pruned.folder.rename(folder / "checkpoint")
    shutil.rmtree(folder / "work")
    told = {"made_of": made_of(setting, recipe), "layers": [layer.model_dump(mode="json") for layer in pruned.layers], "rounds": clock.rounds()}
    (folder / "pruning.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return Kept(folder / "checkpoint", pruned.layers, clock.rounds())


def folder_of(setting: Setting, name: str) -> Path:
    return setting.checkpoints / re.sub(r"\W+", "-", name.lower()).strip("-")


def made_of(setting: Setting, recipe: Recipe) -> dict[str, Any]:
    return {"model": weights_sha256(read_source(setting.model)), "recipe": recipe.model_dump(mode="json")}


# ----------------------------------------------------------------- adaptation


def adaptation(setting: Setting) -> None:
    """What the kept checkpoints are worth after ADAPTATION, told in their rows of quality. All learn the same windows from the same dense model."""
    rows = kept_rows("quality")
    found = {name: kept for name, recipe in setting.contenders() if name in rows and (kept := find_kept(setting, name, recipe))}
    if not found:
        print("adaptation: skipped, no checkpoint of these rows is kept; quality makes them")
        return
    dense = BlockStream(read_source(setting.model))
    text = training_text(tokenize(setting.model, str(setting.data / "wiki.valid.raw"), {}), ADAPTATION)
    assert ADAPTATION.distillation is not None
    with tempfile.TemporaryDirectory() as scratch:
        state = WalkState.open(Path(scratch), "benchmark")
        teacher = teach(dense, text.windows, ADAPTATION.distillation, list(range(len(dense))), state, lambda done, total: None)
        for name, kept in found.items():
            figures = adapted(setting, kept, dense, text, teacher)
            keep_row("quality", kept_rows("quality")[name] | {"adapted": figures})


def adapted(setting: Setting, kept: Kept, dense: BlockStream, text: TrainingText, teacher: Teacher) -> dict[str, Any]:
    """Train a copy of a checkpoint and measure it; `seconds` are those of the training alone."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(kept.checkpoint, Path(folder, "checkpoint"))
        pruned = Pruned(copy, kept.layers, zeros_before=[], zeros_after=[], switches=[], notes=[])
        found = retrain(ADAPTATION, copy, pruned, dense, text, teacher, Path(folder, "work"), lambda step: None)
        value = measured(copy, setting)["perplexity"]
        return {"perplexity": value, **zero_shot(copy, setting), "seconds": found.trained.seconds, "tokens": found.tokens}


# ------------------------------------------------------------------- decoding


def decoding(setting: Setting) -> None:
    """Tokens a second of the dense model, one without half of its parameters and one with 2:4 zeros, taken in turns; plain transformers, float32, batch 1.

    The 2:4 model runs on dense kernels: torch has none for such zeros on a CPU, and its semi-structured tensors are for CUDA alone.
    """
    halves = {row_name(named(name), 0.5): setting.recipe(named(name), 0.5) for name in ("Bonsai", "Bonsai, prior alone")}
    half = next((name for name, recipe in halves.items() if find_kept(setting, name, recipe)), "Bonsai, prior alone, 50%")
    checkpoints = {"dense": setting.model}
    for name, recipe in ((half, halves[half]), ("Wanda 2:4", setting.recipe_of(method="wanda", sparsity="2:4"))):
        checkpoints[name] = (find_kept(setting, name, recipe) or prune_and_keep(setting, name, recipe)).checkpoint
    models = {name: load(checkpoint, loader=True, dtype=torch.float32) for name, checkpoint in checkpoints.items()}
    text = setting.windows()[:1, :PREFILL_TOKENS]
    for model in models.values():
        tokens_per_second(model, text)  # warms up
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(TURNS):
        for name, model in models.items():
            rates[name].append(tokens_per_second(model, text))
    keep("bonsai", stored().get("bonsai", {}) | {"decoding": [{"name": name} | medians(own, rates["dense"]) for name, own in rates.items()]})


def medians(own: list[tuple[float, float]], dense: list[tuple[float, float]]) -> dict[str, float]:
    """Medians of prefill and decode rates, and of their ratios to the dense model's of the same turn."""
    found = {}
    for place, kind in enumerate(("prefill", "decode")):
        found[kind] = statistics.median(rate[place] for rate in own)
        found[f"{kind}_ratio"] = statistics.median(rate[place] / of_dense[place] for rate, of_dense in zip(own, dense, strict=True))
    return found


@torch.no_grad()
def tokens_per_second(model: Any, text: Tensor) -> tuple[float, float]:
    """Of reading (1, T) tokens at once, and of writing DECODE_TOKENS greedily after the first CONTEXT_TOKENS of them; both with the cache."""
    text = text.to(model.device)
    start = time.perf_counter()
    int(model(text, use_cache=True, logits_to_keep=1).logits.argmax())  # which waits for the device
    read = time.perf_counter() - start
    output = model(text[:, :CONTEXT_TOKENS], use_cache=True, logits_to_keep=1)
    int(output.logits.argmax())
    start = time.perf_counter()
    for _ in range(DECODE_TOKENS):
        output = model(output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values, use_cache=True)
    int(output.logits.argmax())
    return text.shape[1] / read, DECODE_TOKENS / (time.perf_counter() - start)


# ---------------------------------------------------------------------- speed


def speed(setting: Setting) -> None:
    """Seconds of each round: the engine in both modes and the released algorithm on a resident model, of equal numbers of sub-models; and the engine with fewer."""
    code, ours, fewer = named("Bonsai, authors' mode"), named("Bonsai"), replace(setting, masks=FEWER_MASKS)
    for name, contender, asked in (("engine, authors' mode", code, setting), ("engine", ours, setting), ("engine, fewer sub-models", ours, fewer)):
        if setting.rows.search(name):
            recipe = asked.recipe(contender, TIMED_FRACTION)
            with tempfile.TemporaryDirectory() as folder:
                pruned, clock = prune_into(Path(folder), setting, recipe)
                keep_row("speed", {"name": name, **clock.rounds(), **measured(pruned.folder, setting)})
    if setting.rows.search("naive"):
        recipe = setting.recipe(code, TIMED_FRACTION)
        model = transformers.AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32).eval().to(default_device())
        seconds = prune_naively(model, setting.tokens(recipe).to(model.device), recipe, TIMED_FRACTION)
        kept = _non_embedding(model)
        value = perplexity_of(model, setting.windows().to(model.device))
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
    return [(score.view(-1, group).mean(dim=1) if place % 2 else score).cpu() for place, score in enumerate(scores)]


def _masked_perplexity(model: Any, tokens: Tensor, mask: Tensor, group: int) -> float:
    outputs = _outputs(model)
    widths = [linear.in_features // group if place % 2 else linear.in_features for place, linear in enumerate(outputs)]
    handles = []
    for place, (linear, own) in enumerate(zip(outputs, mask.split(widths), strict=True)):
        columns = (own.repeat_interleave(group) if place % 2 else own).float()
        handles.append(linear.register_forward_pre_hook(lambda module, args, columns=columns: (args[0] * columns.to(args[0].device),)))
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
            ended = subprocess.run(command, cwd=REPOSITORY, env=ON_CPU, capture_output=True, text=True, check=True)
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
