"""The history of the database schema. `python -m migrations` brings the database of the settings to the newest revision."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from app.database import make_engine


def migrate(url: str, revision: str = "head") -> None:
    """Bring the database at `url` up to `revision`, in one transaction; waits for another process that does the same."""
    _run(url, command.upgrade, revision)


def unmigrate(url: str, revision: str) -> None:
    """Bring the database at `url` back down to `revision` ("base": to nothing)."""
    _run(url, command.downgrade, revision)


def is_at_head(connection: Connection) -> bool:
    """Whether the schema is that of this release, or of a later one, which is made so that this one works with it too."""
    revision = MigrationContext.configure(connection).get_current_revision()
    return revision == head() or (revision is not None and revision not in _known())


@lru_cache
def head() -> str | None:
    return ScriptDirectory.from_config(_config()).get_current_head()


@lru_cache
def _known() -> frozenset[str]:
    return frozenset(script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    return config


def _run(url: str, step: object, revision: str) -> None:
    assert callable(step)
    engine = make_engine(url)
    try:
        with engine.begin() as connection:
            config = _config()
            config.attributes["connection"] = connection
            step(config, revision)
    finally:
        engine.dispose()
