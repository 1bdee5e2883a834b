"""The engine, start to end. READ THIS FIRST.

    python -m worker.pipeline RECIPE.json SOURCE_DIR OUT_DIR [--work WORK_DIR] [--text NAME PATH …] [--memory BYTES]

resolve ▸ load ▸ evaluate the dense model ▸ calibrate and prune ▸ write ▸ recover ▸ evaluate the result ▸ verify it in a fresh process ▸ report.
Where the recipe asks for rounds, all but the last prune, write and recover beforehand, and the last one starts from what they leave.

It knows no service: progress goes to stdout as JSON lines, the result to `OUT_DIR/report.json` and `OUT_DIR/checkpoint/`. Exit 0, or 2 with a last line
`{"event": "error", "code", "message", "hint"}` for a recipe or a model that can't be run. State lies in WORK_DIR until the result is whole; the same command
goes on there.
"""

from __future__ import annotations

import argparse
import errno
import functools
import hashlib
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from app.counting import LinearZeros, count_parameters, fraction_of, macs_per_token, sparsities
from app.estimate import phase_costs
from app.exceptions import EspalierError, RecipeError
from app.recipe import Budget, Pattern, Recipe
from app.recovery import Perp
from app.report import LoadCheck, Measured, Parameters, Perplexity, Recovered, Report, Round, TextUsed
from app.source import Source, check_recipe, read_source
from worker import notes
from worker.blocks import BlockStream
from worker.checkpoint import checkpoint_bytes, finish, model_card, write_padded
from worker.data import leading_windows, random_windows, tokenize
from worker.evaluation import logits, perplexity
from worker.memory import PeakMemory, map_large_allocations, return_freed_memory
from worker.progress import Emit, Progress
from worker.pruners import PRUNERS
from worker.pruners.base import Target
from worker.pruners.magnitude import fractions_of_rounds
from worker.pruning import prune
from worker.recovery.distillation import Teacher, check_size, teach
from worker.recovery.reconstruct import reconstruct
from worker.recovery.retrain import require_room, retrain
from worker.recovery.text import TrainingText, training_text
from worker.state import ROUNDS, WalkState, sha256_of
from worker.trial import Trial, TrialError, fits_in_memory, run_trial
from worker.walk import Edit, Pruned, Pruning

Layout = Literal["uniform", "per_layer", "padded"]

CHECKED_TOKENS = 128  # logits of this many tokens are compared
LOGIT_TOLERANCE = 1e-3  # of the largest logit


