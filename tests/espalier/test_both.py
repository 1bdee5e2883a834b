"""The blocking and the async client: one text, the same answers."""

from __future__ import annotations

import asyncio
import inspect
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from espalier.both import Iteration, Operation
from espalier.client import AsyncClient, Client, Operations
from espalier.errors import ApiError
from espalier.transfers import Transfers
from tests.espalier.conftest import Service
from tests.espalier.proxy import proxy

FILES = {"checkpoint/config.json": b"{}", "checkpoint/model.safetensors": random.Random(0).randbytes(2_000_000)}


def test_everything_public_is_of_both() -> None:
    public = {name: member for kind in (Operations, Transfers) for name, member in vars(kind).items() if not name.startswith("_")}
    assert len(public) > 30
    for name, member in public.items():
        assert isinstance(member, Operation | Iteration), name


def test_async_calls_give_what_blocking_ones_do(service: Service) -> None:
    job_id = service.submit()
    with service.client() as client:
        blocking = [client.get(job_id), list(client.jobs()), list(client.events(job_id)), client.methods(), client.queues(), client.usage()]

    async def ask() -> list[object]:
        async with service.async_client() as client:
            listed = [job async for job in client.jobs()], [event async for event in client.events(job_id)]
            return [await client.get(job_id), *listed, *await asyncio.gather(client.methods(), client.queues(), client.usage())]

    assert asyncio.run(ask()) == blocking
    with pytest.raises(ApiError):
        asyncio.run(_get(service, "job_x"))


async def _get(service: Service, job_id: str) -> None:
    async with service.async_client() as client:
        await client.get(job_id)


def test_many_async_waits_take_one_wait(service: Service) -> None:
    jobs = [service.submit() for _ in range(8)]

    def fail() -> None:
        for job_id in jobs:
            service.fail(service.start(job_id))

    timer = threading.Timer(1, fail)
    timer.start()

    async def wait() -> list[str]:
        async with service.async_client() as client:
            return [job["state"] for job in await asyncio.gather(*(client.wait(job_id) for job_id in jobs))]

    assert asyncio.run(wait()) == ["failed"] * 8
    timer.join()


def test_async_download_through_cuts(service: Service, tmp_path: Path) -> None:
    job_id = service.job_with(FILES)

    async def fetch(url: str) -> None:
        async with service.async_client(url) as client:
            await client.download(job_id, tmp_path)

    with proxy(service.port) as network:
        network.cut_after = 900_000
        asyncio.run(fetch(network.url))
        assert len(network.requests) > 3
    assert {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == FILES


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_a_stream_that_is_cut_loses_and_doubles_nothing(service: Service, kind: str) -> None:
    job_id = service.submit()
    lease = service.start(job_id)
    for number in range(40):
        service.tell(lease, f"phase {number}", number / 50)
    ending = threading.Timer(2, service.fail, (lease,))
    ending.start()

    def blocking(client: Client) -> Iterator[int]:
        for event in client.stream(job_id):
            yield event["sequence"]

    async def awaiting(client: AsyncClient) -> list[int]:
        async with client:
            return [event["sequence"] async for event in client.stream(job_id)]

    with proxy(service.port) as network:
        network.cut_after = 3000
        if kind == "blocking":
            with service.client(network.url) as client:
                seen = list(blocking(client))
        else:
            seen = asyncio.run(awaiting(service.async_client(network.url)))
        assert len(network.requests) > 2
    ending.join()
    assert seen == list(range(1, 44))


def test_a_stream_may_be_left(service: Service) -> None:
    job_id = service.submit()
    with service.client() as client:
        for event in client.stream(job_id):
            assert event["kind"] == "queued"
            break
        assert client.cancel(job_id)["state"] == "cancelled"
        assert [event["kind"] for event in client.stream(job_id, after=1)][-1] == "cancelled"


def test_methods_tell_what_they_do() -> None:
    assert "on_progress" in (inspect.getdoc(Client.wait) or "")
