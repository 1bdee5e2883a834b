"""The audit log: every call that changed something, written in the transaction of the change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from app.database import Base
from app.logging import id_of_request
from app.models import AuditEntry

if TYPE_CHECKING:
    from app.auth import Caller  # which writes entries itself

ENTRIES = Base.metadata.tables[AuditEntry.__tablename__]


def record(session: Session, caller: Caller, action: str, target: str, **data: Any) -> None:
    """Tell that the caller did something, e.g. `job.submit`, to the target, an id; `data` says more and holds no secrets."""
    entry = {"tenant_id": caller.tenant_id, "key_id": caller.key_id, "action": action, "target": target, "request_id": id_of_request(), "data": data}
    session.execute(insert(ENTRIES), entry)
