"""Fetch a model from the Hugging Face Hub: safetensors, configuration and tokenizer only, at one commit.

    python -m worker.fetch MODEL RESULT.json

Speaks to the supervisor as the engine does. RESULT.json gets `folder` and `revision`; where it is there already, its revision is fetched again, so that all
attempts of a job see the same files.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from app.exceptions import RecipeError

WANTED = (
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def fetch(model: str, revision: str | None) -> tuple[Path, str]:
    """The folder of a hub model and the commit that it holds; the newest one where none is asked for. Raises RecipeError."""
    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True)
    except OfflineModeIsEnabled:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
        return folder, folder.name
    except GatedRepoError:
        raise _refuse("model_gated", f"'{model}' is gated on the hub.", "The operator must accept its terms and set HF_TOKEN.") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise _refuse("model_not_found", f"The hub has no public model '{model}'.", "Look for a typing error in its name.") from None
    if info.sha is None:
        raise _refuse("model_not_found", f"The hub names no commit of '{model}'.", "Try another model.")
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if "/" not in file.rfilename}
    files = [name for name in sizes if _matches(name, WANTED)]
    if not any(name.endswith(".safetensors") for name in files):
        pickled = any(_matches(name, PICKLES) for name in sizes)
        code, why = ("pickle_weights", "only pickled weights, which can run code when loaded") if pickled else ("weights_missing", "no safetensors weights")
        raise _refuse(code, f"'{model}' has {why}.", "Use a model that is stored as safetensors.")
    cache = Path(HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / f"models--{model.replace('/', '--')}" / "snapshots" / info.sha).is_dir():
        need = sum(sizes[name] for name in files)
        if need > shutil.disk_usage(cache).free:
            raise OSError(errno.ENOSPC, f"'{model}' takes {need / 1e9:.1f} GB")
    return Path(snapshot_download(model, revision=info.sha, allow_patterns=files)), info.sha


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _refuse(code: str, message: str, hint: str) -> RecipeError:
    return RecipeError(message, code=code, hint=hint, pointer="/model")


def main(model: str, result: Path) -> int:
    disable_progress_bars()
    _say(event="phase", phase="fetch")
    earlier = json.loads(result.read_text(encoding="utf-8"))["revision"] if result.is_file() else None
    try:
        folder, revision = fetch(model, earlier)
    except RecipeError as error:
        _say(event="error", code=error.code, message=error.message, hint=error.hint)
        return 2
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _say(event="error", code="disk_full", message=f"The disk that models are fetched to is full: {error.strerror}.", hint="Free space in the hub's cache.")
        return 2
    unfinished = result.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"folder": str(folder), "revision": revision}), encoding="utf-8")
    unfinished.replace(result)
    _say(event="log", message=f"'{model}' is at commit {revision}.")
    return 0


def _say(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
