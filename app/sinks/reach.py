"""Which servers a sink may reach: public ones, and those in networks that the operator allows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import ip_address

from app.addresses import Address, read_url, resolve
from app.exceptions import AddressError
from app.settings import Settings
from app.sinks.schemas import S3, Hub, Mlflow


def look_up(url: str, settings: Settings) -> tuple[Address, Sequence[str]]:
    """-> the parts of a URL, and the IP addresses that may be connected to now. Raises AddressError.

    In production, plain http, over which secrets travel openly, leads only into an allowed network.
    """
    address = read_url(url, https_only=False)
    found = asyncio.run(resolve(address, settings.sink_networks))
    inside = all(any(ip_address(ip) in network for network in settings.sink_networks) for ip in found)
    if address.scheme == "http" and settings.environment == "production" and not inside:
        hint = "Use https; an operator may allow http in networks of their own by ESPALIER_SINK_NETWORKS."
        raise AddressError("The address is not https.", code="address_not_https", hint=hint)
    return address, found


def check(sink: Hub | Mlflow | S3, settings: Settings, pointer: str) -> None:
    """Raises AddressError, which points into the request, for a server that may not be reached now. The hub's is the operator's choice."""
    field, url = ("tracking_uri", sink.tracking_uri) if isinstance(sink, Mlflow) else ("endpoint", sink.endpoint if isinstance(sink, S3) else None)
    if url is None:
        return
    try:
        look_up(url, settings)
    except AddressError as error:
        error.pointer = f"{pointer}/{field}"
        raise
