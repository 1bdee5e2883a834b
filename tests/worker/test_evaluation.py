"""Counts by the headers are those of the loaded model, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from app.architecture import ARCHITECTURES
from app.counting import LinearZeros, count_parameters, macs_per_token
from app.source import read_source
from tests.models import load_model, make_checkpoint

MORE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": [1], "moe_intermediate_size": 20},
    "opt": {"word_embed_proj_dim": 16},
    "llama": {"attention_bias": True, "mlp_bias": True},
}
USED = 2  # experts a token, of the checkpoints made here


def is_ffn(name: str) -> bool:
    return ".mlp." in name or ".fc" in name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_counts_are_those_of_the_loaded_model(model_type: str, tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, model_type, tied=tied, layers=2, **MORE.get(model_type, {}))
    source, model = read_source(folder), load_model(folder)
    path = ARCHITECTURES[model_type].blocks

    linears = {f"{path}.{name}": module for name, module in model.get_submodule(path).named_modules() if isinstance(module, nn.Linear | Conv1D)}
    fused = {name: weight for name, weight in model.named_parameters() if weight.dim() == 3}  # transformers' matrices of all experts
    weights = {name: module.weight.numel() for name, module in linears.items()} | {name: weight.numel() for name, weight in fused.items()}
    counted = count_parameters(source, [LinearZeros(attention=3, mlp=4), LinearZeros(mlp=5)])
    assert counted.all == sum(weight.numel() for weight in model.parameters())
    assert counted.non_embedding == counted.all - sum({id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.lm_head)}.values())
    assert counted.decoder == sum(weights.values())
    assert counted.ffn == sum(count for name, count in weights.items() if is_ffn(name))
    assert (counted.decoder_zeros, counted.ffn_zeros) == (12, 9)
    channels = {"mixtral": 4 * 48 * 2, "qwen3_moe": 5 * 20 + 48}.get(model_type, 2 * 48)
    assert counted.ffn_channels == channels


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@torch.no_grad()
def test_macs_are_those_that_a_token_passes_through(model_type: str, tmp_path: Path) -> None:
    """Each module that multiplies counts its matrix once a row that passes it; of the experts, those that the router chooses."""
    folder = make_checkpoint(tmp_path, model_type, layers=2, **MORE.get(model_type, {}))
    model, rows = load_model(folder), 6
    passed = 0

    def count(module: Any, args: tuple[Tensor, ...], output: Any) -> None:
        nonlocal passed
        passed += module.weight.numel() * args[0].numel() // args[0].shape[-1]

    def count_experts(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal passed
        chosen = args[1]  # (tokens, experts a token)
        assert chosen.shape == (rows, USED)
        passed += chosen.numel() * (module.gate_up_proj[0].numel() + module.down_proj[0].numel())

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) or name.endswith("mlp.gate"):
            module.register_forward_hook(count)
        elif name.endswith("mlp.experts"):
            module.register_forward_hook(count_experts)
    model(torch.arange(rows)[None])
    assert macs_per_token(read_source(folder)) * rows == passed
