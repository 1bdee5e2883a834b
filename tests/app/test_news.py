"""Those who wait for news of a job: long polls and event streams, at a real server."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import make_url

from app.jobs import news as news_module
from app.jobs import repository
from app.jobs.lease import Lease, beat, claim, finish
from app.jobs.news import KEPT_EVENTS, News, stream
from app.models import JobEvent
from tests import jobs
from tests.app.conftest import RECIPE
from tests.app.serving import Server, serving
from tests.servers import fresh_database

STREAMS = 500
SPARE_STREAMS = 2
Said = dict[str, str]


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    settings = {"max_streams": str(STREAMS + SPARE_STREAMS), "rate_read": "", "rate_write": "", "rate_read_tenant": "", "rate_write_tenant": ""}
    if request.param == "sqlite":
        with serving(f"sqlite:///{home}/espalier.db", home, **settings) as server:
            yield server
    else:
        with fresh_database(request.getfixturevalue("postgres_url")) as url, serving(url, home, **settings) as server:
            yield server


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def submit(client: httpx.Client) -> str:
    return str(client.post("/v1/jobs", json=RECIPE).raise_for_status().json()["id"])


def start(server: Server, job_id: str) -> Lease:
    with server.database.writing() as session:
        lease = claim(session, job_id, "test", 600)
    assert lease is not None
    return lease


def say(server: Server, lease: Lease, message: str) -> None:
    with server.database.writing() as session:
        repository.add_event(session, lease.job_id, lease.tenant_id, "log", message)


def fail(server: Server, lease: Lease) -> None:
    with server.database.writing() as session:
        finish(session, lease, "failed", error={"code": "disk_full", "message": "The disk is full.", "hint": ""})


def listen(client: httpx.Client, job_id: str, query: str = "", **headers: str) -> Iterator[Said]:
    """What a stream says, field by field; comments are left out."""
    with client.stream("GET", f"/v1/jobs/{job_id}/events{query}", headers={"Accept": "text/event-stream"} | headers) as answer:
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        said: Said = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                said[name] = value
            elif said:
                if said.keys() > {"event"}:
                    yield said
                said = {}


# -------------------------------------------------------------------- streams


def test_a_stream_brings_what_was_and_what_comes_and_ends(server: Server, client: httpx.Client) -> None:
    job_id = submit(client)
    lease = start(server, job_id)
    events = listen(client, job_id)
    first = [next(events), next(events)]
    assert [(said["id"], said["event"]) for said in first] == [("1", "queued"), ("2", "claimed")]
    for number in range(3):
        say(server, lease, f"line {number}\nand more")
        assert next(events)["id"] == str(number + 3)
    fail(server, lease)
    last = list(events)
    assert [(said.get("id"), said["event"]) for said in last] == [("6", "failed"), (None, "end")]
    assert json.loads(last[-1]["data"]) == {"state": "failed"}
    page = client.get(f"/v1/jobs/{job_id}/events").json()["items"]
    replayed = list(listen(client, job_id))
    assert [json.loads(said["data"]) for said in replayed[:-1]] == page
    assert [said.get("id") for said in listen(client, job_id, "?after=4")] == ["5", "6", None]
    assert [said.get("id") for said in listen(client, job_id, "?after=1", **{"Last-Event-ID": "5"})] == ["6", None]
    assert [said["event"] for said in listen(client, job_id, "?after=6")] == ["end"]
    assert [said["event"] for said in listen(client, job_id, f"?after={2**31 - 1}")] == ["end"]


def test_a_stream_that_is_cut_goes_on_without_a_gap_or_a_double(server: Server, client: httpx.Client) -> None:
    """The writer is faster than the reader, who is cut at random; more happens at once than is kept for those who follow."""
    job_id = submit(client)
    lease = start(server, job_id)
    most = 4 * KEPT_EVENTS

    def write() -> None:
        draw = random.Random(1)
        written = 2
        while written < most:
            with server.database.writing() as session:
                for _ in range(draw.choice((1, 1, 1, 3, KEPT_EVENTS + 20))):
                    written = repository.add_event(session, job_id, lease.tenant_id, "log", "line")
            time.sleep(draw.uniform(0, 0.2))
        fail(server, lease)

    writer = threading.Thread(target=write)
    writer.start()
    draw = random.Random(0)
    numbers: list[int] = []
    ended = cuts = 0
    while not ended:
        last = {"Last-Event-ID": str(numbers[-1])} if numbers else {}
        patience = draw.randint(1, 60)
        for said in listen(client, job_id, **last):
            if said["event"] == "end":
                ended = 1
                break
            numbers.append(int(said["id"]))
            patience -= 1
            if not patience:
                cuts += 1
                break
    writer.join()
    page = client.get(f"/v1/jobs/{job_id}").json()
    assert page["state"] == "failed"
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > most
    assert cuts > 5


def test_a_stream_of_no_job_of_the_tenant_is_refused(server: Server, client: httpx.Client) -> None:
    headers = {"Accept": "text/event-stream"}
    assert client.get(f"/v1/jobs/job_{'0' * 32}/events", headers=headers).json()["code"] == "job_not_found"
    for number in ("-1", "x", str(2**31)):
        refused = client.get(f"/v1/jobs/{submit(client)}/events", headers=headers | {"Last-Event-ID": number})
        assert (refused.status_code, refused.json()["errors"][0]["parameter"]) == (422, "Last-Event-ID")


def test_a_stream_of_a_job_that_is_deleted_closes(server: Server, client: httpx.Client) -> None:
    job_id = submit(client)
    client.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()
    client.post(f"/v1/jobs/{job_id}/retry").raise_for_status()
    events = listen(client, job_id)
    assert [next(events)["event"] for _ in range(3)] == ["queued", "cancelled", "retried"]
    with server.client() as other:
        lease = start(server, job_id)
        fail(server, lease)
        assert other.delete(f"/v1/jobs/{job_id}").status_code == 204
    assert [said["event"] for said in events] in ([], ["claimed"], ["claimed", "failed"], ["claimed", "failed", "end"]), "as far as it saw before"
    assert client.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}).status_code == 404


async def open_stream(server: Server, job_id: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    head = f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\nAccept: text/event-stream\r\n\r\n"
    writer.write(head.encode())
    return reader, writer


@pytest.mark.parametrize("server", ["postgres"], indirect=True)
def test_500_streams_hold_no_connection_and_all_hear_of_an_event(server: Server, client: httpx.Client) -> None:
    watched = [start(server, submit(client)) for _ in range(5)]

    async def measure() -> dict[str, Any]:
        began = time.perf_counter()
        streams = [await open_stream(server, watched[number % 5].job_id) for number in range(STREAMS)]
        for reader, _ in streams:
            assert b"event: claimed" in await asyncio.wait_for(reader.readuntil(b"event: claimed"), 60)
        opened = time.perf_counter() - began
        full = [await open_stream(server, watched[0].job_id) for _ in range(SPARE_STREAMS + 1)]
        heads = [await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60) for reader, _ in full]
        refused = [head for head in heads if b"503" in head.splitlines()[0]]
        connections = [await asyncio.to_thread(backends, server) for _ in range(20)]
        waits = time.perf_counter()
        answered = await asyncio.to_thread(client.get, "/v1/jobs?limit=1")
        waits = time.perf_counter() - waits
        told = time.perf_counter()
        for lease in watched:
            await asyncio.to_thread(say, server, lease, "the news")
        delays = await asyncio.gather(*[hear(reader, told) for reader, _ in streams])
        for _, writer in streams + full:
            writer.close()
        return {"opened": opened, "refused": refused, "backends": connections, "answered": answered, "waits": waits, "delays": delays}

    async def hear(reader: asyncio.StreamReader, told: float) -> float:
        await asyncio.wait_for(reader.readuntil(b"the news"), 60)
        return time.perf_counter() - told

    found = asyncio.run(measure())
    print(f"opened in {found['opened']:.1f} s, all told within {max(found['delays']):.2f} s, a list meanwhile took {found['waits'] * 1000:.0f} ms")  # noqa: T201
    assert len(found["refused"]) == 1
    assert b"retry-after" in found["refused"][0].lower()
    assert max(working for working, _ in found["backends"]) < 10, "what the poller and the dispatcher do at a moment"
    assert max(opened for _, opened in found["backends"]) < 40
    assert found["answered"].status_code == 200
    assert max(found["delays"]) < 45
    # The server closes them all, one after the other: as many may be opened again.
    jobs.wait_until(lambda: is_open(client, watched[0].job_id), 60, "room for a stream")


def is_open(client: httpx.Client, job_id: str) -> bool:
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}) as answer:
        return answer.status_code == 200


def backends(server: Server) -> tuple[int, int]:
    """The server's connections to the database that are in use, and all of them."""
    url = make_url(server.database.engine.url.render_as_string(hide_password=False)).set(drivername="postgresql")
    with psycopg.connect(url.render_as_string(hide_password=False)) as connection:
        counted = "count(*) FILTER (WHERE state <> 'idle' AND pid <> pg_backend_pid()), count(*)"
        row = connection.execute(f"SELECT {counted} FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend'").fetchone()
    assert row is not None
    return row[0], row[1]


