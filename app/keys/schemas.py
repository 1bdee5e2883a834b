"""What the key endpoints take and give."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Self

from pydantic import AfterValidator, Field

from app import models
from app.auth import SCOPES, Scope
from app.queues.schemas import Out
from app.strict import Strict

DAY = 24 * 3600
MAX_LIFETIME = 3650 * DAY
MAX_OVERLAP = 7 * DAY


def _distinct(scopes: list[Scope]) -> list[Scope]:
    if len(set(scopes)) < len(scopes):
        raise ValueError("A scope may be named once")
    return scopes


Scopes = Annotated[list[Scope], AfterValidator(_distinct), Field(min_length=1, max_length=len(SCOPES), json_schema_extra={"uniqueItems": True})]


class KeyRequest(Strict):
    """A key that is to be made."""

    name: str = Field(min_length=1, max_length=200, pattern=r"^[^\x00]+$", description="What it is for.", examples=["nightly pruning"])
    scopes: Scopes = Field(description="What it may do; `admin` may do everything.", examples=[["jobs:read", "jobs:write"]])
    lifetime: int | None = Field(None, ge=60, le=MAX_LIFETIME, description="Seconds after which it expires; null: never.", examples=[90 * DAY])


class Rotation(Strict):
    """How a key is replaced."""

    overlap: int = Field(3600, ge=0, le=MAX_OVERLAP, description="Seconds for which the old key stays good; 0: it is revoked at once.", examples=[3600])


class Key(Out):
    """An API key, without its secret."""

    id: str = Field(description="Its id.", examples=["key_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])
    name: str = Field(description="What it is for.", examples=["nightly pruning"])
    scopes: list[Scope] = Field(description="What it may do.", examples=[["jobs:read", "jobs:write"]])
    created_at: datetime = Field(description="When it was made (UTC).", examples=["2026-11-22T01:02:03.456Z"])
    expires_at: datetime | None = Field(description="When it ends (UTC); null: never.", examples=["2027-02-20T01:02:03.456Z"])
    last_used_at: datetime | None = Field(
        description="When it was last used (UTC), to within a minute or two; null: never.", examples=["2026-11-22T08:00:03.456Z"]
    )


class NewKey(Key):
    """A key that was just made."""

    key: str = Field(description="The key itself, told this once: keep it now.", examples=["esp_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f_…"])

    @classmethod
    def of(cls, row: models.ApiKey, key: str) -> Self:
        return cls.model_validate({**{name: getattr(row, name) for name in Key.model_fields}, "key": key})


class KeyPage(Out):
    """Keys, newest first."""

    items: list[Key] = Field(description="The keys of this page.")
    next: str | None = Field(description="Give it as `cursor` for the next page; null on the last one.", examples=[None])
