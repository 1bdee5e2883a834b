"""Every figure is right whichever process is asked, none is made up by a caller, and the dashboard and the alerts ask only for figures that exist."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import promql_parser as promql
import psutil
import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import delete, update

from app import metrics, totals
from app.database import Database, db_now
from app.jobs.lease import finish, reap, release
from app.main import create_app
from app.models import Delivery, Job, OutboxMessage, SinkRun, Total, Worker
from app.settings import Settings
from app.sinks import lease as sinks
from app.webhooks import deliveries
from app.webhooks.repository import insert_webhook
from app.webhooks.schemas import NewWebhook
from migrations import migrate
from tests import jobs
from tests.app.conftest import Api, insert_jobs, make_settings
from tests.app.running import RECIPE, Running, running
from tests.app.test_bad_input import check_problem
from tests.app.test_sinks import HUB
from tests.servers import fresh_database, postgres

TOKEN = "token-of-the-metrics"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "espalier.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
SCRAPE = DEPLOY / "prometheus" / "prometheus.yaml"

OF_PROMETHEUS: dict[str, set[str]] = {"up": set()}
TARGET = {"job", "instance"}  # labels that Prometheus adds

Figures = dict[tuple[str, tuple[tuple[str, str], ...]], float]
Exposed = dict[str, set[str]]  # names of series, and of their labels


def read(text: str) -> Figures:
    """Samples by name and labels; fails on a text that Prometheus would refuse."""
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


def key(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


@pytest.fixture
def api(tmp_path: Path, roots: Path, fresh_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """A service of its own, whose figures are not kept."""
    monkeypatch.setattr(metrics, "KEEP_SECONDS", 0.0)
    settings = make_settings(tmp_path, fresh_url, roots, metrics_token=TOKEN)
    database = Database(fresh_url)
    with TestClient(create_app(settings)) as client:
        yield Api(client, database, client.app.state.store, settings)  # type: ignore[attr-defined]  # it is typed as any ASGI app
    database.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def fresh_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        migrate(f"sqlite:///{tmp_path}/espalier.db")
        yield f"sqlite:///{tmp_path}/espalier.db"
    else:
        with fresh_database(request.getfixturevalue("postgres_url")) as url:
            migrate(url)
            yield url


def scrape(api: Api) -> Figures:
    answer = api.client.get("/metrics", headers=BEARER)
    assert answer.status_code == 200, answer.text
    return read(answer.text)


def add_worker(database: Database, name: str, *, queue: str = "default", seen: float = 0, draining: bool = False, devices: int = 0) -> None:
    gpus = [{"name": "H100", "memory_bytes": 80 * 10**9}] * devices
    row = Worker(
        id=name, queue=queue, devices=gpus, host_bytes=10**9, device_bytes=80 * 10**9 if devices else 0, disk_bytes=10**9, version="1", draining=draining
    )
    with database.writing() as session:
        session.add(row)
    with database.writing() as session:
        session.execute(update(Worker).where(Worker.id == name).values(seen_at=db_now(-seen)))


# -------------------------------------------------------------------- who may ask


def test_no_api_key_opens_it(api: Api) -> None:
    assert check_problem(api.client.get("/metrics"), 401)["code"] == "metrics_token_wrong"
    for scopes in (["admin"], ["jobs:read"]):
        check_problem(api.get("/metrics", key=api.new_key(scopes)), 401)
    for wrong in ("", TOKEN[:-1], f"{TOKEN}x", "é"):
        check_problem(api.client.get("/metrics", headers={b"Authorization": f"Bearer {wrong}".encode()}), 401)
    assert api.client.get("/metrics", headers=BEARER).status_code == 200
    assert "/metrics" not in api.client.get("/openapi.json").json()["paths"]


def test_without_a_token_there_is_none(tmp_path: Path) -> None:
    with TestClient(create_app(Settings.model_validate({"home": tmp_path, "sweep_seconds": 3600}))) as client:
        check_problem(client.get("/metrics", headers={"Authorization": "Bearer "}), 404)


# --------------------------------------------------------------- jobs and workers


def test_queues_by_class(api: Api) -> None:
    first, _, third = (api.submit() for _ in range(3))
    api.start(third)
    with api.database.writing() as session:
        session.execute(update(Job).where(Job.id == first).values(updated_at=db_now(-100)))
        session.execute(update(Job).where(Job.id == third).values(queue="h100"))
    figures = scrape(api)
    assert figures[key("espalier_queue_depth", queue="default")] == 2
    assert 100 <= figures[key("espalier_queue_oldest_seconds", queue="default")] < 130
    assert figures[key("espalier_queue_depth", queue="h100")] == figures[key("espalier_queue_oldest_seconds", queue="h100")] == 0
    assert figures[key("espalier_jobs", queue="h100", state="running")] == 1
    assert figures[key("espalier_jobs", queue="default", state="cancelling")] == 0
    assert figures[key("espalier_database_up")] == 1


def test_workers_by_class(api: Api) -> None:
    add_worker(api.database, "a", queue="h100", devices=2)
    add_worker(api.database, "b", queue="h100", draining=True)
    add_worker(api.database, "dead", queue="h100", devices=8, seen=api.settings.lease_seconds + 5)
    figures = scrape(api)
    assert figures[key("espalier_workers", queue="h100")] == 1
    assert figures[key("espalier_workers_draining", queue="h100")] == 1
    assert figures[key("espalier_workers", queue="default")] == 0  # told even where there is none, so that an alert can see it
    assert figures[key("espalier_worker_memory_bytes", queue="h100")] == 2 * 10**9
    assert figures[key("espalier_worker_devices", queue="h100", device="H100")] == 2
    assert figures[key("espalier_worker_device_memory_bytes", queue="h100", device="H100")] == 160 * 10**9


def test_what_happened_to_jobs_is_counted_once_and_for_good(api: Api, tmp_path: Path) -> None:
    def events() -> dict[tuple[str, str], float]:
        found = scrape(api)
        return {(dict(labels)["kind"], dict(labels)["code"]): value for (name, labels), value in found.items() if name == "espalier_job_events_total" and value}

    assert events() == {}
    api.succeed(tmp_path, {"report.json": b"{}"})
    api.fail(api.submit())
    api.post(f"/v1/jobs/{api.submit()}/cancel")
    lost, released = api.submit(), api.submit()
    api.start(lost)
    lease = api.start(released)
    with api.database.writing() as session:
        release(session, lease, "It drains.", charged=False)
        session.execute(update(Job).where(Job.id == lost).values(lease_until=db_now(-1)))
    with api.database.writing() as session:
        reap(session)
    expected = {("claimed", ""): 4, ("succeeded", ""): 1, ("failed", "disk_full"): 1, ("cancelled", ""): 1, ("lease_expired", ""): 1, ("requeued", ""): 2}
    assert events() == expected
    _count_and_roll_back(api)
    with api.database.writing() as session:
        session.execute(delete(Job).where(Job.id.in_([lost, released])))
    assert events() == expected


def _count_and_roll_back(api: Api) -> None:
    try:
        with api.database.writing() as session:
            totals.count(session, totals.EVENTS, kind="claimed", queue="default", code="")
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass


def test_the_outbox(api: Api) -> None:
    figures = scrape(api)
    assert figures[key("espalier_outbox_size")] == figures[key("espalier_outbox_lag_seconds")] == 0
    insert_jobs(api.database, api.tenant, 2)
    with api.database.writing() as session:
        session.execute(update(OutboxMessage).values(created_at=db_now(-60)))
    figures = scrape(api)
    assert figures[key("espalier_outbox_size")] == 2
    assert 60 <= figures[key("espalier_outbox_lag_seconds")] < 90


def test_what_is_to_be_done_after_jobs(api: Api) -> None:
    figures = scrape(api)
    assert figures[key("espalier_deliveries_waiting")] == figures[key("espalier_deliveries_lag_seconds")] == 0
    assert figures[key("espalier_sinks_waiting", sink="s3")] == figures[key("espalier_sinks_lag_seconds", sink="s3")] == 0
    job_id = api.submit(sinks=[HUB, HUB])
    held = api.start(job_id)
    with api.database.writing() as session:
        finish(session, held, "succeeded", report={})
    with api.database.writing() as session:
        webhook = insert_webhook(session, session.get_one(Job, job_id).tenant_id, NewWebhook(url="https://example.com/"), "sealed")
        for _ in range(3):
            deliveries.ping(session, webhook)
    for table, seconds in ((Delivery, 40), (SinkRun, 70)):
        with api.database.writing() as session:
            session.execute(update(table).values(next_at=db_now(-seconds)))
    figures = scrape(api)
    assert figures[key("espalier_deliveries_waiting")] == 3
    assert 40 <= figures[key("espalier_deliveries_lag_seconds")] < 70
    assert figures[key("espalier_sinks_waiting", sink="hub")] == 2
    assert 70 <= figures[key("espalier_sinks_lag_seconds", sink="hub")] < 100
    for outcome in ("retried", "failed"):
        with api.database.writing() as session:
            turn = sinks.claim(session, 45, 2)
        assert turn is not None
        with api.database.writing() as session:
            if outcome == "retried":
                sinks.retry(session, turn, -50, None)
                sinks.retry(session, turn, -50, None, charged=False)  # given back by an exporter that stops
            else:
                sinks.finish(session, turn, "failed", error=sinks.LOST)
    figures = scrape(api)
    tries = {outcome: figures[key("espalier_sink_tries_total", sink="hub", outcome=outcome)] for outcome in sinks.OUTCOMES}
    assert tries == {"succeeded": 0, "retried": 1, "failed": 1}
    assert figures[key("espalier_sinks_waiting", sink="hub")] == 1
    with api.database.writing() as session:
        session.execute(delete(SinkRun))
        session.execute(delete(Delivery))


def test_histograms_add_up(api: Api) -> None:
    for seconds in (0.5, 3, 3, 10**6):
        with api.database.writing() as session:
            totals.observe(session, totals.PHASE_SECONDS, seconds, totals.PHASE_BOUNDS, queue="default", phase="prune")
    figures = scrape(api)
    buckets = {dict(labels)["le"]: value for (name, labels), value in figures.items() if name == "espalier_phase_seconds_bucket"}
    assert (buckets["1.0"], buckets["5.0"], buckets["43200.0"], buckets["+Inf"]) == (1, 3, 3, 4)
    assert figures[key("espalier_phase_seconds_count", queue="default", phase="prune")] == 4
    assert figures[key("espalier_phase_seconds_sum", queue="default", phase="prune")] == 10**6 + 6.5


def test_a_label_that_a_process_makes_up_breaks_nothing(api: Api) -> None:
    with api.database.writing() as session:
        totals.count(session, totals.EVENTS, kind="failed", queue="q" * 500, code='"\n\0é{}' * 100)
    assert 1 in [value for (name, _), value in scrape(api).items() if name == "espalier_job_events_total"]


def test_counts_of_many_processes_at_once_all_arrive(fresh_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds in both orders, all in the same rows: without one order these would wait for each other for ever."""
    database = Database(fresh_url)

    def work(number: int) -> None:
        for turn in range(20):
            with database.writing() as session:
                for kind in ("claimed", "failed") if (number + turn) % 2 else ("failed", "claimed"):
                    totals.count(session, totals.EVENTS, kind=kind)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.reading() as session:
        assert sorted(value for _, _, value in totals.read(session)) == [120, 120]
        assert session.query(Total).count() == 2
    database.dispose()


