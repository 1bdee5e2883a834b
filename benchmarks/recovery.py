"""Recovery on SmolLM2-135M: what each brings back of what pruning lost, at one number of tokens and at a tuned learning rate; and its memory.

    python -m benchmarks.recovery [--data FOLDER] [--only tuning|quality|timing|memory] [--bases REGEX] [--rows REGEX] [--steps 30] [--tuning-steps 30] [--again]

FOLDER holds `wiki.valid.raw` (calibration and training, but for its last windows, which are held out) and `wiki.test.raw` (evaluation) of WikiText-2. Pruned models
stay in `var/bench/recovery/`, a folder each, and are pruned again only when the model or the recipe is another one. Results go to `benchmarks/engine.json`, and from there into `benchmarks/README.md`, row by row as soon as they are there; a row that
is there with the same settings is not measured again, except with `--again`; so what was stopped goes on with the same command. After changes to the engine,
remove the folder and say `--again`.

Every contender's learning rate is tuned: on 50% magnitude for the masked models, on CFSP for those with parts removed. It is the one with the lowest loss on the
held-out windows; the grid grows while the best is at its edge. `quality` tunes first what isn't tuned. The evaluated text is never chosen by.

Where rows were measured by several processes at once, `--only timing` takes their seconds and peaks again, one after the other.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError
from torch import Tensor

from app.counting import count_parameters
from app.exceptions import RecipeError
from app.recipe import Recipe
from app.recovery import Perp
from app.source import check_recipe, read_source
from benchmarks.engine import REPOSITORY, named, recipe_of
from benchmarks.engine import Contender as Base
from benchmarks.results import HERE, ON_CPU, keep, stored
from espalier.demo import converted_model
from worker.blocks import BlockStream
from worker.checkpoint import COPIED, finish, write_shard
from worker.data import leading_windows, random_windows, tokenize
from worker.evaluation import perplexity
from worker.memory import PeakMemory, map_large_allocations, return_freed_memory
from worker.pipeline import run, target_of
from worker.pruners import PRUNERS
from worker.pruning import prune
from worker.recovery.reconstruct import reconstruct
from worker.recovery.retrain import Retrained, retrain
from worker.recovery.text import TrainingText, training_text
from worker.state import WalkState
from worker.walk import Pruned, Pruning

Row = dict[str, Any]
LENGTH, BATCH, HELD_OUT = 256, 4, 16
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # that a grid can grow by
MASKED, SLICED = named("Magnitude 50%"), named("CFSP, default mode, per layer, FFN 20%")
BASES = [MASKED, named("Wanda 50%"), Base("", "Magnitude 2:4", "magnitude", "2:4"), SLICED]
UNRECOVERED = [named("SparseGPT 50%")]  # only a figure to compare with


@dataclass(frozen=True)
class Contender:
    """A recovery without its budget, and the grid of its learning rates."""

    name: str
    recovery: Row
    rates: tuple[float, ...]
    method: Row = field(default_factory=dict)  # further fields of the base's method, which then prunes anew


PUBLISHED: Row = {"name": "perp", "train": "published"}
# On a model without biases, as this one is, the preset biases+norms is norms. What a recovery can't do on a base, the engine refuses, and the row says so.
CONTENDERS = [
    Contender("full retraining", {"name": "full"}, (3e-4, 1e-3, 3e-3)),
    Contender("full retraining in each of 3 rounds of pruning", {"name": "full"}, (3e-4, 1e-3, 3e-3), {"rounds": 3}),
    Contender("biases", {"name": "perp", "train": "biases"}, (3e-3, 1e-2, 3e-2)),
    Contender("norms", {"name": "perp", "train": "norms"}, (3e-3, 1e-2, 3e-2)),
    Contender("head", {"name": "perp", "train": "head"}, (3e-4, 1e-3, 3e-3)),
    Contender("adapters: MaskLoRA", {"name": "perp", "train": "adapters"}, (3e-3, 1e-2, 3e-2)),
    Contender("published: norms, MaskLoRA", PUBLISHED, (3e-3, 1e-2, 3e-2)),
    Contender("all: norms, head, MaskLoRA", {"name": "perp", "train": "all"}, (3e-3, 1e-2, 3e-2)),
    Contender("norms, ScaleLoRA", PUBLISHED | {"adapter": "scale_lora"}, (3e-3, 1e-2, 3e-2)),
    Contender("norms, LoRA-Prune", PUBLISHED | {"adapter": "lora_prune"}, (3e-3, 1e-2, 3e-2)),
    Contender("norms, MaskLoRA of rank 16", PUBLISHED | {"rank": 16}, (1e-3, 3e-3, 1e-2)),
    Contender("LoRA of rank 8", {"name": "lora", "rank": 8, "alpha": 16.0}, (3e-4, 1e-3, 3e-3)),
    Contender("LoRA of rank 8 on average, ranks by importance", {"name": "lora", "rank": 8, "alpha": 16.0, "ranks": "importance"}, (3e-4, 1e-3, 3e-3)),
    Contender("norms, MaskLoRA, reconstructed by block", PUBLISHED | {"mode": "reconstruct"}, (1e-3, 3e-3, 1e-2)),
    Contender("norms, MaskLoRA, reconstructed by attention and FFN", PUBLISHED | {"mode": "reconstruct", "parts": "attention_ffn"}, (1e-3, 3e-3, 1e-2)),
]


@dataclass(frozen=True)
class Watched:
    """A recovery whose memory is measured, and at most which share of another's it may take."""

    name: str
    recovery: Row
    doubled: bool = False  # whether the model has its blocks twice
    of: str = "full retraining"
    asked: float | None = None


