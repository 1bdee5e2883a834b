"""The schema by its migrations is the schema of the models, up, down and up again, on both databases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from app.database import Base, make_engine
from app.models import Job
from migrations import head, is_at_head, migrate, unmigrate

assert Job.metadata is Base.metadata


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/empty.db" if request.param == "sqlite" else str(request.getfixturevalue("postgres_database"))


def test_up_down_up(empty_url: str) -> None:
    engine = make_engine(empty_url)
    for _ in range(2):
        migrate(empty_url)
        with engine.connect() as connection:
            assert is_at_head(connection)
            assert set(inspect(connection).get_table_names()) == {*Base.metadata.tables, "alembic_version"}
        unmigrate(empty_url, "base")
        with engine.connect() as connection:
            assert not is_at_head(connection)
            assert inspect(connection).get_table_names() == ["alembic_version"]
    engine.dispose()


def test_the_migrated_schema_is_that_of_the_models(empty_url: str) -> None:
    migrate(empty_url)
    engine = make_engine(empty_url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), Base.metadata) == []
        found = inspect(connection)
        for name, table in Base.metadata.tables.items():
            assert found.get_pk_constraint(name)["name"] == f"pk_{name}"
            assert {key["name"] for key in found.get_foreign_keys(name)} == {str(key.name) for key in table.foreign_key_constraints}
        assert [check["name"] for check in found.get_check_constraints("jobs")] == ["ck_jobs_state"]
    engine.dispose()


def test_processes_that_migrate_at_once_wait_for_each_other(empty_url: str, tmp_path: Path) -> None:
    environment = {"ESPALIER_DATABASE_URL": empty_url}
    processes = [subprocess.Popen([sys.executable, "-m", "migrations"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE) for _ in range(3)]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()
    engine = make_engine(empty_url)
    with engine.connect() as connection:
        assert is_at_head(connection)
        assert connection.execute(text("SELECT count(*) FROM alembic_version")).scalar() == 1
    engine.dispose()


def test_a_migration_that_fails_leaves_nothing(empty_url: str) -> None:
    engine = make_engine(empty_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE artifacts (id INTEGER)"))  # the last table of the first migration
    with pytest.raises(Exception, match="already exists"):
        migrate(empty_url)
    with engine.connect() as connection:
        assert inspect(connection).get_table_names() == ["artifacts"]
    engine.dispose()


def test_the_command_finds_the_migrations_from_anywhere(tmp_path: Path) -> None:
    environment = {"ESPALIER_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-m", "migrations"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    engine = make_engine(f"sqlite:///{tmp_path}/home/espalier.db")
    with engine.connect() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == head()
    engine.dispose()
