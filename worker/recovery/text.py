"""The text that a recovery trains on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from app.exceptions import RecipeError
from app.recovery import Training
from app.report import TextUsed
from worker.data import TokenizedText, windows_at_random


@dataclass(frozen=True)
class TrainingText:
    windows: Tensor  # (B, T) token ids, in the order of the training; B is steps · batch, or the samples of a reconstruction
    held_out: Tensor | None  # (b, T), of which no token is in a window
    used: TextUsed


def training_text(text: TokenizedText, config: Training) -> TrainingText:
    """Windows at random offsets before the end of the text, and the windows at its end that are held out. Raises RecipeError where the text is too short."""
    length, (count, held_out) = config.sequence_length, config.windows
    before = len(text.tokens) - held_out * length
    if before < length + 1:
        raise RecipeError(
            f"The text '{text.source}' has {len(text.tokens)} tokens, fewer than the {(held_out + 1) * length + 1} of one sequence and {held_out} held-out windows.",
            code="training_text_too_short",
            hint="Give a longer text, a smaller sequence_length, or fewer held_out windows.",
            pointer="/recovery/sequence_length",
        )
    windows = windows_at_random(text.tokens[:before], count, length, config.seed)
    rest = text.tokens[before:].view(held_out, length) if held_out else None
    return TrainingText(windows, rest, text.used(count * length + held_out * length))
