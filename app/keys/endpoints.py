"""`/v1/keys`: make, list, rotate and revoke the keys of one's tenant."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Response

from app.auth import Admin, OpenKeys
from app.dependencies import OpenDatabase
from app.keys import service
from app.keys.schemas import Key, KeyPage, KeyRequest, NewKey, Rotation
from app.problems import declared

KEY_ID = re.compile(r"key_[0-9a-f]{32}")
LOCATION = {"description": "The key's path.", "schema": {"type": "string"}}
CACHE_CONTROL = {"description": "`no-store`: the answer holds a secret.", "schema": {"type": "string"}}
NEW_KEY: dict[int | str, dict[str, Any]] = {201: {"headers": {"Location": LOCATION, "Cache-Control": CACHE_CONTROL}}}

router = APIRouter(prefix="/v1/keys", tags=["keys"], responses=declared(401, 403, 422))


async def _key_id(key_id: Annotated[str, Path(description="The key's id.", examples=["key_0193d5f0c1d57a3c8d4e0a1b2c3d4e5f"])]) -> str:
    if not KEY_ID.fullmatch(key_id):
        raise service.no_key(key_id)
    return key_id


KeyId = Annotated[str, Depends(_key_id)]


@router.post("", status_code=201, responses={**NEW_KEY, **declared(400, 413, 415)})
def create_key(request: KeyRequest, caller: Admin, database: OpenDatabase, response: Response) -> NewKey:
    """Make a key. The key itself is told this once."""
    with database.writing() as session:
        row, key = service.create(session, caller, request)
    return _new_key(NewKey.of(row, key), response)


@router.get("", responses=declared(400))
def list_keys(
    caller: Admin,
    database: OpenDatabase,
    cursor: Annotated[str | None, Query(max_length=1024, description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Most items of a page.")] = 20,
) -> KeyPage:
    """List the keys that were not revoked, newest first."""
    with database.reading() as session:
        keys, following = service.list_keys(session, caller.tenant_id, cursor, limit)
    return KeyPage(items=[Key.model_validate(key) for key in keys], next=following)


@router.get("/{key_id}", responses=declared(404))
def get_key(caller: Admin, key_id: KeyId, database: OpenDatabase) -> Key:
    """One key that was not revoked."""
    with database.reading() as session:
        return Key.model_validate(service.get(session, caller.tenant_id, key_id))


@router.delete("/{key_id}", status_code=204, responses=declared(404, 409))
def revoke_key(caller: Admin, key_id: KeyId, database: OpenDatabase, keys: OpenKeys) -> None:
    """Revoke a key: at once in this process, within seconds in the others. The last key with the scope `admin` can't be revoked."""
    with database.writing() as session:
        service.revoke(session, caller, key_id)
    keys.forget(key_id)


@router.post("/{key_id}/rotate", status_code=201, responses={**NEW_KEY, **declared(400, 404, 409, 413, 415)})
def rotate_key(caller: Admin, key_id: KeyId, rotation: Rotation, database: OpenDatabase, keys: OpenKeys, response: Response) -> NewKey:
    """Make a key with the same name, scopes and lifetime. The old one stays good for a while, so that its users can change over."""
    with database.writing() as session:
        row, key = service.rotate(session, caller, key_id, rotation.overlap)
    keys.forget(key_id)
    return _new_key(NewKey.of(row, key), response)


def _new_key(key: NewKey, response: Response) -> NewKey:
    response.headers.update({"Location": f"/v1/keys/{key.id}", "Cache-Control": "no-store"})
    return key
