"""`python -m app.sinks.export`: one try at one sink, as a process of its own that can be ended at any moment.

It reads a JSON object from stdin: `sink`, secrets included, and `result`. The last line that it writes is one, too: `done`, where the result lies now; or `error` with
`code`, `message`, `hint`, and `final`, which says that another try would not help.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.exceptions import AddressError, UnavailableError
from app.settings import Settings, get_settings
from app.sinks.results import Result, ResultFile, SinkFailed
from app.sinks.schemas import SINK, Hub, Mlflow
from app.storage import Store, open_store

DISK_FULL = SinkFailed("disk_full", "The disk of the process that brings results elsewhere is full.", "Tell the operator.", final=False)


def main(request: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Try it; the answer."""
    sink = SINK.validate_python(request["sink"])
    result = Result(**request["result"] | {"files": [ResultFile(**file) for file in request["result"]["files"]]})
    scratch = settings.exports_dir / f"{result.job_id}-{request['number']}"
    shutil.rmtree(scratch, ignore_errors=True)  # an earlier try may have been killed
    scratch.mkdir(parents=True)
    store = open_store(settings)
    try:
        return {"done": _exporter(sink)(sink, result, store, scratch)}
    except SinkFailed as failed:
        return _failed(failed)
    except AddressError as error:
        return _failed(SinkFailed(error.code, error.message, error.hint, final=error.code != "address_unknown"))
    except UnavailableError as error:
        return _failed(SinkFailed(error.code, error.message, error.hint, final=False))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _failed(DISK_FULL)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _exporter(sink: Any) -> Callable[[Any, Result, Store, Path], dict[str, Any]]:
    """Imported only where it is needed: the hub's client alone takes longer to load than a small file to send."""
    if isinstance(sink, Hub):
        from app.sinks import hub

        return hub.push
    if isinstance(sink, Mlflow):
        from app.sinks import mlflow

        return mlflow.register
    from app.sinks import s3

    return s3.copy


def _failed(failed: SinkFailed) -> dict[str, Any]:
    return {"error": {"code": failed.code, "message": failed.message, "hint": failed.hint}, "final": failed.final}


if __name__ == "__main__":
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    answer = main(json.load(sys.stdin), get_settings())
    sys.stdout.write(json.dumps(answer) + "\n")
