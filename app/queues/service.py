"""Which class of workers a job goes to, and what the classes have and do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from sqlalchemy.orm import Session

from app.estimate import Estimate
from app.exceptions import RecipeError
from app.models import Worker
from app.queues import repository
from app.queues.repository import Load
from app.queues.schemas import Placement, Queue, QueueWorker

AUTO = "auto"
DEFAULT = "default"


def list_queues(session: Session, lease_seconds: float) -> list[Queue]:
    classes = _classes(session, lease_seconds)
    loads = {load.queue: load for load in repository.loads(session)}
    return [_queue(name, classes.get(name, []), loads.get(name)) for name in sorted({*classes, *loads})]


def place(session: Session, wanted: str, cost: Estimate | None, lease_seconds: float) -> Placement:
    """The class that a job goes to: the wanted one or, for `auto`, the one with the least memory that suffices.

    Raises RecipeError if live workers could get it and none has the memory. A class without live workers keeps its jobs until one comes.
    """
    classes = _classes(session, lease_seconds)
    if cost is None:
        queue = DEFAULT if wanted == AUTO else wanted
        return Placement(queue=queue, live_workers=len(classes.get(queue, [])), fits=None)
    asked = classes if wanted == AUTO else {wanted: classes.get(wanted, [])}
    rooms = [_room(worker) for workers in asked.values() for worker in workers]
    if not rooms:
        return Placement(queue=DEFAULT if wanted == AUTO else wanted, live_workers=0, fits=None)
    fitting = {name: min(_room(worker) for worker in workers if _fits(cost, worker)) for name, workers in asked.items() if any(_fits(cost, w) for w in workers)}
    if not fitting:
        raise _too_large(wanted, cost, max(rooms))
    queue = min(fitting, key=lambda name: fitting[name])
    return Placement(queue=queue, live_workers=len(classes[queue]), fits=True)


def _classes(session: Session, lease_seconds: float) -> dict[str, list[Worker]]:
    """The live workers of each class that has any."""
    return {name: list(workers) for name, workers in groupby(repository.live_workers(session, lease_seconds), lambda worker: worker.queue)}


def _queue(name: str, workers: Sequence[Worker], load: Load | None) -> Queue:
    told = [QueueWorker.model_validate(worker) for worker in workers]
    if load is None:
        return Queue(name=name, workers=told, queued=0, running=0, oldest_queued_at=None)
    return Queue(name=name, workers=told, queued=load.queued, running=load.running, oldest_queued_at=load.oldest_queued_at)


def _room(worker: Worker) -> tuple[int, int]:
    return worker.device_bytes, worker.host_bytes


def _fits(cost: Estimate, worker: Worker) -> bool:
    return cost.host_bytes <= worker.host_bytes and (not worker.device_bytes or cost.device_bytes <= worker.device_bytes)


def _too_large(wanted: str, cost: Estimate, largest: tuple[int, int]) -> RecipeError:
    device, host = largest
    where = "of any queue" if wanted == AUTO else f"of the queue '{wanted}'"
    needed = f"about {cost.host_bytes / 1e9:.1f} GB of memory" + (f" and {cost.device_bytes / 1e9:.1f} GB on a GPU" if device else "")
    there = f"{host / 1e9:.1f} GB" + (f" and {device / 1e9:.1f} GB" if device else "")
    return RecipeError(
        f"The job needs {needed}; the largest live worker {where} has {there}.",
        code="no_worker_has_memory",
        hint="Give fewer or shorter calibration samples, a smaller model, or another queue; GET /v1/queues lists what they have.",
        pointer="/queue",
    )
