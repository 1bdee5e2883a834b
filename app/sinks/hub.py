"""The Hugging Face Hub: the checkpoint's files and the report become one commit of a model repository.

`HF_ENDPOINT` names another hub. A try that finds the same content there makes no commit. The large files pass over the disk one by one. They go up by Git LFS,
which every hub speaks, and not by Xet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from httpx2 import TransportError  # the hub's client raises it as it is
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from app.sinks.results import Result, SinkFailed, fetch
from app.sinks.schemas import Hub
from app.storage import Store

FOLDER = "checkpoint/"
DENIED = (401, 403)


def push(sink: Hub, result: Result, store: Store, scratch: Path) -> dict[str, Any]:
    """-> the repository's `url` and the `commit` that holds the result."""
    api = HfApi(token=sink.token.get_secret_value())
    try:
        url = api.create_repo(sink.repository, private=sink.private, exist_ok=True)
        additions = []
        for file in result.files:
            if file.role not in ("checkpoint", "report"):
                continue
            path = scratch / file.path
            fetch(store, result, file, path)
            addition = CommitOperationAdd(file.path.removeprefix(FOLDER), path)
            api.preupload_lfs_files(sink.repository, [addition], free_memory=False)
            if addition._is_uploaded:  # else it is a small one, which travels in the commit
                path.unlink()
            additions.append(addition)
        commit = api.create_commit(sink.repository, additions, commit_message=f"Pruned by Espalier, {result.job_id}")
    except HfHubHTTPError as error:
        raise _refused(error) from error
    except TransportError as error:
        hint = "Try the sink again when the hub is there."
        raise SinkFailed("sink_unreachable", "The hub did not answer.", hint, final=False) from error
    return {"url": str(url), "commit": commit.oid}


def _refused(error: HfHubHTTPError) -> SinkFailed:
    status = error.response.status_code
    if status in DENIED:
        hint = "Give a token that may write to the repository, and try the sink again."
        return SinkFailed("sink_denied", f"The hub refused the token ({status}).", hint, final=True)
    final = 400 <= status < 500 and status not in (408, 409, 412, 429)
    return SinkFailed("sink_refused", f"The hub answered {status}.", "Look at the repository's name and its settings.", final=final)
