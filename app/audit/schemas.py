"""What is told of the audit log."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field

from app.queues.schemas import Out


class Entry(Out):
    """A call that changed something."""

    id: int = Field(description="A number that grows with time, with gaps.", examples=[4711])
    action: str = Field(description="What was done.", examples=["job.submit"])
    target: str = Field(description="The id of what it was done to.", examples=["job_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])
    key_id: str = Field(description="Whose key it was; `operator`: it was done by hand on the server.", examples=["key_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])
    request_id: str = Field(description="The request, by which the service's logs name it; empty where there was none.", examples=["0193d5f0c1d57a3c8d4e0a1b"])
    data: dict[str, Any] = Field(description="More about it; its fields depend on the action.", examples=[{}])
    created_at: datetime = Field(description="When it was done (UTC).", examples=["2026-11-22T01:02:03.456Z"])


class EntryPage(Out):
    """Entries, newest first."""

    items: list[Entry] = Field(description="The entries of this page.")
    next: str | None = Field(description="Give it as `cursor`, with the same filters, for the next page; null on the last one.", examples=[None])