def test_many_who_ask_ask_the_database_once(tmp_path: Path, roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path}/espalier.db"
    migrate(url)
    asked: list[Settings] = []
    collect = metrics._collect

    def counting(database: Database, settings: Settings) -> list[Metric]:
        asked.append(settings)
        return collect(database, settings)

    monkeypatch.setattr(metrics, "_collect", counting)
    monkeypatch.setattr(metrics, "KEEP_SECONDS", 600.0)
    with TestClient(create_app(make_settings(tmp_path, url, roots, metrics_token=TOKEN))) as client:
        for _ in range(20):
            assert client.get("/metrics", headers=BEARER).status_code == 200
    assert len(asked) == 1


def test_without_the_database_the_process_still_tells(tmp_path: Path, roots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "KEEP_SECONDS", 0.0)
    with postgres() as (url, server):
        migrate(url)
        with TestClient(create_app(make_settings(tmp_path, url, roots, metrics_token=TOKEN))) as client:

            def figures() -> Figures:
                return read(client.get("/metrics", headers=BEARER).text)

            assert figures()[key("espalier_database_up")] == 1
            server.stop()
            began = time.monotonic()
            down = figures()
            assert time.monotonic() - began < metrics.WAIT_SECONDS + 30
            assert down[key("espalier_database_up")] == 0
            assert key("espalier_queue_depth", queue="default") not in down
            assert down[key("espalier_http_requests_in_flight")] >= 1
            server.start()
            jobs.wait_until(lambda: figures()[key("espalier_database_up")] == 1, 60, "the database")


