"""What endpoints are given: the parts that `create_app` opened."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from app.database import Database
from app.settings import Settings
from app.storage import Store


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


async def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


Configuration = Annotated[Settings, Depends(_settings)]
OpenDatabase = Annotated[Database, Depends(_database)]
OpenStore = Annotated[Store, Depends(_store)]
