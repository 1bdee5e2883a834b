"""Uploaded checkpoints, as the service stores them, without HTTP."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from app.checkpoints import repository, service
from app.checkpoints.schemas import Declaration
from app.checkpoints.verifying import verify_next
from app.database import Database
from app.settings import Settings
from app.storage import Store
from espalier import uploading


def store_checkpoint(database: Database, store: Store, settings: Settings, tenant_id: str, folder: Path, *, verified: bool = True) -> str:
    """The id of a checkpoint whose parts have all come; verified: which a job may use."""
    declaration = Declaration.model_validate({"name": "tiny", "files": uploading.declare(folder)})
    with database.writing() as session:
        checkpoint = service.declare(session, tenant_id, declaration, settings)
        files = repository.list_files(session, checkpoint)
    part = folder.parent / "part"
    for file in files:
        for number in file.missing:
            begin = number * file.part_bytes
            content = (folder / file.path).read_bytes()[begin : begin + file.size(number)]
            part.write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            store.put_file(file.key(number, sha256), part)
            with database.writing() as session:
                service.add_part(session, file, number, sha256)
    with database.writing() as session:
        service.complete(session, tenant_id, checkpoint.id)
    if verified:
        assert verify_next(database, store, settings, threading.Event())
    return checkpoint.id
