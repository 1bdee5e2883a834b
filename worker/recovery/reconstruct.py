"""Fits one block after the other to the dense block, by its outputs on the same inputs; never more than a block is in memory (PERP; Zimmer et al., arXiv 2312.15230).

The inputs are the outputs of the blocks before, as they were fitted, so a block is not to make up for those: its target is what the dense block gives on them.

Notation: B windows, T tokens, D hidden size.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from app.recovery import Perp
from app.report import BlockError
from app.source import Source, read_source
from worker.blocks import BlockStream, batches
from worker.calibration import HiddenStates, embed_into
from worker.checkpoint import masks_name, read_masks, shard_name, write_shard
from worker.recovery.perp import Modules, choose_rank, make_ready, modules_of_block
from worker.recovery.retrain import Retrained, recounted, require_zeros
from worker.recovery.text import TrainingText
from worker.state import WalkState
from worker.training import Step, Trained, train
from worker.walk import Pruned

WALK = "reconstruct"


def reconstruct(
    config: Perp, folder: Path, pruned: Pruned, dense: BlockStream, text: TrainingText, state: WalkState, tell: Callable[[Step], None]
) -> Retrained:
    """Recover the checkpoint in `folder`, whose shards are written again with their names, shapes and dtypes; a mask's zeros stay zero.

    `pruned` is what was told of it, `dense` the model before. A run that was killed goes on at its block, on the same pruned shards.
    """
    source, work = read_source(folder), state.work / "recovery"
    work.mkdir(exist_ok=True)
    stream = BlockStream(source, str(dense.device))
    hidden = HiddenStates(work, (*text.windows.shape, int(stream.config.hidden_size)))
    if not state.blocks(WALK):
        embed_into(hidden, stream, text.windows)
    fit = _Fit(config, source, stream, dense, stream.block_arguments(text.windows.shape[1]), hidden, choose_rank(source, config), work, tell)
    for index in range(len(state.blocks(WALK)), len(stream)):
        with torch.random.fork_rng():
            torch.manual_seed(config.seed + index)
            tensors, facts = fit.block(index, pruned.kept[index].index)
        shard = work / shard_name(index + 1, len(stream) + 1)
        write_shard(shard, tensors)
        last = index + 1 == len(stream)
        if not last:
            _run(stream.materialise(index, tensors), fit.arguments[index], hidden.open(index), hidden.open(index + 1))
            stream.drop(index)
        state.finish_block(WALK, [shard], facts, [] if last else [hidden.path(index + 1)])
        shutil.rmtree(fit.scratch(index), ignore_errors=True)
    for index in range(len(stream)):
        name = shard_name(index + 1, len(stream) + 1)
        write_shard(folder / name, load_file(work / name))
    found = [block["facts"] for block in state.blocks(WALK)]
    trained, added = (sum(block[what] for block in found) for what in ("trained", "added"))
    notes = [*dict.fromkeys(note for block in found for note in block["notes"])]
    if "head" in config.train:
        notes.append("A reconstruction fits blocks, so the head was not trained.")
    counted = recounted(folder, pruned)
    return Retrained(
        Trained(steps=config.total_steps, seconds=sum(block["seconds"] for block in found)),
        trained,
        trained / (sum(math.prod(entry.shape) for entry in source.tensors.values()) + added),
        text.windows.numel(),
        replace(counted, notes=[*counted.notes, *notes]),
        blocks=[BlockError(**error) for block in found for error in block["errors"]],
    )


@dataclass(frozen=True)
class _Stage:
    """A part of a block that is fitted at once."""

    part: Literal["block", "attention", "ffn"]
    modules: Modules
    end: str | None  # the linear whose outputs are compared; None: the whole block's


@dataclass(frozen=True)
class _Fit:
    """One run over the blocks."""

    config: Perp
    source: Source
    stream: BlockStream
    dense: BlockStream
    arguments: list[dict[str, Any]]
    hidden: HiddenStates
    rank: int
    work: Path
    tell: Callable[[Step], None]

    def scratch(self, index: int) -> Path:
        return self.work / f"block.{index}"

    def block(self, index: int, dense_index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A block's tensors as they are to be stored, and the facts about their fit. What will be the next block's inputs holds the targets meanwhile."""
        architecture, stream, dense, arguments = self.stream.architecture, self.stream, self.dense, self.arguments[index]
        prefix, dense_prefix = architecture.block_prefix(index), architecture.block_prefix(dense_index)
        inputs, targets = self.hidden.open(index), self.hidden.open(index + 1)
        masks = self._masks(index)
        tensors, whole = stream.block_tensors(index), dense.block_tensors(dense_index)
        facts: dict[str, Any] = {"errors": [], "notes": [], "trained": 0, "added": 0, "seconds": 0.0}
        stages = self._stages(index, tensors)
        for number, stage in enumerate(stages):
            with _ending_at(dense.materialise(dense_index, whole), stage.end) as block:
                _run(block, arguments, inputs, targets)
            dense.drop(dense_index)
            block = stream.materialise(index, tensors)
            size = _size(block)
            adapted = make_ready(block, stage.modules, masks, self.config, self.rank, transposed=architecture.transposed)
            if adapted.parameters:
                with _ending_at(block, stage.end):
                    before = _error(block, arguments, inputs, targets)
                    facts["trained"] += adapted.count
                    facts["added"] += _size(block) - size
                    facts["notes"] += adapted.notes
                    place = (index * len(stages) + number) * self.config.total_steps
                    facts["seconds"] += self._train(block, adapted.parameters, arguments, inputs, targets, self.scratch(index) / stage.part, place, len(stages))
                adapted.merge()
                fitted = {prefix + name: parameter.detach().to(tensors[prefix + name].dtype) for name, parameter in block.named_parameters()}
                with _ending_at(stream.materialise(index, fitted), stage.end) as block:
                    after = _error(block, arguments, inputs, targets)
                if after < before:
                    tensors = fitted
                facts["errors"].append({"index": index, "part": stage.part, "before": before, "after": min(before, after)})
            stream.drop(index)
            # The half that comes next is compared with the dense one behind this half, as it is now.
            whole |= {
                dense_prefix + name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.removeprefix(prefix).rpartition(".")[0] in stage.modules.biased
            }
        require_zeros(tensors, {prefix + name: mask for name, mask in masks.items()})
        return tensors, facts

    def _masks(self, index: int) -> dict[str, Tensor]:
        """By the names that their weights have in the block."""
        file, prefix = self.source.folder / masks_name(index + 1, len(self.stream) + 1), self.stream.architecture.block_prefix(index)
        return {name.removeprefix(prefix): mask.to(self.stream.device) for name, mask in read_masks(file).items()} if file.is_file() else {}

    def _stages(self, index: int, tensors: dict[str, Tensor]) -> list[_Stage]:
        modules = modules_of_block(self.source, index)
        if self.config.parts == "block":
            return [_Stage("block", modules, None)]
        end = self.stream.architecture.attention.output
        ran = modules_before(self.stream.materialise(index, tensors), end, self.arguments[index], self.hidden.open(index)[:1])
        first = Modules([name for name in modules.linears if name in ran], [name for name in modules.norms if name in ran])
        rest = Modules([name for name in modules.linears if name not in ran], [name for name in modules.norms if name not in ran])
        return [_Stage("attention", first, end), _Stage("ffn", rest, None)]

    def _train(
        self,
        block: nn.Module,
        parameters: dict[str, nn.Parameter],
        arguments: dict[str, Any],
        inputs: Tensor,
        targets: Tensor,
        work: Path,
        place: int,
        stages: int,
    ) -> float:
        """Fit a block to (B, T, D) targets; the seconds that it took. `place` are the steps before it, of all blocks."""
        config, device = self.config, self.stream.device
        steps = config.total_steps * stages * len(self.stream)
        numbers = torch.arange(config.total_steps * config.batch)[:, None] % len(inputs)  # of the windows, again and again

        def loss(rows: Tensor, first: int) -> Tensor:
            chosen = rows[:, 0].cpu()
            return mse_loss(_output(block, inputs[chosen].to(device), arguments).float(), targets[chosen].to(device))

        def tell(step: Step) -> None:
            self.tell(replace(step, done=place + step.done, total=steps))

        # The block itself stays in evaluation, without dropout: that would be noise in what is to be matched.
        found = train(nn.Identity(), parameters, numbers.expand(-1, inputs.shape[1]), None, config, loss, lambda rows: rows.new_zeros(()), work, tell)
        return found.seconds


