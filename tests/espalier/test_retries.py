"""What is sent again after a failure, and what never is."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from espalier.client import Client
from espalier.errors import ApiError, UnreachableError
from espalier.sending import Call, Outage, pause_before_try, retry_after, worth_another_try
from tests.espalier.conftest import MODEL, Service
from tests.espalier.proxy import Proxy, proxy

READ, ONCE, KEYED = Call[Any]("GET", "/"), Call[Any]("POST", "/"), Call[Any]("POST", "/", headers={"Idempotency-Key": "1"})
LOST = httpx.ReadError("cut")
REFUSED = httpx.ConnectError("refused")


@pytest.mark.parametrize(
    ("call", "failure", "again"),
    [
        (READ, LOST, True),
        (KEYED, LOST, True),
        (ONCE, LOST, False),  # the service may have acted on it
        (ONCE, REFUSED, True),  # it never left
        (ONCE, ApiError(429, {}), True),
        (ONCE, ApiError(503, {}), False),
        (KEYED, ApiError(503, {}), True),
        (READ, ApiError(502, {}), True),
        (READ, ApiError(500, {}), False),
        (READ, ApiError(404, {}), False),
        (KEYED, ApiError(409, {"code": "job_finished"}), False),
        (KEYED, ApiError(409, {"code": "idempotency_key_in_flight"}), True),
        (Call[Any]("GET", "/", params={"wait": 30}), ApiError(503, {"code": "too_many_streams"}), False),
        (READ, ApiError(503, {"code": "too_many_streams"}), True),
    ],
)
def test_what_is_worth_another_try(call: Call[Any], failure: httpx.TransportError | ApiError, again: bool) -> None:
    assert worth_another_try(call, failure) is again


def test_pauses_grow_and_never_undercut_the_service() -> None:
    assert [pause_before_try(tries, None, 1.0) for tries in (1, 2, 3, 10)] == [0.25, 0.5, 1.0, 8.0]
    assert [pause_before_try(tries, None, 0.0) for tries in (1, 2, 10)] == [0.125, 0.25, 4.0]
    assert pause_before_try(1, 5.0, 0.0) > 5.0
    assert retry_after(httpx.Response(429, headers={"Retry-After": "7"})) == 7
    assert retry_after(httpx.Response(429, headers={"Retry-After": "99999"})) == 60
    assert retry_after(httpx.Response(429, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})) is None


def test_an_outage_ends_with_its_patience() -> None:
    error = UnreachableError("gone")
    assert Outage(60).pause(error) <= 0.25
    with pytest.raises(UnreachableError):
        Outage(60).pause(error, after=60)


class Forgetful(Proxy):
    """Passes requests on and loses the first so many answers."""

    def __init__(self, port: int, losses: int) -> None:
        super().__init__(("127.0.0.1", port))
        self.losses = losses

    def _forward(self, client: Any) -> None:
        self.cut_after = 1 if self.losses > 0 else None
        self.losses -= 1
        super()._forward(client)


def test_a_submission_whose_answer_is_lost_makes_one_job(service: Service) -> None:
    network = Forgetful(service.port, 2)
    network.open()
    try:
        with service.client(network.url) as client:
            job = client.submit(MODEL, "cfsp", 0.2)
    finally:
        network.close()
    assert sum(piece.startswith(b"POST ") for piece in network.requests) == 3
    with service.client() as client:
        assert [each["id"] for each in client.jobs()] == [job["id"]]


def test_a_deletion_whose_answer_is_lost_is_done(service: Service) -> None:
    job_id = service.job_with({})
    network = Forgetful(service.port, 1)
    network.open()
    try:
        with service.client(network.url) as client:
            client.delete(job_id)
    finally:
        network.close()
    with service.client() as client, pytest.raises(ApiError):
        client.get(job_id)


def test_a_key_whose_answer_is_lost_is_not_made_twice(service: Service) -> None:
    network = Forgetful(service.port, 1)
    network.open()
    try:
        with service.client(network.url) as client, pytest.raises(UnreachableError):
            client.create_key("CI", ["jobs:read"])
    finally:
        network.close()
    with service.client() as client:
        assert len([key for key in client.keys() if key["name"] == "CI"]) == 1  # noqa: SIM118  no dict


def test_a_call_survives_a_short_outage(service: Service) -> None:
    with proxy(service.port) as network:
        network.cut_after = 0
        with Client(network.url, service.key, patience=0.3) as client, pytest.raises(UnreachableError):
            list(client.jobs())
        assert len(network.requests) > 1
