"""Try a checkpoint as its user will: a fresh process loads it with transformers, runs tokens through it and, where asked, times it.

    python -m worker.trial FOLDER TOKENS.safetensors OUT_DIR [--loader] [--speed] [--dtype float32] [--blocks 0 16 31]

`TOKENS.safetensors` holds `tokens`, (B, T) int64. `OUT_DIR` gets `logits.safetensors` with `logits`, (B, T, V) float32, and `trial.json`.

Of a checkpoint that doesn't fit in memory, transformers checks all names and shapes on the meta device and loads a few blocks alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.architecture import ARCHITECTURES
from app.processes import dies_with
from app.report import Speed
from app.source import Source, read_source
from worker.blocks import default_device
from worker.memory import PeakMemory, anonymous_bytes, available_bytes, peak_resident_bytes

PREFILL_TOKENS = 512
DECODE_TOKENS = 64
WARM_UP_TOKENS = 8
REPETITIONS = 3
STDERR_TAIL = 4000  # characters
PROCESS_BYTES = 1 << 30  # of a process beside the weights: libraries, activations, logits


class TrialError(RuntimeError):
    """The checkpoint could not be loaded or run; the message has what the process said last."""


@dataclass(frozen=True)
class Trial:
    """What a fresh process found."""

    loader: str  # what loaded it, e.g. "transformers 5.23.0 + espalier.loader"
    device: str
    threads: int
    peak_memory_bytes: int  # highest anonymous resident memory
    peak_resident_bytes: int  # highest resident memory, mapped files included
    speed: Speed | None
    logits: Tensor  # (B, T, V) float32


# --------------------------------------------------------------- the caller's side


def fits_in_memory(source: Source, allowed: int | None = None) -> bool:
    """Whether a fresh process can hold the model in float32; `allowed` bounds the anonymous memory of this process and those that it starts."""
    rooms = [available_bytes()]
    if allowed is not None:
        rooms.append(allowed - anonymous_bytes())
    if torch.cuda.is_available():
        rooms.append(torch.cuda.mem_get_info()[0])
    return PROCESS_BYTES + 4 * sum(math.prod(entry.shape) for entry in source.tensors.values()) <= min(rooms)


def run_trial(
    folder: Path,
    tokens: Tensor,
    *,
    loader: bool = False,
    speed: bool = False,
    dtype: str = "float32",
    blocks: Sequence[int] | None = None,
    work: Path | None = None,
    timeout: float = 3600,
) -> Trial:
    """Try the checkpoint in `folder` on (B, T) token ids, with plain transformers or also with `espalier.loader`.

    With `blocks`, a model of these blocks and all that lies outside of them runs; of the rest only names and shapes are checked. The files that pass between
    the processes lie in `work` for the time of the call. Raises TrialError.
    """
    with tempfile.TemporaryDirectory(prefix="trial-", dir=work) as exchange:
        batch, out = Path(exchange, "tokens.safetensors"), Path(exchange, "out")
        save_file({"tokens": tokens.to(torch.int64).contiguous()}, batch)
        flags = ["--loader"] * loader + ["--speed"] * speed + (["--blocks", *map(str, blocks)] if blocks is not None else [])
        command = [sys.executable, "-m", "worker.trial", str(folder), str(batch), str(out), "--dtype", dtype, *flags]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        try:
            ended = subprocess.run(
                command, env=os.environ | offline, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise TrialError(f"Loading and running '{folder.name}' took longer than {timeout:g} s.") from error
        if ended.returncode != 0:
            raise TrialError(
                f"'{folder.name}' could not be loaded and run in a fresh process (exit {ended.returncode}):\n{ended.stderr[-STDERR_TAIL:].strip()}"
            )
        found = json.loads((out / "trial.json").read_text(encoding="utf-8"))
        measured = None if found["speed"] is None else Speed(**found["speed"])
        return Trial(**(found | {"speed": measured}), logits=load_file(out / "logits.safetensors")["logits"])


# ------------------------------------------------------------- in the fresh process


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m worker.trial", description="Try a checkpoint in this process.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path, help="safetensors file with `tokens`, (B, T) int64")
    parser.add_argument("out", type=Path)
    parser.add_argument("--loader", action="store_true", help="import espalier.loader first")
    parser.add_argument("--speed", action="store_true", help="measure prefill and decode")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--blocks", nargs="+", type=int, help="run these blocks alone, and check names and shapes of all")
    asked = parser.parse_args(arguments)

    dies_with(os.getppid())()
    asked.out.mkdir(parents=True, exist_ok=True)
    tokens = load_file(asked.tokens)["tokens"]
    with PeakMemory() as memory:
        model = load(asked.folder, loader=asked.loader, dtype=getattr(torch, asked.dtype), blocks=asked.blocks)
        logits = run(model, tokens)
        speed = measure_speed(model, tokens) if asked.speed else None
    save_file({"logits": logits}, asked.out / "logits.safetensors")
    found = {
        "loader": _loader_name(asked.loader),
        "device": _device_name(model.device),
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": memory.bytes,
        "peak_resident_bytes": peak_resident_bytes(),
        "speed": speed and speed.model_dump(),
    }
    (asked.out / "trial.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def load(folder: Path, *, loader: bool, dtype: torch.dtype, blocks: Sequence[int] | None = None) -> Any:
    """The model by `from_pretrained`, or one of some of its blocks; raises ValueError where a weight is missing, left over or of another shape."""
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    if loader:
        importlib.import_module("espalier.loader")
    model_class = transformers.AutoModelForCausalLM
    if blocks is None:
        model = _from_pretrained(model_class, folder, dtype=dtype)
    else:
        whole = _from_pretrained(model_class, folder, dtype=dtype, device_map="meta")
        config, weights = excerpt(read_source(folder), blocks)
        model = _from_pretrained(type(whole), None, dtype=dtype, config=type(whole.config).from_dict(config), state_dict=weights)
    return model.to(default_device()).eval()


def _from_pretrained(model_class: Any, folder: Path | None, **options: Any) -> Any:
    model, info = model_class.from_pretrained(folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"from_pretrained did not load the weights as they are: {wrong}")
    return model


def excerpt(source: Source, blocks: Sequence[int]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors, mapped from their files, of a model of these blocks alone."""
    architecture = ARCHITECTURES[source.model_type]
    config = architecture.keep_blocks(source.config, blocks)
    if source.config.get("per_layer_config"):
        own = {int(layer): sizes for layer, sizes in source.config["per_layer_config"].items()}
        config["per_layer_config"] = {str(place): own[index] for place, index in enumerate(blocks) if index in own}
    prefixes = {architecture.block_prefix(index): architecture.block_prefix(place) for place, index in enumerate(blocks)}
    weights: dict[str, Tensor] = {}
    for name, entry in source.tensors.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        if old or not name.startswith(f"{architecture.blocks}."):
            with safe_open(entry.file, framework="pt") as stored:
                weights[prefixes.get(old, "") + name.removeprefix(old)] = stored.get_tensor(entry.name)
    return config, weights


