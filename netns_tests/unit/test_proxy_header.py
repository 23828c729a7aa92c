"""PROXY headers: bytes written by hand after HAProxy's doc/proxy-protocol.txt (its sections in parentheses), and hypothesis against them."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxyd.datapath.proxy_header import MOST_BYTES, InvalidHeaderError, ProxyHeader, make_v1, make_v2, parse_header

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
CLIENT, SERVER = ("192.0.2.1", 56324), ("198.51.100.11", 443)
CLIENT6, SERVER6 = ("2001:db8::1", 56324), ("2001:db8:0:1::b", 443)
TCP4 = bytes.fromhex("c0000201 c633640b dc04 01bb")
TCP6 = bytes.fromhex("20010db8000000000000000000000001 20010db800000001000000000000000b dc04 01bb")


def table(rows: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """Rows of (name, ...) as arguments of parametrize; the name becomes the id."""
    return {"argvalues": [row[1:] for row in rows], "ids": [row[0] for row in rows]}


def v2(kind: int, content: bytes, *, command: int = 0x21) -> bytes:
    return SIGNATURE + bytes((command, kind)) + len(content).to_bytes(2, "big") + content


def tlv(kind: int, value: bytes) -> bytes:
    return bytes((kind,)) + len(value).to_bytes(2, "big") + value


def crc32c(data: bytes) -> int:
    """Bit by bit, as a polynomial is divided: another way than by a table."""
    crc = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            odd = (crc ^ byte >> bit) & 1
            crc = crc >> 1 ^ (0x82F63B78 if odd else 0)
    return crc ^ 0xFFFFFFFF


def with_crc(kind: int, before: bytes, after: bytes = b"") -> bytes:
    """A header with a right checksum between two parts of its content."""
    blank = v2(kind, before + tlv(3, bytes(4)) + after)
    at = len(SIGNATURE) + 4 + len(before) + 3
    return blank[:at] + crc32c(blank).to_bytes(4, "big") + blank[at + 4 :]


def outcome(data: bytes) -> ProxyHeader | type[InvalidHeaderError] | None:
    try:
        return parse_header(data)
    except InvalidHeaderError:
        return InvalidHeaderError


# Headers that are made

MADE_V1 = [
    ("the example of 2.1", ("192.168.0.1", 56324), ("192.168.0.11", 443),
     b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"),
    ("the longest of IPv4", ("255.255.255.255", 65535), ("255.255.255.255", 65535),
     b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n"),
    ("IPv6 with flow and scope", ("2001:db8::1", 1, 7, 2), ("2001:DB8::2", 0, 0, 0),
     b"PROXY TCP6 2001:db8::1 2001:db8::2 1 0\r\n"),
    ("a scope in the address", ("fe80::1%eth0", 1, 0, 2), ("fe80::2%eth0", 2, 0, 2),
     b"PROXY TCP6 fe80::1 fe80::2 1 2\r\n"),
    ("mapped", ("::ffff:192.0.2.1", 1, 0, 0), ("::ffff:c633:640b", 2, 0, 0),
     b"PROXY TCP4 192.0.2.1 198.51.100.11 1 2\r\n"),
    ("one of the two mapped", ("::ffff:192.0.2.1", 1, 0, 0), ("198.51.100.11", 2),
     b"PROXY TCP4 192.0.2.1 198.51.100.11 1 2\r\n"),
    ("IPv4-compatible, which is IPv6", ("::192.0.2.1", 1, 0, 0), ("::1", 2, 0, 0),
     b"PROXY TCP6 ::c000:201 ::1 1 2\r\n"),
]  # fmt: skip

MADE_V2: list[tuple[str, Any, Any, dict[str, str], bytes]] = [
    ("IPv4", CLIENT, SERVER, {}, SIGNATURE + b"\x21\x11\x00\x0c" + TCP4),
    ("IPv6", (*CLIENT6, 0, 0), (*SERVER6, 0, 0), {}, SIGNATURE + b"\x21\x21\x00\x24" + TCP6),
    ("mapped", ("::ffff:192.0.2.1", 56324, 0, 0), ("::ffff:198.51.100.11", 443, 0, 0), {},
     SIGNATURE + b"\x21\x11\x00\x0c" + TCP4),
    ("a scope in the address", ("fe80::1%eth0", 1, 0, 2), ("fe80::2%eth0", 2, 0, 2), {},
     SIGNATURE + b"\x21\x21\x00\x24" + bytes.fromhex("fe80" + "00" * 13 + "01" + "fe80" + "00" * 13 + "02" + "00010002")),
    ("all TLVs", CLIENT, SERVER, {"alpn": "h2", "authority": "app.example", "unique_id": "id-7"},
     SIGNATURE + b"\x21\x11\x00\x26" + TCP4 + b"\x01\x00\x02h2" + b"\x02\x00\x0bapp.example" + b"\x05\x00\x04id-7"),
    ("one TLV, empty", CLIENT, SERVER, {"authority": ""}, SIGNATURE + b"\x21\x11\x00\x0f" + TCP4 + b"\x02\x00\x00"),
    ("UTF-8", CLIENT, SERVER, {"authority": "ä.example"},
     SIGNATURE + b"\x21\x11\x00\x19" + TCP4 + b"\x02\x00\x0a\xc3\xa4.example"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "destination", "expected"), **table(MADE_V1))
def test_a_line_of_version_1(source: Any, destination: Any, expected: bytes) -> None:
    assert make_v1(source, destination) == expected


@pytest.mark.parametrize(("source", "destination", "texts", "expected"), **table(MADE_V2))
def test_a_header_of_version_2(source: Any, destination: Any, texts: dict[str, str], expected: bytes) -> None:
    assert make_v2(source, destination, **texts) == expected


@pytest.mark.parametrize("make", [make_v1, make_v2])
@pytest.mark.parametrize(
    ("source", "destination", "complaint"),
    [
        (CLIENT, SERVER6, "one family, not '192.0.2.1' and '2001:db8:0:1::b'"),
        (("::ffff:192.0.2.1", 1), CLIENT6, "one family"),
        (("app.example", 1), SERVER, "'app.example' is no IP address"),
        (CLIENT, ("192.0.2.1", 65536), "65536 is no port"),
        (CLIENT, ("192.0.2.1", -1), "-1 is no port"),
        (("192.0.2.1\r\n", 1), SERVER, "is no IP address"),
    ],
)
def test_what_no_header_can_say(make: Any, source: Any, destination: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make(source, destination)


@pytest.mark.parametrize(("text", "most"), [("alpn", 255), ("authority", 255), ("unique_id", 128)])
def test_a_text_has_a_bound_in_bytes(text: str, most: int) -> None:
    header = parse_header(make_v2(CLIENT, SERVER, **{text: "x" * most}))
    assert header
    assert getattr(header, text) == "x" * most
    with pytest.raises(ValueError, match=f"at most {most}"):
        make_v2(CLIENT, SERVER, **{text: "ä" + "x" * (most - 1)})


# Headers that are read

BOTH = {"source": CLIENT, "destination": SERVER}
BOTH6 = {"source": CLIENT6, "destination": SERVER6}

READ: list[tuple[str, bytes, dict[str, Any]]] = [
    ("IPv4", b"PROXY TCP4 192.0.2.1 198.51.100.11 56324 443\r\n", BOTH),
    ("IPv6", b"PROXY TCP6 2001:db8::1 2001:db8:0:1::b 56324 443\r\n", BOTH6),
    ("IPv6 in full, in capitals", b"PROXY TCP6 2001:0DB8:0000:0000:0000:0000:0000:0001 2001:DB8:0:1:0:0:0:B 56324 443\r\n",
     BOTH6),
    ("the longest of IPv6", b"PROXY TCP6 " + (b"ffff:" * 8)[:-1] + b" " + (b"ffff:" * 8)[:-1] + b" 65535 65535\r\n",
     {"source": ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535),
      "destination": ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535)}),
    ("zeros", b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n", {"source": ("0.0.0.0", 0), "destination": ("0.0.0.0", 0)}),
    ("zeros of IPv6", b"PROXY TCP6 :: 0:0:0:0:0:0:0:0 0 0\r\n", {"source": ("::", 0), "destination": ("::", 0)}),
    ("zeros at the ends", b"PROXY TCP6 1:2:3:4:5:6:7:: ::2:3:4:5:6:7:8 1 2\r\n",
     {"source": ("1:2:3:4:5:6:7:0", 1), "destination": ("0:2:3:4:5:6:7:8", 2)}),
    ("mapped", b"PROXY TCP6 ::ffff:192.0.2.1 0:0:0:0:0:ffff:198.51.100.11 56324 443\r\n", BOTH),
    ("unknown", b"PROXY UNKNOWN\r\n", {}),
    ("unknown, the worst case of 2.1", b"PROXY UNKNOWN " + (b"ffff:" * 8)[:-1] + b" " + (b"ffff:" * 8)[:-1] + b" 65535 65535\r\n", {}),
    ("unknown, whatever follows", b"PROXY UNKNOWN  \0 \xff 1.2.3\r\n", {}),
    ("v2 IPv4", v2(0x11, TCP4), BOTH),
    ("v2 IPv6", v2(0x21, TCP6), BOTH6),
    ("v2 mapped", v2(0x21, bytes(10) + b"\xff\xff" + TCP4[:4] + bytes(10) + b"\xff\xff" + TCP4[4:]), BOTH),
    ("v2 local", v2(0x00, b"", command=0x20), {}),
    ("v2 local of IPv4, without addresses", v2(0x11, b"", command=0x20), {}),
    ("v2 local, to be skipped", v2(0xFF, b"\x02\x00\x03app", command=0x20), {}),
    ("v2 unspecified", v2(0x00, b""), {}),
    ("v2 unspecified, of no known form", v2(0x00, b"\x02\xff\xff"), {}),
    ("v2 unspecified, with TLVs", v2(0x00, tlv(2, b"app")), {"authority": "app"}),
    ("v2 half specified", v2(0x10, tlv(2, b"app")), {}),
    ("v2 datagrams", v2(0x12, TCP4 + tlv(2, b"app")), {"authority": "app"}),
    ("v2 datagrams of IPv6", v2(0x22, TCP6 + tlv(2, b"app")), {"authority": "app"}),
    ("v2 Unix", v2(0x31, bytes(216) + tlv(2, b"app")), {"authority": "app"}),
    ("v2 Unix datagrams", v2(0x32, bytes(216)), {}),
    ("v2 TLVs, also unknown ones", v2(0x11, TCP4 + tlv(4, b"") + tlv(0x20, b"\x01\0\0\0\0" + tlv(0x21, b"TLSv1.3")) + tlv(1, b"h2") + tlv(0xEA, b"\x01vpce")
     + tlv(2, b"app.example") + tlv(5, b"id-7")), {**BOTH, "alpn": "h2", "authority": "app.example", "unique_id": "id-7"}),
    ("v2 twice: the first", v2(0x11, TCP4 + tlv(2, b"one") + tlv(2, b"two")), {**BOTH, "authority": "one"}),
    ("v2 not for a log", v2(0x11, TCP4 + tlv(1, b"a\0b") + tlv(2, b"a\r\nb") + tlv(5, b"\xff")), BOTH),
    ("v2 a host name that is none", v2(0x11, TCP4 + tlv(2, b"x" * 256)), BOTH),
    ("v2 checksum", with_crc(0x11, TCP4 + tlv(2, b"app"), tlv(1, b"h2")), {**BOTH, "alpn": "h2", "authority": "app"}),
    ("v2 checksum, no addresses", with_crc(0x00, b""), {}),
    ("v2 the longest", v2(0x11, TCP4 + tlv(4, bytes(MOST_BYTES - 16 - 12 - 3))), BOTH),
]  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), **table(READ))
def test_a_header_is_read_when_its_last_byte_is_there(data: bytes, expected: dict[str, Any]) -> None:
    assert len(data) <= MOST_BYTES
    for end in range(len(data)):
        assert parse_header(data[:end]) is None
    assert parse_header(data) == parse_header(data + data) == ProxyHeader(len(data), **expected)


def test_a_checksum_of_the_known_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value in the catalogues, for the reckoning of these tests
    header = with_crc(0x11, TCP4)
    assert (
        header.hex()
        == "0d0a0d0a000d0a515549540a21110013c0000201c633640bdc0401bb030004"
        + crc32c(v2(0x11, TCP4 + tlv(3, bytes(4)))).to_bytes(4, "big").hex()
    )
    for at in range(16, len(header)):
        if not 28 <= at < 31:  # there it is no checksum any more
            spoilt = header[:at] + bytes((header[at] ^ 0x40,)) + header[at + 1 :]
            with pytest.raises(InvalidHeaderError, match="CRC32C"):
                parse_header(spoilt)


# What is no header: how it begins well, and the first bytes that make it none.

WRONG: list[tuple[str, bytes, bytes]] = [
    ("something else", b"", b"G"),
    ("lower case", b"", b"p"),
    ("another word", b"PROX", b"I"),
    ("no space", b"PROXY", b"\t"),
    ("two spaces", b"PROXY ", b" "),
    ("no protocol", b"PROXY ", b"\r"),
    ("another protocol", b"PROXY TCP", b"5"),
    ("a protocol in lower case", b"PROXY ", b"t"),
    ("a longer protocol", b"PROXY UNKNOWN", b"S"),
    ("a protocol and no more", b"PROXY TCP4", b"\r"),
    ("only LF", b"PROXY UNKNOWN", b"\n"),
    ("LF within the rest", b"PROXY UNKNOWN a", b"\n"),
    ("CR within the rest", b"PROXY UNKNOWN a\r", b"b"),
    ("two CR", b"PROXY UNKNOWN\r", b"\r"),
    ("too long a rest", b"PROXY UNKNOWN " + b"x" * 91, b"x"),
    ("too long a rest, CR at the end", b"PROXY UNKNOWN " + b"x" * 91 + b"\r", b"x"),
    ("two spaces before an address", b"PROXY TCP4 ", b" "),
    ("a name", b"PROXY TCP4 ", b"a"),
    ("an octet of three digits", b"PROXY TCP4 25", b"6"),
    ("a leading zero", b"PROXY TCP4 192.0", b"2"),
    ("an octet too many", b"PROXY TCP4 192.0.2.1", b"."),
    ("an octet too few", b"PROXY TCP4 192.0.2", b" "),
    ("no octet", b"PROXY TCP4 192.", b"."),
    ("the other family", b"PROXY TCP4 200", b"1"),
    ("the other family for IPv6", b"PROXY TCP6 192", b"."),
    ("the second of the other family", b"PROXY TCP4 192.0.2.1 200", b"1"),
    ("five hexadecimal digits", b"PROXY TCP6 2001:db8::0001", b"1"),
    ("no hexadecimal digit", b"PROXY TCP6 2001:db8::", b"g"),
    ("three colons", b"PROXY TCP6 2001::", b":"),
    ("two gaps", b"PROXY TCP6 2001::1:", b":"),
    ("a colon before", b"PROXY TCP6 :", b"1"),
    ("a colon behind", b"PROXY TCP6 1:", b" "),
    ("too many groups", b"PROXY TCP6 1:2:3:4:5:6:7:8", b":"),
    ("a gap for nothing", b"PROXY TCP6 1:2:3:4:5:6:7::", b"8"),
    ("too few groups", b"PROXY TCP6 1:2:3:4:5:6:7", b" "),
    ("a scope", b"PROXY TCP6 fe80::1", b"%"),
    ("brackets", b"PROXY TCP6 ", b"["),
    ("NUL in an address", b"PROXY TCP4 192.0.2.1", b"\0"),
    ("not ASCII", b"PROXY TCP4 192.0.2.", b"\xb2"),
    ("a port with a zero before", b"PROXY TCP4 192.0.2.1 192.0.2.2 0", b"1"),
    ("a port too large", b"PROXY TCP4 192.0.2.1 192.0.2.2 6553", b"6"),
    ("a port of six digits", b"PROXY TCP4 192.0.2.1 192.0.2.2 12345", b"6"),
    ("a port with a sign", b"PROXY TCP4 192.0.2.1 192.0.2.2 ", b"+"),
    ("a port in other digits", b"PROXY TCP4 192.0.2.1 192.0.2.2 1", b"\xb2"),
    ("no port", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 ", b"\r"),
    ("one port", b"PROXY TCP4 192.0.2.1 192.0.2.2 1", b"\r"),
    ("a port that ends in LF", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2", b"\n"),
    ("a space before the end", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2", b" "),
    ("CR alone", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r", b"G"),
    ("v2 another signature", SIGNATURE[:11], b"\r"),
    ("v2 version 1", SIGNATURE, b"\x11"),
    ("v2 version 3", SIGNATURE, b"\x31"),
    ("v2 another command", SIGNATURE, b"\x22"),
    ("v2 another family", SIGNATURE + b"\x21", b"\x41"),
    ("v2 another protocol", SIGNATURE + b"\x21", b"\x13"),
    ("v2 too long", SIGNATURE + b"\x21\x11" + b"\x0f", b"\xf1"),
    ("v2 too long, local", SIGNATURE + b"\x20\x00" + b"\xff", b"\xff"),
    ("v2 too short for IPv4", SIGNATURE + b"\x21\x11" + b"\x00", b"\x0b"),
    ("v2 too short for IPv6", SIGNATURE + b"\x21\x21" + b"\x00", b"\x23"),
    ("v2 too short for UDP", SIGNATURE + b"\x21\x12" + b"\x00", b"\x0b"),
    ("v2 too short for Unix", SIGNATURE + b"\x21\x31" + b"\x00", b"\xd7"),
    ("v2 half a TLV", v2(0x11, TCP4 + b"\x04\x00")[:-1], b"\x00"),
    ("v2 a TLV too long", v2(0x11, TCP4 + b"\x04\x00\x02\x00")[:-1], b"\x00"),
    ("v2 the second TLV too long", v2(0x11, TCP4 + tlv(2, b"app") + b"\x01\xff\xff\x00")[:-1], b"\x00"),
    ("v2 a TLV of datagrams too long", v2(0x12, TCP4 + b"\x04\x00\x01")[:-1], b"\x01"),
    ("v2 a unique id too long", v2(0x11, TCP4 + tlv(5, b"x" * 129))[:-1], b"x"),
    ("v2 a checksum too short", v2(0x11, TCP4 + tlv(3, bytes(3)))[:-1], b"\x00"),
    ("v2 two checksums", with_crc(0x11, TCP4, tlv(3, bytes(4)))[:-1], b"\x00"),
    ("v2 a wrong checksum", with_crc(0x11, TCP4, b"\x04\x00\x01\x00")[:-1], b"\x01"),
    ("v2 a wrong checksum, no addresses", with_crc(0x00, b"", b"\x04\x00\x01\x00")[:-1], b"\x01"),
]  # fmt: skip


@pytest.mark.parametrize(("well", "wrong"), **table(WRONG))
def test_49_a_malformed_header_is_refused_at_its_first_wrong_byte(well: bytes, wrong: bytes) -> None:
    assert parse_header(well) is None
    for rest in (b"", b"\r\n", bytes(5000)):
        with pytest.raises(InvalidHeaderError):
            parse_header(well + wrong + rest)


# Any header, any bytes

ADDRESSES4 = st.ip_addresses(v=4).map(str)
ADDRESSES6 = st.ip_addresses(v=6).map(str).filter(lambda text: IPv6Address(text).ipv4_mapped is None)
PORTS = st.integers(0, 65535)
ENDPOINTS = st.one_of(
    st.tuples(st.tuples(ADDRESSES4, PORTS), st.tuples(ADDRESSES4, PORTS)),
    st.tuples(st.tuples(ADDRESSES6, PORTS), st.tuples(ADDRESSES6, PORTS)),
)
TEXTS = st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=30)
V1 = ENDPOINTS.map(lambda pair: make_v1(*pair))
V2 = st.builds(
    lambda pair, alpn, authority, unique_id: make_v2(*pair, alpn=alpn, authority=authority, unique_id=unique_id),
    ENDPOINTS, TEXTS, TEXTS, TEXTS,
)  # fmt: skip


def same(endpoint: tuple[str, int] | None, other: tuple[str, int]) -> bool:
    kind = IPv6Address if ":" in other[0] else IPv4Address
    return endpoint is not None and kind(endpoint[0]) == kind(other[0]) and endpoint[1] == other[1]


@given(ENDPOINTS, TEXTS, TEXTS, TEXTS, st.binary(max_size=20))
def test_what_was_made_is_read(
    pair: Any, alpn: str | None, authority: str | None, unique_id: str | None, behind: bytes
) -> None:
    line = make_v1(*pair)
    made = make_v2(*pair, alpn=alpn, authority=authority, unique_id=unique_id)
    read_line, read = parse_header(line + behind), parse_header(made + behind)
    assert read_line
    assert read
    assert same(read_line.source, pair[0])
    assert same(read_line.destination, pair[1])
    assert read == (len(made), read_line.source, read_line.destination, alpn, authority, unique_id)
    assert read_line == ProxyHeader(len(line), read.source, read.destination)
    assert [parse_header(line[:end]) for end in range(len(line))] == [None] * len(line)
    assert [parse_header(made[:end]) for end in range(len(made))] == [None] * len(made)


def mutated(headers: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Some bytes of a header changed, left out or added."""

    def change(header: bytes, steps: list[tuple[int, bytes, int]]) -> bytes:
        for place, added, removed in steps:
            at = place % (len(header) + 1)
            header = header[:at] + added + header[at + removed :]
        return header

    step = st.tuples(st.integers(0, 400), st.binary(max_size=2) | st.sampled_from([b" ", b"\r", b":", b".", b"0", b"::"]), st.integers(0, 2))  # fmt: skip
    return st.builds(change, headers, st.lists(step, max_size=3))


