"""Learning from the dense model, which is run once over the training windows, block by block, and leaves what it says in files: it is never beside the student.

Notation: B windows, T tokens, D hidden size, L blocks of the student, V vocabulary, k largest probabilities of a token.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from app.exceptions import RecipeError
from app.recovery import Distillation
from worker.blocks import BlockStream
from worker.calibration import HiddenStates, embed_into, forward
from worker.evaluation import TOKENS_PER_HEAD
from worker.state import WalkState

TOKENS_AT_ONCE = 1 << 16  # that the dense model's blocks are read for
MOST_BYTES = 1 << 36  # of what the dense model says


@dataclass(frozen=True)
class Teacher:
    """What the dense model says of the training windows."""

    tokens: Tensor  # (B, T, k) int32, the likeliest
    log_probs: Tensor  # (B, T, k), or (B, T, k + 1) with all others' in the end
    hidden: Tensor | None  # (L, B, T, D), the outputs of the blocks that the student has too

    def loss(self, logits: Tensor, outputs: Sequence[Tensor], first: int, config: Distillation) -> Tensor:
        """What is added to the cross-entropy, for the student's (b, T, V) logits and its blocks' (b, T, D) outputs on windows from number `first` on."""
        window = slice(first, first + len(logits))
        loss = logits.new_zeros(())
        if config.kl:
            tokens, log_probs = self.tokens[window].to(logits.device), self.log_probs[window].to(logits.device)
            loss = loss + config.kl * divergence(logits, tokens.long(), log_probs, config.temperature)
        if self.hidden is not None:
            loss = loss + config.hidden * sum(mse_loss(output, hidden[window].to(output.device)) for output, hidden in zip(outputs, self.hidden, strict=True))
        return loss


def divergence(logits: Tensor, tokens: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """τ² · KL(teacher ‖ student), a mean over tokens, of (b, T, V) student's logits from a teacher's (b, T, k) tokens and their (b, T, k or k + 1) log-probs.

    The tokens outside the k count as one: what the teacher gives to all of them together is compared with what the student does. That is a lower bound of
    the whole KL, exact for k = V. Both models' logits are divided by τ (Hinton et al., arXiv 1503.02531), the teacher's before they come here.
    """
    scaled = logits.float() / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    student = scaled.gather(-1, tokens) - total
    if log_probs.shape[-1] > tokens.shape[-1]:
        others = scaled.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True) - total
        student = torch.cat([student, others], dim=-1)
    return (log_probs.exp() * (log_probs - student)).sum(-1).mean() * temperature**2


def likeliest(logits: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """(…, V) logits -> the k likeliest tokens (…, k) and the log-probs of each and, where k < V, of all others together (…, k or k + 1)."""
    scaled = logits.float() / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    top = scaled.topk(min(top_k, scaled.shape[-1]), dim=-1)
    log_probs = top.values - total
    if top_k < scaled.shape[-1]:
        others = scaled.scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True) - total
        log_probs = torch.cat([log_probs, others], dim=-1)
    return top.indices, log_probs


@contextmanager
def outputs_of(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Collects what the blocks give, in their order, in one forward pass."""
    outputs: list[Tensor] = []
    handles = [block.register_forward_hook(lambda module, inputs, output: outputs.append(output)) for block in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------- the dense model


def check_size(stream: BlockStream, windows: Tensor, config: Distillation) -> None:
    """Refuse what would leave too much on the disk."""
    size = sum(math.prod(shape) * 4 for shape in _shapes(stream, windows, config, len(stream)).values())
    if size > MOST_BYTES:
        raise RecipeError(
            f"What the dense model says of the training windows would take {size / 2**30:.0f} GiB, and {MOST_BYTES / 2**30:.0f} are allowed.",
            code="teacher_too_large",
            hint="Train for fewer steps, with a smaller top_k, or set recovery.distillation.hidden to 0: hidden states take most of it.",
            pointer="/recovery/distillation",
        )


def _shapes(stream: BlockStream, windows: Tensor, config: Distillation, blocks: int) -> dict[str, tuple[int, ...]]:
    vocabulary = stream.architecture.dimensions(stream.source.config).vocab
    top_k = min(config.top_k, vocabulary)
    shapes: dict[str, tuple[int, ...]] = {"tokens": (*windows.shape, top_k), "log_probs": (*windows.shape, top_k + (top_k < vocabulary))}
    return shapes | ({"hidden": (blocks, *windows.shape, int(stream.config.hidden_size))} if config.hidden else {})


def teach(stream: BlockStream, windows: Tensor, config: Distillation, blocks: list[int], state: WalkState, done: Callable[[int, int], None]) -> Teacher:
    """Run the dense model over (B, T) windows, some thousand tokens at a time; what is finished is on record and not done again.

    `blocks` are those that the student has too. `done` is told how many blocks were run, of how many.
    """
    folder = state.work / "teacher"
    folder.mkdir(exist_ok=True)
    shapes = _shapes(stream, windows, config, len(blocks))
    if not all((folder / f"{name}.bin").is_file() for name in shapes):  # they are not in a state that came from another machine
        state.forget("teacher ")
    files = {name: _mapped(folder / f"{name}.bin", shape, torch.int32 if name == "tokens" else torch.float32) for name, shape in shapes.items()}
    parts = windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1]))
    first = 0
    for number, part in enumerate(parts):
        rows = {name: file[:, first : first + len(part)] if name == "hidden" else file[first : first + len(part)] for name, file in files.items()}

        def run(part: Tensor = part, rows: dict[str, Tensor] = rows, before: int = number * len(stream)) -> bool:
            _run(stream, part, config, blocks, rows, folder / "states", lambda index: done(before + index + 1, len(parts) * len(stream)))
            for name in files:
                _force_to_disk(folder / f"{name}.bin")
            return True

        state.figure(f"teacher {number}", run)
        first += len(part)
    return Teacher(files["tokens"], files["log_probs"], files.get("hidden"))


@torch.no_grad()
def _run(
    stream: BlockStream, windows: Tensor, config: Distillation, blocks: list[int], rows: dict[str, Tensor], scratch: Path, done: Callable[[int], None]
) -> None:
    scratch.mkdir(exist_ok=True)
    hidden = HiddenStates(scratch, (*windows.shape, int(stream.config.hidden_size)))
    embed_into(hidden, stream, windows)
    arguments = stream.block_arguments(windows.shape[1])
    for index in range(len(stream)):
        forward(stream.materialise(index, stream.block_tensors(index)), arguments[index], hidden.open(index), hidden.open(index + 1))
        stream.drop(index)
        if "hidden" in rows and index in blocks:
            rows["hidden"][blocks.index(index)] = hidden.open(index + 1)
        done(index)
    for number, states in enumerate(hidden.open(len(stream))):  # (T, D)
        for start in range(0, len(states), TOKENS_PER_HEAD):
            part = slice(start, start + TOKENS_PER_HEAD)
            rows["tokens"][number, part], rows["log_probs"][number, part] = likeliest(stream.logits(states[part]), config.top_k, config.temperature)
    shutil.rmtree(scratch)


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file. Raises OSError (ENOSPC) here, and not when it is written to, where the disk is too small."""
    with path.open("ab") as stream:
        os.posix_fallocate(stream.fileno(), 0, math.prod(shape) * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


def _force_to_disk(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
