"""Pages of living connections: whole, in order, bounded, whatever begins and ends meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tproxyd.datapath import listing as room
from tproxyd.datapath.connection import Connection
from tproxyd.datapath.listing import End, Filter, Listing, ListOrder, read_end
from tproxyd.errors import UsageError


def living(
    identity: int, *, source: str = "192.0.2.1", to: Any = ("203.0.113.7", 80), workload: str = "host"
) -> Connection:
    content = {
        "identity": identity,
        "workload": SimpleNamespace(name=workload),
        "client": (source, 40000),
        "destination": to,
        "upstream": None,
        "target": None,
        "upstream_source": None,
        "hello": None,
        "rule": None,
        "started": 1.0,
        "stage": "dialling",
        "downstream": SimpleNamespace(received=7),
    }
    return cast(Connection, SimpleNamespace(**content))


def pages(listing: Listing, which: Filter = Filter()) -> Iterator[list[int]]:  # noqa: B008  # frozen
    after = ""
    while True:
        page = listing.page(ListOrder(1, which, after), 3.5)
        assert len(page.connections) <= room._TOLD
        yield [int(one.id, 16) for one in page.connections]
        after = page.after
        if not after:
            return


def listed(listing: Listing, which: Filter = Filter()) -> list[int]:  # noqa: B008  # as above
    return [identity for page in pages(listing, which) for identity in page]


@pytest.mark.parametrize("count", [0, 1, 32, 33, 1000])
def test_each_is_listed_once_in_the_order_of_their_beginning(count: int) -> None:
    first = 0xFFF0_0000_0000_0000
    connections = {first + number: living(first + number) for number in range(count)}
    assert listed(Listing(connections)) == list(connections)


def test_what_ends_or_begins_between_two_pages_moves_nothing() -> None:
    connections = {number: living(number) for number in range(1, 101)}
    listing = Listing(connections)
    some = pages(listing)
    got = next(some)
    for number in (5, 40, 41, 100):
        del connections[number]
    connections[101] = living(101)
    assert listed(Listing(connections)) == [number for number in range(1, 102) if number not in (5, 40, 41, 100)]
    assert listed(listing)  # of somebody else, to its end
    got += [identity for page in some for identity in page]
    assert [number for number in got if number != 101] == [n for n in range(1, 101) if n not in (40, 41, 100)]


def test_a_page_looks_at_so_many_however_few_of_them_are_wanted() -> None:
    connections = {
        number: living(number, source="192.0.2.9" if number == 5000 else "192.0.2.1") for number in range(1, 5001)
    }
    some = list(pages(Listing(connections), Filter(source=End("192.0.2.9/32"))))
    assert [identity for page in some for identity in page] == [5000]
    assert len(some) == -(-5000 // room._LOOKED_AT)


FILTERS = [
    (Filter(), {1, 2, 3, 4, 5}),
    (Filter(workload="web"), {2}),
    (Filter(source=read_end("192.0.2.1", "")), {1, 5}),
    (Filter(source=read_end("192.0.2.0/24", "")), {1, 2, 5}),
    (Filter(source=read_end("fe80::1", "")), {4}),
    (Filter(source=read_end("fe80::/10", "")), {4}),
    (Filter(source=read_end("[fe80::1]", "")), {4}),
    (Filter(source=read_end("192.0.2.1:40001", "")), set()),
    (Filter(destination=read_end(":443", "")), {3}),
    (Filter(destination=read_end("[2001:db8::7]:443", "")), {3}),
    (Filter(destination=read_end("203.0.113.0/24:80", "")), {1, 2, 4}),
    (Filter("host", read_end("192.0.2.1", ""), read_end("203.0.113.7", "")), {1}),
]


@pytest.mark.parametrize(("which", "expected"), FILTERS, ids=range(len(FILTERS)))
def test_filters(which: Filter, expected: set[int]) -> None:
    connections = {
        1: living(1),
        2: living(2, source="192.0.2.77", workload="web"),
        3: living(3, source="2001:db8::9", to=("2001:db8::7", 443, 0, 0)),
        4: living(4, source="fe80::1%eth0"),
        5: living(5, to=None),  # not known yet
    }
    assert set(listed(Listing(connections), which)) == expected


@pytest.mark.parametrize(
    "text", ["", ":", "x", "192.0.2.1:", "192.0.2.1:65536", "192.0.2.1:x", "[192.0.2.1", "::1:80:x", "1.2.3.4/33"]
)
def test_what_is_no_end_is_said_in_a_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"--source .* is no address, network or port; write "):
        read_end(text, "--source")
