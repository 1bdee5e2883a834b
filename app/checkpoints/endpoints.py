"""`/v1/checkpoints`: upload a model that is to be pruned, in parts that can be sent again, and use it as a job's `model`."""

from __future__ import annotations

import base64
import re
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from sqlalchemy.orm import Session

from app import audit
from app.auth import Caller, CheckpointWriter
from app.checkpoints import repository, service
from app.checkpoints.receiving import received
from app.checkpoints.repository import StoredFile
from app.checkpoints.schemas import FILE_PATH, NAME, Checkpoint, CheckpointPage, CheckpointSummary, Declaration, Part, State
from app.database import Database
from app.dependencies import Configuration, OpenDatabase, OpenStore
from app.exceptions import EspalierError, LengthError, UploadError
from app.idempotency import REPLAYED, Answer, MayBeAsked, answer_once
from app.problems import declared
from app.settings import MAX_PART_BYTES
from app.source import CHECKPOINT_ID

POLL_SECONDS = 2
MAX_PARTS = 2**31 - 1
ID_PATTERN = f"^{CHECKPOINT_ID.pattern}$"
DIGEST = re.compile(r"sha-256=:([A-Za-z0-9+/]{43}=):")

router = APIRouter(prefix="/v1/checkpoints", tags=["checkpoints"], responses=declared(401, 403, 422, 429))


