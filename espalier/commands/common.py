"""What several commands share: exit codes, arguments, and what the shell is offered to complete them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from espalier.client import Client
from espalier.errors import ClientError

SUCCEEDED, FAILED, USAGE, UNREACHABLE, NOT_MET = range(5)
PATIENCE_SECONDS = 3.0
COMPLETION_SECONDS = 0.4  # to connect, and again to answer
OFFERED = 50

Offers = list[tuple[str, str]]
"""Values to complete with, each with what tells them apart."""


def connect() -> Client:
    return Client(patience=PATIENCE_SECONDS)


def new_app(**options: Any) -> typer.Typer:
    return typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, **options)


def _offered(ask: Callable[[Client], Iterable[tuple[str, str]]], incomplete: str) -> Offers:
    """Nothing, and no word, where the service is away or refuses."""
    try:
        with Client(timeout=COMPLETION_SECONDS, patience=0) as client:
            return [(value, told) for (value, told), _ in zip(ask(client), range(OFFERED), strict=False) if value.startswith(incomplete)]
    except (ClientError, ValueError, LookupError):
        return []


def offer_jobs(incomplete: str) -> Offers:
    return _offered(lambda client: ((job["id"], f"{job['state']} {job['method']} {job['model']}") for job in client.jobs(page_size=OFFERED)), incomplete)


def offer_methods(incomplete: str) -> Offers:
    return _offered(lambda client: ((method["name"], method["summary"]) for method in client.methods()), incomplete)


def offer_queues(incomplete: str) -> Offers:
    return _offered(lambda client: ((queue["name"], f"{len(queue['workers'])} workers") for queue in client.queues()), incomplete)


JobId = Annotated[str, typer.Argument(help="The job's id, job_…", metavar="JOB", autocompletion=offer_jobs)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
