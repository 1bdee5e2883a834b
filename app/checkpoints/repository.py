"""Every query on uploaded checkpoints, and the keys under which their parts are stored. What is not for all tenants names the tenant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, delete, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session
from uuid_utils import uuid7

from app.database import db_now
from app.models import FINISHED, Checkpoint, CheckpointFile, CheckpointPart, Job, Tenant

DAY = 24 * 3600
PART_KEY = re.compile(r"[^/]+/checkpoints/(?P<checkpoint>[^/]+)/(?P<path>.+)\.(?P<number>\d{5,})\.(?P<sha256>[0-9a-f]{64})")


@dataclass(frozen=True)
class StoredFile:
    """A file of a checkpoint, and the parts of it that the store holds."""

    checkpoint_id: str
    tenant_id: str
    path: str
    bytes: int
    sha256: str
    part_bytes: int
    parts: dict[int, str]  # number: sha256

    @property
    def count(self) -> int:
        """Of parts that it has when it is whole."""
        return -(-self.bytes // self.part_bytes)

    @cached_property
    def missing(self) -> list[int]:
        return [number for number in range(self.count) if number not in self.parts]

    @property
    def keys(self) -> list[str]:
        """Of its parts in the store, in order."""
        return [self.key(number, sha256) for number, sha256 in sorted(self.parts.items())]

    def key(self, number: int, sha256: str) -> str:
        """Names the content, so that no other content is ever written in its place."""
        return f"{prefix(self.tenant_id, self.checkpoint_id)}{self.path}.{number:05d}.{sha256}"

    def size(self, number: int) -> int:
        """Bytes of a part."""
        return min(self.part_bytes, self.bytes - number * self.part_bytes)


def prefix(tenant_id: str, checkpoint_id: str) -> str:
    """Where the parts of a checkpoint lie."""
    return f"{tenant_id}/checkpoints/{checkpoint_id}/"


# ---------------------------------------------------------------------- one tenant's


def insert_checkpoint(session: Session, tenant_id: str, name: str, part_bytes: int, files: Sequence[dict[str, Any]]) -> Checkpoint:
    """files: of each its path, bytes and sha256."""
    row = {"id": f"ckpt_{uuid7().hex}", "tenant_id": tenant_id, "name": name, "part_bytes": part_bytes, "bytes": sum(file["bytes"] for file in files)}
    checkpoint = session.scalars(insert(Checkpoint).values(row).returning(Checkpoint)).one()
    session.execute(insert(CheckpointFile), [file | {"checkpoint_id": checkpoint.id, "tenant_id": tenant_id} for file in files])
    return checkpoint


def find_checkpoint(session: Session, tenant_id: str, checkpoint_id: str) -> Checkpoint | None:
    return session.scalar(_of(tenant_id, checkpoint_id))


def hold_checkpoint(session: Session, tenant_id: str, checkpoint_id: str, *, alone: bool) -> Checkpoint | None:
    """A checkpoint that stays as it is until the transaction ends; alone: others that hold it wait."""
    return session.scalar(_of(tenant_id, checkpoint_id).with_for_update(read=not alone).execution_options(populate_existing=True))


def _of(tenant_id: str, checkpoint_id: str) -> Select[Checkpoint]:
    return select(Checkpoint).where(Checkpoint.id == checkpoint_id, Checkpoint.tenant_id == tenant_id)


def list_checkpoints(session: Session, tenant_id: str, states: Sequence[str], name: str | None, before: str | None, limit: int) -> Sequence[Checkpoint]:
    """Newest first, from the one before this id on."""
    query = select(Checkpoint).where(Checkpoint.tenant_id == tenant_id)
    if states:
        query = query.where(Checkpoint.state.in_(states))
    if name is not None:
        query = query.where(Checkpoint.name == name)
    if before is not None:
        query = query.where(Checkpoint.id < before)
    return session.scalars(query.order_by(Checkpoint.id.desc()).limit(limit)).all()


def list_files(session: Session, checkpoint: Checkpoint) -> list[StoredFile]:
    """By path."""
    files = session.scalars(select(CheckpointFile).where(CheckpointFile.checkpoint_id == checkpoint.id).order_by(CheckpointFile.path)).all()
    parts: dict[str, dict[int, str]] = {file.path: {} for file in files}
    columns = (CheckpointPart.path, CheckpointPart.number, CheckpointPart.sha256)
    for path, number, sha256 in session.execute(select(*columns).where(CheckpointPart.checkpoint_id == checkpoint.id)):
        parts[path][number] = sha256
    return [_stored(checkpoint, file, parts[file.path]) for file in files]


def find_file(session: Session, checkpoint: Checkpoint, path: str) -> StoredFile | None:
    """A file without its parts, of which there may be many."""
    file = session.get(CheckpointFile, (checkpoint.id, path))
    return None if file is None else _stored(checkpoint, file, {})


def _stored(checkpoint: Checkpoint, file: CheckpointFile, parts: dict[int, str]) -> StoredFile:
    return StoredFile(checkpoint.id, checkpoint.tenant_id, file.path, file.bytes, file.sha256, checkpoint.part_bytes, parts)


def insert_part(session: Session, file: StoredFile, number: int, sha256: str) -> str | None:
    """None, or the sha256 of the part that is there already."""
    of_file = {"checkpoint_id": file.checkpoint_id, "path": file.path, "number": number}
    row = of_file | {"tenant_id": file.tenant_id, "bytes": file.size(number), "sha256": sha256}
    into = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    if session.execute(into(CheckpointPart).values(row).on_conflict_do_nothing().returning(CheckpointPart.number)).one_or_none() is not None:
        return None
    return session.scalar(select(CheckpointPart.sha256).filter_by(**of_file))


def set_state(session: Session, checkpoint: Checkpoint, state: str, **values: Any) -> Checkpoint:
    """Write a checkpoint's state, which may be the one that it has, and when it changed."""
    changed = update(Checkpoint).where(Checkpoint.id == checkpoint.id, Checkpoint.tenant_id == checkpoint.tenant_id)
    changed = changed.values({"state": state, "updated_at": db_now()} | values)
    return session.scalars(changed.returning(Checkpoint), execution_options={"populate_existing": True}).one()


