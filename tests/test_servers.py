"""The servers that the other tests stand on."""

from __future__ import annotations

import obstore
import psycopg
import pytest
import redis
from obstore.store import S3Store

from tests.servers import S3, postgres


def test_a_fresh_database_is_empty(postgres_database: str) -> None:
    with psycopg.connect(postgres_database) as connection:
        row = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
        assert row == (0,)


def test_postgres_keeps_its_rows_over_a_restart() -> None:
    with postgres() as (url, server):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
        server.stop()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url, connect_timeout=2)
        server.start()
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT n FROM kept").fetchone() == (7,)


def test_valkey_answers(redis_database: str) -> None:
    with redis.Redis.from_url(redis_database) as client:
        assert client.dbsize() == 0
        assert client.set("a", "b")


def test_s3_takes_and_gives_with_the_right_keys_only(s3: S3) -> None:
    def store(secret: str) -> S3Store:
        return S3Store(
            s3.bucket,
            endpoint=s3.endpoint,
            access_key_id=s3.access_key,
            secret_access_key=secret,
            region=s3.region,
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )

    obstore.put(store(s3.secret_key), "folder/file", b"content")
    assert bytes(obstore.get(store(s3.secret_key), "folder/file").bytes()) == b"content"
    with pytest.raises(Exception, match=r"SignatureDoesNotMatch|403"):
        obstore.get(store("wrong"), "folder/file")