async def _checkpoint_id(checkpoint_id: Annotated[str, Path(description="The checkpoint's id.", examples=["ckpt_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])]) -> str:
    if not CHECKPOINT_ID.fullmatch(checkpoint_id):
        raise service.no_checkpoint(checkpoint_id)
    return checkpoint_id


CheckpointId = Annotated[str, Depends(_checkpoint_id)]
RETRY_AFTER = {"description": "Seconds after which to look again, while it is verified.", "schema": {"type": "integer"}}
LOCATION = {"description": "The checkpoint's path.", "schema": {"type": "string"}}
FIRST_PART = {"checkpoint_id": "$response.body#/id", "path": "$response.body#/files/0/path", "number": "$response.body#/files/0/missing/0"}
LINK_TO_FIRST_PART = {"put_part": {"operationId": "put_part", "parameters": FIRST_PART}}
PART_BODY: dict[str, Any] = {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


@router.post(
    "",
    status_code=201,
    response_model=Checkpoint,
    responses={201: {"headers": {"Location": LOCATION, "Idempotency-Replayed": REPLAYED}, "links": LINK_TO_FIRST_PART}, **declared(400, 409, 413, 415)},
)
def declare_checkpoint(declaration: Declaration, asked: MayBeAsked, caller: CheckpointWriter, database: OpenDatabase, settings: Configuration) -> Response:
    """Begin an upload: say which files will come. Only safetensors, configuration and tokenizer are taken; what can run code is refused by its name."""

    def declare(session: Session) -> Answer:
        checkpoint = service.declare(session, caller.tenant_id, declaration, settings)
        audit.record(session, caller, "checkpoint.declare", checkpoint.id, name=checkpoint.name, bytes=checkpoint.bytes)
        body = Checkpoint.of(checkpoint, repository.list_files(session, checkpoint)).model_dump_json()
        return Answer(201, body, {"Location": f"/v1/checkpoints/{checkpoint.id}"})

    return answer_once(database, caller.tenant_id, asked, declare)


@router.get("")
def list_checkpoints(
    caller: CheckpointWriter,
    database: OpenDatabase,
    state: Annotated[list[State] | None, Query(description="Only checkpoints in this state; may be given again.")] = None,
    name: Annotated[str | None, Query(pattern=NAME, description="Only checkpoints of this name.")] = None,
    cursor: Annotated[str | None, Query(pattern=ID_PATTERN, description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Most items of a page.")] = 20,
) -> CheckpointPage:
    """List checkpoints, newest first. What is declared meanwhile changes no later page."""
    with database.reading() as session:
        checkpoints, following = service.list_checkpoints(session, caller.tenant_id, state or (), name, cursor, limit)
    return CheckpointPage(items=[CheckpointSummary.model_validate(checkpoint) for checkpoint in checkpoints], next=following)


@router.get("/{checkpoint_id}", responses={200: {"headers": {"Retry-After": RETRY_AFTER}}, **declared(404)})
def get_uploaded_checkpoint(caller: CheckpointWriter, checkpoint_id: CheckpointId, database: OpenDatabase, response: Response) -> Checkpoint:
    """One checkpoint, and while it is uploaded the parts that are missing."""
    with database.reading() as session:
        checkpoint = service.get_checkpoint(session, caller.tenant_id, checkpoint_id)
        files = repository.list_files(session, checkpoint)
    if checkpoint.state == "verifying":
        response.headers["Retry-After"] = str(POLL_SECONDS)
    return Checkpoint.of(checkpoint, files)


@router.put(
    "/{checkpoint_id}/files/{path:path}/parts/{number}",
    status_code=201,
    max_body_size=MAX_PART_BYTES,
    responses={200: {"model": Part, "description": "It had come before."}, **declared(404, 409, 411, 413)},
    openapi_extra={"requestBody": PART_BODY},
)
async def put_part(
    caller: CheckpointWriter,
    checkpoint_id: CheckpointId,
    path: Annotated[str, Path(pattern=FILE_PATH, max_length=200, description="The file's path, as declared.", examples=["model.safetensors"])],
    number: Annotated[int, Path(ge=0, le=MAX_PARTS, description="0, 1, … within the file.", examples=[0])],
    digest: Annotated[
        str,
        Header(
            alias="Content-Digest",
            pattern=f"^{DIGEST.pattern}$",
            description="The sha256 of the body, in base64 (RFC 9530).",
            examples=["sha-256=:n4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg=:"],
        ),
    ],
    database: OpenDatabase,
    store: OpenStore,
    request: Request,
    response: Response,
) -> Part:
    """Send a part of a file as raw bytes. Sent again with the same bytes it changes nothing. The header of a safetensors file, and config.json, are looked
    at before anything is stored; a file that can't be pruned ends here."""
    sha256 = _sha256_of(digest)
    file = await run_sync(_find_part, database, caller, checkpoint_id, path, number)
    size = file.size(number)
    _check_length(request, size)
    key = file.key(number, sha256)
    await store.put_stream(key, received(request.stream(), file, number, sha256))
    try:
        is_new = await run_sync(_add_part, database, caller, file, number, sha256)
    except EspalierError:  # other bytes came at the same moment, or the upload has ended
        await run_sync(_drop_part, database, store, key)
        raise
    response.status_code = 201 if is_new else 200
    return Part(number=number, bytes=size, sha256=sha256)


@router.post("/{checkpoint_id}/complete", status_code=202, responses={202: {"headers": {"Retry-After": RETRY_AFTER}}, **declared(404, 409)})
def complete_checkpoint(caller: CheckpointWriter, checkpoint_id: CheckpointId, database: OpenDatabase, response: Response) -> Checkpoint:
    """Have the files verified, once all parts have come; the state tells the outcome. Asking again changes nothing."""
    with database.writing() as session:
        checkpoint = service.complete(session, caller.tenant_id, checkpoint_id)
        audit.record(session, caller, "checkpoint.complete", checkpoint_id)
        files = repository.list_files(session, checkpoint)
    response.headers["Retry-After"] = str(POLL_SECONDS)
    return Checkpoint.of(checkpoint, files)


@router.delete("/{checkpoint_id}", status_code=204, responses=declared(404, 409))
def delete_checkpoint(caller: CheckpointWriter, checkpoint_id: CheckpointId, database: OpenDatabase, store: OpenStore) -> None:
    """Delete a checkpoint and its files, or end its upload. A checkpoint that a queued or running job needs stays."""
    with database.writing() as session:
        prefix = service.delete(session, caller.tenant_id, checkpoint_id)
        audit.record(session, caller, "checkpoint.delete", checkpoint_id)
    store.delete_prefix(prefix)


def _sha256_of(digest: str) -> str:
    found = DIGEST.fullmatch(digest)
    assert found is not None
    return base64.b64decode(found[1]).hex()


def _check_length(request: Request, size: int) -> None:
    length = request.headers.get("content-length")
    if length is None:
        raise LengthError("The request does not tell the length of its body.", code="length_required", hint="Send Content-Length, not a chunked body.")
    if length != str(size):
        raise UploadError(f"The part has {size} bytes, and {length[:20]} are announced.", code="part_size_wrong", hint="See `part_bytes` of the checkpoint.")


def _find_part(database: Database, caller: Caller, checkpoint_id: str, path: str, number: int) -> StoredFile:
    with database.reading() as session:
        return service.find_part(session, caller.tenant_id, checkpoint_id, path, number)


def _add_part(database: Database, caller: Caller, file: StoredFile, number: int, sha256: str) -> bool:
    with database.writing() as session:
        is_new = service.add_part(session, file, number, sha256)
        if is_new:
            audit.record(session, caller, "checkpoint.part", file.checkpoint_id, path=file.path, number=number)
    return is_new


def _drop_part(database: Database, store: OpenStore, key: str) -> None:
    """Delete a part that no row tells of; where this fails, the sweep finds it."""
    with database.reading() as session:
        orphans = repository.find_orphans(session, [key])
    if orphans:
        store.delete(orphans)
