"""Verifies uploads that are complete: every file is read back and hashed, then looked at as a job's model is. One at a time in each process of the API.

A lease on the row keeps other processes from the same work; that of a killed process runs out, and another begins anew. Two that verify the same come to the
same end, so nothing more is needed.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence

import structlog

from app.checkpoints import repository
from app.checkpoints.repository import StoredFile
from app.checkpoints.service import manifest_sha256
from app.checkpoints.skeleton import skeleton
from app.database import Database
from app.exceptions import RecipeError
from app.models import Checkpoint
from app.settings import Settings
from app.source import read_source
from app.storage import Store, open_store

log = structlog.get_logger(__name__)


def keep_verifying(database: Database, settings: Settings, stopping: threading.Event) -> None:
    """Verify what waits, now and every `sweep_seconds`, until `stopping` is set."""
    store = open_store(settings)
    while not stopping.is_set():
        try:
            while verify_next(database, store, settings, stopping):
                pass
        except Exception:  # whatever a driver or the store raises, the next round tries again
            log.exception("verifying failed")
        stopping.wait(settings.sweep_seconds)


def verify_next(database: Database, store: Store, settings: Settings, stopping: threading.Event) -> bool:
    """Verify one checkpoint; False where none waits, or `stopping` was set."""
    with database.writing() as session:
        checkpoint = repository.claim_unverified(session, settings.lease_seconds)
        files = [] if checkpoint is None else repository.list_files(session, checkpoint)
    if checkpoint is None:
        return False
    try:
        error = find_damage(store, checkpoint, files, _beating(database, checkpoint, settings, stopping))
    except InterruptedError:
        with database.writing() as session:
            repository.renew_lease(session, checkpoint, 0)
        return False
    with database.writing() as session:
        ended = repository.conclude(session, checkpoint, sha256=manifest_sha256(files) if error is None else None, error=error)
    if ended and error is not None:
        store.delete_prefix(repository.prefix(checkpoint.tenant_id, checkpoint.id))
    log.info("checkpoint verified", checkpoint_id=checkpoint.id, tenant_id=checkpoint.tenant_id, bytes=checkpoint.bytes, error=error)
    return True


def _beating(database: Database, checkpoint: Checkpoint, settings: Settings, stopping: threading.Event) -> Callable[[], None]:
    """To be called with every chunk: renews the lease from time to time. Raises InterruptedError once `stopping` is set."""
    renewed_at = time.monotonic()

    def beat() -> None:
        nonlocal renewed_at
        if stopping.is_set():
            raise InterruptedError
        if time.monotonic() - renewed_at >= settings.beat_seconds:
            renewed_at = time.monotonic()
            with database.writing() as session:
                repository.renew_lease(session, checkpoint, settings.lease_seconds)

    return beat


def find_damage(store: Store, checkpoint: Checkpoint, files: Sequence[StoredFile], beat: Callable[[], None]) -> dict[str, str] | None:
    """Why the checkpoint can't be used, if so. `beat` is called with every chunk."""
    for file in files:
        digest = hashlib.sha256()
        try:
            for number, key in enumerate(file.keys):
                for chunk in store.get_range(key, 0, file.size(number)):
                    beat()
                    digest.update(chunk)
        except FileNotFoundError:
            digest = hashlib.sha256()
        if digest.hexdigest() != file.sha256:
            message = f"'{file.path}' is not what was declared: its sha256 is another."
            return {"code": "checkpoint_damaged", "message": message, "hint": "Hash the file again, and upload it anew."}
    try:
        with skeleton(store, checkpoint.name, files) as folder:
            read_source(folder)
    except RecipeError as error:
        return {"code": error.code, "message": error.message, "hint": error.hint}
    return None
