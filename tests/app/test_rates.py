"""How often a key, a tenant and an address may call; in one process and in several that share a Redis, and without the Redis that they should share."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from fastapi import Request

from app import rates
from app.auth import client_network
from app.settings import Settings
from tests.app.conftest import RECIPE, Api, serving
from tests.app.running import running
from tests.servers import free_port, valkey

NOBODY = "esp_" + "0" * 32 + "_" + "A" * 43


@pytest.fixture
def url(sqlite_template: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'service.db')}"


def test_a_key_may_call_so_often(url: str, roots: Path, tmp_path: Path) -> None:
    with serving(tmp_path, url, roots, rate_read="3/day", rate_write="1/day", rate_read_tenant="") as api:
        answers = [api.get("/v1/methods") for _ in range(5)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
        assert [answer.headers["RateLimit"].partition(";t=")[0] for answer in answers] == [f'"key";r={left}' for left in (2, 1, 0, 0, 0)]
        assert {answer.headers["RateLimit-Policy"] for answer in answers} == {'"key";q=3;w=86400'}
        refused = answers[-1]
        assert refused.headers["Content-Type"] == "application/problem+json"
        assert refused.json()["code"] == "rate_exceeded"
        assert 1 <= int(refused.headers["Retry-After"]) <= 86400
        assert api.post("/v1/jobs", json=RECIPE).status_code == 202  # what changes something has a limit of its own
        assert api.post("/v1/jobs", json=RECIPE).status_code == 429
        assert api.get("/v1/methods", key=api.new_key()).status_code == 200
        assert api.other_tenant().get("/v1/methods").status_code == 200


def test_a_tenants_keys_share_a_limit(url: str, roots: Path, tmp_path: Path) -> None:
    with serving(tmp_path, url, roots, rate_read="2/day", rate_read_tenant="3/day") as api:
        first, second = api.new_key(), api.new_key()
        statuses = [api.get("/v1/methods", key=key).status_code for key in (first, first, first, second, second)]
        assert statuses == [200, 200, 429, 200, 429]
        told = api.get("/v1/methods", key=api.new_key())
        assert "This tenant" in told.json()["detail"]
        assert told.headers["RateLimit-Policy"] == '"key";q=2;w=86400, "tenant";q=3;w=86400'
        assert api.other_tenant().get("/v1/methods").status_code == 200


def test_after_the_time_told_calls_are_taken_again(url: str, roots: Path, tmp_path: Path) -> None:
    with serving(tmp_path, url, roots, rate_read="4/second") as api:
        statuses: Counter[int] = Counter()
        began = time.monotonic()
        while statuses[200] < 10:
            answer = api.get("/v1/methods")
            statuses[answer.status_code] += 1
            time.sleep(float(answer.headers.get("Retry-After", 0)))
        assert statuses[429] <= 4
        assert time.monotonic() - began >= 1


def test_an_error_tells_the_limits_too(api: Api) -> None:
    for answer in (api.get("/v1/keys/key_0"), api.get("/v1/audit", key=api.new_key(["jobs:read"]))):
        assert answer.status_code in (403, 404)
        assert answer.headers["RateLimit"].startswith('"key";r=')
    assert "RateLimit" not in api.client.get("/livez").headers
    assert "RateLimit" not in api.client.get("/v1/jobs").headers


def test_empty_settings_limit_nothing(url: str, roots: Path, tmp_path: Path) -> None:
    with serving(tmp_path, url, roots, rate_read="", rate_read_tenant="", rate_refused="") as api:
        assert "RateLimit" not in api.get("/v1/methods").headers
        assert api.get("/v1/methods", key=NOBODY).status_code == 401


@pytest.mark.parametrize("rate", ["0/minute", "10", "ten/minute", "10/fortnight", "-1/day", "1/minute;2/hour"])
def test_what_is_no_rate(rate: str) -> None:
    with pytest.raises(ValueError, match="rate_read"):
        Settings(rate_read=rate)


def test_keys_cannot_be_guessed_for_ever(url: str, roots: Path, tmp_path: Path) -> None:
    with serving(tmp_path, url, roots, rate_refused="5/day", key_cache_seconds=0) as api:
        assert api.get("/v1/methods").status_code == 200
        unseen = api.new_key()
        statuses = [api.get("/v1/methods", key=key).status_code for key in (NOBODY, "x") * 4]
        assert statuses == [401] * 5 + [429] * 3
        refused = api.get("/v1/methods", key=api.key[:-2] + "xx")
        assert (refused.status_code, refused.json()["code"]) == (429, "too_many_refused")
        assert int(refused.headers["Retry-After"]) >= 1
        assert api.get("/v1/methods").status_code == 200  # others at this address go on
        assert api.get("/v1/methods", key=unseen).status_code == 429


def test_an_address_is_a_network_in_ipv6() -> None:
    def network(client: tuple[str, int] | None) -> str:
        return client_network(Request({"type": "http", "client": client}))

    assert network(("192.0.2.7", 1)) == "192.0.2.7"
    assert network(("2001:db8:1:2:3:4:5:6", 1)) == network(("2001:db8:1:2::9", 1)) == "2001:db8:1:2::/64"
    assert network(("2001:db8:1:3::9", 1)) != network(("2001:db8:1:2::9", 1))
    assert network(None) == ""


# ----------------------------------------------------------------------- Redis


def test_processes_share_the_counts(roots: Path, tmp_path: Path, redis_database: str) -> None:
    rates = {"rate_read": "20/day", "rate_read_tenant": "30/day"}
    environment = {f"ESPALIER_{name.upper()}": rate for name, rate in rates.items()} | {"ESPALIER_BROKER_URL": redis_database}
    with (
        running(tmp_path, {}, environment, worker=False) as there,
        serving(tmp_path, f"sqlite:///{tmp_path}/espalier.db", roots, broker_url=redis_database, **rates) as here,
    ):
        here.tenant = "running"
        key = here.new_key()
        headers = {"Authorization": f"Bearer {key}"}
        statuses: Counter[int] = Counter()
        for _ in range(15):
            statuses[here.get("/v1/methods", key=key).status_code] += 1
            statuses[there.client.get("/v1/methods", headers=headers).status_code] += 1
        assert statuses == {200: 20, 429: 10}
        second = [there.client.get("/v1/methods").status_code for _ in range(12)]
        assert second == [200] * 10 + [429] * 2  # of the tenant


def test_without_redis_calls_are_taken(roots: Path, tmp_path: Path) -> None:
    url = f"redis://:secret@127.0.0.1:{free_port()}/0"
    with running(tmp_path, {}, {"ESPALIER_BROKER_URL": url, "ESPALIER_RATE_READ": "2/day"}, worker=False) as there:
        began = time.monotonic()
        assert {there.client.get("/v1/methods").status_code for _ in range(20)} == {200}
        assert time.monotonic() - began < 60
        warned = [line for line in there.lines("api") if line["event"] == "rates not limited"]
        assert len(warned) == 1
        assert "secret" not in json.dumps(warned)


def test_a_redis_that_hangs_delays_few_calls(roots: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "AWAY_SECONDS", 600.0)
    with valkey() as (broker, server), serving(tmp_path, url, roots, broker_url=broker, rate_read="2/day") as api:
        assert [api.get("/v1/methods").status_code for _ in range(3)] == [200, 200, 429]
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        try:
            seconds = []
            for _ in range(10):
                began = time.monotonic()
                assert api.get("/v1/methods").status_code == 200
                seconds.append(time.monotonic() - began)
        finally:
            server.process.send_signal(signal.SIGCONT)
        assert sum(second > rates.ANSWER_SECONDS for second in seconds) <= len(seconds) / 2
