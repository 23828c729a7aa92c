"""What is read of other programs' nft tables, whatever nft makes of them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from netns_tests.foreign import plant_foreign
from tproxyd import kernel
from tproxyd.errors import KernelError
from tproxyd.kernel import foreign_listing
from tproxyd.kernel.nft import run_program
from tproxyd.testing import Lab, Node
from tproxyd.testing.daemon import open_daemon

# What nft 1.0.6 was seen to print of a table that has an owner.
CUT_OFF = '{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"table": {"family": "inet", "name": "x", "flags": \n'


@contextmanager
def owned_table(node: Node) -> Iterator[None]:
    """Somebody else's, with its owner."""
    library = node.call(kernel.Library)
    library.run(
        "table inet owned {\n flags owner\n chain other {\n tcp dport 8080 drop\n }\n"
        " chain in {\n type filter hook input priority 0; policy accept;\n jump other\n }\n}\n"
    )
    try:
        yield
    finally:
        library.close()


async def test_each_table_by_itself_tells_what_all_of_them_do(
    sidecar_lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = sidecar_lab["host"]
    await plant_foreign(host)
    whole = [str(chain) for chain in host.call(kernel.list_chains)]
    assert "inet foreign in" in whole
    with owned_table(host):
        monkeypatch.setattr(
            foreign_listing,
            "run_program",
            lambda *words: CUT_OFF if words == ("-j", "-t", "list", "ruleset") else run_program(*words),
        )
        chains = host.call(kernel.list_chains)
    assert {(one.table, one.name, one.hook) for one in chains if one.table == "owned"} == {
        ("owned", "in", "input"),
        ("owned", "other", None),
    }
    assert [str(chain) for chain in chains if chain.table != "owned"] == whole
    assert [one.rules[0].text for one in chains if one.name in ("in", "other") and one.table == "owned"] == [
        "tcp dport 8080 drop",
        "jump other",
    ]


def add_table(name: bytes) -> None:
    """Through netlink, which takes any name."""

    def message(kind: int, flags: int, family: int, resource: int, attributes: bytes = b"") -> bytes:
        body = struct.pack(">BBH", family, 0, resource) + attributes
        return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body

    attribute = struct.pack("=HH", 4 + len(name) + 1, 1) + name + bytes(4 - len(name) % 4)  # NFTA_TABLE_NAME
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as sock:
        # NFNL_MSG_BATCH_BEGIN, NFT_MSG_NEWTABLE (request, acknowledge, create) for inet, NFNL_MSG_BATCH_END.
        sock.send(message(16, 1, 0, 10) + message(10 << 8, 0x405, 1, 0, attribute) + message(17, 1, 0, 10))
        sock.settimeout(3)
        assert struct.unpack_from("=i", sock.recv(4096), 16)[0] == 0


async def test_a_table_of_any_name_makes_nothing_of_tproxyd_fail(sidecar_lab: Lab) -> None:
    """Several words and lines; and what nft would obey: it is neither ours nor in the way."""
    host = sidecar_lab["host"]
    for name in (b"a b\nc", b'tproxyd_;include"/etc/shadow"'):
        host.call(add_table, name)
    async with open_daemon(host, '[capture]\nports = ["8080"]\n') as daemon:
        assert set(host.call(kernel.observe).tables) == {"tproxyd"}
        assert await daemon.stop() == 0
    assert host.call(kernel.observe).tables == {}


async def test_a_name_that_nft_would_obey_is_not_given_to_it(sidecar_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    host = sidecar_lab["host"]
    host.call(add_table, b'x;include"/etc/shadow"')
    asked: list[tuple[str, ...]] = []

    def run(*words: str) -> str:
        asked.append(words)
        return CUT_OFF if words == ("-j", "-t", "list", "ruleset") else run_program(*words)

    monkeypatch.setattr(foreign_listing, "run_program", run)
    with pytest.raises(KernelError, match="takes no such name"):
        host.call(kernel.list_chains)
    assert not any("include" in word for words in asked for word in words)


async def test_tables_that_are_switched_off_are_not_there(sidecar_lab: Lab) -> None:
    host = sidecar_lab["host"]
    drop = "chain in { type filter hook input priority 0; policy drop; }"
    await host.run("nft", "-f", "-", input=f"table inet off {{\n flags dormant\n {drop}\n}}\n")
    assert host.call(kernel.list_chains) == ()
    await host.run("nft", "-f", "-", input=f"table inet on {{\n {drop}\n}}\n")
    assert [str(chain) for chain in host.call(kernel.list_chains)] == ["inet on in"]


async def test_a_table_that_goes_meanwhile_is_not_missed(sidecar_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked at again; when that never ends, it is said."""
    host = sidecar_lab["host"]
    await plant_foreign(host)
    calls: list[tuple[str, ...]] = []

    def gone(*words: str) -> str:
        calls.append(words)
        if words[-1] == "ruleset" and words[0] == "-j":
            return CUT_OFF
        if words[3:] == ("table", "inet", "foreign") and calls.count(words) <= failures:
            raise KernelError("`nft` failed: Error: No such file or directory")
        return run_program(*words)

    monkeypatch.setattr(foreign_listing, "run_program", gone)
    failures = 1
    assert any(chain.table == "foreign" for chain in host.call(kernel.list_chains))
    calls, failures = [], 9
    with pytest.raises(KernelError, match="No such file"):
        host.call(kernel.list_chains)
