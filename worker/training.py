"""The training loop: AdamW, warm-up and decay, accumulation, clipping, early stop, a state that a killed run goes on from. It knows nothing of what is trained.

Notation: B sequences, T tokens.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from app.exceptions import RecipeError
from app.recovery import Training
from worker.checkpoint import write_lasting

Loss = Callable[[Tensor, int], Tensor]  # (b, T) windows and the number of the first of them -> their mean loss
HeldOutLoss = Callable[[Tensor], Tensor]  # (b, T) windows -> their mean loss

STATE, BEST = "training.safetensors", "best.safetensors"


@dataclass(frozen=True)
class Step:
    """What is told after each step."""

    done: int
    total: int
    loss: float
    tokens_per_second: float
    seconds: float  # a step, on average since this attempt began; held-out measurements included

    @property
    def eta_seconds(self) -> float:
        return self.seconds * (self.total - self.done)


@dataclass
class Trained:
    """How far a training has come; in the end, what it did."""

    steps: int = 0
    seconds: float = 0.0  # of all attempts
    before: float | None = None  # held-out loss before the first step
    best: float | None = None  # the lowest held-out loss: that of the parameters which are kept
    worse: int = 0  # measurements since


def train(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    windows: Tensor,
    held_out: Tensor | None,
    config: Training,
    loss: Loss,
    held_out_loss: HeldOutLoss,
    work: Path,
    tell: Callable[[Step], None] = lambda step: None,
) -> Trained:
    """Train `parameters` of `model`, in place, on (B, T) `windows`, each once and in their order; steps · batch of them are needed.

    Every `checkpoint_every` steps the held-out loss is measured and all that the rest depends on is written to `work`. A run that is killed goes on from
    there, on a CPU to the very bits of an undisturbed one. With `held_out` windows the best parameters are kept, those before the first step included.

    The parameters are float32; on a GPU the model computes in bfloat16 where autocast allows. Randomness comes from torch's global generators, whose state
    is kept. Raises RecipeError where the loss is no longer finite.
    """
    work.mkdir(parents=True, exist_ok=True)
    device = next(iter(parameters.values())).device
    optimizer = torch.optim.AdamW(_groups(parameters, config.weight_decay), lr=config.learning_rate)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def measure(run: Trained) -> float | None:
        if held_out is None:
            return None
        model.eval()
        with torch.no_grad(), autocast:
            value = sum(float(held_out_loss(part.to(device))) * len(part) for part in held_out.split(config.micro_batch)) / len(held_out)
        _keep_best(run, value, parameters, work)
        return value

    run = _restore(work / STATE, parameters, optimizer, device)
    if run is None:
        run = Trained()
        run.before = measure(run)
    first, began, spent = run.steps, time.monotonic(), run.seconds
    while run.steps < config.total_steps and run.worse < config.patience:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate(run.steps, config.total_steps, config.warmup)
        start = run.steps * config.batch
        model.train()
        value = _accumulate(windows[start : start + config.batch], start, config.micro_batch, loss, autocast, device)
        _require_finite(value, run.steps)
        if config.clip is not None:
            clip_grad_norm_(parameters.values(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.steps += 1
        seconds = (time.monotonic() - began) / (run.steps - first)
        tell(Step(run.steps, config.total_steps, value, config.batch * windows.shape[1] / seconds, seconds))
        if run.steps % config.checkpoint_every == 0 or run.steps == config.total_steps:
            measure(run)
            run.seconds = spent + time.monotonic() - began
            _save(work / STATE, run, parameters, optimizer, device)
    if run.best is not None:
        with torch.no_grad():
            for name, kept in load_file(work / BEST, device=str(device)).items():
                parameters[name].copy_(kept)
    model.eval()
    return run


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the highest learning rate at a step from 0: up to 1 over the first `warmup` share of the steps, then down towards 0 after the last."""
    rising = round(steps * warmup)
    return (step + 1) / rising if step < rising else (steps - step) / (steps - rising)


def _groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases and norms don't."""
    matrices = [parameter for parameter in parameters.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters.values() if parameter.dim() <= 1]
    return [{"params": group, "weight_decay": decay} for group, decay in ((matrices, weight_decay), (vectors, 0.0)) if group]


def _accumulate(windows: Tensor, start: int, micro_batch: int, loss: Loss, autocast: torch.autocast, device: torch.device) -> float:
    """Add up the gradients of a step's (B, T) windows; their mean loss."""
    total = 0.0
    for part in windows.split(micro_batch):
        with autocast:
            value = loss(part.to(device), start) * (len(part) / len(windows))
        value.backward()
        total += float(value.detach())
        start += len(part)
    return total


def _require_finite(loss: float, steps: int) -> None:
    if not math.isfinite(loss):
        raise RecipeError(
            f"The training loss is {loss} at step {steps + 1}.",
            code="training_diverged",
            hint="Lower the learning rate, or raise the share of the warm-up.",
            pointer="/recovery/learning_rate",
        )


# ------------------------------------------------------------------------ state


def _keep_best(run: Trained, value: float, parameters: Mapping[str, nn.Parameter], work: Path) -> None:
    if run.best is None or value < run.best:
        run.best, run.worse = value, 0
        write_lasting(work / BEST, parameters)
    else:
        run.worse += 1


def _save(path: Path, run: Trained, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    tensors = {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        tensors |= {f"{kind}/{name}": moment for kind, moment in optimizer.state[parameter].items()}
    tensors["generator"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["generator_of_device"] = torch.cuda.get_rng_state(device)
    write_lasting(path, tensors, json.dumps(asdict(run)))


def _restore(path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, device: torch.device) -> Trained | None:
    """Put back what `_save` wrote; None where nothing is there."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as stored, torch.no_grad():
        for key in stored.keys():  # noqa: SIM118  it is no dict
            kind, _, name = key.partition("/")
            if kind == "parameter":
                parameters[name].copy_(stored.get_tensor(key))
            elif name:
                optimizer.state[parameters[name]][kind] = stored.get_tensor(key).to("cpu" if kind == "step" else device)
        torch.set_rng_state(stored.get_tensor("generator"))
        if device.type == "cuda":
            torch.cuda.set_rng_state(stored.get_tensor("generator_of_device"), device)
        return Trained(**json.loads(stored.metadata()["facts"]))
