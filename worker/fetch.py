"""Fetch a model into the worker's cache: safetensors, configuration and tokenizer only, at one version.

    python -m worker.fetch MODEL RESULT.json TENANT

MODEL is a hub id, `s3://bucket/prefix`, or the id of a checkpoint that the tenant has uploaded. Speaks to the supervisor as the engine does. RESULT.json gets `folder`, `revision`, and whether the folder is `cached`
and so must be held while it is used; where it is there already, its revision is fetched again, so that all attempts of a job see the same files.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from app.checkpoints.repository import list_files
from app.checkpoints.service import get_ready
from app.database import Database
from app.exceptions import RecipeError
from app.settings import Settings, get_settings
from app.source import CHECKPOINT_ID, read_config
from app.storage import KEY, Store, open_store
from worker import cache
from worker.cache import RemoteFile, RemoteModel

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
TRANSFERS_AT_ONCE = 4


# ---------------------------------------------------------- where models come from


def on_hub(model: str, revision: str | None) -> RemoteModel:
    """A model of the Hugging Face Hub, at the commit that is asked for or the newest one. Raises RecipeError."""
    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True)
    except GatedRepoError:
        raise _refuse("model_gated", f"'{model}' is gated on the hub.", "The operator must accept its terms and set HF_TOKEN.") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise _refuse("model_not_found", f"The hub has no public model '{model}'.", "Look for a typing error in its name.") from None
    if info.sha is None:
        raise _refuse("model_not_found", f"The hub names no commit of '{model}'.", "Try another model.")
    files = {
        file.rfilename: RemoteFile(file.size or 0, None if file.lfs is None else file.lfs.sha256) for file in info.siblings or [] if "/" not in file.rfilename
    }
    wanted = _choose(model, files)

    def transfer(folder: Path) -> None:
        get = functools.partial(snapshot_download, model, revision=info.sha, local_dir=folder)
        get(allow_patterns=["config.json"])
        read_config(folder)  # a model that can't be pruned costs no transfer of its weights
        get(allow_patterns=list(wanted))
        shutil.rmtree(folder / ".cache")  # what it notes of a transfer, to go on with

    return RemoteModel(model, info.sha, wanted, transfer)


def in_bucket(url: str, settings: Settings) -> RemoteModel:
    """A model at `s3://bucket/prefix`, read with the service's own credentials. Its version is a hash of the ETags. Raises RecipeError."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    store = open_store(settings.model_copy(update={"store_url": f"s3://{bucket}"}))
    found = {entry.key.removeprefix(f"{prefix}/"): entry for entry in store.entries(f"{prefix}/")}
    if not found:
        raise _refuse("model_not_found", f"There is nothing at {url}.", "Look for a typing error in its name.")
    wanted = _choose(url, {name: RemoteFile(entry.bytes) for name, entry in found.items() if "/" not in name and KEY.fullmatch(name)})
    version = _digest({name: (found[name].bytes, found[name].etag) for name in wanted})

    def transfer(folder: Path) -> None:
        _get_files(store, {name: [f"{prefix}/{name}"] for name in wanted}, folder)
        if in_bucket(url, settings).version != version:
            raise OSError(errno.EIO, f"{url} was changed while it was fetched")

    return RemoteModel(url, version, wanted, transfer)


def in_store(checkpoint_id: str, tenant_id: str, settings: Settings) -> RemoteModel:
    """A checkpoint that the tenant has uploaded. Its version is the hash of its manifest. Raises RecipeError."""
    database = Database(settings.database_url.get_secret_value())
    try:
        with database.reading() as session:
            checkpoint = get_ready(session, tenant_id, checkpoint_id)
            files = {file.path: file for file in list_files(session, checkpoint) if "/" not in file.path}
    finally:
        database.dispose()
    assert checkpoint.sha256 is not None
    wanted = _choose(checkpoint_id, {path: RemoteFile(file.bytes, file.sha256) for path, file in files.items()})
    keys = {path: files[path].keys for path in wanted}
    return RemoteModel(checkpoint_id, checkpoint.sha256, wanted, functools.partial(_get_files, open_store(settings), keys))


def _choose(model: str, files: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
    """The files that are fetched of all that there are."""
    wanted = {name: file for name, file in files.items() if _matches(name, WANTED)}
    if not any(name.endswith(".safetensors") for name in wanted):
        pickled = any(_matches(name, PICKLES) for name in files)
        code, why = ("pickle_weights", "only pickled weights, which can run code when loaded") if pickled else ("weights_missing", "no safetensors weights")
        raise _refuse(code, f"'{model}' has {why}.", "Use a model that is stored as safetensors.")
    return wanted


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _digest(files: Mapping[str, tuple[Any, ...]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _get_files(store: Store, keys: Mapping[str, Sequence[str]], folder: Path) -> None:
    """Files, by the keys of the objects that one after another make up each, into a folder; those that an earlier transfer left whole are not transferred again."""

    def get(name: str) -> None:
        if not (folder / name).exists():
            part = folder / f".{name}.part"
            store.get_file(part, *keys[name])
            part.rename(folder / name)

    with ThreadPoolExecutor(TRANSFERS_AT_ONCE) as pool:
        for _ in pool.map(get, sorted(keys)):
            pass
    for left in folder.glob(".*.part"):
        left.unlink()


# -------------------------------------------------------------------- the command


def fetch(model: str, revision: str | None, tenant_id: str, settings: Settings) -> dict[str, Any]:
    """What the command answers. Raises RecipeError, and OSError (ENOSPC) where the disk is too small."""
    folder = revision and cache.find(settings.models_dir, model, revision)
    if folder and revision:
        return _answer(folder, revision, cached=True)
    try:
        remote = _find(model, revision, tenant_id, settings)
    except OfflineModeIsEnabled:  # the operator has filled the hub's own cache
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
        return _answer(folder, folder.name, cached=False)
    if revision not in (None, remote.version):
        raise _refuse("model_changed", f"'{model}' was changed after the job's first attempt.", "Submit the job again.")
    folder = cache.fill(settings.models_dir, settings.model_cache_bytes, remote, lambda message: _say(event="log", message=message))
    return _answer(folder, remote.version, cached=True)


def _find(model: str, revision: str | None, tenant_id: str, settings: Settings) -> RemoteModel:
    if CHECKPOINT_ID.fullmatch(model):
        return in_store(model, tenant_id, settings)
    return in_bucket(model, settings) if model.startswith("s3://") else on_hub(model, revision)


def _answer(folder: Path, revision: str, *, cached: bool) -> dict[str, Any]:
    return {"folder": str(folder), "revision": revision, "cached": cached}


def main(model: str, result: Path, tenant_id: str) -> int:
    disable_progress_bars()
    _say(event="phase", phase="fetch")
    earlier = json.loads(result.read_text(encoding="utf-8"))["revision"] if result.is_file() else None
    try:
        answer = fetch(model, earlier, tenant_id, get_settings())
    except RecipeError as error:
        _say(event="error", code=error.code, message=error.message, hint=error.hint)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _say(
            event="error",
            code="disk_full",
            message=f"The disk that models are fetched to is full: {error.strerror}.",
            hint="Free space in the worker's home, or prune a smaller model.",
        )
        return 2
    unfinished = result.with_suffix(".tmp")
    unfinished.write_text(json.dumps(answer), encoding="utf-8")
    unfinished.replace(result)
    _say(event="log", message=f"'{model}' is at version {answer['revision']}.")
    return 0


def _refuse(code: str, message: str, hint: str) -> RecipeError:
    return RecipeError(message, code=code, hint=hint, pointer="/model")


def _say(**event: Any) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
