"""No address that is not public is ever connected to, however it is written and whatever a name means a moment later."""

from __future__ import annotations

import asyncio
import ipaddress
import random
from collections.abc import Sequence

import pytest

from app.addresses import Address, look_up, may_be_called, read_url, resolve
from app.exceptions import AddressError

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://example.com", Address("https", "example.com", 443, "/")),
        ("HTTPS://Example.COM/Hook?a=b&c", Address("https", "example.com", 443, "/Hook?a=b&c")),
        ("http://example.com:8080?x", Address("http", "example.com", 8080, "/?x")),
        ("https://xn--bcher-kva.example:443/", Address("https", "xn--bcher-kva.example", 443, "/")),
        ("https://93.184.216.34/", Address("https", "93.184.216.34", 443, "/")),
        ("https://[2606:4700::1111]:8443/", Address("https", "2606:4700::1111", 8443, "/")),
        ("https://a_b-c.example/%00", Address("https", "a_b-c.example", 443, "/%00")),
    ],
)
def test_a_url_is_taken_apart(url: str, address: Address) -> None:
    assert read_url(url, https_only=False) == address


def test_the_host_header_names_a_port_only_where_it_is_another() -> None:
    assert read_url("https://example.com:443/", https_only=True).authority == "example.com"
    assert read_url("http://example.com:443/", https_only=False).authority == "example.com:443"
    assert read_url("https://[2606:4700::1111]:8443/", https_only=True).authority == "[2606:4700::1111]:8443"


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "example.com",
            "//example.com",
            "ftp://example.com/",
            "file:///etc/passwd",
            "gopher://example.com/",
            "https://",
            "https:///x",
            "https:example.com",
        ),
        *("https://user@example.com/", "https://user:password@example.com/", "https://example.com#fragment", "https://example.com/#fragment"),
        *("https://example.com\\@127.0.0.1/", "https://127.0.0.1\\.example.com", "https://example.com/\\x", "https://exa mple.com", "https://example.com/ x"),
        *(
            "https://example.com/\n",
            "\nhttps://example.com/",
            "https://example.com\t/",
            "https://example.com/\x00",
            "https://example.com/ü",
            "https://bücher.example/",
        ),
        *("https://example。com/", "https://①②⑦.0.0.1/", "https://\u212aelvin.example/"),  # characters that some readers turn into others
        *("https://2130706433/", "https://0x7f000001/", "https://0x7f.1/", "https://0177.0.0.1/", "https://127.1/", "https://127.0.0.01/", "https://0/"),
        *(
            "https://127.0.0.0x1/",
            "https://a.0x/",
            "https://example.1/",
            "https://1.2.3.4.5/",
            "https://256.0.0.1/",
            "https://127.0.0.1./",
            "https://localhost./",
        ),
        *("https://[fe80::1%25eth0]/", "https://[fe80::1%eth0]/", "https://[::1", "https://::1/", "https://[127.0.0.1]/", "https://[:::1]/", "https://[::1]x/"),
        *("https://-a.example/", "https://a..example/", "https://.example/", f"https://{'a' * 64}.example/", f"https://{'a.' * 126}aa/", "https://a,b/"),
        *("https://example.com:/", "https://example.com:x/", "https://example.com:-1/", "https://example.com:443:443/", "https://example.com:４４３/"),
    ],
)
def test_an_odd_url_is_refused(url: str) -> None:
    with pytest.raises(AddressError) as refused:
        read_url(url, https_only=False)
    assert refused.value.code == "address_invalid"


@pytest.mark.parametrize("port", [0, 1, 22, 25, 79, 444, 1023, 65536, 99999])
def test_a_port_of_other_services_is_refused(port: int) -> None:
    with pytest.raises(AddressError) as refused:
        read_url(f"https://example.com:{port}/", https_only=True)
    assert refused.value.code == "address_port_refused"
    assert read_url("https://example.com:65535/", https_only=True).port == 65535


def test_production_calls_only_https() -> None:
    with pytest.raises(AddressError) as refused:
        read_url("http://example.com/", https_only=True)
    assert refused.value.code == "address_not_https"


