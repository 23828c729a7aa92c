"""What stands before the stream, as far as it needs no socket: who begins with a header, and what one for the server says."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from tproxyd.datapath.client_hello import NO_HELLO, ClientHello
from tproxyd.datapath.opening import compile_networks, make_header, names_of
from tproxyd.datapath.proxy_header import ProxyHeader, parse_header

CLIENT, SERVER = ("192.0.2.1", 56324), ("198.51.100.11", 443)


@pytest.mark.parametrize(
    ("networks", "host", "expected"),
    [
        (["192.0.2.0/24"], "192.0.2.0", True),
        (["192.0.2.0/24"], "192.0.2.255", True),
        (["192.0.2.0/24"], "192.0.3.0", False),
        (["192.0.2.0/24"], "::c000:201", False),
        (["192.0.2.7/32", "198.51.100.0/25"], "198.51.100.127", True),
        (["192.0.2.7/32", "198.51.100.0/25"], "198.51.100.128", False),
        (["2001:db8::/32"], "2001:db8:ffff::1", True),
        (["2001:db8::/32"], "2001:db9::", False),
        (["fe80::/10"], "fe80::1%eth0", True),
        (["::/1"], "192.0.2.1", False),
    ],
)
def test_who_is_in_the_networks(networks: list[str], host: str, expected: bool) -> None:
    assert compile_networks([ip_network(one) for one in networks])(host) is expected


def test_a_header_for_the_server_has_what_is_known() -> None:
    hello = ClientHello("app.example", ("h2", "http/1.1"))
    assert parse_header(make_header("v2", CLIENT, SERVER, 0xABC, hello)) == ProxyHeader(
        28 + 5 + 14 + 19, CLIENT, SERVER, "h2", "app.example", "0000000000000abc"
    )


@pytest.mark.parametrize("hello", [None, NO_HELLO])
def test_a_header_for_the_server_without_names(hello: ClientHello | None) -> None:
    header = parse_header(make_header("v2", CLIENT, SERVER, 1, hello))
    assert header is not None
    assert header[1:] == (CLIENT, SERVER, None, None, "0000000000000001")


def test_version_1_has_the_addresses_alone() -> None:
    hello = ClientHello("app.example", ("h2",))
    assert make_header("v1", CLIENT, SERVER, 1, hello) == b"PROXY TCP4 192.0.2.1 198.51.100.11 56324 443\r\n"


@pytest.mark.parametrize(
    ("alpn", "authority", "expected"),
    [
        (None, None, None),
        ("", None, None),
        ("h2", None, ClientHello(None, ("h2",))),
        (None, "app.example", ClientHello("app.example", ())),
        ("h2", "app.example", ClientHello("app.example", ("h2",))),
    ],
)
def test_the_names_that_a_header_hands_on(
    alpn: str | None, authority: str | None, expected: ClientHello | None
) -> None:
    assert names_of(ProxyHeader(28, CLIENT, SERVER, alpn, authority)) == expected