RECONSTRUCTION = PUBLISHED | {"mode": "reconstruct"}
WATCHED = [
    Watched("full retraining", {"name": "full"}),
    Watched("norms", {"name": "perp", "train": "norms"}, asked=0.5),
    Watched("norms, without gradient checkpointing", {"name": "perp", "train": "norms", "gradient_checkpointing": False}),
    Watched("published: norms, MaskLoRA", PUBLISHED),
    Watched("reconstructed by block", RECONSTRUCTION),
    Watched("reconstructed by block, twice the blocks", RECONSTRUCTION, doubled=True, of="reconstructed by block", asked=1.05),
]
WATCHED_STEPS = 3  # from the second on, gradients and AdamW's moments are there together


@dataclass(frozen=True)
class Setting:
    """What all parts work on."""

    model: Path
    data: Path
    folder: Path  # where pruned models are kept
    steps: int
    tuning_steps: int
    bases: re.Pattern[str]
    rows: re.Pattern[str]

    def recipe(self, base: Base) -> Recipe:
        return recipe_of(base, self.data)

    def chosen(self) -> list[Contender]:
        return [contender for contender in CONTENDERS if self.rows.search(contender.name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "wikitext-2")
    parser.add_argument("--model", type=Path, help="another checkpoint folder; give another --folder too")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "var" / "bench" / "recovery", help="where pruned models are kept")
    parser.add_argument("--only", choices=["tuning", "quality", "timing", "memory"])
    parser.add_argument("--bases", type=re.compile, default=re.compile(""), help="only the pruned models whose names this finds")
    parser.add_argument("--rows", type=re.compile, default=re.compile(""), help="only the recoveries whose names this finds")
    parser.add_argument("--steps", type=int, default=30, help=f"of {BATCH} × {LENGTH} tokens, for every recovery")
    parser.add_argument("--tuning-steps", type=int, help="for the choice of the learning rate (default: as many)")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--watch", choices=[watched.name for watched in WATCHED], help="only print the peak memory of this, in this process")
    asked = parser.parse_args()
    if not (asked.data / "wiki.test.raw").is_file():
        parser.error(f"{asked.data} has no wiki.test.raw; name the folder of WikiText-2 raw with --data")
    map_large_allocations()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = asked.model or converted_model(REPOSITORY / "var" / "cache")
    setting = Setting(model, asked.data, asked.folder, asked.steps, asked.tuning_steps or asked.steps, asked.bases, asked.rows)
    if asked.watch:
        print(json.dumps(peak_of(setting, next(watched for watched in WATCHED if watched.name == asked.watch))))
        return
    if asked.again:
        forget(setting)
    parts: dict[str, Callable[[Setting], None]] = {"memory": memory, "tuning": tuning, "quality": quality}
    for name, measure in (parts | {"timing": timing} if asked.only else parts).items():
        if asked.only in (None, name):
            measure(setting)
    print((HERE / "README.md").read_text(encoding="utf-8"))


# ------------------------------------------------------------------ the record


def on_record(part: str) -> list[Row]:
    rows: list[Row] = stored().get("recovery", {}).get(part, [])
    return rows


