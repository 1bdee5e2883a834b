"""Zero-shot WinoGrande (Sakaguchi et al., arXiv 1907.10641): which of two contexts makes the rest of the sentence likelier.

FILE is JSON lines, as lm-evaluation-harness scores them: `context_options` (two), `continuation`, `gold` (0 or 1).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import espalier.loader  # noqa: F401  builds layers of different widths

SENTENCES_AT_ONCE = 32


@torch.no_grad()
def accuracy(checkpoint: Path, file: Path, items: int | None = None) -> tuple[float, int]:
    """Share of the first `items` questions (None: all) that a checkpoint answers rightly, and how many there were."""
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    questions = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:items]]
    sentences: list[tuple[list[int], int]] = []  # token ids, and where the continuation begins
    for question in questions:
        rest = tokenizer(" " + question["continuation"], add_special_tokens=False).input_ids
        for context in question["context_options"]:
            ids = tokenizer(context).input_ids
            sentences.append((ids + rest, len(ids)))
    likelihood = torch.empty(len(sentences))
    by_length = sorted(range(len(sentences)), key=lambda place: len(sentences[place][0]))
    for start in range(0, len(by_length), SENTENCES_AT_ONCE):
        places = by_length[start : start + SENTENCES_AT_ONCE]
        likelihood[places] = _likelihoods(model, [sentences[place] for place in places])
    answers = likelihood.view(-1, 2).argmax(dim=1)
    gold = torch.tensor([question["gold"] for question in questions])
    return float((answers == gold).double().mean()), len(questions)


def _likelihoods(model: Any, sentences: list[tuple[list[int], int]]) -> Tensor:
    """Log-likelihood of each sentence's continuation, (B,)."""
    longest = max(len(ids) for ids, _ in sentences)
    tokens = torch.zeros(len(sentences), longest, dtype=torch.int64)
    targets = torch.full_like(tokens, -100)
    for row, (ids, begin) in enumerate(sentences):
        tokens[row, : len(ids)] = torch.tensor(ids)  # what follows a shorter one is seen by none of its tokens
        targets[row, begin : len(ids)] = tokens[row, begin : len(ids)]
    logits = model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=-100, reduction="none")
    return -loss.view(len(sentences), -1).sum(dim=1)
