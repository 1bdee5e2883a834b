"""Texts and the token batches drawn from them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from app.exceptions import RecipeError
from app.recipe import BUNDLED_TEXTS, Calibration, Evaluation
from app.report import TextUsed
from worker.memory import return_freed_memory


@dataclass(frozen=True)
class TokenizedText:
    """A text, tokenised whole, as it is."""

    source: str
    sha256: str
    tokens: Tensor  # (n,)
    bos_added: bool

    def used(self, tokens: int) -> TextUsed:
        return TextUsed(source=self.source, sha256=self.sha256, tokens=len(self.tokens), used_tokens=tokens, bos_added=self.bos_added)


def tokenize(folder: Path, source: str, texts: dict[str, Path]) -> TokenizedText:
    """Tokenise the text that a recipe calls `source` with the tokenizer of a checkpoint folder; `texts` says where texts lie that are no paths from here."""
    text = _read_text(source, texts)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises nothing narrower
        raise RecipeError(f"The checkpoint's tokenizer can't be loaded: {error}", code="tokenizer_invalid", hint="Save the tokenizer again.") from error
    ids = tokenizer(text, verbose=False).input_ids
    return_freed_memory()
    bos_added = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    return TokenizedText(source, hashlib.sha256(text.encode()).hexdigest(), torch.tensor(ids, dtype=torch.int64), bos_added)


def random_windows(text: TokenizedText, calibration: Calibration) -> Tensor:
    """(samples, sequence_length) token ids at offsets drawn with the recipe's seed."""
    length = calibration.sequence_length
    _require_tokens(text, length + 1, "calibration_text_too_short", "/calibration")
    return windows_at_random(text.tokens, calibration.samples, length, calibration.seed)


def windows_at_random(tokens: Tensor, count: int, length: int, seed: int) -> Tensor:
    """(n,) -> (count, length), at offsets drawn with the seed; n must be larger than the length."""
    offsets = torch.randint(0, len(tokens) - length, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([tokens[offset : offset + length] for offset in offsets.tolist()])


def leading_windows(text: TokenizedText, evaluation: Evaluation) -> Tensor:
    """(windows, sequence_length) token ids from the start of the text; fewer windows where the text is shorter."""
    length = evaluation.sequence_length
    _require_tokens(text, length, "evaluation_text_too_short", "/evaluation")
    windows = min(evaluation.windows, len(text.tokens) // length)
    return text.tokens[: windows * length].view(windows, length)


def _require_tokens(text: TokenizedText, needed: int, code: str, pointer: str) -> None:
    if len(text.tokens) < needed:
        raise RecipeError(
            f"The text '{text.source}' has {len(text.tokens)} tokens, fewer than the {needed} that one sequence needs.",
            code=code,
            hint="Give a longer text, or a smaller sequence_length.",
            pointer=f"{pointer}/sequence_length",
        )


def _read_text(source: str, texts: dict[str, Path]) -> str:
    path = _bundled_path(source) if source in BUNDLED_TEXTS else texts.get(source, Path(source))
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise RecipeError(
            f"There is no text '{source}'.", code="text_not_found", hint=f"Give a .txt or .jsonl file, or one of {', '.join(BUNDLED_TEXTS)}."
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"The text '{source}' is not UTF-8: {error}.", code="text_invalid", hint="Convert it to UTF-8.") from None
    return _join_records(source, text) if path.suffix == ".jsonl" else text


def _join_records(source: str, text: str) -> str:
    """The `text` fields of a .jsonl file, joined by blank lines."""
    try:
        records = [json.loads(line)["text"] for line in text.splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"A line of '{source}' is no JSON object with a 'text' field: {error}.", code="text_invalid", hint='Write {"text": "…"} on each line.'
        ) from None
    if not all(isinstance(record, str) for record in records):
        raise RecipeError(f"A 'text' field of '{source}' is not a string.", code="text_invalid", hint='Write {"text": "…"} on each line.')
    return "\n\n".join(records)


def _bundled_path(name: str) -> Path:
    """Real text that comes with the wheel `exllamav2`, which is installed for it and never imported."""
    spec = find_spec("exllamav2")
    if spec is None or spec.origin is None:
        raise RecipeError(
            f"The bundled text '{name}' is not installed.",
            code="text_not_found",
            hint="Run: pip install --no-deps exllamav2==0.3.2; or give the path of a text.",
        )
    return Path(spec.origin).parent / "conversion" / "standard_cal_data" / f"{name}.utf8"
