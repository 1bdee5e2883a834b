"""Which addresses the service calls because a user says so: public ones only, so that nobody reaches what lies behind it (server-side request forgery).

A URL is read by one strict pattern, and the connection is made from its parts, so that no two readers of it differ. At every call the host is resolved once, each
of its addresses is checked, and the connection goes to one of these, whatever the name means a moment later.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from app.exceptions import AddressError

Network = IPv4Network | IPv6Network
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]  # host and port -> the host's addresses; raises OSError

URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f]*:[0-9a-f:.]*\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?(?P<target>(?:[/?][!\"$-\[\]-~]*)?)",
    re.ASCII | re.IGNORECASE,
)
LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
NAME = re.compile(rf"(?=.{{1,253}}$){LABEL}(?:\.{LABEL})*")
NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")  # what ends so is an IPv4 address to a resolver, however odd
LOWEST_PORT = 1024  # below it lie, but for these two, the ports of mail, shells and files
PORTS = {"http": 80, "https": 443}
LOOK_UP_SECONDS = 5.0

GLOBAL = ip_network("2000::/3")  # all of IPv6 that is routed
TRANSLATED = ip_network("64:ff9b::/96")  # NAT64: the last 32 bits are the IPv4 address that is reached
REFUSED = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's host of virtual machines
        "169.254.0.0/16",  # link-local; metadata of clouds
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",
        "2001::/23",  # Teredo and other protocols
        "2001:db8::/32",
        "2002::/16",  # 6to4, which holds an IPv4 address
        "3fff::/20",
    )
)


@dataclass(frozen=True)
class Address:
    """A URL in its parts."""

    scheme: str
    host: str  # in lower case; an IPv6 address without brackets
    port: int
    target: str  # path and query

    @property
    def authority(self) -> str:
        """As in the header `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def read_url(url: str, *, https_only: bool) -> Address:
    """The parts of a URL that may be called as far as its text tells. Raises AddressError."""
    parts = URL.fullmatch(url)
    host = "" if parts is None else parts["host"].strip("[]").lower()
    if parts is None or not (_is_ip(host) or (NAME.fullmatch(host) and not NUMBER.fullmatch(host))):
        raise AddressError(
            "This is not a URL of the form https://host[:port]/path.",
            code="address_invalid",
            hint="Write it in ASCII, without user, password and fragment; an international name as xn--….",
        )
    scheme = parts["scheme"].lower()
    if https_only and scheme != "https":
        raise AddressError("The address is not https.", code="address_not_https", hint="This service calls only https addresses.")
    port = int(parts["port"] or PORTS[scheme])
    if port not in PORTS.values() and not LOWEST_PORT <= port < 2**16:
        raise AddressError(f"Port {port} is not called.", code="address_port_refused", hint=f"Use 80, 443, or one from {LOWEST_PORT} on.")
    target = parts["target"]
    return Address(scheme, host, port, target if target.startswith("/") else f"/{target}")


async def look_up(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, as the system tells them, best first."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def resolve(address: Address, allowed: Sequence[Network], resolver: Resolver = look_up) -> Sequence[str]:
    """The IP addresses to connect to, every one of them public or in an allowed network. Raises AddressError."""
    try:
        async with asyncio.timeout(LOOK_UP_SECONDS):
            found = [address.host] if _is_ip(address.host) else await resolver(address.host, address.port)
    except OSError:
        found = []
    if not found:
        raise AddressError(f"The host '{address.host}' has no address.", code="address_unknown", hint="Check the name, as this service looks it up.")
    if not all(may_be_called(ip, allowed) for ip in found):  # one is too many: which one is connected to must not matter
        raise AddressError(
            f"The host '{address.host}' has an address that is not public.",
            code="address_not_public",
            hint="Use a public address; an operator may allow networks by ESPALIER_WEBHOOK_NETWORKS or ESPALIER_SINK_NETWORKS.",
        )
    return found


def may_be_called(ip: str, allowed: Sequence[Network]) -> bool:
    """Whether an IP address, or the IPv4 address that it stands for, is public or in an allowed network."""
    address = _reached(ip_address(ip))
    if any(address in network for network in allowed):
        return True
    return (address.version == 4 or address in GLOBAL) and not any(address in network for network in REFUSED)


def _reached(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in TRANSLATED:
            return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _is_ip(host: str) -> bool:
    """Whether it is an IP address in its usual form."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return "%" not in host