def delete_checkpoint(session: Session, checkpoint: Checkpoint) -> None:
    session.execute(delete(Checkpoint).where(Checkpoint.id == checkpoint.id, Checkpoint.tenant_id == checkpoint.tenant_id))


def find_user(session: Session, checkpoint: Checkpoint) -> str | None:
    """A job that goes on and needs the checkpoint."""
    goes_on = Job.state.not_in(FINISHED)
    return session.scalar(select(Job.id).where(Job.tenant_id == checkpoint.tenant_id, Job.model == checkpoint.id, goes_on).limit(1))


def count_bytes(session: Session, tenant_id: str) -> tuple[int, int | None]:
    """Bytes of a tenant's checkpoints, those that are still to come too, and as many as it may have, if it has a bound of its own."""
    taken = select(func.coalesce(func.sum(Checkpoint.bytes), 0)).where(Checkpoint.tenant_id == tenant_id, Checkpoint.state != "failed").scalar_subquery()
    row = session.execute(select(taken, Tenant.max_stored_bytes).where(Tenant.id == tenant_id)).one()
    return int(row[0]), row[1]


# ----------------------------------------------------------- of whatever tenant


def claim_unverified(session: Session, lease_seconds: float) -> Checkpoint | None:
    """The checkpoint that has waited longest to be verified, and that no living process verifies."""
    free = and_(Checkpoint.state == "verifying", or_(Checkpoint.lease_until.is_(None), Checkpoint.lease_until < db_now()))
    longest = select(Checkpoint.id).where(free).order_by(Checkpoint.updated_at).limit(1).with_for_update(skip_locked=True)
    claimed = update(Checkpoint).where(Checkpoint.id == longest.scalar_subquery()).values(lease_until=db_now(lease_seconds))
    return session.scalar(claimed.returning(Checkpoint), execution_options={"synchronize_session": False})


def renew_lease(session: Session, checkpoint: Checkpoint, seconds: float) -> None:
    session.execute(update(Checkpoint).where(Checkpoint.id == checkpoint.id).values(lease_until=db_now(seconds)))


def conclude(session: Session, checkpoint: Checkpoint, *, sha256: str | None, error: dict[str, str] | None) -> bool:
    """End the verification; whether it was this one that ended it."""
    values = {"state": "ready" if error is None else "failed", "sha256": sha256, "error": error, "updated_at": db_now(), "completed_at": db_now()}
    ended = update(Checkpoint).where(Checkpoint.id == checkpoint.id, Checkpoint.state == "verifying").values(values | {"lease_until": None})
    return session.scalar(ended.returning(Checkpoint.id), execution_options={"synchronize_session": False}) is not None


def give_up(session: Session, days: float, limit: int) -> list[str]:
    """Delete up to `limit` uploads that came to nothing and have rested for so long; the prefixes under which their parts lie."""
    rests = and_(Checkpoint.state.in_(("uploading", "failed")), Checkpoint.updated_at < db_now(-days * DAY))
    resting = select(Checkpoint.id).where(rests).limit(limit).with_for_update(skip_locked=True)
    gone = delete(Checkpoint).where(Checkpoint.id.in_(resting)).returning(Checkpoint.tenant_id, Checkpoint.id)
    return [prefix(*row) for row in session.execute(gone, execution_options={"synchronize_session": False})]


def find_orphans(session: Session, keys: Sequence[str]) -> list[str]:
    """Those of some stored files that are no part of a checkpoint, or of one that failed."""
    matches = {key: PART_KEY.fullmatch(key) for key in keys}
    ids = {match["checkpoint"] for match in matches.values() if match is not None}
    columns = (CheckpointPart.checkpoint_id, CheckpointPart.path, CheckpointPart.number, CheckpointPart.sha256)
    used: ColumnElement[bool] = and_(Checkpoint.id == CheckpointPart.checkpoint_id, Checkpoint.state != "failed")
    parts = {tuple(row) for row in session.execute(select(*columns).join(Checkpoint, used).where(Checkpoint.id.in_(ids)))}
    return [key for key, match in matches.items() if match is None or (match["checkpoint"], match["path"], int(match["number"]), match["sha256"]) not in parts]