class _Reached(Exception):  # noqa: N818  it is no error
    """Ends a forward pass at a linear, with what that gives."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


@contextmanager
def _ending_at(block: nn.Module, end: str | None) -> Iterator[nn.Module]:
    """A block that computes no farther than its linear `end`, and gives what that does."""

    def reached(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        raise _Reached(output)

    handle = None if end is None else block.get_submodule(end).register_forward_hook(reached)
    try:
        yield block
    finally:
        if handle is not None:
            handle.remove()


def _output(block: nn.Module, rows: Tensor, arguments: dict[str, Any]) -> Tensor:
    try:
        output: Tensor = block(rows, **arguments)
    except _Reached as reached:
        return reached.output
    return output


@torch.no_grad()
def modules_before(block: nn.Module, end: str, arguments: dict[str, Any], rows: Tensor) -> set[str]:
    """Names of the modules that have computed when the linear `end` has, itself included, for (b, T, D) inputs."""
    ran: set[str] = set()
    handles = [module.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, module in block.named_modules()]
    try:
        with _ending_at(block, end):
            _output(block, rows.to(next(block.parameters()).device), arguments)
    finally:
        for handle in handles:
            handle.remove()
    return ran


@torch.no_grad()
def _run(block: nn.Module, arguments: dict[str, Any], inputs: Tensor, outputs: Tensor) -> None:
    """Outputs of (B, T, D) inputs, both on the CPU."""
    device = next(block.parameters()).device
    for rows, target in zip(batches(inputs), batches(outputs), strict=True):
        target.copy_(_output(block, rows.to(device), arguments))


@torch.no_grad()
def _error(block: nn.Module, arguments: dict[str, Any], inputs: Tensor, targets: Tensor) -> float:
    """Mean squared difference of a block's outputs from (B, T, D) targets."""
    device = next(block.parameters()).device
    total = 0.0
    for rows, target in zip(batches(inputs), batches(targets), strict=True):
        total += float((_output(block, rows.to(device), arguments) - target.to(device)).square().double().sum())
    return total / targets.numel()


def _size(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())
