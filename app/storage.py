"""The object store: a local directory or an S3 bucket, one code path on obstore.

An object is visible only once it is whole, on both: a local one is written beside its place and renamed, an S3 one appears when its upload completes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store

from app.exceptions import UnavailableError
from app.settings import Settings

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
FULL = re.compile(rf"os error ({errno.ENOSPC}|{errno.EDQUOT}|{errno.EFBIG})\b")
MAX_KEY_LENGTH = 1024  # S3's own limit
CHUNK_BYTES = 8 * 1024 * 1024  # a part of an upload, and one request of a download, so a slow reader holds no request open
UPLOADS_AT_ONCE = 4
RETRIES: RetryConfig = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2},
}


class Store:
    """Objects under keys such as `tenant/jobs/job/a1/checkpoint/config.json`.

    Raises ValueError for a malformed key, FileNotFoundError for a missing object, UnavailableError when the store does not answer or is full.
    """

    def __init__(self, backend: LocalStore | S3Store, *, folder: Path | None = None, signer: S3Store | None = None) -> None:
        self._backend = backend
        self._folder = folder  # where the local store lies
        self._signer = signer  # knows the address under which clients reach S3

    def put_file(self, key: str, path: Path) -> tuple[int, str]:
        """Upload a file as a stream; its size in bytes and its sha256."""
        _check(key)
        digest = hashlib.sha256()

        def chunks() -> Iterator[bytes]:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                    yield chunk

        size = path.stat().st_size
        with _told():
            obstore.put(self._backend, key, chunks(), use_multipart=size > CHUNK_BYTES, chunk_size=CHUNK_BYTES, max_concurrency=UPLOADS_AT_ONCE)
        stored = self.size(key)
        if stored != size:
            raise UnavailableError(f"The store holds {stored} bytes of '{key}', which has {size}.", code="store_incomplete", hint="Try again.")
        return size, digest.hexdigest()

    def get_range(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` up to, without, `end`, in chunks."""
        _check(key)
        for begin in range(start, end, CHUNK_BYTES):
            with _told():
                chunk = obstore.get_range(self._backend, key, start=begin, end=min(begin + CHUNK_BYTES, end))
            yield chunk.to_bytes()

    def size(self, key: str) -> int:
        _check(key)
        with _told():
            return obstore.head(self._backend, key)["size"]

    def presign(self, key: str, seconds: int) -> str | None:
        """A URL from which anyone may get this one object for a while; None on the local store."""
        _check(key)
        if self._signer is None:
            return None
        return obstore.sign(self._signer, "GET", key, timedelta(seconds=seconds))

    def delete_prefix(self, prefix: str) -> None:
        """Delete everything below `prefix`, half-written files too."""
        _check(prefix.removesuffix("/"))
        with _told():
            for objects in obstore.list(self._backend, prefix):
                obstore.delete(self._backend, [found["path"] for found in objects])
        if self._folder is not None:
            shutil.rmtree(self._folder / prefix, ignore_errors=True)

    def check(self) -> None:
        """Raises UnavailableError unless the store answers with the right to list and, locally, to write."""
        if self._folder is not None and not os.access(self._folder, os.W_OK):
            raise UnavailableError("The directory of the object store can't be written.", code="store_unavailable", hint="See ESPALIER_STORE_URL.")
        with _told():
            obstore.list_with_delimiter(self._backend, "readyz")


def open_store(settings: Settings) -> Store:
    """The store at `store_url`: `file:///directory`, which is made if it is missing, or `s3://bucket/prefix`."""
    url = urlsplit(settings.store_url)
    if url.scheme == "file":
        folder = Path(unquote(url.path))
        folder.mkdir(parents=True, exist_ok=True)
        return Store(LocalStore(folder), folder=folder)
    if url.scheme != "s3" or not url.netloc:
        raise ValueError(f"ESPALIER_STORE_URL must be file:///directory or s3://bucket/prefix, not '{settings.store_url}'")
    endpoint = settings.s3_endpoint
    return Store(_s3(settings, endpoint), signer=_s3(settings, settings.s3_public_endpoint or endpoint))


def _s3(settings: Settings, endpoint: str) -> S3Store:
    url = urlsplit(settings.store_url)
    client: ClientConfig = {"allow_http": endpoint.startswith("http://"), "connect_timeout": "5 seconds", "timeout": "60 seconds"}
    options: dict[str, str] = {}
    if endpoint:
        options["endpoint"] = endpoint
    if settings.s3_access_key.get_secret_value():
        options["access_key_id"] = settings.s3_access_key.get_secret_value()
        options["secret_access_key"] = settings.s3_secret_key.get_secret_value()
    return S3Store(
        url.netloc,
        prefix=url.path.strip("/") or None,
        region=settings.s3_region,
        virtual_hosted_style_request=not endpoint,
        client_options=client,
        retry_config=RETRIES,
        **options,  # type: ignore[arg-type]
    )


def _check(key: str) -> None:
    if len(key) > MAX_KEY_LENGTH or not KEY.fullmatch(key):
        raise ValueError(f"'{key[:100]}' is not a key of the object store")


@contextmanager
def _told() -> Iterator[None]:
    """Turn obstore's errors, which quote addresses and requests, into one that may be shown."""
    try:
        yield
    except BaseError as error:
        if FULL.search(str(error)):
            raise UnavailableError("The object store is full.", code="store_full", hint="Free space and try again.") from error
        raise UnavailableError("The object store does not answer.", code="store_unavailable", hint="Try again in a while.") from error
