"""`/metrics` for Prometheus, behind a token of its own: it tells of all tenants, so no API key opens it.

Whatever concerns jobs, workers, the outbox, webhooks and sinks comes from the database, the same from every API process: sum nothing over processes there, take
the maximum. Only `espalier_http_…` and `process_…` are of the process that answers. Where several share a port (`uvicorn --workers`), set
PROMETHEUS_MULTIPROC_DIR to an empty directory, and each of them answers for all; `process_…` is left out then.
"""

from __future__ import annotations

import os
import re
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, Header, Request, Response
from prometheus_client import CollectorRegistry, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session
from starlette.exceptions import HTTPException

from app import totals
from app.database import Database, UtcDateTime, db_now, seconds_between
from app.dependencies import Configuration
from app.exceptions import AuthenticationError
from app.jobs.repository import COUNTED
from app.models import Delivery, Job, OutboxMessage, SinkRun, Worker
from app.probing import Probe
from app.settings import Settings
from app.sinks import lease as sinks
from app.sinks.schemas import SINK_NAMES
from app.webhooks import deliveries as news

KEEP_SECONDS = 5.0  # for which figures from the database are given again
WAIT_SECONDS = 5.0  # for them, before the rest is told without
STATEMENT_SECONDS = 3
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
LIVE = ("queued", "running", "cancelling")
"""States whose rows are few enough to be counted at every scrape; how many jobs have ended is a count of events."""

log = structlog.get_logger(__name__)
router = APIRouter()

# ---------------------------------------------------------------- of this process

disable_created_metrics()  # a series more of each, for no one
_registry = CollectorRegistry()
ProcessCollector(registry=_registry)
_requests = Histogram(
    "espalier_http_request_seconds",
    "Requests by route template, to the last byte of the answer.",
    ("method", "route", "status"),
    buckets=SECONDS,
    registry=_registry,
)
_in_flight = Gauge("espalier_http_requests_in_flight", "Requests that are being answered.", registry=_registry, multiprocess_mode="livesum")


def request_began() -> None:
    _in_flight.inc()


