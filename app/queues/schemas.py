"""What is told about the classes of workers."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field


class Out(BaseModel):
    model_config = ConfigDict(from_attributes=True, frozen=True)


class Device(Out):
    """A GPU of a worker."""

    name: str = Field(description="As its driver names it.", examples=["NVIDIA H100 80GB HBM3"])
    memory_bytes: int = Field(description="Its memory.", examples=[85_017_493_504])


class QueueWorker(Out):
    """A live worker. It runs one job at a time."""

    devices: list[Device] = Field(description="Its GPUs, of which a job uses the first; empty: it computes on the CPU.")
    host_bytes: int = Field(description="Memory of the machine that a job may take.", examples=[137_438_953_472])
    disk_bytes: int = Field(description="Free disk for a job's work.", examples=[500_000_000_000])
    draining: bool = Field(description="Whether it shuts down and takes no more jobs.", examples=[False])
    version: str = Field(description="Release of the service that it runs.", examples=["0.1.0"])
    seen_at: datetime = Field(description="When it was last heard of (UTC).", examples=["2026-11-22T01:02:03.456Z"])


class Queue(Out):
    """A class of workers, e.g. all that have the same GPU, and how busy it is."""

    name: str = Field(description="What to give as `queue`.", examples=["default"])
    workers: list[QueueWorker] = Field(description="Its live workers; empty: its jobs wait until one comes.")
    queued: int = Field(description="Jobs that wait, of all tenants.", examples=[3])
    running: int = Field(description="Jobs that run, of all tenants.", examples=[1])
    oldest_queued_at: datetime | None = Field(description="When the job that waits longest was submitted (UTC); null where none waits.", examples=[None])


class QueueList(Out):
    """All classes that have live workers or unfinished jobs, by name."""

    items: list[Queue] = Field(description="The classes.")


class Placement(Out):
    """Where a job would run."""

    queue: str = Field(description="The class of workers that would get it.", examples=["default"])
    live_workers: int = Field(description="Workers of this class that live; 0: the job would wait until one comes.", examples=[2])
    fits: bool | None = Field(
        description="Whether one of them has the memory that the job is expected to need; null where its need is not known, or none lives.", examples=[True]
    )
