"""The object store: a local directory or an S3 bucket, one code path on obstore.

An object is visible only once it is whole, on both: a local one is written beside its place and renamed, an S3 one appears when its upload completes.
What a killed upload leaves on S3 is not listed by obstore; a rule of the bucket (AbortIncompleteMultipartUpload) frees it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, S3Store

from app.exceptions import UnavailableError
from app.settings import Settings

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, RetryConfig

KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
FULL = re.compile(rf"os error ({errno.ENOSPC}|{errno.EDQUOT}|{errno.EFBIG})\b")
MAX_KEY_LENGTH = 1024  # S3's own limit
CHUNK_BYTES = 8 * 1024 * 1024  # a part of an upload, and one request of a download, so a slow reader holds no request open
PIECE_BYTES = 1024 * 1024  # what a download hands on at a time: a server copies it several times on its way to the socket
PARTS_AT_ONCE = 2  # of one upload
BUFFER_BYTES = 5 * 1024 * 1024  # the least that S3 takes as a part
PAGE = 1000  # objects, as many as S3 lists or deletes by one request
RETRIES: RetryConfig = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2},
}


@dataclass(frozen=True)
class Entry:
    """An object of a listing."""

    key: str
    bytes: int
    etag: str
    modified: datetime  # by the store's clock


class Store:
    """Objects under keys such as `tenant/jobs/job/a1/checkpoint/config.json`.

    Raises ValueError for a malformed key, FileNotFoundError for a missing object, UnavailableError when the store does not answer or is full.
    """

    def __init__(self, backend: LocalStore | S3Store, *, folder: Path | None = None, signer: S3Store | None = None) -> None:
        self._backend = backend
        self._folder = folder  # where the local store lies
        self._signer = signer  # knows the address under which clients reach S3

    def put_file(self, key: str, path: Path, *, create: bool = False, on_bytes: Callable[[int], None] = lambda _: None) -> tuple[int, str]:
        """Upload a file as a stream; its size in bytes and its sha256.

        create: write no object that is there already. If it holds the same bytes it is what an earlier try stored, and nothing is sent; if it holds others,
        another process writes here: UnavailableError `store_conflict`.
        on_bytes: hears how many more bytes are done.
        """
        _check(key)
        digest = hashlib.sha256()

        def chunks() -> Iterator[bytes]:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                    yield chunk
                    on_bytes(len(chunk))

        size = path.stat().st_size
        multipart = size > CHUNK_BYTES
        # obstore sends a conditional put in one piece, from memory, so that a large file is looked for beforehand. Its prefix has one writer all the same.
        if create and multipart and self._there(key):
            return self._same(key, path, on_bytes)
        try:
            with _told():
                if multipart:
                    put = obstore.put(self._backend, key, chunks(), use_multipart=True, chunk_size=CHUNK_BYTES, max_concurrency=PARTS_AT_ONCE)
                else:
                    put = obstore.put(self._backend, key, b"".join(chunks()), use_multipart=False, mode="create" if create else "overwrite")
        except AlreadyExistsError:
            return self._same(key, path, lambda _: None)
        with _told():
            stored = obstore.head(self._backend, key)
        if (stored["size"], stored["e_tag"]) != (size, put["e_tag"]):
            raise UnavailableError(f"The store does not hold '{key}' as it was sent.", code="store_incomplete", hint="Try again.")
        return size, digest.hexdigest()

    def _there(self, key: str) -> bool:
        try:
            self.size(key)
        except FileNotFoundError:
            return False
        return True

    def _same(self, key: str, path: Path, on_bytes: Callable[[int], None]) -> tuple[int, str]:
        """Size and sha256 of an object that holds the bytes of a file."""
        size, digest = self.size(key), hashlib.sha256()
        with path.open("rb") as file:
            local = hashlib.file_digest(file, "sha256")
        if size == path.stat().st_size:
            for chunk in self.get_range(key, 0, size):
                digest.update(chunk)
                on_bytes(len(chunk))
        if digest.digest() != local.digest():
            hint = "Another process writes to the store under the same name; try again."
            raise UnavailableError(f"The store has another '{key}' already.", code="store_conflict", hint=hint)
        return size, digest.hexdigest()

    async def put_stream(self, key: str, chunks: AsyncIterator[bytes]) -> None:
        """Upload chunks as they come, in the memory of `BUFFER_BYTES` whatever their number. Where one of them raises, nothing is stored."""
        _check(key)
        with _told():
            async with obstore.open_writer_async(self._backend, key, buffer_size=BUFFER_BYTES, max_concurrency=1) as writer:
                async for chunk in chunks:
                    await writer.write(chunk)

    def get_range(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` up to, without, `end`, in pieces."""
        _check(key)
        for begin in range(start, end, CHUNK_BYTES):
            with _told():
                chunk = memoryview(obstore.get_range(self._backend, key, start=begin, end=min(begin + CHUNK_BYTES, end)))
            for piece in range(0, len(chunk), PIECE_BYTES):
                yield bytes(chunk[piece : piece + PIECE_BYTES])

    def get_file(self, path: Path, *keys: str) -> str:
        """Download an object, or several one after another, into a file; its sha256."""
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for key in keys:
                for chunk in self.get_range(key, 0, self.size(key)):
                    digest.update(chunk)
                    file.write(chunk)
        return digest.hexdigest()

    def entries(self, prefix: str) -> list[Entry]:
        """Everything below `prefix`."""
        _check(prefix.removesuffix("/"))
        with _told():
            return [_entry(found) for page in obstore.list(self._backend, prefix) for found in page]

    def pages(self, prefix: str) -> Iterator[list[Entry]]:
        """Everything below `prefix`, a page at a time; of the local store half-written files too, whose keys have a `#`."""
        _check(prefix.removesuffix("/"))
        if self._folder is None:
            with _told():
                for page in obstore.list(self._backend, prefix, chunk_size=PAGE):
                    yield [_entry(found) for found in page]
        else:
            files = self._local_files(prefix)
            while entries := list(islice(files, PAGE)):
                yield entries

    def _local_files(self, prefix: str) -> Iterator[Entry]:
        assert self._folder is not None
        for folder, _, names in os.walk(self._folder / prefix):
            for name in names:
                path = Path(folder, name)
                with suppress(FileNotFoundError):  # renamed or deleted since
                    found = path.stat()
                    yield Entry(path.relative_to(self._folder).as_posix(), found.st_size, "", datetime.fromtimestamp(found.st_mtime, UTC))

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects that `pages` has listed; those that are gone already do no harm."""
        if self._folder is None:
            with _told():
                obstore.delete(self._backend, keys)
            return
        for key in keys:
            path = self._folder / key
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                for folder in path.relative_to(self._folder).parents[:-1]:
                    (self._folder / folder).rmdir()

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


def open_store(settings: Settings, *, patience_seconds: float = 0) -> Store:
    """The store at `store_url`: `file:///directory`, which is made if it is missing, or `s3://bucket/prefix`.

    patience_seconds: for how long each request to S3 is tried again, with growing pauses; 0: for some seconds, as a caller who waits for an answer needs it.
    """
    url = urlsplit(settings.store_url)
    if url.scheme == "file":
        folder = Path(unquote(url.path))
        folder.mkdir(parents=True, exist_ok=True)
        return Store(LocalStore(folder), folder=folder)
    if url.scheme != "s3" or not url.netloc:
        raise ValueError(f"ESPALIER_STORE_URL must be file:///directory or s3://bucket/prefix, not '{settings.store_url}'")
    endpoint = settings.s3_endpoint
    retries = RETRIES
    if patience_seconds:
        retries = RETRIES | {"max_retries": sys.maxsize, "retry_timeout": timedelta(seconds=patience_seconds)}
    return Store(_s3(settings, endpoint, retries), signer=_s3(settings, settings.s3_public_endpoint or endpoint, retries))


def _s3(settings: Settings, endpoint: str, retries: RetryConfig) -> S3Store:
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
        retry_config=retries,
        **options,  # type: ignore[arg-type]
    )


def is_key(key: str) -> bool:
    return len(key) <= MAX_KEY_LENGTH and KEY.fullmatch(key) is not None


def _check(key: str) -> None:
    if not is_key(key):
        raise ValueError(f"'{key[:100]}' is not a key of the object store")


def _entry(found: ObjectMeta) -> Entry:
    return Entry(found["path"], found["size"], found["e_tag"] or "", found["last_modified"])


@contextmanager
def _told() -> Iterator[None]:
    """Turn obstore's errors, which quote addresses and requests, into one that may be shown."""
    try:
        yield
    except AlreadyExistsError:
        raise
    except BaseError as error:
        if FULL.search(str(error)):
            raise UnavailableError("The object store is full.", code="store_full", hint="Free space and try again.") from error
        raise UnavailableError("The object store does not answer.", code="store_unavailable", hint="Try again in a while.") from error