def request_ended(scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
    """Count a request under its route's template: what a caller makes up must not make series."""
    _in_flight.dec()
    method = scope["method"] if scope["method"] in METHODS else "other"
    _requests.labels(method, getattr(scope.get("route"), "path_format", "other"), str(status)).observe(seconds)


def _of_processes() -> Iterable[Metric]:
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if folder is None:
        return _registry.collect()
    for path in Path(folder).glob("gauge_live*.db"):
        pid = int(path.stem.rpartition("_")[2])
        if not Path(f"/proc/{pid}").exists():
            mark_process_dead(pid, folder)
    collected: Iterable[Metric] = MultiProcessCollector(None, folder).collect()
    return collected


# --------------------------------------------------------------- of the database


def make_probe(database: Database, settings: Settings) -> Probe[list[Metric]]:
    return Probe(partial(_collect, database, settings), patience=WAIT_SECONDS, keep=KEEP_SECONDS)


def _collect(database: Database, settings: Settings) -> list[Metric]:
    with database.reading() as session:
        if session.get_bind().dialect.name == "postgresql":
            session.connection(execution_options={"isolation_level": "READ COMMITTED"})  # a transaction, to whose end SET LOCAL holds
            session.execute(text(f"SET LOCAL statement_timeout = '{STATEMENT_SECONDS}s'"))
        return [*_of_queues(session, settings), *_of_outbox(session), *_of_waiting(session), *_of_workers(session, settings), *_of_totals(session, settings)]


def _of_queues(session: Session, settings: Settings) -> Iterator[Metric]:
    since = func.min(Job.updated_at, type_=UtcDateTime())  # of a job that waits: when it was queued, or requeued
    query = select(Job.queue, Job.state, func.count(), seconds_between(since, db_now())).where(Job.state.in_(LIVE)).group_by(Job.queue, Job.state)
    found = {(queue, state): (number, max(0.0, seconds)) for queue, state, number, seconds in session.execute(query)}
    queues = sorted({settings.queue, *(queue for queue, _ in found), *session.scalars(select(Worker.queue).distinct())})
    jobs = {(queue, state): found.get((queue, state), (0, 0.0)) for queue in queues for state in LIVE}
    waiting = {(queue,): jobs[queue, "queued"] for queue in queues}
    yield _gauge("espalier_jobs", "Jobs that have not ended.", ("queue", "state"), {key: number for key, (number, _) in jobs.items()})
    yield _gauge("espalier_queue_depth", "Jobs that wait for a worker.", ("queue",), {key: number for key, (number, _) in waiting.items()})
    yield _gauge("espalier_queue_oldest_seconds", "How long the oldest job waits.", ("queue",), {key: seconds for key, (_, seconds) in waiting.items()})


def _of_outbox(session: Session) -> Iterator[Metric]:
    age = seconds_between(func.min(OutboxMessage.created_at), db_now())
    size, lag = session.execute(select(func.count(), age).select_from(OutboxMessage)).one()
    yield GaugeMetricFamily("espalier_outbox_size", "Messages that are not yet published.", size)
    yield GaugeMetricFamily("espalier_outbox_lag_seconds", "Age of the oldest message that is not yet published.", max(0.0, lag or 0.0))


def _of_waiting(session: Session) -> Iterator[Metric]:
    """What is to be done after jobs. It is late by the time since its next try was due; whoever makes one puts the next off."""
    late = seconds_between(func.min(Delivery.next_at, type_=UtcDateTime()), db_now())
    number, seconds = session.execute(select(func.count(), late).where(Delivery.state == "waiting")).one()
    yield GaugeMetricFamily("espalier_deliveries_waiting", "News that webhooks have not taken yet.", number)
    yield GaugeMetricFamily("espalier_deliveries_lag_seconds", "How late the next try to send news is, at most.", max(0.0, seconds or 0.0))
    late = seconds_between(func.min(SinkRun.next_at, type_=UtcDateTime()), db_now())
    query = select(SinkRun.name, func.count(), late).where(SinkRun.state == "waiting").group_by(SinkRun.name)
    found = {name: (number, max(0.0, seconds)) for name, number, seconds in session.execute(query)}
    waiting: dict[tuple[str, ...], tuple[int, float]] = {(name,): found.get(name, (0, 0.0)) for name in SINK_NAMES}
    yield _gauge("espalier_sinks_waiting", "Sinks that results have not reached yet.", ("sink",), {key: number for key, (number, _) in waiting.items()})
    lags = {key: seconds for key, (_, seconds) in waiting.items()}
    yield _gauge("espalier_sinks_lag_seconds", "How late the next try at a sink is, at most.", ("sink",), lags)


def _of_workers(session: Session, settings: Settings) -> Iterator[Metric]:
    alive = (Worker.seen_at > db_now(-settings.lease_seconds)).label("alive")
    rows = session.execute(select(Worker.queue, alive, Worker.draining, Worker.host_bytes, Worker.devices)).all()
    workers = Counter[tuple[str, ...]]({(queue,): 0 for queue in (settings.queue, *(row.queue for row in rows))})
    draining, host_bytes = Counter(workers), Counter(workers)
    devices, device_bytes = Counter[tuple[str, ...]](), Counter[tuple[str, ...]]()
    for row in rows:
        if not row.alive:
            continue
        (draining if row.draining else workers)[row.queue,] += 1
        host_bytes[row.queue,] += row.host_bytes
        for device in row.devices:
            devices[row.queue, device["name"]] += 1
            device_bytes[row.queue, device["name"]] += device["memory_bytes"]
    yield _gauge("espalier_workers", "Live workers that take jobs.", ("queue",), workers)
    yield _gauge("espalier_workers_draining", "Live workers that take no more jobs.", ("queue",), draining)
    yield _gauge("espalier_worker_memory_bytes", "Memory that engines may take on live workers.", ("queue",), host_bytes)
    yield _gauge("espalier_worker_devices", "GPUs of live workers.", ("queue", "device"), devices)
    yield _gauge("espalier_worker_device_memory_bytes", "Memory of the GPUs of live workers.", ("queue", "device"), device_bytes)


def _gauge(name: str, meaning: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _of_totals(session: Session, settings: Settings) -> Iterator[Metric]:
    counted: defaultdict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for name, labels, value in totals.read(session):
        counted[name].append((labels, value))
    events = CounterMetricFamily(
        totals.EVENTS,
        "What happened to jobs: attempts are `claimed`, lost workers `lease_expired`. `code` tells why a job failed.",
        labels=("kind", "queue", "code"),
    )
    happened = {(kind, settings.queue, ""): 0.0 for kind in COUNTED}  # an increase is only seen of what was told before
    happened |= {(labels["kind"], labels["queue"], labels["code"]): value for labels, value in counted[totals.EVENTS]}
    for key, value in happened.items():
        events.add_metric(key, value)
    yield events
    deliveries = CounterMetricFamily(totals.DELIVERIES, "Tries to send news to webhooks, by what came of them; `failed`: given up.", labels=("outcome",))
    came = dict.fromkeys(news.OUTCOMES, 0.0) | {labels["outcome"]: value for labels, value in counted[totals.DELIVERIES]}
    for outcome, value in came.items():
        deliveries.add_metric((outcome,), value)
    yield deliveries
    tries = CounterMetricFamily(totals.SINK_TRIES, "Tries at sinks, by what came of them; `failed`: given up.", labels=("sink", "outcome"))
    tried = {(name, outcome): 0.0 for name in SINK_NAMES for outcome in sinks.OUTCOMES}
    tried |= {(labels["sink"], labels["outcome"]): value for labels, value in counted[totals.SINK_TRIES]}
    for labelled, value in tried.items():
        tries.add_metric(labelled, value)
    yield tries
    yield _histogram(totals.SINK_SECONDS, "Time of a try at a sink.", ("sink",), totals.SINK_BOUNDS, counted)
    phase = "Time of an attempt's phases, once the attempt has ended."
    yield _histogram(totals.PHASE_SECONDS, phase, ("queue", "phase"), totals.PHASE_BOUNDS, counted)
    engine = "Highest anonymous resident memory of the engines of jobs that succeeded."
    yield _histogram(totals.ENGINE_BYTES, engine, ("queue",), totals.BYTES_BOUNDS, counted)
    device = "Highest memory that the engines of jobs that succeeded held on a GPU."
    yield _histogram(totals.DEVICE_BYTES, device, ("queue",), totals.BYTES_BOUNDS, counted)


def _histogram(
    name: str, meaning: str, labels: tuple[str, ...], bounds: Iterable[float], counted: dict[str, list[tuple[dict[str, str], float]]]
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, meaning, labels=labels)
    found: defaultdict[tuple[str, ...], dict[float, float]] = defaultdict(dict)
    for given, value in counted[f"{name}_bucket"]:
        found[tuple(given[label] for label in labels)][float(given["le"])] = value
    for given, total in counted[f"{name}_sum"]:
        key, below = tuple(given[label] for label in labels), 0.0
        buckets = []
        for bound in (*bounds, float("inf")):
            below += found[key].get(bound, 0.0)
            buckets.append((floatToGoString(bound), below))
        family.add_metric(key, buckets, total)
    return family


# ---------------------------------------------------------------------- endpoint


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


async def _authorise(settings: Configuration, authorization: Annotated[str, Header()] = "") -> None:
    token = settings.metrics_token.get_secret_value()
    if not token:
        raise HTTPException(404)
    if not secrets.compare_digest(re.sub(r"^Bearer ", "", authorization).encode(), token.encode()):
        raise AuthenticationError(
            "The request does not carry the token of /metrics.",
            code="metrics_token_wrong",
            hint="Send 'Authorization: Bearer …' with the value of ESPALIER_METRICS_TOKEN.",
        )


@router.get("/metrics", include_in_schema=False, dependencies=[Depends(_authorise)])
async def get_metrics(request: Request) -> Response:
    """All metrics; without those of the database while it does not answer, which `espalier_database_up` tells."""
    probe: Probe[list[Metric]] = request.app.state.metrics
    families = [*_of_processes(), InfoMetricFamily("espalier_build", "What runs here.", {"version": request.app.version})]
    try:
        families += await probe.answer()
        answers = True
    except Exception as error:  # noqa: BLE001  whatever the driver raises, the process's own figures are told
        log.warning("no figures of the database", cause=repr(error))
        answers = False
    families.append(GaugeMetricFamily("espalier_database_up", "Whether the database gave its figures.", float(answers)))
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(_Families(families)), media_type=None, headers={"Content-Type": media_type})
