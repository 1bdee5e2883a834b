"""Engine, sessions and the database's own clock, the same on SQLite and Postgres."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, DateTime, Dialect, Engine, Float, MetaData, create_engine, event
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ColumnElement
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.visitors import InternalTraversal
from sqlalchemy.types import TypeDecorator

TRUSTED_SECONDS = 1.0  # for which a connection that was in use is taken to be alive

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)


Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime: timestamptz on Postgres, ISO text on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive datetime can't be stored: give it a time zone")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


class db_now(ColumnElement[datetime]):  # noqa: N801  reads as a SQL function
    """The database's clock, moved by a number of seconds. All lease arithmetic uses it, so a worker's wrong clock changes nothing."""

    type = UtcDateTime()
    _traverse_internals = [("plus_seconds", InternalTraversal.dp_plain_obj)]  # noqa: RUF012  typed so by SQLAlchemy; part of the key under which a statement is compiled once

    def __init__(self, plus_seconds: float = 0) -> None:
        self.plus_seconds = float(plus_seconds)


@compiles(db_now, "postgresql")
def _now_postgres(element: db_now, compiler: SQLCompiler, **kwargs: Any) -> str:
    return f"(clock_timestamp() + interval '{element.plus_seconds:.3f} seconds')"


@compiles(db_now, "sqlite")
def _now_sqlite(element: db_now, compiler: SQLCompiler, **kwargs: Any) -> str:
    # The format in which SQLAlchemy stores a DateTime, so that text comparison is time comparison.
    return f"(strftime('%Y-%m-%d %H:%M:%f000', 'now', '{element.plus_seconds:+.3f} seconds'))"


class seconds_between(FunctionElement[float]):  # noqa: N801  reads as a SQL function
    """The seconds from one moment to a later one."""

    type = Float()
    inherit_cache = True


@compiles(seconds_between, "postgresql")
def _between_postgres(element: seconds_between, compiler: SQLCompiler, **kwargs: Any) -> str:
    start, end = (compiler.process(moment, **kwargs) for moment in element.clauses)
    return f"extract(epoch FROM {end} - {start})"


@compiles(seconds_between, "sqlite")
def _between_sqlite(element: seconds_between, compiler: SQLCompiler, **kwargs: Any) -> str:
    start, end = (compiler.process(moment, **kwargs) for moment in element.clauses)
    return f"((julianday({end}) - julianday({start})) * 86400)"


def make_engine(url: str) -> Engine:
    """An engine for `sqlite:///path` or `postgresql://…`; a missing SQLite directory is made."""
    if make_url(url).get_backend_name() != "sqlite":
        # A process that was stopped in the middle of a transaction must not keep its locks from the others for ever.
        options = {"connect_timeout": 5, "tcp_user_timeout": 15_000, "options": "-c idle_in_transaction_session_timeout=60s"}
        return _checked(create_engine(url, pool_size=10, max_overflow=20, pool_timeout=5, connect_args=options))
    database = make_url(url).database
    if database:
        Path(database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": 15, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A deferred transaction that turns into a writer fails at once instead of waiting, so a writer takes the lock at its start.
        reads = connection.get_execution_options().get("reads_only", False)
        connection.exec_driver_sql("BEGIN DEFERRED" if reads else "BEGIN IMMEDIATE")

    return engine


def _checked(engine: Engine) -> Engine:
    """Have the server answer on a connection that has rested before it is used again. `pool_pre_ping` asks every time, which a short query pays for twice."""

    @event.listens_for(engine, "checkin")
    def _note(connection: Any, record: ConnectionPoolEntry) -> None:
        record.info["rests_since"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _ask(connection: Any, record: ConnectionPoolEntry, proxy: Any) -> None:
        if time.monotonic() - record.info.get("rests_since", -math.inf) < TRUSTED_SECONDS:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error  # the pool makes others

    return engine


class Database:
    """Sessions of one engine: `reading()` takes no write lock and sees with each query what is committed then, `writing()` commits at its end.

    `writing_at_once()` is for what is written by a single statement: on Postgres each of its statements is a transaction of its own, which saves the round trips
    of one around it.
    """

    def __init__(self, url: str) -> None:
        self.engine = make_engine(url)
        self._writers = sessionmaker(self.engine, expire_on_commit=False)
        alone = {"isolation_level": "AUTOCOMMIT"} if self.engine.dialect.name == "postgresql" else {}  # no BEGIN and ROLLBACK around a query
        self._readers = sessionmaker(self.engine.execution_options(reads_only=True, **alone), expire_on_commit=False)
        self._writers_at_once = sessionmaker(self.engine.execution_options(**alone), expire_on_commit=False)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        with self._readers() as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        with self._writers.begin() as session:
            yield session

    @contextmanager
    def writing_at_once(self) -> Iterator[Session]:
        with self._writers_at_once.begin() as session:
            yield session

    def dispose(self) -> None:
        self.engine.dispose()
