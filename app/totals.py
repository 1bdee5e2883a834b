"""Counts of what happened to jobs and after them, kept in the database and written in the transaction in which it happened: right whichever process tells them.

A count is spread over a few rows, so that workers that end their jobs at the same time do not wait for each other. Rows are written in one order, so that
none wait for ever.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Executable, event, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.models import Total

SHARDS = 8
UNSAFE = re.compile(r"[^A-Za-z0-9_.+-]")  # in a label's value
LABEL_LENGTH = 64
EVENTS = "espalier_job_events"
DELIVERIES = "espalier_deliveries"
SINK_TRIES = "espalier_sink_tries"
SINK_SECONDS = "espalier_sink_seconds"
SINK_BOUNDS = (1, 5, 15, 60, 300, 900, 3600, 3 * 3600)
PHASE_SECONDS = "espalier_phase_seconds"
PHASE_BOUNDS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600)
ENGINE_BYTES = "espalier_engine_memory_bytes"
DEVICE_BYTES = "espalier_device_memory_bytes"
BYTES_BOUNDS = tuple(2**power for power in range(28, 39))  # 256 MiB to 256 GiB


def count(session: Session, name: str, amount: float = 1, **labels: str) -> None:
    """Add to a count once the session's transaction is committed."""
    safe = {label: UNSAFE.sub("_", value)[:LABEL_LENGTH] for label, value in labels.items()}
    session.info.setdefault("totals", Counter())[name, json.dumps(safe, sort_keys=True)] += amount


def observe(session: Session, name: str, value: float, bounds: Sequence[float], **labels: str) -> None:
    """Add a measured value to a histogram with these upper bounds."""
    bound = next((bound for bound in bounds if value <= bound), math.inf)
    count(session, f"{name}_bucket", 1, **labels, le=str(float(bound)))
    count(session, f"{name}_sum", value, **labels)


def read(session: Session) -> list[tuple[str, dict[str, str], float]]:
    """Every count: name, labels, value. A bucket holds what lies between the bound below and its own."""
    query = select(Total.name, Total.labels, func.sum(Total.value)).group_by(Total.name, Total.labels)
    return [(name, json.loads(labels), value) for name, labels, value in session.execute(query)]


@event.listens_for(Session, "before_commit")
def _write(session: Session) -> None:
    counts: Counter[tuple[str, str]] = session.info.pop("totals", Counter())
    if not counts:
        return
    shard = os.getpid() % SHARDS
    rows: list[dict[str, Any]] = [{"name": name, "labels": labels, "shard": shard, "value": float(counts[name, labels])} for name, labels in sorted(counts)]
    session.connection().execute(_upsert(session.get_bind().dialect.name), rows if len(rows) > 1 else rows[0])  # a batch costs more than one alone


@lru_cache
def _upsert(dialect: str) -> Executable:
    insert = (postgresql if dialect == "postgresql" else sqlite).insert(Total)
    upsert: Executable = insert.on_conflict_do_update(
        index_elements=[Total.name, Total.labels, Total.shard], set_={"value": Total.value + insert.excluded.value}
    )
    return upsert