def keep_row(part: str, row: Row, *keys: str) -> None:
    """Put a row in the place of the one with the same `keys`; rows are in the order of bases and contenders."""
    print(part, row, flush=True)
    bases, contenders = [base.name for base in (*BASES, *UNRECOVERED)], [contender.name for contender in CONTENDERS]
    names = {"bases": bases, "memory": [watched.name for watched in WATCHED]}.get(part, contenders)

    def place(row: Row) -> tuple[int, int, int, float]:
        return bases.index(row.get("base", bases[0])), row.get("steps", 0), names.index(row["name"]), row.get("rate") or 0.0

    rows = [kept for kept in on_record(part) if any(kept[key] != row[key] for key in keys) and kept["name"] in names] + [row]
    keep("recovery", stored().get("recovery", {}) | {part: sorted(rows, key=place), "contenders": contenders, "device": device_name()})


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def forget(setting: Setting) -> None:
    """Take what is asked for off the record."""
    left = {
        part: [row for row in on_record(part) if not (setting.bases.search(row["base"]) and setting.rows.search(row["name"]))] for part in ("tuning", "quality")
    }
    keep("recovery", stored().get("recovery", {}) | left)


# ------------------------------------------------------------------- the bases


def pruned_model(setting: Setting, base: Base) -> tuple[Pruned, WalkState]:
    """A pruned checkpoint and its state, which holds figures too; pruned now, or before by the same recipe."""
    source, recipe = read_source(setting.model), setting.recipe(base)
    stream = BlockStream(source)
    folder = setting.folder / "-".join(re.findall(r"[a-z0-9]+", base.name.lower()))
    state = WalkState.open(folder, json.dumps([str(setting.model), recipe.model_dump(mode="json")]))
    tokens = random_windows(tokenize(setting.model, recipe.calibration.source, {}), recipe.calibration)
    pruning = Pruning(stream, recipe, tokens, state, lambda done, total: None)
    pruned = prune(pruning, PRUNERS[recipe.method.name], target_of(recipe, count_parameters(source, [])))
    finish(pruned.folder, source, pruned.kept, recipe.output.layout, recipe.output.dtype, pruned.switches)
    return pruned, state


def evaluated_windows(setting: Setting) -> Tensor:
    evaluation = setting.recipe(MASKED).evaluation
    assert evaluation is not None
    return leading_windows(tokenize(setting.model, evaluation.source, {}), evaluation)


def perplexity_of(checkpoint: Path, windows: Tensor) -> float:
    with tempfile.TemporaryDirectory() as scratch:
        return perplexity(BlockStream(read_source(checkpoint)), windows, Path(scratch))


# ---------------------------------------------------------------- one recovery


