"""Publishes a job's id by the task's name. A message is only a hint that its class of workers may have work; the job's row is the truth.

On the broker each class has a queue, and so has each worker, by which it wakes itself when a hint was lost or went to another in vain.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from queue import Empty
from typing import Any

from celery import Celery
from kombu.entity import Exchange, Queue
from kombu.exceptions import ChannelError
from kombu.transport import TRANSPORT_ALIASES, filesystem, redis, virtual
from kombu.utils.json import dumps, loads

from app.settings import Settings

TASK = "espalier.run_job"
QUEUE = "prune"  # of the class `default`
SECONDS = 5.0  # that one operation on the broker may take
POLL_SECONDS = 0.2  # of a worker, in the directory of messages


class Channel(filesystem.Channel):
    """Kombu's directory of messages, where a message appears only once it is whole, and goes to one worker only."""

    def _put(self, queue: str, payload: dict[str, Any], **kwargs: Any) -> None:  # type: ignore[override]  # kombu names it differently in base and class
        folder = Path(self.data_folder_out)
        unfinished = folder / uuid.uuid4().hex
        unfinished.write_text(dumps(payload), encoding="utf-8")
        unfinished.replace(folder / f"{time.time_ns():020d}_{unfinished.name}.{queue}.msg")

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        for path in sorted(Path(self.data_folder_in).glob(f"*.{queue}.msg")):
            try:
                payload = path.read_text(encoding="utf-8")
                path.unlink()
            except FileNotFoundError:  # another worker has it
                continue
            message: dict[str, Any] = loads(payload)
            return message
        raise Empty


class Transport(filesystem.Transport):
    Channel = Channel


TRANSPORT_ALIASES["filesystem"] = f"{__name__}:Transport"


class QoS(redis.QoS):
    """Kombu's count of the messages that a worker holds, where one whose acknowledgement failed is held no longer.

    Celery logs that failure and goes on. A worker that still counted the message would be at its limit for ever: it would neither ask for another one nor
    find that its connection was lost.
    """

    def ack(self, delivery_tag: str) -> None:
        try:
            super().ack(delivery_tag)  # type: ignore[no-untyped-call, unused-ignore]  # kombu has no types, which mypy sees only in some runs
        finally:
            virtual.QoS.ack(self, delivery_tag)


redis.Channel.QoS = QoS


def of_class(name: str) -> str:
    """The queue of a class of workers."""
    return QUEUE if name == "default" else f"{QUEUE}-{name}"


def of_worker(worker_id: str) -> str:
    """The queue of one worker."""
    return f"{QUEUE}@{worker_id}"


def declare(name: str) -> Queue:
    # The default exchange routes by the queue's name and keeps no table that processes would have to share.
    return Queue(name, Exchange(""), routing_key=name)


def make_celery(settings: Settings) -> Celery:
    """Celery bound to the settings' broker: JSON only, no results, and no operation that waits for ever."""
    url = settings.broker_url.get_secret_value()
    celery = Celery("espalier", broker=f"{url}localhost" if url.endswith("://") else url, set_as_current=False)
    celery.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_queues=[declare(of_class(settings.queue))],
        task_default_queue=of_class(settings.queue),
        task_default_exchange="",
        task_create_missing_queues=False,
        task_publish_retry=False,
        broker_connection_timeout=SECONDS,
        broker_pool_acquire_timeout=SECONDS,
        broker_transport_options=_transport_options(settings),
    )
    return celery


def publish(settings: Settings, job_id: str, queue: str = QUEUE) -> None:
    """Send one message to a queue. Raises whatever the broker's client raises, within a few seconds.

    Only workers of the release before read the job's id; the others claim the best job of their class.
    """
    publish_all(settings, [(job_id, queue)])


def publish_all(settings: Settings, messages: Sequence[tuple[str, str]]) -> None:
    """Send a message of each job to its queue."""
    celery = _publisher(settings.broker_url.get_secret_value(), settings.messages_dir)
    queues = {name: declare(name) for _, name in messages}
    with celery.producer_or_acquire() as producer:
        for job_id, name in messages:
            celery.send_task(TASK, args=[job_id], queue=queues[name], ignore_result=True, producer=producer)


def depth(settings: Settings, queue: str = QUEUE) -> int:
    """How many messages wait in a queue."""
    celery = _publisher(settings.broker_url.get_secret_value(), settings.messages_dir)
    with celery.connection_for_write() as connection:
        try:
            return int(connection.default_channel.queue_declare(queue, passive=True).message_count)
        except ChannelError:  # nothing was ever published
            return 0


@lru_cache(maxsize=8)
def _publisher(broker_url: str, messages: Path) -> Celery:
    return make_celery(Settings(broker_url=broker_url, home=messages.parent))


def _transport_options(settings: Settings) -> dict[str, Any]:
    if settings.broker_url.get_secret_value().startswith("filesystem:"):
        queue, control = settings.messages_dir / "queue", settings.messages_dir / "control"
        for folder in (queue, control):
            folder.mkdir(parents=True, exist_ok=True)
        return {"data_folder_in": str(queue), "data_folder_out": str(queue), "control_folder": str(control), "polling_interval": POLL_SECONDS}
    return {
        "socket_timeout": SECONDS,
        "socket_connect_timeout": SECONDS,
        "socket_keepalive": True,
        "health_check_interval": 25,
        "retry_on_timeout": True,
        "visibility_timeout": 3600,  # a redelivered message finds a live lease or a finished job and is a no-op
    }