def test_the_server_stops_while_streams_and_long_polls_are_open(tmp_path: Path) -> None:
    with (
        serving(f"sqlite:///{tmp_path}/espalier.db", tmp_path, metrics_token="token") as server,
        server.client() as client,
        ThreadPoolExecutor(2) as pool,
    ):
        job_id = submit(client)
        stream = pool.submit(list, listen(client, job_id))
        poll = pool.submit(client.get, f"/v1/jobs/{job_id}?wait=60")

        def all_there() -> bool:
            told = client.get("/metrics", headers={"Authorization": "Bearer token"}).text
            return "espalier_http_requests_in_flight 3.0" in told.splitlines()  # and this one

        jobs.wait_until(all_there, 60, "both requests")
        time.sleep(1)
        assert not stream.done()
        assert not poll.done()
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert [said["event"] for said in stream.result(60)] == ["queued"]
        assert poll.result(60).json()["state"] == "queued"
        server.process.wait(60)
        assert time.monotonic() - began < 40


# ----------------------------------------------------------------- long polls


def test_a_long_poll_answers_at_the_first_change(server: Server, client: httpx.Client) -> None:
    job_id = submit(client)
    etag = client.get(f"/v1/jobs/{job_id}").headers["ETag"]
    with ThreadPoolExecutor(1) as pool, server.client() as other:
        waiting = pool.submit(other.get, f"/v1/jobs/{job_id}?wait=60", headers={"If-None-Match": etag})
        time.sleep(1)
        assert not waiting.done()
        lease = start(server, job_id)
        began = time.monotonic()
        changed = waiting.result(60)
        assert time.monotonic() - began < 30
        assert (changed.status_code, changed.json()["state"]) == (200, "running")
        assert changed.headers["ETag"] != etag
        assert client.get(f"/v1/jobs/{job_id}?wait=60", headers={"If-None-Match": etag}).json()["state"] == "running", "it has changed already"

        waiting = pool.submit(other.get, f"/v1/jobs/{job_id}?wait=60")
        time.sleep(1)
        with server.database.writing() as session:
            beat(session, lease, 600, phase="prune")
        time.sleep(1)
        assert not waiting.done(), "without If-None-Match it waits for the end"
        fail(server, lease)
        assert waiting.result(60).json()["state"] == "failed"
    ended = client.get(f"/v1/jobs/{job_id}?wait=60")
    assert ended.json()["state"] == "failed"