@given(
    st.one_of(
        mutated(V1),
        mutated(V2),
        st.binary(max_size=60).map(lambda rest: b"PROXY " + rest),
        st.builds(v2, st.integers(0, 255), st.binary(max_size=300), command=st.integers(0x20, 0x21)),
        st.binary(max_size=300),
    )
)
def test_49_bytes_of_any_kind_are_a_header_or_refused_once_and_for_all(data: bytes) -> None:
    """Byte by byte: first nothing is known, and what is known then stays, whatever follows."""
    outcomes = [outcome(data[:end]) for end in range(len(data) + 1)]
    known = next((one for one in outcomes if one is not None), None)
    assert outcomes == [None] * outcomes.count(None) + [known] * (len(outcomes) - outcomes.count(None))
    if isinstance(known, ProxyHeader):
        assert known.length == outcomes.count(None)
        assert all(text is None or text.isprintable() for text in known[3:])
    if known is None:
        assert len(data) < MOST_BYTES


ENDINGS = ["", "0", "0.0", "0.0.0", "0.0.0.0", ".0", ".0.0", ".0.0.0", ":", "::"]  # of an address or port
RESTS = [
    *("UNKNOWN\r\n"[at:] for at in range(9)),
    *("TCP4 1.2.3.4 1.2.3.4 1 2\r\n"[at:] for at in range(5)),
    *(rest + "\r\n" for host in ("1.2.3.4", "::1") for rest in (f" {host} {host} 1 2", f" {host} 1 2", " 1 2", " 2")),
]


@given(mutated(V1))
def test_49_what_is_not_refused_yet_can_still_become_a_line(data: bytes) -> None:
    begun = max((data[:end] for end in range(len(data) + 1) if outcome(data[:end]) is None), key=len)
    if begun.startswith(b"PROXY "):
        completed = (outcome(begun + (ending + rest).encode()) for ending in ENDINGS for rest in RESTS)
        assert any(isinstance(header, ProxyHeader) for header in completed)