def recipe_with(setting: Setting, base: Base, contender: Contender, rate: float, steps: int) -> Recipe:
    """A base's recipe with a recovery at the common budget: steps × 4 × 256 tokens, in all rounds together.

    A reconstruction goes once through the very windows that the others train on, and takes as many steps in each block as they do, or in each half: every
    weight that is trained gets its gradient from as many tokens. Raises ValidationError for what can't be.
    """
    steps = max(1, steps // int(contender.method.get("rounds", 1)))
    budget: Row = {"sequence_length": LENGTH, "batch": BATCH, "held_out": HELD_OUT, "steps": steps, "checkpoint_every": steps, "learning_rate": rate}
    once = {"samples": steps * BATCH} if contender.recovery.get("mode") == "reconstruct" else {}
    method = ({"name": base.method} if isinstance(base.method, str) else base.method) | contender.method
    return recipe_of(replace(base, method=method, more=base.more | {"recovery": budget | contender.recovery | once}), setting.data)


def texts(setting: Setting, recipe: Recipe) -> tuple[TrainingText, Tensor]:
    """What is trained on, and (b, T) windows that are held out of every training, also of a reconstruction, which measures no loss by itself."""
    config, source, end = recipe.recovery, recipe.trains_on, HELD_OUT * LENGTH
    assert config is not None
    assert source is not None
    text = tokenize(setting.model, source, {})
    held_out = text.tokens[-end:].view(HELD_OUT, LENGTH)
    return training_text(text if config.windows[1] else replace(text, tokens=text.tokens[:-end]), config), held_out


def measured(setting: Setting, base: Base, contender: Contender, rate: float, steps: int) -> Row:
    """A row: what a recovery does to a base; from the record where that has it. A recovery that the engine refuses or that diverges is a row too."""
    row: Row = {"base": base.name, "name": contender.name, "steps": steps, "rate": rate, "device": device_name()}
    try:
        recipe = recipe_with(setting, base, contender, rate, steps)
        check_recipe(recipe, read_source(setting.model))
    except ValidationError as error:
        fault = error.errors()[0]
        return row | {"rate": None, "refused": ": ".join([*filter(None, ["/".join(map(str, fault["loc"]))]), fault["msg"].removeprefix("Value error, ")])}
    except RecipeError as error:
        return row | {"rate": None, "refused": f"{error.message} {error.hint}"}
    assert recipe.recovery is not None
    row["recovery"] = recipe.recovery.model_dump_json(exclude_defaults=True)
    for known in (*on_record("tuning"), *on_record("quality")):
        if known | row == known:
            print(f"on record: {row}", flush=True)
            return known
    try:
        return row | (in_rounds(setting, recipe) if contender.method else recovered(setting, base, recipe))
    except RecipeError as error:
        if error.code != "training_diverged":
            raise
        return row | {"held_out": None, "refused": error.message}


def recovered(setting: Setting, base: Base, recipe: Recipe) -> Row:
    """The figures of a recovery. Seconds and peak (anonymous memory of this whole process) are of what the engine calls the phase `recover`."""
    pruned, _ = pruned_model(setting, base)
    text, held_out = texts(setting, recipe)
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        checkpoint = Path(folder, "checkpoint")
        shutil.copytree(pruned.folder, checkpoint)
        stored_before = count_parameters(read_source(checkpoint), []).all
        return_freed_memory()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with PeakMemory() as peak:
            start = time.perf_counter()
            found = recover(setting, recipe, pruned, text, checkpoint)
            seconds = time.perf_counter() - start
        loss = found.merged if found.merged is not None else found.trained.best
        return {
            "held_out": math.log(perplexity_of(checkpoint, held_out)) if loss is None else loss,
            "perplexity": perplexity_of(checkpoint, evaluated_windows(setting)),
            "parameters": found.parameters,
            "share": found.share,
            "stored_more": count_parameters(read_source(checkpoint), []).all - stored_before,
            "tokens": found.tokens,
            "seconds": seconds,
            "peak": peak.bytes,
            "device_peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        }


def recover(setting: Setting, recipe: Recipe, pruned: Pruned, text: TrainingText, checkpoint: Path) -> Retrained:
    """Recover a checkpoint in place, as the engine does."""
    config, dense, work = recipe.recovery, BlockStream(read_source(setting.model)), checkpoint.with_name("work")
    assert config is not None
    if isinstance(config, Perp) and config.reconstructs:
        return reconstruct(config, checkpoint, pruned, dense, text, WalkState.open(work, "benchmark"), lambda step: None)
    return retrain(config, checkpoint, pruned, dense, text, None, work, lambda step: None)


def in_rounds(setting: Setting, recipe: Recipe) -> Row:
    """The same figures of a whole job that prunes and recovers in turns; parameters and peak are those of its last round."""
    with tempfile.TemporaryDirectory() as folder:
        report = run(recipe, setting.model, Path(folder, "out"), Path(folder, "work"), lambda event: None)
    found, after = report.recovery, report.after
    assert found is not None
    assert after is not None
    assert after.perplexity is not None
    return {
        "held_out": found.held_out_loss_after if found.held_out_loss_merged is None else found.held_out_loss_merged,
        "perplexity": after.perplexity.value,
        "parameters": found.trained_parameters,
        "share": found.trained_share,
        "stored_more": 0,
        "tokens": found.tokens * recipe.rounds,
        "seconds": report.seconds["recover"],
        "peak": found.peak_memory_bytes,
        "device_peak": report.peak_device_bytes,
    }


# --------------------------------------------------------------------- tuning


def tuning(setting: Setting) -> None:
    for base in (MASKED, SLICED):
        if setting.bases.search(base.name):
            for contender in setting.chosen():
                tuned_rate(setting, base, contender)


def tuned_rate(setting: Setting, base: Base, contender: Contender) -> float | None:
    """The learning rate with the lowest held-out loss on a base; None where the engine refuses the recovery."""

    def loss(rate: float) -> float:
        row = measured(setting, base, contender, rate, setting.tuning_steps)
        if row["rate"] is None:
            return math.nan
        keep_row("tuning", row, "base", "name", "steps", "rate")
        return math.inf if row["held_out"] is None or math.isnan(row["held_out"]) else float(row["held_out"])

    return lowest(loss, contender.rates)


def lowest(loss: Callable[[float], float], rates: tuple[float, ...]) -> float | None:
    """The learning rate of the lowest loss, of a grid that grows while that is at its edge; None where losses are NaN."""
    losses: dict[float, float] = {}
    wanted = [*rates]
    while wanted:
        losses |= {rate: loss(rate) for rate in wanted}
        if any(math.isnan(value) for value in losses.values()):
            return None
        best = min(losses, key=losses.__getitem__)
        place = RATES.index(best)
        wanted = [rate for rate in RATES[max(0, place - 1) : place + 2] if rate not in losses]
    return best


# -------------------------------------------------------------------- quality


def quality(setting: Setting) -> None:
    """What each contender brings back at its tuned learning rate, and how good every base is without."""
    windows = evaluated_windows(setting)
    if "dense" not in stored().get("recovery", {}):
        keep("recovery", stored().get("recovery", {}) | {"dense": perplexity_of(setting.model, windows), "device": device_name()})
    for base in (*BASES, *UNRECOVERED):
        if not setting.bases.search(base.name):
            continue
        pruned, state = pruned_model(setting, base)
        before = state.figure("perplexity", functools.partial(perplexity_of, pruned.folder, windows))
        keep_row("bases", {"name": base.name, "perplexity": before}, "name")
        for contender in setting.chosen() if base in BASES else []:
            rate = tuned_rate(setting, tuned_on(setting, base), contender)
            row = measured(setting, base, contender, rate or contender.rates[0], setting.steps)
            keep_row("quality", row, "base", "name", "steps")


def tuned_on(setting: Setting, base: Base) -> Base:
    """The base that a base's learning rates are tuned on."""
    return SLICED if setting.recipe(base).facts.structured else MASKED


def timing(setting: Setting) -> None:
    """Seconds and peaks of the rows on record, again."""
    contenders, bases = {contender.name: contender for contender in setting.chosen()}, {base.name: base for base in BASES}
    for row in on_record("quality"):
        contender, base = contenders.get(row["name"]), bases[row["base"]]
        if contender and "refused" not in row and setting.bases.search(base.name):
            recipe = recipe_with(setting, base, contender, row["rate"], row["steps"])
            found = in_rounds(setting, recipe) if contender.method else recovered(setting, base, recipe)
            keep_row("quality", row | {name: found[name] for name in ("seconds", "peak", "device_peak")}, "base", "name", "steps")


# --------------------------------------------------------------------- memory


def memory(setting: Setting) -> None:
    """Peak memory of a fresh process each, while it recovers 50% magnitude."""
    for watched in WATCHED:
        if not setting.rows.search(watched.name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            own = setting
            if watched.doubled:
                own = replace(setting, model=Path(folder, "model"), folder=Path(folder, "pruned"))
                write_doubled(setting.model, own.model)
            pruned_model(own, MASKED)
            command = [sys.executable, "-m", "benchmarks.recovery", "--watch", watched.name]
            command += ["--model", str(own.model), "--folder", str(own.folder), "--data", str(own.data)]
            ended = subprocess.run(command, cwd=REPOSITORY, env=ON_CPU, stdout=subprocess.PIPE, text=True, check=True)
        keep_row("memory", {"name": watched.name, "bytes": json.loads(ended.stdout.splitlines()[-1]), "of": watched.of, "asked": watched.asked}, "name")


def peak_of(setting: Setting, watched: Watched) -> int:
    """Highest anonymous memory of this process while it recovers a model that was pruned before."""
    recipe = recipe_with(setting, MASKED, Contender("", watched.recovery, ()), 1e-4, WATCHED_STEPS)
    pruned, _ = pruned_model(setting, MASKED)
    text, _ = texts(setting, recipe)
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        shutil.copytree(pruned.folder, Path(folder, "checkpoint"))
        return_freed_memory()
        with PeakMemory() as peak:
            recover(setting, recipe, pruned, text, Path(folder, "checkpoint"))
    return peak.bytes


def write_doubled(model: Path, folder: Path) -> None:
    """The model with all its blocks twice, one run of them after the other."""
    stream = BlockStream(read_source(model))
    architecture, blocks = stream.architecture, [*range(len(stream)), *range(len(stream))]
    tensors = stream.outer_tensors()
    for place, index in enumerate(blocks):
        old, new = architecture.block_prefix(index), architecture.block_prefix(place)
        tensors |= {new + name.removeprefix(old): tensor.clone() for name, tensor in stream.block_tensors(index).items()}
    folder.mkdir(parents=True)
    write_shard(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(architecture.keep_blocks(stream.source.config, blocks)), encoding="utf-8")
    for name in COPIED:
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)


if __name__ == "__main__":
    main()