@torch.no_grad()
def run(model: Any, tokens: Tensor) -> Tensor:
    """(B, T) -> (B, T, V) float32 on the CPU, one sequence at a time."""
    return torch.stack([model(row[None].to(model.device), use_cache=False).logits[0].float().cpu() for row in tokens])


@torch.no_grad()
def measure_speed(model: Any, tokens: Tensor) -> Speed:
    """Medians over repetitions, after a warm-up, of reading a prompt and of writing greedily after it."""
    longest = model.config.max_position_embeddings - DECODE_TOKENS
    length = max(1, min(PREFILL_TOKENS, longest))
    prompt = tokens.flatten().repeat(-(-length // tokens.numel()))[None, :length].to(model.device)

    def once(written: int) -> tuple[float, float]:
        output, prefill = _timed(lambda: model(prompt, use_cache=True, logits_to_keep=1), model.device)
        return prefill, _timed(lambda: _decode(model, output, written), model.device)[1]

    once(WARM_UP_TOKENS)
    prefills, decodes = zip(*(once(DECODE_TOKENS) for _ in range(REPETITIONS)), strict=True)
    return Speed(
        device=_device_name(model.device),
        threads=torch.get_num_threads(),
        prefill_tokens=length,
        prefill_tokens_per_second=length / statistics.median(prefills),
        decode_tokens=DECODE_TOKENS,
        decode_tokens_per_second=DECODE_TOKENS / statistics.median(decodes),
    )


def _decode(model: Any, output: Any, count: int) -> None:
    for _ in range(count):
        output = model(output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values, use_cache=True)


def _timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    _finish_queued(device)
    start = time.perf_counter()
    result = work()
    _finish_queued(device)
    return result, time.perf_counter() - start


def _finish_queued(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _loader_name(loader: bool) -> str:
    transformers = f"transformers {importlib.import_module('transformers').__version__}"
    return f"{transformers} + espalier.loader" if loader else transformers


if __name__ == "__main__":
    main(sys.argv[1:])