# ------------------------------------------------------------------ this process


def test_requests_are_counted_by_template(api: Api) -> None:
    def counts(figures: Figures) -> dict[tuple[str, ...], float]:
        labels = ("method", "route", "status")
        return {
            tuple(dict(found)[label] for label in labels): value for (name, found), value in figures.items() if name == "espalier_http_request_seconds_count"
        }

    before = counts(scrape(api))
    job_id = api.submit()
    for _ in range(3):
        api.get(f"/v1/jobs/{job_id}")
    for number in range(20):
        api.get(f"/v1/jobs/job_{number:032x}")
        api.get(f"/made/up/{number}")
        api.request(f"MADE{number}", "/v1/jobs")
    after = counts(scrape(api))
    new = {labels: value - before.get(labels, 0) for labels, value in after.items() if value != before.get(labels, 0)}
    new.pop(("GET", "/metrics", "200"))
    assert new == {
        ("POST", "/v1/jobs", "202"): 1,
        ("GET", "/v1/jobs/{job_id}", "200"): 3,
        ("GET", "/v1/jobs/{job_id}", "404"): 20,
        ("GET", "other", "404"): 20,
        ("other", "/v1/jobs", "405"): 20,
    }


def test_processes_that_share_a_port_answer_for_all(tmp_path: Path) -> None:
    folder = tmp_path / "multiprocess"
    folder.mkdir()
    environment = {"ESPALIER_METRICS_TOKEN": TOKEN, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    with running(tmp_path, {}, environment, api_workers=2, worker=False) as service:
        processes = api_processes(service)
        assert len(processes) == 2

        def ask(path: str) -> str:
            """By a connection of its own, which either process may take."""
            return httpx.get(service.client.base_url.join(path), headers=BEARER, trust_env=False, timeout=120).raise_for_status().text

        both_ways = (processes, processes[::-1])
        for asked, other in both_ways:
            with suspended(other):  # else one process may take all connections; it may stop in a transaction, so what is asked needs no database
                for _ in range(5):
                    ask("/openapi.json")
                jobs.wait_until((folder / f"histogram_{asked.pid}.db").exists, 60, "what it counts")
        (folder / "gauge_livesum_999999999.db").write_bytes((next(folder.glob("gauge_livesum_*.db"))).read_bytes())  # as one that was killed leaves it
        count, in_flight = key("espalier_http_request_seconds_count", method="GET", route="other", status="200"), key("espalier_http_requests_in_flight")

        def told() -> tuple[float, float]:
            figures = read(ask("/metrics"))
            return figures[count], figures[in_flight]

        jobs.wait_until(lambda: told() == (10, 1), 60, "the figures")  # a request is counted after its last byte
        for _, other in both_ways:
            with suspended(other):
                assert told()[0] == 10
        assert not (folder / "gauge_livesum_999999999.db").exists()


def api_processes(service: Running) -> list[psutil.Process]:
    """Those that answer; beside them the parent has one that only tracks resources."""
    return [child for child in psutil.Process(service.api.pid).children() if any("spawn_main" in part for part in child.cmdline())]


@contextmanager
def suspended(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        jobs.wait_until(lambda: process.status() == psutil.STATUS_STOPPED, 60, "the stop", pause=0.01)
        yield
    finally:
        process.resume()


# ------------------------------------------------------- dashboard, alerts, scrape


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> Exposed:
    """All that a service tells once a job has run on a worker with a GPU."""
    with running(tmp_path_factory.mktemp("exposed"), {"steps": 1}, {"ESPALIER_METRICS_TOKEN": TOKEN}) as service:
        assert service.wait_for_end(service.client.post("/v1/jobs", json=RECIPE).json()["id"])["state"] == "succeeded"
        return _names_told(service)


def _names_told(service: Running) -> Exposed:
    database = Database(f"sqlite:///{service.home}/espalier.db")
    add_worker(database, "with a GPU", devices=1)
    with database.writing() as session:
        for name in (totals.ENGINE_BYTES, totals.DEVICE_BYTES):
            totals.observe(session, name, 10**9, totals.BYTES_BOUNDS, queue="default")
        totals.observe(session, totals.SINK_SECONDS, 10, totals.SINK_BOUNDS, sink="hub")
    database.dispose()
    time.sleep(metrics.KEEP_SECONDS)
    figures = read(service.client.get("/metrics", headers=BEARER).text)
    phases = {dict(labels)["phase"] for name, labels in figures if name == "espalier_phase_seconds_count"}
    assert phases == {"prune", "upload"}
    assert figures[key("espalier_job_events_total", kind="succeeded", queue="default", code="")] == 1
    return {name: {label for label, _ in labels} for name, labels in figures} | OF_PROMETHEUS


def read_expression(expression: str) -> tuple[Exposed, set[str]]:
    """The series that a PromQL expression reads, with the labels that it chooses by, and the labels that it groups by. Raises for one that does not parse."""
    series: defaultdict[str, set[str]] = defaultdict(set)
    groups: set[str] = set()

    def visit(part: promql.Expr) -> None:
        if isinstance(part, promql.MatrixSelector):
            part = part.vector_selector
        if isinstance(part, promql.VectorSelector):
            assert part.name is not None
            series[part.name] |= {matcher.name for matcher in part.matchers.matchers}
        elif isinstance(part, promql.AggregateExpr) and part.modifier is not None:
            groups.update(part.modifier.labels)

    promql.walk(promql.parse(expression), visit)
    return series, groups


def expressions_of(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"].replace("$__rate_interval", "5m").replace("$queue", "default")


def check(expressions: Iterable[str], exposed: Exposed) -> None:
    for expression in expressions:
        series, groups = read_expression(expression)
        assert series, expression
        assert series.keys() <= exposed.keys(), (expression, series.keys() - exposed.keys())
        for name, labels in series.items():
            assert labels <= exposed[name] | TARGET, (expression, labels)
        assert groups <= TARGET.union(*(exposed[name] for name in series)), (expression, groups)


def test_the_dashboard_asks_for_what_exists(exposed: Exposed) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    check(expressions_of(dashboard), exposed)
    plots = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in plots:
        assert panel["title"]
        assert panel["description"]
        assert panel["targets"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    asked = {name for expression in expressions_of(dashboard) for name in read_expression(expression)[0]}
    told = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exposed if name.startswith("espalier_")}
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked}
    assert told - shown <= {"espalier_build_info", "espalier_jobs"}


def test_the_alerts_ask_for_what_exists(exposed: Exposed) -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    check((rule["expr"] for rule in rules), exposed)
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert {"summary", "description"} <= set(rule["annotations"])


def test_the_scrape_matches_the_service(api: Api) -> None:
    config = yaml.safe_load(SCRAPE.read_text())
    job = next(job for job in config["scrape_configs"] if job["job_name"] == "espalier")
    assert api.client.get(job["metrics_path"], headers=BEARER).status_code == 200
    assert job["authorization"]["credentials_file"]
    assert float(job["scrape_timeout"].removesuffix("s")) > metrics.WAIT_SECONDS
    assert config["rule_files"] == [ALERTS.name]
