"""What can be done with uploaded checkpoints, apart from HTTP. Raises the errors of `app.exceptions`; the caller commits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import PurePosixPath

from sqlalchemy.orm import Session

from app.checkpoints import repository
from app.checkpoints.repository import StoredFile
from app.checkpoints.schemas import Declaration, DeclaredFile
from app.exceptions import ConflictError, NotFoundError, QuotaError, RecipeError, UploadError
from app.models import Checkpoint
from app.settings import Settings
from app.source import INDEX, TOKENIZER_FILES

KINDS = (".safetensors", ".json", ".txt", ".model", ".jinja")
CODE = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle", ".npy", ".npz", ".py", ".so", ".h5", ".keras")  # what runs code when it is loaded, or can
MOST_BYTES = {"config.json": 2**16, "tokenizer_config.json": 2**24, INDEX: 2**24}  # of the files that are read whole
RETRY_SECONDS = 3600  # after an upload that was one too many


# -------------------------------------------------------------------- declare


def declare(session: Session, tenant_id: str, declaration: Declaration, settings: Settings) -> Checkpoint:
    """Begin an upload. Raises UploadError for files that are not taken, QuotaError where they are more than the tenant may store; requests at the same
    moment may exceed that by what they declare."""
    _check_files(declaration.files)
    total = sum(file.bytes for file in declaration.files)
    if total > settings.max_checkpoint_bytes:
        raise UploadError(
            f"The checkpoint has {total} bytes, and this service takes {settings.max_checkpoint_bytes}.",
            code="checkpoint_too_large",
            hint="Upload a smaller model, or let the operator raise ESPALIER_MAX_CHECKPOINT_BYTES.",
            pointer="/files",
        )
    taken, bound = repository.count_bytes(session, tenant_id)
    bound = settings.max_stored_bytes if bound is None else bound
    if bound and taken + total > bound:
        error = QuotaError(
            f"The tenant's checkpoints take {taken} bytes, of {bound} that it may store, and this one has {total}.",
            code="too_much_stored",
            hint="Delete a checkpoint that is no longer needed.",
        )
        error.headers = {"Retry-After": str(RETRY_SECONDS)}
        raise error
    return repository.insert_checkpoint(session, tenant_id, declaration.name, settings.upload_part_bytes, [file.model_dump() for file in declaration.files])


def _check_files(files: Sequence[DeclaredFile]) -> None:
    seen = set()
    for position, file in enumerate(files):
        if file.path in seen:
            raise UploadError(f"'{file.path}' is declared twice.", code="path_twice", hint="Declare each file once.", pointer=f"/files/{position}/path")
        seen.add(file.path)
        _check_kind(file, f"/files/{position}")
    lacks = [
        ("config_missing", "config.json", "config.json" in seen),
        ("weights_missing", "safetensors weights", any(path.endswith(".safetensors") and "/" not in path for path in seen)),
        ("tokenizer_missing", f"tokenizer ({', '.join(TOKENIZER_FILES)})", any(name in seen for name in TOKENIZER_FILES)),
    ]
    for code, what, there in lacks:
        if not there:
            raise UploadError(f"No {what} is declared.", code=code, hint="Upload the folder that save_pretrained wrote, with the tokenizer.", pointer="/files")


def _check_kind(file: DeclaredFile, pointer: str) -> None:
    suffix = PurePosixPath(file.path).suffix.lower()
    if suffix in CODE:
        raise UploadError(
            f"'{file.path}' is refused: {suffix} files can run code when they are loaded.",
            code="file_unsafe",
            hint="Store the weights as safetensors, and leave out code.",
            pointer=f"{pointer}/path",
        )
    if suffix not in KINDS:
        raise UploadError(
            f"'{file.path}' is refused: nothing here reads it.", code="file_kind_refused", hint=f"Taken are {', '.join(KINDS)}.", pointer=f"{pointer}/path"
        )
    most = MOST_BYTES.get(file.path)
    if most is not None and file.bytes > most:
        raise UploadError(f"{file.path} has {file.bytes} bytes, and {most} are taken.", code="file_too_large", hint="Save the model again.", pointer=pointer)


# --------------------------------------------------------------------- upload


def find_part(session: Session, tenant_id: str, checkpoint_id: str, path: str, number: int) -> StoredFile:
    """The file that a part is of, if the part may come now."""
    checkpoint = get_checkpoint(session, tenant_id, checkpoint_id)
    file = repository.find_file(session, checkpoint, path)
    if file is None:
        raise NotFoundError(f"The checkpoint has no file '{path[:200]}'.", code="file_not_found", hint="Its files are those that were declared.")
    if number >= file.count:
        raise NotFoundError(
            f"'{path}' has no part {number}: its {file.bytes} bytes are {file.count} parts of {file.part_bytes}, from 0 on.",
            code="part_not_found",
            hint="`missing` tells which parts are wanted.",
        )
    if checkpoint.state != "uploading":
        raise _not_uploading(checkpoint)
    return file


def add_part(session: Session, file: StoredFile, number: int, sha256: str) -> bool:
    """Note a part that has been stored; False where it was noted before. Raises ConflictError where other bytes were, or the upload is over."""
    checkpoint = repository.hold_checkpoint(session, file.tenant_id, file.checkpoint_id, alone=True)
    if checkpoint is None:
        raise no_checkpoint(file.checkpoint_id)
    if checkpoint.state != "uploading":
        raise _not_uploading(checkpoint)
    there = repository.insert_part(session, file, number, sha256)
    if there not in (None, sha256):
        raise ConflictError(
            f"Part {number} of '{file.path}' has come before, with other bytes.",
            code="part_differs",
            hint="Hash the file again; if it has changed, declare a new checkpoint.",
        )
    repository.set_state(session, checkpoint, "uploading")
    return there is None


def complete(session: Session, tenant_id: str, checkpoint_id: str) -> Checkpoint:
    """Have an upload verified; asking again changes nothing. Raises ConflictError where a part is missing."""
    checkpoint = repository.hold_checkpoint(session, tenant_id, checkpoint_id, alone=True)
    if checkpoint is None:
        raise no_checkpoint(checkpoint_id)
    if checkpoint.state in ("verifying", "ready"):
        return checkpoint
    if checkpoint.state != "uploading":
        raise _not_uploading(checkpoint)
    for file in repository.list_files(session, checkpoint):
        if file.missing:
            raise ConflictError(
                f"Part {file.missing[0]} of '{file.path}' has not come.",
                code="checkpoint_incomplete",
                hint="Send the parts that `missing` names, then complete.",
            )
    return repository.set_state(session, checkpoint, "verifying")


def _not_uploading(checkpoint: Checkpoint) -> ConflictError:
    hint = "Declare a new checkpoint." if checkpoint.state == "failed" else "All its parts have come; nothing is left to send."
    return ConflictError(f"The checkpoint is {checkpoint.state}.", code="checkpoint_not_uploading", hint=hint)


# ------------------------------------------------------------------------ use


def get_checkpoint(session: Session, tenant_id: str, checkpoint_id: str) -> Checkpoint:
    checkpoint = repository.find_checkpoint(session, tenant_id, checkpoint_id)
    if checkpoint is None:
        raise no_checkpoint(checkpoint_id)
    return checkpoint


def no_checkpoint(checkpoint_id: str) -> NotFoundError:
    return NotFoundError(f"There is no checkpoint {checkpoint_id[:100]}.", code="checkpoint_not_found", hint="List checkpoints with GET /v1/checkpoints.")


def list_checkpoints(
    session: Session, tenant_id: str, states: Sequence[str], name: str | None, cursor: str | None, limit: int
) -> tuple[Sequence[Checkpoint], str | None]:
    """A page of checkpoints, newest first, and the cursor of the next page."""
    checkpoints = repository.list_checkpoints(session, tenant_id, states, name, cursor, limit + 1)
    return checkpoints[:limit], checkpoints[limit - 1].id if len(checkpoints) > limit else None


def delete(session: Session, tenant_id: str, checkpoint_id: str) -> str:
    """Delete a checkpoint that no job needs any more; the prefix under which its parts lie, to be deleted after the commit."""
    checkpoint = repository.hold_checkpoint(session, tenant_id, checkpoint_id, alone=True)
    if checkpoint is None:
        raise no_checkpoint(checkpoint_id)
    user = repository.find_user(session, checkpoint)
    if user is not None:
        raise ConflictError(f"{user} has not finished and needs the checkpoint.", code="checkpoint_in_use", hint="Wait for its end, or cancel it.")
    repository.delete_checkpoint(session, checkpoint)
    return repository.prefix(tenant_id, checkpoint_id)


def get_ready(session: Session, tenant_id: str, checkpoint_id: str) -> Checkpoint:
    """A checkpoint that a job may name as its model, which stays until the transaction ends. Raises RecipeError."""
    checkpoint = repository.hold_checkpoint(session, tenant_id, checkpoint_id, alone=False)
    if checkpoint is None:
        hint = "Upload it, or list the checkpoints that there are with GET /v1/checkpoints."
        raise RecipeError(f"There is no checkpoint {checkpoint_id}.", code="checkpoint_not_found", hint=hint, pointer="/model")
    if checkpoint.state != "ready":
        hints = {"uploading": "Send its parts and complete it.", "verifying": "Submit the job again in a while.", "failed": "Upload it again."}
        raise RecipeError(f"The checkpoint is {checkpoint.state}.", code="checkpoint_not_ready", hint=hints[checkpoint.state], pointer="/model")
    return checkpoint


def manifest_sha256(files: Sequence[StoredFile]) -> str:
    """Names the content of a checkpoint: a hash of its files' paths, sizes and hashes."""
    return hashlib.sha256(json.dumps({file.path: (file.bytes, file.sha256) for file in files}, sort_keys=True).encode()).hexdigest()
