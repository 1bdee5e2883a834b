"""A bucket of the caller: every file of the result, then `manifest.json`, so that whoever finds that finds all.

A file is read, hashed and sent as a stream, and appears in the bucket only if its sha256 is the one of the job's manifest; each part's own sha256 is part of the
signature that the server checks. A later try sends what is not there yet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from app.settings import get_settings
from app.sinks.reach import look_up
from app.sinks.results import Result, ResultFile, SinkFailed, read
from app.sinks.schemas import S3
from app.sinks.tunnel import tunnel
from app.storage import CHUNK_BYTES, PARTS_AT_ONCE, Store

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config

MANIFEST = "manifest.json"
SHA256 = "espalier-sha256"  # of the whole object, in its metadata


def copy(sink: S3, result: Result, store: Store, scratch: Path) -> dict[str, Any]:
    """-> the `url` below which the files lie, and the `manifest` among them."""
    files = [{"path": file.path, "bytes": file.bytes, "sha256": file.sha256} for file in result.files]
    try:
        with _opened(sink) as bucket:
            for file in result.files:
                if not _there(bucket, file):
                    _send(bucket, result, file, store)
            obstore.put(bucket, MANIFEST, json.dumps({"job": result.job_id, "model": result.model, "method": result.method, "files": files}).encode())
    except (UnauthenticatedError, PermissionDeniedError) as error:
        hint = "Give keys that may read and write below the prefix, and try the sink again."
        raise SinkFailed("sink_denied", "The S3 server refused the keys.", hint, final=True) from error
    except (BaseError, FileNotFoundError) as error:
        hint = "See that bucket, region and endpoint are right and the server runs, then try the sink again."
        raise SinkFailed("sink_unreachable", "The S3 server did not take a file, or did not answer.", hint, final=False) from error
    return {"url": sink.url, "manifest": f"{sink.url}/{MANIFEST}"}


@contextmanager
def _opened(sink: S3) -> Iterator[S3Store]:
    """An endpoint is looked up and checked once, and every connection goes there: the library itself would look it up each time, and follows redirects."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]  # of the operator, and obstore would use it where the sink says nothing
    url = urlsplit(sink.url)
    config: S3Config = {}
    options: ClientConfig = {"allow_http": (sink.endpoint or "").startswith("http://"), "connect_timeout": "5 seconds", "timeout": "60 seconds"}
    with ExitStack() as way:
        if sink.endpoint:
            address, ips = look_up(sink.endpoint, get_settings())
            config["endpoint"] = sink.endpoint
            options["proxy_url"] = way.enter_context(tunnel(ips, address.port))
        yield S3Store(
            url.netloc,
            config=config,
            prefix=url.path.strip("/") or None,
            region=sink.region,
            access_key_id=sink.access_key.get_secret_value(),
            secret_access_key=sink.secret_key.get_secret_value(),
            virtual_hosted_style_request=not sink.endpoint,
            client_options=options,
            retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=30)},
        )


def _there(bucket: S3Store, file: ResultFile) -> bool:
    """Whether an earlier try has sent it."""
    try:
        found = obstore.get(bucket, file.path, options={"head": True})
    except FileNotFoundError:
        return False
    return found.meta["size"] == file.bytes and found.attributes.get(SHA256) == file.sha256


def _send(bucket: S3Store, result: Result, file: ResultFile, store: Store) -> None:
    """Where `read` finds it damaged, nothing appears there."""
    with obstore.open_writer(bucket, file.path, attributes={SHA256: file.sha256}, buffer_size=CHUNK_BYTES, max_concurrency=PARTS_AT_ONCE) as writer:
        for chunk in read(store, result, file):
            writer.write(chunk)
