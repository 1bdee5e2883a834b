"""How far a pruned model has drifted, measured where its FFNs can take it back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.architecture import ARCHITECTURES
from app.source import read_source
from tests.worker.test_blocks import make
from worker.blocks import BlockStream
from worker.calibration import Drift, forward

SHAPE = (7, 24)


def states(stream: BlockStream, seed: int) -> Tensor:
    return torch.randn(*SHAPE, int(stream.config.hidden_size), generator=torch.Generator().manual_seed(seed))


def without_ffn(stream: BlockStream, hidden: Tensor) -> Tensor:
    """What block 0 gives where the last linear of its FFN gives nothing."""
    tensors, down = stream.block_tensors(0), stream.architecture.mlp.down
    silent = {name: torch.zeros_like(tensor) if f".{down}." in name else tensor for name, tensor in tensors.items()}
    output = torch.empty_like(hidden)
    forward(stream.materialise(0, silent), stream.block_arguments(SHAPE[1])[0], hidden, output)
    return output


@pytest.mark.parametrize("variant", [*ARCHITECTURES, "opt, norms after", "gpt_neox, in turns"])
def test_drift_is_known_where_the_ffn_is_added_as_it_is(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.blocks.TOKENS_AT_ONCE", 48)
    stream = BlockStream(read_source(make(tmp_path / "model", variant)))
    if stream.architecture.router(stream.source.config, 0):
        assert not stream.architecture.adds_ffn(stream.source.config, 0)
        return
    dense, pruned, down = states(stream, 1), states(stream, 2), stream.architecture.mlp.down
    arguments = stream.block_arguments(SHAPE[1])[0]
    block = stream.materialise(0, stream.block_tensors(0))
    inputs: list[Tensor] = []
    block.get_submodule(down).register_forward_hook(lambda module, args, output: inputs.append(args[0].detach().flatten(0, -2)))
    drift = Drift(down, torch.empty_like(dense))
    with drift.measuring_dense(block):
        forward(block, arguments, dense, None)
    inputs.clear()
    for _ in range(2):  # the first is forgotten
        inputs.clear()
        with drift.measuring_pruned(block):
            forward(block, arguments, pruned, None)
    moved = (without_ffn(stream, dense) - without_ffn(stream, pruned)).flatten(0, 1).double()
    x = torch.cat(inputs).double()
    expected = moved.T @ x / len(x)
    agrees = torch.allclose(drift.mean.double(), expected, atol=1e-4)
    assert agrees == stream.architecture.adds_ffn(stream.source.config, 0)
