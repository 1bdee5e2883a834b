"""Widths and slicing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.architecture import ARCHITECTURES
from app.source import read_source
from tests.models import make_checkpoint
from worker.blocks import BlockStream
from worker.calibration import forward
from worker.structured import Keep, group_cost, integer_widths, kept_columns, slice_block


@given(
    shares=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12),
    keep=st.floats(0.05, 1.0),
    multiple_of=st.sampled_from([1, 2, 8]),
)
@settings(deadline=None)
def test_widths_are_bounded_whole_and_meet_the_total(shares: list[float], keep: float, multiple_of: int) -> None:
    maximum, layers = 64, len(shares)
    total = round(keep * maximum * layers)
    widths = integer_widths(shares, total, maximum, multiple_of)
    assert all(multiple_of <= width <= maximum and width % multiple_of == 0 for width in widths)
    reachable = min(max(round(total / multiple_of), layers), layers * maximum // multiple_of) * multiple_of
    assert sum(widths) == reachable
    for one, two in zip(shares, widths, strict=True):
        for other, width in zip(shares, widths, strict=True):
            assert one <= other or two >= width - multiple_of  # a larger share never gets less, but for rounding


def test_widths_follow_the_shares_and_hand_on_what_a_bound_cuts_off() -> None:
    assert integer_widths([0.5, 0.25, 0.25], 40, 100) == [20, 10, 10]
    assert integer_widths([0.8, 0.1, 0.1], 40, 20) == [20, 10, 10]
    assert integer_widths([0.998, 0.001, 0.001], 12, 100) == [10, 1, 1]  # never zero


def test_a_multiple_that_no_width_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        integer_widths([1.0], 64, 100, multiple_of=128)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "mixtral"])
def test_slicing_channels_equals_zeroing_them(model_type: str, tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "dense", model_type, layers=2, ffn=12, hidden=16))
    stream, architecture = BlockStream(source), ARCHITECTURES[model_type]
    tensors = stream.block_tensors(1)
    mlps = architecture.mlps(source.config, 1)
    generator = torch.Generator().manual_seed(0)
    masks = tuple(torch.rand(12, generator=generator).argsort() < 7 for _ in mlps)
    sliced = slice_block(tensors, architecture, source.config, 1, Keep(channels=masks))
    zeroed = stream.with_weights(tensors, 1, {mlp.down: stream.weight(tensors, 1, mlp.down) * mask for mlp, mask in zip(mlps, masks, strict=True)})
    for mlp in mlps:
        assert stream.weight(sliced, 1, mlp.down).shape == (16, 7)
        assert sum(stream.weight(sliced, 1, name).shape[0] for name in mlp.outer) == 7 * (len(mlp.outer) * mlp.parts)
    same_outputs(stream, sliced, zeroed)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen3", "qwen2", "gemma2"])
def test_slicing_groups_equals_zeroing_their_columns(model_type: str, tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "dense", model_type, layers=2, heads=8, kv_heads=4, hidden=32))
    stream, architecture = BlockStream(source), ARCHITECTURES[model_type]
    tensors, output = stream.block_tensors(1), architecture.attention.output
    keep = Keep(groups=torch.tensor([True, False, True, True]))
    columns = kept_columns(keep, architecture, source.config)
    assert columns is not None
    size = architecture.dimensions(source.config)
    assert columns.view(4, -1).all(1).tolist() == [True, False, True, True]
    assert len(columns) == size.heads * size.head_dim
    sliced = slice_block(tensors, architecture, source.config, 1, keep)
    zeroed = stream.with_weights(tensors, 1, {output: stream.weight(tensors, 1, output) * columns})
    removed = sum(tensor.numel() for tensor in tensors.values()) - sum(tensor.numel() for tensor in sliced.values())
    biases = 4 * size.head_dim if model_type == "qwen2" else 0
    assert removed == group_cost(architecture, source.config) + biases
    same_outputs(stream, sliced, zeroed)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_that_stay_are_numbered_anew(model_type: str, tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "dense", model_type, layers=2))
    stream, architecture = BlockStream(source), ARCHITECTURES[model_type]
    tensors, router = stream.block_tensors(0), architecture.router(source.config, 0)
    count = architecture.expert_count(source.config)
    keep = torch.ones(count, dtype=torch.bool)
    keep[1] = False
    sliced = slice_block(tensors, architecture, source.config, 0, Keep(experts=keep))
    old, new = architecture.mlps(source.config, 0), architecture.mlps(source.config, 0)[: count - 1]
    prefix = architecture.block_prefix(0)
    for expert, number in zip(new, [0, *range(2, count)], strict=True):
        for name, before in zip(expert.linears, old[number].linears, strict=True):
            assert torch.equal(sliced[f"{prefix}{name}.weight"], tensors[f"{prefix}{before}.weight"])
    assert torch.equal(sliced[f"{prefix}{router}.weight"], tensors[f"{prefix}{router}.weight"][keep])
    assert len(sliced) == len(tensors) - 3


def test_what_stays_whole_is_not_copied(tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "dense", "llama"))
    stream = BlockStream(source)
    tensors = stream.block_tensors(0)
    sliced = slice_block(tensors, stream.architecture, source.config, 0, Keep())
    assert all(sliced[name] is tensor for name, tensor in tensors.items())


def same_outputs(stream: BlockStream, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    x = torch.randn(2, 6, int(stream.config.hidden_size), generator=torch.Generator().manual_seed(1))
    outputs = []
    for tensors in (one, other):
        out = torch.empty_like(x)
        forward(stream.materialise(1, tensors), stream.block_arguments(6)[1], x, out)
        outputs.append(out)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)
    assert not torch.equal(outputs[0], x)