def run(recipe: Recipe, source_dir: Path, out: Path, work: Path, emit: Emit, texts: dict[str, Path] | None = None, memory_allowed: int | None = None) -> Report:
    """Run a recipe on a checkpoint folder; the result is in `out` when this returns. Raises RecipeError for what can't be run.

    `texts` says where the texts lie that the recipe names otherwise than by a bundled name or a path from here. A model that would not fit in
    `memory_allowed` bytes, or in what is free, is never loaded whole.
    """
    texts = texts or {}
    with PeakMemory() as memory:
        progress = Progress(emit)
        with progress.phase("load"):
            source = read_source(source_dir)
            check_recipe(recipe, source)
            fingerprint = weights_sha256(source)
            stream = BlockStream(source)
            tokens, calibration_text = _calibration_tokens(recipe, source, texts)
            evaluated = _evaluation_windows(recipe, source, texts)
            training = _training_text(recipe, stream, texts, evaluated)
            require_room(recipe, source, memory_allowed)
            target = None if isinstance(recipe.sparsity, Budget) else target_of(recipe, count_parameters(source, []))
            progress.plan(phase_costs(recipe, source))
        state = WalkState.open(work, _state_fingerprint(recipe, fingerprint, tokens, evaluated, training, stream.device))
        resumed_at_block, resumed_at_round = state.finished or None, state.finished_rounds or None
        _tell_what_is_done(state, progress)

        before = None
        if evaluated is not None:  # the dense model is measured once a job, however often it is attempted
            measure = functools.partial(_measure, evaluated, source, [], work, progress, "evaluate_dense", memory_allowed, loader=False)
            before = Measured.model_validate(state.figure("before", lambda: measure().model_dump()))
        start, earlier = stream, list[Round]()
        if recipe.rounds > 1:
            assert target is not None
            assert training is not None
            start, earlier = _earlier_rounds(recipe, stream, target.fraction, training, state, progress, memory_allowed)
        with progress.phase("prune", 1 / recipe.rounds):
            pruned = _prune(recipe, start, target, tokens, evaluated, state, progress)
        with progress.phase("write", 1 / recipe.rounds):
            _write(recipe, start.source, pruned, out)
        before_recovery, recovered = None, None
        if training is not None:
            if evaluated is not None:
                pruned_source, quality = read_source(out / "checkpoint"), replace(evaluated, speed=False)
                measure = functools.partial(
                    _measure, quality, pruned_source, pruned.zeros_after, work, progress, "evaluate_pruned", memory_allowed, loader=False
                )
                before_recovery = Measured.model_validate(state.figure("pruned", lambda: measure().model_dump()))
            teacher = _teach(recipe, stream, pruned, training, state, progress)
            pruned, recovered = _recover(recipe, stream, pruned, training, teacher, out, state, progress, memory_allowed)
        result = read_source(out / "checkpoint")
        per_layer = bool(result.config.get("per_layer_config"))
        after = None
        if evaluated is not None:
            after = _measure(evaluated, result, pruned.zeros_after, work, progress, "evaluate", memory_allowed, loader=per_layer)
        with progress.phase("verify"):
            loads_with = _verify(out, result, work, per_layer, memory_allowed)

    rounds = [*earlier, _round(pruned, recovered)] if earlier and recovered is not None else None
    parameters_before = count_parameters(source, _zeros_before(state) if earlier else pruned.zeros_before)
    parameters_after = count_parameters(result, pruned.zeros_after)
    report = Report(
        recipe=recipe,
        model_type=source.model_type,
        model_fingerprint=fingerprint,
        before=before and before.model_copy(update={"parameters": parameters_before}),
        pruned=before_recovery,
        after=after,
        parameters_before=parameters_before,
        parameters_after=parameters_after,
        sparsity=sparsities(parameters_before, parameters_after),
        layers=pruned.layers,
        calibration=calibration_text,
        recovery=recovered,
        rounds=rounds,
        loads_with=loads_with,
        seconds=progress.seconds,
        resumed_at_block=resumed_at_block,
        resumed_at_round=resumed_at_round,
        peak_memory_bytes=memory.bytes,
        peak_device_bytes=torch.cuda.max_memory_reserved(stream.device) if stream.device.type == "cuda" else None,
        notes=[
            *notes.of_pruning(recipe, target, pruned, parameters_before, parameters_after),
            *notes.of_rounds(rounds),
            *notes.of_recovery(recipe, recovered),
            *notes.of_memory(recipe, before, after, loads_with),
        ],
        versions=_versions(),
    )
    (out / "checkpoint" / "README.md").write_text(model_card(report), encoding="utf-8")
    if recipe.output.padded:
        (out / "padded" / "README.md").write_text(model_card(report, padded=True), encoding="utf-8")
    (out / "report.json").write_text(report.model_dump_json(indent=2), encoding="utf-8")
    state.remove()
    return report


# -------------------------------------------------------------------- the steps


def weights_sha256(source: Source) -> str:
    """sha256 over config.json and all weight files, in the order of their names."""
    digest = hashlib.sha256((source.folder / "config.json").read_bytes())
    for file in sorted({entry.file for entry in source.tensors.values()}):
        digest.update(bytes.fromhex(sha256_of(file)))
    return digest.hexdigest()


def _calibration_tokens(recipe: Recipe, source: Source, texts: dict[str, Path]) -> tuple[Tensor | None, TextUsed | None]:
    if not recipe.calibrates:
        return None, None
    text = tokenize(source.folder, recipe.calibration.source, texts)
    tokens = random_windows(text, recipe.calibration)
    return tokens, text.used(tokens.numel())


@dataclass(frozen=True)
class Evaluated:
    """What both models are measured on, and whether they are timed too."""

    windows: Tensor  # (B, T)
    text: TextUsed
    speed: bool


def _evaluation_windows(recipe: Recipe, source: Source, texts: dict[str, Path]) -> Evaluated | None:
    if recipe.evaluation is None:
        return None
    text = tokenize(source.folder, recipe.evaluation.source, texts)
    windows = leading_windows(text, recipe.evaluation)
    return Evaluated(windows, text.used(windows.numel()), recipe.evaluation.speed)


def _training_text(recipe: Recipe, stream: BlockStream, texts: dict[str, Path], evaluated: Evaluated | None) -> TrainingText | None:
    if recipe.recovery is None or recipe.trains_on is None:
        return None
    text = tokenize(stream.source.folder, recipe.trains_on, texts)
    if evaluated is not None and evaluated.text.sha256 == text.sha256:
        raise RecipeError(
            f"The texts '{text.source}' and '{evaluated.text.source}' are the same, and what is evaluated on can't be trained on.",
            code="training_on_evaluation_text",
            hint="Give recovery or evaluation another source.",
            pointer="/recovery/source",
        )
    training = training_text(text, recipe.recovery)
    if recipe.recovery.distillation is not None:
        check_size(stream, training.windows, recipe.recovery.distillation)
    return training