def test_a_long_poll_ends_with_its_time(server: Server, client: httpx.Client) -> None:
    job_id = submit(client)
    etag = client.get(f"/v1/jobs/{job_id}").headers["ETag"]
    for headers, status in (({"If-None-Match": etag}, 304), ({}, 200)):
        began = time.monotonic()
        answer = client.get(f"/v1/jobs/{job_id}?wait=1", headers=headers)
        assert (answer.status_code, answer.headers["ETag"]) == (status, etag)
        assert 0.9 < time.monotonic() - began < 30
    for wait in ("-1", "61", "1.5", "x"):
        refused = client.get(f"/v1/jobs/{job_id}?wait={wait}")
        assert (refused.status_code, refused.json()["errors"][0]["parameter"]) == (422, "wait")
    assert client.get(f"/v1/jobs/job_{'0' * 32}?wait=60").status_code == 404


# ------------------------------------------------------------ without a server


def read_stream(database: Any, job_id: str, authorized: Callable[[], bool], seconds: float) -> list[bytes]:
    """What a stream sends within so many seconds, or until it ends."""

    async def read() -> list[bytes]:
        chunks: list[bytes] = []
        news = News(database, 1)

        def page(after: int) -> list[JobEvent]:
            with database.reading() as session:
                return list(repository.list_events(session, jobs.TENANT, job_id, after, 100))

        async def collect() -> None:
            async with news.told():
                with news.watch(job_id) as watched:
                    async for chunk in stream(news, watched, page, authorized, 0):
                        chunks.append(chunk)  # noqa: PERF401  those until the time is over count

        try:
            await asyncio.wait_for(collect(), seconds)
        except TimeoutError:
            chunks.append(b"goes on")
        return chunks

    return asyncio.run(read())


def test_a_stream_ends_when_its_key_is_revoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news_module, "AUTHORIZE_SECONDS", 0.5)
    monkeypatch.setattr(news_module, "KEEP_ALIVE_SECONDS", 0.2)
    database = jobs.open_database(f"sqlite:///{tmp_path}/espalier.db")
    job_id = jobs.submit(database)
    asked: list[float] = []

    def authorized() -> bool:
        asked.append(time.monotonic())
        return len(asked) < 3

    said = read_stream(database, job_id, authorized, 60)
    assert b"event: queued" in said[1]
    assert said[2:] == [b": ping\n\n"] * len(said[2:])
    assert len(asked) == 3
    assert all(later - earlier >= 0.5 for earlier, later in pairwise(asked))
    assert read_stream(database, job_id, lambda: True, 2)[-1] == b"goes on"
    database.dispose()
