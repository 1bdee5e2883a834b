"""A part on its way from the request to the store: counted and hashed, and nothing of it passed on before its beginning has been looked at."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory

from anyio.to_thread import run_sync
from starlette.requests import ClientDisconnect

from app.checkpoints.repository import StoredFile
from app.checkpoints.skeleton import header_end, write_beginning
from app.exceptions import RecipeError, UploadError
from app.source import read_config, read_header

MAX_HEADER_BYTES = 4 * 2**20  # of a safetensors file, some 30 000 tensors; it is read into memory
CHUNK_BYTES = 2**20  # that are given to the store at once


async def received(stream: AsyncIterator[bytes], file: StoredFile, number: int, sha256: str) -> AsyncIterator[bytes]:
    """The bytes of a part. Raises UploadError at the latest at their end, where they are not those that were announced or the file is not taken."""
    digest, size, held = hashlib.sha256(), 0, bytearray()
    looked_at = number > 0
    try:
        async for chunk in stream:
            digest.update(chunk)
            size += len(chunk)
            held += chunk
            if not looked_at:
                looked_at = await _look_at(file, held)
            if looked_at and len(held) >= CHUNK_BYTES:
                yield bytes(held)
                held.clear()
    except ClientDisconnect:
        raise UploadError("The connection was cut.", code="part_cut", hint="Send the part again.") from None
    if size != file.size(number) or digest.hexdigest() != sha256:
        raise UploadError(
            f"Part {number} of '{file.path}' came as {size} bytes with sha256 {digest.hexdigest()}, not as Content-Digest says.",
            code="part_damaged",
            hint="Send the part again.",
        )
    yield bytes(held)


async def _look_at(file: StoredFile, beginning: bytearray) -> bool:
    """Whether enough of the file has come to tell that it is taken. Raises UploadError."""
    if file.path == "config.json":
        end = file.bytes
    elif not file.path.endswith(".safetensors"):
        return True
    elif len(beginning) < min(8, file.bytes):
        return False
    else:
        end = min(header_end(bytes(beginning[:8])), file.bytes)
        if end > (most := min(MAX_HEADER_BYTES, file.size(0))):
            raise UploadError(
                f"The header of '{file.path}' has more than {most} bytes.", code="header_too_large", hint="Save the model in smaller files (max_shard_size)."
            )
    if len(beginning) < end:
        return False
    await run_sync(_check, file, bytes(beginning[:end]))
    return True


def _check(file: StoredFile, beginning: bytes) -> None:
    with TemporaryDirectory() as parent:
        path = Path(parent, file.checkpoint_id, Path(file.path).name)  # errors quote the folder
        path.parent.mkdir()
        write_beginning(path, beginning, file.bytes)
        try:
            read_header(path) if file.path.endswith(".safetensors") else read_config(path.parent)
        except RecipeError as error:
            raise UploadError(error.message, code=error.code, hint=error.hint) from None