@pytest.mark.parametrize(
    "ip",
    [
        *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "168.63.129.16", "169.254.169.254", "172.16.0.1"),
        *("172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.19.255.255", "203.0.113.7", "224.0.0.1", "239.1.1.1"),
        *("240.0.0.1", "255.255.255.255", "::", "::1", "::2", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1"),
        *("64:ff9b::169.254.169.254", "64:ff9b:1::1", "100::1", "2001::1", "2001:0:7f00:1::", "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::"),
        *("2002:5db8:d822::", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "4000::1"),
    ],
)
def test_an_address_that_is_not_public_is_refused(ip: str) -> None:
    assert not may_be_called(ip, ())


@pytest.mark.parametrize(
    "ip", ["1.1.1.1", "93.184.216.34", "172.32.0.1", "100.128.0.1", "::ffff:1.1.1.1", "64:ff9b::1.1.1.1", "2606:4700::1111", "2a00:1450:4001:80b::200e"]
)
def test_a_public_address_is_called(ip: str) -> None:
    assert may_be_called(ip, ())


def test_nothing_that_python_knows_as_private_passes() -> None:
    pick = random.Random(1)
    drawn = [ipaddress.IPv4Address(pick.getrandbits(32)) for _ in range(20_000)] + [ipaddress.IPv6Address(pick.getrandbits(128)) for _ in range(5_000)]
    for address in drawn:
        if may_be_called(str(address), ()):
            assert address.is_global, address
            assert not address.is_multicast, address


def test_an_operator_may_allow_networks() -> None:
    assert may_be_called("127.0.0.1", LOOPBACK)
    assert may_be_called("::ffff:127.0.0.1", LOOPBACK)
    assert not may_be_called("10.0.0.1", LOOPBACK)
    assert not may_be_called("::1", LOOPBACK)
    assert may_be_called("fd00::1", (ipaddress.ip_network("fd00::/8"),))


# ---------------------------------------------------------------- names


class Names:
    """A resolver whose answers change from one look-up to the next."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked += 1
        return self.answers.pop(0)


def resolved(url: str, names: Names) -> Sequence[str]:
    return asyncio.run(resolve(read_url(url, https_only=True), (), names))


def test_one_address_that_is_not_public_is_one_too_many() -> None:
    assert resolved("https://example.com/", Names(["1.1.1.1", "2606:4700::1111"])) == ["1.1.1.1", "2606:4700::1111"]
    for answer in (["1.1.1.1", "127.0.0.1"], ["10.0.0.1", "1.1.1.1"], ["2606:4700::1111", "::ffff:10.0.0.1"]):
        with pytest.raises(AddressError) as refused:
            resolved("https://example.com/", Names(answer))
        assert refused.value.code == "address_not_public"
        assert "10.0.0.1" not in refused.value.message  # a name of the inside is not looked up for a user


def test_an_address_is_not_looked_up() -> None:
    names = Names()
    assert resolved("https://1.1.1.1/", names) == ["1.1.1.1"]
    with pytest.raises(AddressError):
        resolved("https://127.0.0.1/", names)
    assert names.asked == 0


def test_a_name_without_an_address_is_refused() -> None:
    with pytest.raises(AddressError) as refused:
        resolved("https://example.com/", Names([]))
    assert refused.value.code == "address_unknown"
    with pytest.raises(AddressError) as refused:
        asyncio.run(resolve(read_url("https://nothing.invalid/", https_only=True), (), look_up))
    assert refused.value.code == "address_unknown"
    with pytest.raises(AddressError) as refused:
        asyncio.run(resolve(read_url("https://localhost/", https_only=True), (), look_up))
    assert refused.value.code == "address_not_public"


def test_a_name_that_nobody_answers_for_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(60)
        return []

    monkeypatch.setattr("app.addresses.LOOK_UP_SECONDS", 0.05)
    with pytest.raises(AddressError) as refused:
        asyncio.run(resolve(read_url("https://example.com/", https_only=True), (), never))
    assert refused.value.code == "address_unknown"
