"""Load the checkpoints that tests left, in a process that has made none of them:

    python -m tests.worker.reload FOLDER

Each folder in FOLDER holds `checkpoint/` and `expected.safetensors` with `tokens`, (B, T), and the engine's `logits`, (B, T, V). All are loaded by plain
transformers but those of layers that differ, for which `espalier.loader` is imported last. Prints the names of all that compute what was expected and generate.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file


def check(folder: Path) -> None:
    auto: Any = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder / "checkpoint", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), (folder.name, info)
    expected = load_file(folder / "expected.safetensors")
    tokens = expected["tokens"]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected["logits"], atol=1e-4, rtol=1e-4, msg=lambda message: f"{folder.name}: {message}")
    prompt = tokens[:1, :4]
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=5, max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert generated.shape == (1, 9), folder.name
    assert torch.equal(generated[:, :4], prompt), folder.name


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    per_layer: dict[bool, list[Path]] = {False: [], True: []}
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        config = json.loads((folder / "checkpoint" / "config.json").read_text(encoding="utf-8"))
        per_layer["per_layer_config" in config].append(folder)
    for folder in per_layer[False]:
        check(folder)
    assert not {name for name in sys.modules if name.partition(".")[0] in ("espalier", "app", "worker")}
    if per_layer[True]:
        import espalier.loader  # noqa: F401
    for folder in per_layer[True]:
        check(folder)
    sys.stdout.write(json.dumps([folder.name for folder in sorted(per_layer[False] + per_layer[True])]))


if __name__ == "__main__":
    main()