def target_of(recipe: Recipe, dense: Parameters) -> Target:
    """What a recipe's fraction or pattern asks of its method, in the method's own denominator."""
    pattern = (recipe.sparsity.n, recipe.sparsity.m) if isinstance(recipe.sparsity, Pattern) else None
    return Target(fraction_of(recipe, dense), pattern)


def _state_fingerprint(
    recipe: Recipe, weights: str, tokens: Tensor | None, evaluated: Evaluated | None, training: TrainingText | None, device: torch.device
) -> str:
    """Of everything that the pruned blocks and the figures in the state depend on."""
    digest = hashlib.sha256(weights.encode())
    digest.update(recipe.model_dump_json(include={"method", "sparsity", "allocation", "restoration", "recovery", "evaluation", "output"}).encode())
    if tokens is not None:
        digest.update(tokens.numpy().tobytes())
    if evaluated is not None:
        digest.update(evaluated.windows.numpy().tobytes() + evaluated.text.sha256.encode())
    if training is not None:
        digest.update(training.windows.numpy().tobytes() + training.used.sha256.encode())
    engine = Path(__file__).parent
    for file in sorted([*engine.rglob("*.py"), *engine.with_name("app").rglob("*.py")]):
        digest.update(file.read_bytes())
    digest.update(json.dumps([_versions(), str(device), torch.get_num_threads()]).encode())
    return digest.hexdigest()


def _tell_what_is_done(state: WalkState, progress: Progress) -> None:
    """Say what of an earlier attempt is gone on with."""
    if state.refused:
        progress.log(f"Started anew, because of the earlier attempt {state.refused}.")
    counts = {"round": state.finished_rounds, "block": state.finished}
    done = " and ".join(f"{count} {unit}{'s' if count > 1 else ''}" for unit, count in counts.items() if count)
    if done:
        progress.log(f"Goes on after {done} of an earlier attempt, all verified.")


def _measure(
    evaluated: Evaluated,
    source: Source,
    zeros: list[LinearZeros],
    work: Path,
    progress: Progress,
    phase: str,
    memory_allowed: int | None,
    *,
    loader: bool,
) -> Measured:
    """Perplexity by streamed blocks in this process; speed and memory of plain transformers in a fresh one."""
    windows = evaluated.windows
    with progress.phase(phase):
        scratch = _scratch(work / phase)
        stream = BlockStream(source)
        value = perplexity(stream, windows, scratch, lambda index: progress.step(index + 1, len(stream)))
        speed = evaluated.speed and fits_in_memory(source, memory_allowed)
        trial = run_trial(source.folder, windows[:1, :CHECKED_TOKENS], loader=loader, speed=True, work=scratch) if speed else None
        shutil.rmtree(scratch)
    return Measured(
        parameters=count_parameters(source, zeros),
        checkpoint_bytes=checkpoint_bytes(source.folder),
        macs_per_token=macs_per_token(source),
        perplexity=Perplexity(value=value, text=evaluated.text, windows=len(windows), sequence_length=windows.shape[1], dtype="float32"),
        speed=trial and trial.speed,
        peak_memory_bytes=trial and trial.peak_resident_bytes,
    )


def _prune(
    recipe: Recipe, stream: BlockStream, target: Target | None, tokens: Tensor | None, evaluated: Evaluated | None, state: WalkState, progress: Progress
) -> Pruned:
    def perplexity_of(edit: Edit) -> float:
        assert evaluated is not None
        scratch = _scratch(state.work / "budget")
        value = perplexity(stream, evaluated.windows, scratch, edit=edit)
        shutil.rmtree(scratch)
        progress.log(f"A try for the budget has a perplexity of {value:.4g}.")
        return value

    run = Pruning(stream=stream, recipe=recipe, tokens=tokens, state=state, block_done=progress.step, perplexity=perplexity_of, round_step=progress.round_step)
    return prune(run, PRUNERS[recipe.method.name], target)


