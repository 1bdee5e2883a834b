"""A checkpoint folder as a stream of decoder blocks: each is materialised from safetensors, used and dropped, so the model is never held whole.

Notation: B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from app.exceptions import RecipeError
from app.source import Source
from worker.architecture import ARCHITECTURES, Architecture
from worker.memory import return_freed_memory

TOKENS_AT_ONCE = 1024  # activations of about this many tokens are alive in one forward


class BlockStream:
    """Blocks of a checkpoint whose layers all have the config's shapes, computed in float32 on `device`."""

    def __init__(self, source: Source, device: str = "cpu") -> None:
        self.source = source
        self.device = torch.device(device)
        self.architecture: Architecture = ARCHITECTURES[source.model_type]
        try:
            self.config: PretrainedConfig = AutoConfig.from_pretrained(source.folder)
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
            raise RecipeError(f"transformers can't build a model from config.json: {error}", code="config_invalid", hint="Save the model again.") from error
        self._model: Any = skeleton.model.eval().requires_grad_(False)
        # The rotary tables are computed, not stored, so they are made anew on the device.
        with self.device:
            self._model.rotary_emb = type(self._model.rotary_emb)(config=self.config)
        self._norm: nn.Module | None = None
        self._head: Tensor | None = None

    def __len__(self) -> int:
        return int(self.config.num_hidden_layers)

    # ------------------------------------------------------------- weights

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Stored tensors by name, in their stored dtype, mapped from the file."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.source.tensors[name].file, []).append(name)
        loaded: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt", device=str(self.device)) as stored:
                loaded.update((name, stored.get_tensor(name)) for name in wanted)
        return loaded

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """Stored tensors of one block, by their full names."""
        prefix = self.architecture.block_prefix(index)
        return self.tensors(name for name in self.source.tensors if name.startswith(prefix))

    def outer_tensors(self) -> dict[str, Tensor]:
        """Stored tensors outside the blocks: embedding, final norm, untied head."""
        return self.tensors(name for name in self.source.tensors if not name.startswith(f"{self.architecture.blocks}."))

    def materialise(self, index: int, tensors: dict[str, Tensor]) -> nn.Module:
        """The block as a transformers module with the given weights (full names, any float dtype, possibly fewer channels)."""
        prefix = self.architecture.block_prefix(index)
        block: nn.Module = self._model.layers[index]
        for name, tensor in tensors.items():
            path, _, attribute = name.removeprefix(prefix).rpartition(".")
            setattr(block.get_submodule(path), attribute, nn.Parameter(tensor.to(self.device, torch.float32), requires_grad=False))
        left = [name for name, parameter in block.named_parameters() if parameter.is_meta]
        if left:
            raise ValueError(f"block {index} lacks the tensors {left}")
        return block

    def drop(self, index: int) -> None:
        """Free the weights of a materialised block."""
        self._model.layers[index].to("meta")
        return_freed_memory()

    # --------------------------------------------------------- computation

    def embed(self, tokens: Tensor) -> Iterator[Tensor]:
        """(B, T) token ids -> (b, T, D) embeddings, a few sequences at a time."""
        name = self.architecture.embedding
        table = self.tensors([name])[name]
        for rows in batches(tokens):
            yield nn.functional.embedding(rows.to(self.device), table).to(torch.float32)

    def block_arguments(self, length: int) -> list[dict[str, Any]]:
        """What the model passes to each of its blocks besides the hidden states, for sequences of `length` tokens.

        The model's own forward is run on blocks that only take note, so masks and rotary tables are right for every family.
        """
        noted: list[dict[str, Any]] = []

        class Notes(nn.Module):
            def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
                noted.append(arguments)
                return hidden

        blocks, norm = self._model.layers, self._model.norm
        self._model.layers, self._model.norm = nn.ModuleList(Notes() for _ in range(len(self))), nn.Identity()
        try:
            with torch.no_grad():
                self._model(inputs_embeds=torch.zeros(1, length, int(self.config.hidden_size), device=self.device), use_cache=False)
        finally:
            self._model.layers, self._model.norm = blocks, norm
        return noted

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) last hidden states, on any device -> (…, V) logits."""
        if self._norm is None:
            outer = self.outer_tensors()
            stored = outer.get(self.architecture.head, outer[self.architecture.embedding])
            norm: nn.Module = self._model.norm
            norm.weight = nn.Parameter(outer[self.architecture.final_norm].float(), requires_grad=False)
            self._norm, self._head = norm, stored
        assert self._head is not None
        return nn.functional.linear(self._norm(hidden.to(self.device)), self._head.float())


def batches(rows: Tensor) -> Iterator[Tensor]:
    """Split (B, T, …) along B so that each part has about TOKENS_AT_ONCE tokens."""
    yield from rows.split(max(1, TOKENS_AT_ONCE // rows.shape[1]))
