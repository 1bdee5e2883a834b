"""`/v1/audit`: who changed what."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from app.audit import repository
from app.audit.repository import AuditFilter
from app.audit.schemas import Entry, EntryPage
from app.auth import Admin
from app.dependencies import OpenDatabase
from app.paging import make_cursor, no_cursor, read_cursor
from app.problems import declared
from app.strict import Time

MAX_DIGITS = 18  # of an entry's number

router = APIRouter(prefix="/v1/audit", tags=["audit"], responses=declared(401, 403, 422))
Text = Annotated[str | None, Query(max_length=200, pattern=r"^[^\x00]*$")]


@router.get("", responses=declared(400))
def list_audit(
    caller: Admin,
    database: OpenDatabase,
    action: Annotated[Text, Query(description="Only this action, e.g. `job.submit`.")] = None,
    target: Annotated[Text, Query(description="Only what was done to this id.")] = None,
    key_id: Annotated[Text, Query(description="Only what was done with this key, named by its id, or by `operator`.")] = None,
    created_after: Annotated[Time | None, Query(description="Only entries of this moment (RFC 3339) or later.")] = None,
    created_before: Annotated[Time | None, Query(description="Only entries from before this moment (RFC 3339).")] = None,
    cursor: Annotated[str | None, Query(max_length=1024, description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Most items of a page.")] = 20,
) -> EntryPage:
    """List the calls that changed something, newest first. What is done meanwhile changes no later page."""
    wanted = AuditFilter(action, target, key_id, created_after, created_before)
    before = None if cursor is None else read_cursor(cursor, wanted)
    if before is not None and not (before.isdecimal() and before.isascii() and len(before) <= MAX_DIGITS):
        raise no_cursor()
    with database.reading() as session:
        entries = repository.list_entries(session, caller.tenant_id, wanted, None if before is None else int(before), limit + 1)
    following = make_cursor(str(entries[limit - 1].id), wanted) if len(entries) > limit else None
    return EntryPage(items=[Entry.model_validate(entry) for entry in entries[:limit]], next=following)