def _write(recipe: Recipe, source: Source, pruned: Pruned, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").unlink(missing_ok=True)  # it tells of another result
    for folder in ("checkpoint", "padded"):
        shutil.rmtree(out / folder, ignore_errors=True)
    shutil.copytree(pruned.folder, out / "checkpoint", copy_function=_link)
    finish(out / "checkpoint", source, pruned.kept, recipe.output.layout, recipe.output.dtype, pruned.switches)
    if recipe.output.padded and recipe.recovery is None:
        write_padded(out / "checkpoint", out / "padded")


def _teach(recipe: Recipe, dense: BlockStream, pruned: Pruned, text: TrainingText, state: WalkState, progress: Progress) -> Teacher | None:
    if recipe.recovery is None or recipe.recovery.distillation is None:
        return None
    with progress.phase("teach", 1 / recipe.rounds):
        return teach(dense, text.windows, recipe.recovery.distillation, [layer.index for layer in pruned.kept], state, progress.step)


def _recover(
    recipe: Recipe,
    dense: BlockStream,
    pruned: Pruned,
    text: TrainingText,
    teacher: Teacher | None,
    out: Path,
    state: WalkState,
    progress: Progress,
    memory_allowed: int | None,
) -> tuple[Pruned, Recovered]:
    """Train the written checkpoint, from the shards that the pruning left: a killed attempt wrote over none of those."""
    config = recipe.recovery
    assert config is not None
    with progress.phase("recover", 1 / recipe.rounds), PeakMemory() as memory:
        if isinstance(config, Perp) and config.reconstructs:
            found = reconstruct(config, out / "checkpoint", pruned, dense, text, state, progress.train_step)
        else:
            found = retrain(config, out / "checkpoint", pruned, dense, text, teacher, state.work / "recovery", progress.train_step, memory_allowed)
        return_freed_memory()
        if recipe.output.padded:
            write_padded(out / "checkpoint", out / "padded")
    return found.pruned, Recovered(
        trained_parameters=found.parameters,
        trained_share=found.share,
        steps=found.trained.steps,
        tokens=found.tokens,
        text=text.used,
        held_out_loss_before=found.trained.before,
        held_out_loss_after=found.trained.best,
        held_out_loss_merged=found.merged,
        blocks=found.blocks,
        seconds=round(found.trained.seconds, 3),
        peak_memory_bytes=memory.bytes,
    )


def _earlier_rounds(
    recipe: Recipe, dense: BlockStream, fraction: float, text: TrainingText, state: WalkState, progress: Progress, memory_allowed: int | None
) -> tuple[BlockStream, list[Round]]:
    """Prune, write and recover in every round but the last; the checkpoint that is left for it, and what is told of each. Goes on where the state says.

    The state verifies a round's checkpoint until the next round has its own. What a round works with lies in a folder beside it, with a state of its own.
    """

    def folder_of(number: int) -> Path:
        return state.work / f"round-{number}"

    def checkpoint_of(number: int) -> BlockStream:
        return BlockStream(read_source(folder_of(number) / "checkpoint")) if number else dense

    share, fractions = 1 / recipe.rounds, fractions_of_rounds(fraction, recipe.rounds)
    for phase in ("prune", "write", "teach", "recover"):
        progress.skip(phase, share * state.finished_rounds)
    for number in range(state.finished_rounds + 1, recipe.rounds):
        target, out = Target(fractions[number - 1]), folder_of(number)
        progress.log(f"Round {number} of {recipe.rounds} prunes to {target.fraction:.2%}.")
        start = checkpoint_of(number - 1)
        within = WalkState.open(out.with_name(f"{out.name}.work"), f"{state.fingerprint} {out.name}")
        _tell_what_is_done(within, progress)
        with progress.phase("prune", share):
            pruned = _prune(recipe, start, target, None, None, within, progress)
        with progress.phase("write", share):
            _write(recipe, start.source, pruned, out)
        teacher = _teach(recipe, dense, pruned, text, state, progress)
        pruned, recovered = _recover(recipe, dense, pruned, text, teacher, out, within, progress, memory_allowed)
        facts = {"round": _round(pruned, recovered).model_dump(), "zeros_before": [asdict(zeros) for zeros in pruned.zeros_before]}
        state.finish_block(ROUNDS, [], facts, sorted((out / "checkpoint").iterdir()))
        within.remove()
        shutil.rmtree(folder_of(number - 1), ignore_errors=True)
    progress.log(f"Round {recipe.rounds} of {recipe.rounds} prunes to {fraction:.2%}.")
    return checkpoint_of(recipe.rounds - 1), [Round(**record["facts"]["round"]) for record in state.blocks(ROUNDS)]


def _round(pruned: Pruned, recovered: Recovered) -> Round:
    return Round(sparsity=sum(layer.zeros for layer in pruned.layers) / sum(layer.weights for layer in pruned.layers), recovery=recovered)


def _zeros_before(state: WalkState) -> list[LinearZeros]:
    """Of the dense model, which only the first of several rounds reads."""
    return [LinearZeros(**zeros) for zeros in state.blocks(ROUNDS)[0]["facts"]["zeros_before"]]


def _link(source: str, target: str) -> None:
    """A second name for a finished shard, where the file system has such; else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _verify(out: Path, result: Source, work: Path, per_layer: bool, memory_allowed: int | None) -> list[LoadCheck]:
    """Load every artifact in a fresh process and compare its logits with this process's own; where they don't fit in memory, those of a few blocks."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, int(result.config["vocab_size"]), (1, CHECKED_TOKENS), generator=generator)
    scratch = _scratch(work / "verify")
    attempts: list[tuple[Layout, str, bool]] = [("per_layer" if per_layer else "uniform", "checkpoint", per_layer)]
    if (out / "padded").is_dir():
        attempts.append(("padded", "padded", False))
    fits = all(fits_in_memory(read_source(out / folder), memory_allowed) for _, folder, _ in attempts)
    stream = BlockStream(result)
    blocks = None if fits else sorted({0, (len(stream) - 1) // 2, len(stream) - 1})
    own = logits(stream, tokens, scratch, lambda index, tensors: tensors if blocks is None or index in blocks else None)
    checks = [_compare(layout, run_trial(out / folder, tokens, loader=loader, blocks=blocks, work=scratch), own, blocks) for layout, folder, loader in attempts]
    shutil.rmtree(scratch)
    return checks


def _compare(layout: Layout, trial: Trial, own: Tensor, blocks: list[int] | None) -> LoadCheck:
    difference = float((trial.logits - own).abs().max())
    allowed = LOGIT_TOLERANCE * max(1.0, float(own.abs().max()))
    if not difference <= allowed:
        raise EspalierError(
            f"The {layout} checkpoint gives other logits when it is loaded ({difference:.3g} off, {allowed:.3g} allowed).",
            code="reload_mismatch",
            hint="This is a fault of Espalier; please report it with the recipe.",
        )
    return LoadCheck(layout=layout, loader=trial.loader, max_logit_difference=difference, checked="blocks" if blocks else "logits", blocks=blocks)


# ------------------------------------------------------------------------- helpers


def _scratch(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _versions() -> dict[str, str]:
    return {"espalier": version("espalier"), "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


# ---------------------------------------------------------------------- the command


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.pipeline", description="Prune a checkpoint folder by a recipe.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, help="where state is kept until the result is whole (default: OUT_DIR/.work)")
    parser.add_argument("--text", nargs=2, action="append", default=[], metavar=("NAME", "PATH"), help="where the text lies that the recipe calls NAME")
    parser.add_argument("--memory", type=int, metavar="BYTES", help="what this process and those that it starts may hold (default: what is free)")
    asked = parser.parse_args()

    def emit(event: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()

    map_large_allocations()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        texts = {name: Path(path) for name, path in asked.text}
        run(_read_recipe(asked.recipe), asked.source, asked.out, asked.work or asked.out / ".work", emit, texts, asked.memory)
    except (EspalierError, SafetensorError, TrialError, OSError) as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        emit({"event": "error", **refusal})
        return 2
    return 0


def _read_recipe(path: Path) -> Recipe:
    try:
        return Recipe.model_validate_json(path.read_bytes())
    except ValidationError as error:
        faults = "; ".join(f"{'/'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors())
        raise RecipeError(f"The recipe is not valid: {faults}", code="recipe_invalid", hint="See the recipe's schema in /openapi.json.") from None


def _refusal(error: Exception) -> dict[str, str] | None:
    """What to tell the user where trying again can't help; None for a fault that may pass."""
    if isinstance(error, EspalierError):
        return {"code": error.code, "message": error.message, "hint": error.hint}
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return {"code": "disk_full", "message": f"The disk is full: {error}", "hint": "Free space in the worker's work directory, or prune a smaller model."}
    if isinstance(error, TrialError):
        return {"code": "reload_failed", "message": str(error), "hint": "This is a fault of Espalier; please report it with the recipe."}
    if isinstance(error, SafetensorError):
        full = "No space left" in str(error)
        if full:
            return {
                "code": "disk_full",
                "message": f"The disk is full: {error}",
                "hint": "Free space in the worker's work directory, or prune a smaller model.",
            }
        return {"code": "checkpoint_truncated", "message": f"A weight file can't be read: {error}", "hint": "Download or save the checkpoint again."}
    return None


if __name__ == "__main__":
    sys.exit(main())
