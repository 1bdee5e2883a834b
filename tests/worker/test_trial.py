"""A checkpoint is tried in a fresh process, which fails for anything but exactly its weights."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import __version__

from app.recipe import MODEL_TYPES
from app.source import read_source
from tests.models import load_model, make_checkpoint, pruned_checkpoint
from worker import memory
from worker.blocks import BlockStream
from worker.evaluation import logits
from worker.memory import anonymous_bytes, available_bytes
from worker.trial import PROCESS_BYTES, TrialError, fits_in_memory, load, measure_speed, run, run_trial

TOKENS = torch.arange(3, 63).reshape(2, 30)


def test_a_trial_finds_the_logits_of_the_model(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "qwen3")
    trial = run_trial(folder, TOKENS, speed=True, work=tmp_path)
    with torch.no_grad():
        expected = load_model(folder)(TOKENS).logits
    assert trial.logits.dtype == torch.float32
    assert float((trial.logits - expected).abs().max()) < 1e-4
    assert trial.loader == f"transformers {__version__}"
    assert trial.speed is not None
    assert trial.device == trial.speed.device == (torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    assert trial.threads >= 1
    assert 20e6 < trial.peak_memory_bytes < trial.peak_resident_bytes
    assert (trial.speed.prefill_tokens, trial.speed.decode_tokens) == (512, 64)
    assert trial.speed.prefill_tokens_per_second > trial.speed.decode_tokens_per_second > 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_per_layer_checkpoint_needs_the_loader(tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "source", "llama"))
    folder = pruned_checkpoint(source, tmp_path / "per_layer", [20, 48, 31], "per_layer")
    trial = run_trial(folder, TOKENS, loader=True, work=tmp_path)
    assert trial.loader == f"transformers {__version__} + espalier.loader"
    assert trial.speed is None
    assert trial.logits.shape == (2, 30, 320)
    with pytest.raises(TrialError) as failed:
        run_trial(folder, TOKENS, work=tmp_path)
    assert "could not be loaded and run in a fresh process (exit 1)" in str(failed.value)
    assert "mlp.down_proj.weight" in str(failed.value)


def test_a_trial_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    started = time.monotonic()
    with pytest.raises(TrialError, match=r"longer than 0\.2 s"):
        run_trial(folder, TOKENS, work=tmp_path, timeout=0.2)
    assert time.monotonic() - started < 60
    assert not [child for child in psutil.Process().children() if "worker.trial" in child.cmdline()]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_trial_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    code = f"""
from pathlib import Path
import torch
from worker.trial import run_trial
run_trial(Path({str(folder)!r}), torch.arange(600)[None] % 300, speed=True, work=Path({str(tmp_path)!r}))
"""
    parent = psutil.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("trial-*/out")):  # the first that a trial does
            assert parent.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = parent.children()
        parent.kill()
        parent.wait()
        gone, alive = psutil.wait_procs(children, timeout=60)
        assert len(gone) == 1
        assert not alive
    finally:
        if parent.poll() is None:
            parent.kill()
            parent.wait()


# The checks on what was loaded run in this process: they are the same code, without the start-up.


def test_a_missing_weight_fails(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*layers\.1\.mlp\.up_proj"):
        load(folder, loader=False, dtype=torch.float32)


def test_a_weight_left_over_fails(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors") | {"model.layers.1.mlp.up_proj.bias": torch.zeros(48)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected_keys.*layers\.1\.mlp\.up_proj\.bias"):
        load(folder, loader=False, dtype=torch.float32)


def test_a_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", tied=True)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors", {"format": "pt"})
    model = load(folder, loader=False, dtype=torch.float32)
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"].to(model.device))


def test_stored_types_are_computed_as_asked(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    assert load(folder, loader=False, dtype=torch.float32).dtype == torch.float32


def test_a_short_context_is_not_overrun(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path, "llama"), loader=False, dtype=torch.float32)
    model.config.max_position_embeddings = 100
    assert measure_speed(model, TOKENS).prefill_tokens == 36


# What doesn't fit in memory.


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_few_blocks_alone_compute_what_the_engine_computes_with_them(model_type: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", model_type, layers=5, max_shard_size="20KB")
    blocks = [0, 1, 4]
    alone = run(load(folder, loader=False, dtype=torch.float32, blocks=blocks), TOKENS)
    stream = BlockStream(read_source(folder))
    torch.testing.assert_close(alone, logits(stream, TOKENS, tmp_path, lambda index, tensors: tensors if index in blocks else None), atol=1e-4, rtol=1e-4)
    assert float((alone - logits(stream, TOKENS, tmp_path)).abs().max()) > 1e-2  # the others would have shown


def test_a_few_blocks_of_their_own_widths(tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path / "source", "llama", layers=4))
    folder = pruned_checkpoint(source, tmp_path / "per_layer", [20, 48, 31, 7], "per_layer")
    trial = run_trial(folder, TOKENS, loader=True, blocks=[0, 3], work=tmp_path)
    with torch.no_grad():
        model = load_model(tmp_path / "source")
        for index, width in ((0, 20), (3, 7)):
            model.model.layers[index].mlp.down_proj.weight[:, width:] = 0
        model.model.layers = model.model.layers[::3]
        model.config.num_hidden_layers = 2
        expected = model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(trial.logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fault", ["missing", "left over", "of another shape"])
def test_names_and_shapes_of_the_other_blocks_are_checked_too(fault: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", layers=3)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "left over":
        weights["model.layers.1.mlp.up_proj.bias"] = torch.zeros(48)
    else:
        weights[name] = weights[name][:40].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"missing_keys|unexpected_keys|size mismatch|ignore_mismatched_sizes"):
        load(folder, loader=False, dtype=torch.float32, blocks=[0, 2])


def test_whether_a_model_fits_is_told_by_its_size_in_float32(tmp_path: Path) -> None:
    source = read_source(make_checkpoint(tmp_path, "llama", dtype=torch.bfloat16))
    needed = PROCESS_BYTES + 4 * sum(weight.numel() for weight in load_file(tmp_path / "model.safetensors").values())
    assert fits_in_memory(source)
    assert fits_in_memory(source, needed + anonymous_bytes() + (64 << 20))
    assert not fits_in_memory(source, needed + anonymous_bytes() // 2)


@pytest.mark.parametrize("names", [("memory.max", "memory.current", "memory.stat"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")])
def test_a_containers_limit_bounds_what_is_available(names: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path if names[0] == "memory.max" else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    unbounded = available_bytes()
    for name, content in zip(names, ("60000000\n", "50000000\n", "anon 20000000\nactive_file 5000000\ninactive_file 25000000\n"), strict=True):
        (folder / name).write_text(content)
    assert available_bytes() == 60000000 - 50000000 + 30000000
    (folder / names[0]).write_text("max\n")
    assert available_bytes() > unbounded / 2 > 40000000
