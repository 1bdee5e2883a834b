"""A checkpoint folder as a stream of decoder blocks: each is materialised from safetensors, used and dropped, so the model is never held whole.

Everything that a family computes outside its blocks (embeddings, masks, rotary tables, the head) is computed by transformers' own forward, run on stand-ins for
the blocks; there is no code for single families here.

Notation: B sequences, T tokens, D hidden size, E size of a token's embedding, I FFN channels, V vocabulary, N tokens of all sequences, K experts a token.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from app.architecture import ARCHITECTURES, Architecture, Mlp
from app.exceptions import RecipeError
from app.source import Source, TensorEntry
from worker.memory import return_freed_memory

TOKENS_AT_ONCE = 1024  # activations of about this many tokens are alive in one forward
FREED_BYTES = 128 * 2**20  # of blocks, after which memory is returned to the system: to take it back costs small blocks a tenth of their time
HEAD_ROWS_AT_ONCE = 4096  # of the head's matrix, this many are float32 at a time


class BlockStream:
    """Blocks of a checkpoint, computed in float32 on `device`, or else on the GPU where there is one. A block's own tensors say how large it is; config.json says
    the rest."""

    def __init__(self, source: Source, device: str | None = None) -> None:
        self.source = source
        self.device = torch.device(device or default_device())
        self.architecture: Architecture = ARCHITECTURES[source.model_type]
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source.folder), dtype=torch.float32)
        except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
            raise RecipeError(f"transformers can't build a model from config.json: {error}", code="config_invalid", hint="Save the model again.") from error
        # The skeleton: its blocks stay on the meta device and are copied to be filled; what it has outside them is small and filled here, but for the two tables.
        self._model: Any = model.eval().requires_grad_(False)
        self.config: PretrainedConfig = self._model.config
        decoder, _, self._list = self.architecture.blocks.rpartition(".")
        self._decoder: Any = self._model.get_submodule(decoder)
        self._blocks: nn.ModuleList = getattr(self._decoder, self._list)
        self._embedding: nn.Embedding = self._model.get_submodule(self.architecture.embedding.removesuffix(".weight"))
        self._embedding.padding_idx = None  # it only matters in training, and may lie outside the rows that are loaded
        self._materialised: dict[int, nn.Module] = {}
        self._held: dict[int, dict[str, Tensor]] = {}  # by block
        self._room = 0  # bytes that more of them may take
        self._has_head = False
        self._freed = 0
        _compute_buffers(self._model, self.device)
        tables = (self.architecture.embedding, self.architecture.head)
        small = [name for name, _ in self.architecture.outer_shapes(source.config) if name not in tables]
        for name, tensor in self.tensors(small).items():
            _fill(self._model, name, tensor.to(torch.float32))

    def __len__(self) -> int:
        return int(self.config.num_hidden_layers)

    # ------------------------------------------------------------- weights

    def tensors(self, names: Iterable[str], device: torch.device | None = None) -> dict[str, Tensor]:
        """Stored tensors by name, in their stored dtype; on the CPU, mapped from the file."""
        loaded: dict[str, Tensor] = {}
        for file, entries in _by_file(self.source, names).items():
            with safe_open(file, framework="pt", device=str(device or self.device)) as stored:
                loaded.update((name, stored.get_tensor(entry.name)) for name, entry in entries.items())
        return loaded

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """Stored tensors of one block, by their full names."""
        if index in self._held:
            return dict(self._held[index])
        tensors = self.tensors(self._names(index))
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size <= self._room:
            self._room -= size
            self._held[index] = dict(tensors)
        return tensors

    @contextmanager
    def holding_blocks(self, room: int | None = None) -> Iterator[bool]:
        """Meanwhile stored tensors of blocks stay where they were read to, for many passes: so many bytes of them, or half of what is free on the GPU.

        On a CPU they are mapped files anyway, and without `room` none are held. Tells whether a pass will have to read any again.
        """
        mapped = room is None and self.device.type != "cuda"
        if room is None:
            room = 0 if mapped else torch.cuda.mem_get_info(self.device)[0] // 2
        entries = (self.source.tensors[name] for index in range(len(self)) for name in self._names(index))
        self._room = room
        try:
            yield not mapped and sum(entry.end - entry.begin for entry in entries) > room
        finally:
            self._held, self._room = {}, 0

    def outer_tensors(self) -> dict[str, Tensor]:
        """Stored tensors outside the blocks: embeddings, final norm, projections, untied head."""
        return self.tensors(name for name in self.source.tensors if not name.startswith(f"{self.architecture.blocks}."))

    def _names(self, index: int) -> list[str]:
        prefix = self.architecture.block_prefix(index)
        return [name for name in self.source.tensors if name.startswith(prefix)]

    def weight(self, tensors: dict[str, Tensor], index: int, name: str) -> Tensor:
        """A linear's weight (C_out, C_in) in float32, from a block's tensors, by the linear's name in the block."""
        stored = tensors[f"{self.architecture.block_prefix(index)}{name}.weight"].to(self.device, torch.float32)
        return stored.T if self.architecture.transposed else stored

    def with_weights(self, tensors: dict[str, Tensor], index: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A block's tensors with other weights (C_out, C_in) for some of its linears, given by their names in the block; the inverse of `weight`."""
        replaced = dict(tensors)
        for name, weight in weights.items():
            full = f"{self.architecture.block_prefix(index)}{name}.weight"
            replaced[full] = (weight.T if self.architecture.transposed else weight).to(tensors[full].dtype).contiguous()
        return replaced

    def materialise(self, index: int, tensors: dict[str, Tensor]) -> nn.Module:
        """The block as a transformers module with the given weights: full names, any float dtype.

        There may be fewer FFN channels, KV groups or experts than in the checkpoint, and biases that it has not. The experts of a mixture are ordinary linears by
        their stored names, and each sees exactly the tokens that the router sends it. The block's earlier weights are dropped.
        """
        self.drop(index)
        self._read_ahead(index + 1)
        prefix = self.architecture.block_prefix(index)
        given = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        block = _copied(self._blocks[index])
        router = self.architecture.router(self.source.config, index)
        if router is not None:  # as many experts as it has rows
            split_experts(block, self.architecture, router, given[f"{router}.weight"].shape[0], self.config.hidden_act)
        for name, tensor in given.items():
            _fill(block, name, tensor.to(self.device, torch.float32))
        self._fit_attention(block, given)
        left = [name for name, parameter in block.named_parameters() if parameter.is_meta]
        if left:
            raise ValueError(f"block {index} lacks the tensors {left}")
        self._materialised[index] = block
        return block

    def drop(self, index: int) -> None:
        """Free the weights of a materialised block, whoever still holds the module."""
        block = self._materialised.pop(index, None)
        if block is None:
            return
        self._freed += sum(parameter.numel() * parameter.element_size() for parameter in block.parameters())
        for module in block.modules():
            for name, _ in [*module.named_parameters(recurse=False)]:
                setattr(module, name, None)
        if self._freed >= FREED_BYTES:
            self._freed = 0
            return_freed_memory()

    def _fit_attention(self, block: nn.Module, given: dict[str, Tensor]) -> None:
        """Where KV groups were removed, tell the module; most families only look at the weights."""
        size = self.architecture.dimensions(self.source.config)
        output = self.architecture.attention.output
        heads = given[f"{output}.weight"].shape[0 if self.architecture.transposed else 1] // size.head_dim
        if heads != size.heads:
            attention: Any = block.get_submodule(output.rpartition(".")[0])
            attention.config = copy.copy(attention.config)
            attention.config.num_attention_heads = heads
            attention.num_key_value_heads = attention.config.num_key_value_heads = heads // size.queries_per_group

    def _read_ahead(self, index: int) -> None:
        """Let the kernel read a block's bytes while another one computes."""
        if not hasattr(os, "posix_fadvise"):
            return
        for file, entries in _by_file(self.source, self._names(index)).items():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                for entry in entries.values():
                    os.posix_fadvise(descriptor, entry.begin, entry.end - entry.begin, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    # --------------------------------------------------------- computation

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Iterator[Tensor]:
        """(B, T) token ids -> (b, T, D) inputs of the first block, a few sequences at a time."""
        name = self.architecture.embedding
        table = self.tensors([name], torch.device("cpu"))[name]
        for rows in batches(tokens):
            used, numbers = rows.cpu().unique(return_inverse=True)  # (U,), (b, T)
            self._embedding.weight = nn.Parameter(table[used].to(self.device, torch.float32), requires_grad=False)
            yield self._run_on_notes(self._embedding(numbers.to(self.device)))[0].hidden

    @torch.no_grad()
    def block_arguments(self, length: int) -> list[dict[str, Any]]:
        """What the model passes to each of its blocks besides the hidden states, by name, for sequences of `length` tokens."""
        size = self.architecture.dimensions(self.source.config)
        notes = self._run_on_notes(torch.zeros(1, length, size.embedding, device=self.device))
        return [note.arguments for note in notes]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) last hidden states, on any device -> (…, V) logits."""
        if not self._has_head:
            name = self.architecture.head if self.architecture.head in self.source.tensors else self.architecture.embedding
            self._model.set_output_embeddings(StoredHead(self.tensors([name])[name]))
            self._has_head = True
        size = self.architecture.dimensions(self.source.config)
        last = hidden.to(self.device).reshape(-1, 1, size.hidden)  # each token a sequence of its own: nothing from here on looks at another
        with self._in_place_of_blocks([Replay(last)]):
            logits: Tensor = self._model(inputs_embeds=last.new_zeros(1, 1, size.embedding), use_cache=False).logits
        return logits.view(*hidden.shape[:-1], -1)

    def _run_on_notes(self, embeddings: Tensor) -> list[Note]:
        """Run the model's own forward on (b, T, E) embeddings and blocks that only take note."""
        notes = [Note(block) for block in self._blocks]
        with self._in_place_of_blocks(notes):
            self._decoder(inputs_embeds=embeddings, use_cache=False)
        return notes

    @contextmanager
    def _in_place_of_blocks(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        setattr(self._decoder, self._list, nn.ModuleList(modules))
        try:
            yield
        finally:
            setattr(self._decoder, self._list, self._blocks)


class Note(nn.Module):
    """Stands in a block's place: keeps what it is called with and passes the hidden states on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        _, *self.names = inspect.signature(block.forward).parameters
        self.hidden = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden: Tensor, *by_place: Any, **by_name: Any) -> Tensor:
        self.hidden, self.arguments = hidden, dict(zip(self.names, by_place, strict=False)) | by_name
        return hidden


class Replay(nn.Module):
    """Stands in the place of all blocks: gives what they gave."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.hidden


class StoredHead(nn.Module):
    """The head's matrix (V, E) in its stored dtype, multiplied in float32, a part at a time."""

    def __init__(self, stored: Tensor) -> None:
        super().__init__()
        self.stored = stored

    def forward(self, hidden: Tensor) -> Tensor:
        logits = hidden.new_empty(*hidden.shape[:-1], len(self.stored))
        for start in range(0, len(self.stored), HEAD_ROWS_AT_ONCE):
            rows = self.stored[start : start + HEAD_ROWS_AT_ONCE]
            logits[..., start : start + len(rows)] = linear(hidden, rows.to(torch.float32))
        return logits


class RoutedExperts(nn.ModuleList):
    """The experts of a mixture as they are stored, in the place of transformers' one matrix for all of them; the routing stays transformers'."""

    def __init__(self, mlps: Sequence[Mlp], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__(Expert(mlp, activation) for mlp in mlps)
        self.notice: Callable[[int, Tensor], None] | None = None  # told an expert's number and its weighted outputs (n, D)

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """(N, D) tokens, the (N, K) experts of each and their (N, K) shares -> (N, D)."""
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            tokens, places = (chosen == number).nonzero(as_tuple=True)
            if len(tokens):
                weighted = expert(hidden[tokens]) * shares[tokens, places, None]
                if self.notice is not None:
                    self.notice(number, weighted)
                output.index_add_(0, tokens, weighted.to(output.dtype))
        return output


def split_experts(block: Any, architecture: Architecture, router: str, count: int, activation: str) -> list[Expert]:
    """Put linears without weights in the place of a block's fused experts, which makes all names those of the checkpoint."""
    assert architecture.experts is not None
    mixture = block.mlp
    mixture.experts = RoutedExperts([architecture.experts.mlp_of(number) for number in range(count)], ACT2FN[activation])
    stored_as = router.rpartition(".")[0]
    if stored_as != "mlp":  # which transformers' own forward still calls it, but no more by a module's name
        del block.mlp
        block.add_module(stored_as, mixture)
        object.__setattr__(block, "mlp", mixture)
    return [*mixture.experts]


class Expert(nn.Module):
    """One gated FFN, its linears under the last parts of their stored names."""

    def __init__(self, mlp: Mlp, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = (linear_name.rpartition(".")[2] for linear_name in mlp.linears)
        for name in (self.gate, self.up, self.down):
            self.add_module(name, nn.Linear(1, 1, bias=False, device="meta"))
        self.activation = activation

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in (self.gate, self.up, self.down))
        output: Tensor = down(self.activation(gate(hidden)) * up(hidden))
        return output


def _copied(module: nn.Module) -> nn.Module:
    """A module whose parameters, submodules and hooks can be replaced; all else is shared. A deep copy of a small block takes as long as half its forward."""
    copied = module.__new__(type(module))
    vars(copied).update((name, copy.copy(value) if isinstance(value, dict) else value) for name, value in vars(module).items())
    for name, child in module.named_children():
        copied.add_module(name, _copied(child))
    return copied


def _fill(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a parameter its values; a linear's sizes follow its weight."""
    path, _, attribute = name.rpartition(".")
    owner: Any = module.get_submodule(path)
    setattr(owner, attribute, nn.Parameter(tensor, requires_grad=False))
    if attribute == "weight" and isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = tensor.shape
    elif attribute == "weight" and isinstance(owner, Conv1D):
        owner.nx, owner.nf = tensor.shape


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Make anew what a model computes at its construction and doesn't store (rotary tables, scales), as `from_pretrained` does."""
    for module in model.modules():
        names = [name for name, _ in module.named_buffers(recurse=False)]
        for name in names:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if names:
            model._init_weights(module)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _by_file(source: Source, names: Iterable[str]) -> dict[Path, dict[str, TensorEntry]]:
    files: dict[Path, dict[str, TensorEntry]] = {}
    for name in names:
        entry = source.tensors[name]
        files.setdefault(entry.file, {})[name] = entry
    return files


def batches(rows: Tensor) -> Iterator[Tensor]:
    """Split (B, T, …) along B so that each part has about TOKENS_AT_ONCE tokens."""
    yield from rows.split(max(1, TOKENS_AT_ONCE // rows.shape[1]))
