"""ClientHellos: those that OpenSSL writes, taken apart and changed; some put together by hand; and hypothesis with any bytes."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxyd.datapath.client_hello import MOST_BYTES, NO_HELLO, ClientHello, read_client_hello

GREASE = 0x1A1A  # one of the numbers of RFC 8701
TLS12, TLS13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


def table(rows: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """Rows of (name, ...) as arguments of parametrize; the name becomes the id."""
    return {"argvalues": [row[1:] for row in rows], "ids": [row[0] for row in rows]}


def openssl_hello(
    name: str | None = "app.example", alpn: Sequence[str] = ("h2", "http/1.1"), *, version: ssl.TLSVersion = TLS13
) -> bytes:
    """What a client of the ssl module sends first, in records."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.maximum_version = version
    if alpn:
        context.set_alpn_protocols(list(alpn))
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


def records(message: bytes, *sizes: int) -> bytes:
    """A handshake message in records of these sizes, the last of which is repeated; in one, without any."""
    written, at = b"", 0
    left = list(sizes) or [len(message)]
    while at < len(message):
        size = left.pop(0) if len(left) > 1 else left[0]
        part = message[at : at + size]
        written += b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part
        at += size
    return written


def vector(content: bytes, length_bytes: int) -> bytes:
    return len(content).to_bytes(length_bytes, "big") + content


def extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2, "big") + vector(content, 2)


def server_name(*names: bytes, kind: int = 0) -> bytes:
    return extension(0, vector(b"".join(bytes((kind,)) + vector(name, 2) for name in names), 2))


def protocols(*names: bytes) -> bytes:
    return extension(16, vector(b"".join(vector(name, 1) for name in names), 2))


def message(
    *extensions: bytes, version: bytes = b"\x03\x03", session: bytes = b"", ciphers: bytes = b"\x13\x01", methods: bytes = b"\0"
) -> bytes:  # fmt: skip
    """A handshake message by RFC 8446, 4.1.2."""
    begin = version + bytes(32) + vector(session, 1) + vector(ciphers, 2) + vector(methods, 1)
    return b"\x01" + vector(begin + vector(b"".join(extensions), 2), 3)


HELLO = openssl_hello()
MESSAGE = HELLO[5:]
NAMES = ClientHello("app.example", ("h2", "http/1.1"))


# What clients send

REAL = [
    ("TLS 1.3", HELLO, NAMES),
    ("TLS 1.2", openssl_hello(version=TLS12), NAMES),
    ("no name", openssl_hello(None), ClientHello(None, ("h2", "http/1.1"))),
    ("no ALPN", openssl_hello(alpn=()), ClientHello("app.example", ())),
    ("neither", openssl_hello(None, ()), NO_HELLO),
    ("a long name", openssl_hello(".".join(["x" * 62] * 4)), ClientHello(".".join(["x" * 62] * 4), ("h2", "http/1.1"))),
    ("capitals, an underscore", openssl_hello("_App-1.Example"), ClientHello("_App-1.Example", ("h2", "http/1.1"))),
    ("many protocols", openssl_hello(alpn=[f"proto-{n}" for n in range(100)]),
     ClientHello("app.example", tuple(f"proto-{n}" for n in range(100)))),
    ("GREASE", records(message(extension(GREASE, b""), server_name(b"app.example"), protocols(b"\x1a\x1a", b"zz", b"h2", b"http/1.1"), extension(0xFAFA, b"\0"),
     ciphers=b"\x1a\x1a\x13\x01", session=bytes(32))), NAMES),
    ("without extensions", records(b"\x01" + vector(message()[4:-2], 3)), NO_HELLO),
]  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), **table(REAL))
def test_a_hello_is_read_when_its_last_byte_is_there(data: bytes, expected: ClientHello) -> None:
    for end in range(len(data)):
        assert read_client_hello(data[:end]) is None
    assert read_client_hello(data) == read_client_hello(data + data) == read_client_hello(data + b"\0") == expected


@pytest.mark.parametrize(
    "sizes", [(1, 1000), (3, 1000), (4, 1000), (5, 1000), (1, 1, 1, 1, 1000), (500, 1), (100,), (7,)]
)
def test_a_hello_in_many_records(sizes: tuple[int, ...]) -> None:
    data = records(MESSAGE, *sizes)
    assert [end for end in range(len(data)) if read_client_hello(data[:end]) is not None] == []
    assert read_client_hello(data) == NAMES


@given(st.lists(st.integers(2, 600), min_size=1, max_size=20))
def test_a_hello_in_records_of_any_sizes(sizes: list[int]) -> None:
    assert read_client_hello(records(MESSAGE, *sizes, 1000)) == NAMES


def test_another_message_in_the_same_record() -> None:
    assert read_client_hello(records(MESSAGE + b"\x0b\0\0\0")) == NAMES


def test_the_longest_hello() -> None:
    room = MOST_BYTES - 5 - len(message(server_name(b"app.example"), extension(21, b"")))
    for pad, expected in ((room, ClientHello("app.example", ())), (room + 1, NO_HELLO)):
        padded = message(server_name(b"app.example"), extension(21, bytes(pad)))
        assert read_client_hello(records(padded, 16384)) == expected
        # The bound is known from the header of the message, not by counting bytes.
        assert read_client_hello(records(padded, 16384)[:9]) == (NO_HELLO if pad > room else None)
    # In two records the five bytes of the second header are too many.
    for pad, expected in ((room - 5, ClientHello("app.example", ())), (room - 4, NO_HELLO)):
        padded = message(server_name(b"app.example"), extension(21, bytes(pad)))
        assert read_client_hello(records(padded, 1000, 16384)) == expected
        assert read_client_hello(records(padded, 1000, 16384)[:9]) == (NO_HELLO if pad > room - 5 else None)


# Names that are not given on

NAMES_LEFT_OUT = [
    ("not ASCII", b"\xc3\xa4.example"),
    ("a line end", b"app.example\r\n"),
    ("NUL", b"app\0.example"),
    ("a space", b"app example"),
    ("an IPv6 address", b"2001:db8::1"),
    ("an escape sequence", b"\x1b[2Japp.example"),
    ("254 characters", b"x" * 254),
]


@pytest.mark.parametrize(("name",), **table(NAMES_LEFT_OUT))
def test_a_name_that_is_no_host_name_is_none(name: bytes) -> None:
    assert read_client_hello(records(message(server_name(name), protocols(b"h2")))) == ClientHello(None, ("h2",))


def test_a_host_name_of_253_characters_is_one() -> None:
    assert read_client_hello(records(message(server_name(b"x" * 253)))) == ClientHello("x" * 253, ())


def test_a_name_of_another_type_is_none() -> None:
    assert read_client_hello(records(message(server_name(b"app.example", kind=1)))) == NO_HELLO


def test_protocols_that_are_no_text_are_left_out() -> None:
    offered = protocols(b"\xff", b"h2", b"a\nb", b"\x7f", b"spdy/3", b"\x0a\x0a", b"jj", b"j")
    assert read_client_hello(records(message(offered))) == ClientHello(None, ("h2", "spdy/3", "j"))


# What is no hello: how it begins well, and the first bytes that show it.

OTHERS = [
    ("HTTP", b"", b"G"),
    ("an SSLv2 hello", b"", b"\x80\x2e\x01\x03\x01"),
    ("an alert", b"", b"\x15"),
    ("DTLS", b"\x16", b"\xfe"),
    ("an empty record", b"\x16\x03\x01\x00", b"\x00"),
    ("too long a record", b"\x16\x03\x01\x40", b"\x01"),
    ("a HelloRequest", b"\x16\x03\x01\x00\x50", b"\x00"),
    ("a ServerHello", b"\x16\x03\x01\x00\x50", b"\x02"),
    ("too long a message", b"\x16\x03\x01\x40\x00\x01\x00\x40", b"\x00"),
    ("a message of megabytes", b"\x16\x03\x01\x02\x00\x01\xff\xff", b"\xff"),
    ("a message of megabytes in two records", b"\x16\x03\x01\x00\x02\x01\xff\x16\x03\x01\x02\x00\xff", b"\xff"),
    ("an alert between", records(MESSAGE, 100)[:105], b"\x15"),
    ("another protocol between", records(MESSAGE, 100)[:106], b"\xfe"),
    ("an empty record between", records(MESSAGE, 100)[:105] + b"\x16\x03\x01\x00", b"\x00"),
    ("too many records", records(MESSAGE, 1)[: 255 * 6 + 4], b"\x01"),
]


@pytest.mark.parametrize(("well", "wrong"), **table(OTHERS))
def test_48_what_is_no_hello_is_known_at_its_first_wrong_byte(well: bytes, wrong: bytes) -> None:
    assert read_client_hello(well) is None
    for rest in (b"", b"\0", bytes(20_000)):
        assert read_client_hello(well + wrong + rest) == NO_HELLO


NAME = server_name(b"app.example")
MALFORMED = [
    ("empty", b"\x01\0\0\0"),
    ("random cut short", b"\x01\0\0\x10\x03\x03" + bytes(14)),
    ("another version", message(NAME, version=b"\x02\x03")),
    ("too long a session id", message(NAME, session=bytes(33))),
    ("no ciphers", message(NAME, ciphers=b"")),
    ("half a cipher", message(NAME, ciphers=b"\x13\x01\x13")),
    ("no compression method", message(NAME, methods=b"")),
    ("ciphers over the end", b"\x01" + vector(b"\x03\x03" + bytes(33) + b"\xff\xff\x13\x01", 3)),
    ("extensions cut short", b"\x01" + vector(message(NAME)[4:-1], 3)),
    ("something behind the extensions", b"\x01" + vector(message(NAME)[4:] + extension(0x33, b""), 3)),
    ("half an extension", message(NAME, b"\x00\x10\x00")),
    ("an extension over the end", message(NAME, b"\x00\x33\x00\x01")),
    ("two names", message(server_name(b"app.example", b"other.example"))),
    ("two extensions with a name", message(NAME, NAME)),
    ("two extensions with protocols", message(protocols(b"h2"), NAME, protocols(b"h2"))),
    ("an empty name", message(server_name(b""))),
    ("no name", message(server_name())),
    ("an empty extension for a name", message(extension(0, b""))),
    ("a name over the end", message(extension(0, b"\x00\x04\x00\x00\x02a"))),
    ("half a name", message(extension(0, b"\x00\x02\x00\x00"))),
    ("something behind the names", message(extension(0, b"\x00\x04\x00\x00\x01a\x00"))),
    ("an empty protocol", message(NAME, protocols(b"h2", b""))),
    ("no protocols", message(NAME, protocols())),
    ("an empty extension for protocols", message(NAME, extension(16, b""))),
    ("a protocol over the end", message(NAME, extension(16, b"\x00\x02\x02h"))),
    ("something behind the protocols", message(NAME, extension(16, b"\x00\x02\x01h\x00"))),
]


@pytest.mark.parametrize(("malformed",), **table(MALFORMED))
def test_48_a_malformed_hello_has_no_names(malformed: bytes) -> None:
    data = records(malformed)
    assert read_client_hello(data[:-1]) is None
    assert read_client_hello(data) == NO_HELLO
    assert read_client_hello(records(malformed, 20)) == NO_HELLO


# Any bytes


def changed(hello: bytes, places: list[tuple[int, bytes, int]]) -> bytes:
    for place, added, removed in places:
        at = place % (len(hello) + 1)
        hello = hello[:at] + added + hello[at + removed :]
    return hello


SMALL = records(message(NAME, protocols(b"h2", b"http/1.1")))
CHANGES = st.lists(st.tuples(st.integers(0, 600), st.binary(max_size=3), st.integers(0, 3)), max_size=4)


@given(
    st.one_of(
        st.builds(changed, st.sampled_from([HELLO, SMALL, records(MESSAGE, 50)]), CHANGES),
        st.builds(lambda places: records(changed(SMALL[5:], places)), CHANGES),
        st.binary(max_size=300).map(lambda content: records(b"\x01" + vector(content, 3))),
        st.binary(max_size=300).map(lambda content: records(message(content))),
        st.builds(lambda name, alpn: records(message(extension(0, name), extension(16, alpn))), st.binary(max_size=40), st.binary(max_size=40)),
        st.binary(max_size=300),
    )
)  # fmt: skip
def test_48_bytes_of_any_kind_are_a_hello_or_none_once_and_for_all(data: bytes) -> None:
    """Byte by byte: first nothing is known, and what is known then stays, whatever follows."""
    answers = [read_client_hello(data[:end]) for end in range(len(data) + 1)]
    unknown = answers.count(None)
    assert answers == [None] * unknown + [answers[-1]] * (len(answers) - unknown)
    sni, alpn = answers[-1] or NO_HELLO
    assert sni is None or (sni.isascii() and set("\r\n\0 :/\"'") & set(sni) == set() and 0 < len(sni) <= 253)
    assert all(protocol.isascii() and protocol.isprintable() for protocol in alpn)


@pytest.mark.parametrize("size", [16384, 100, 60, 40])
def test_48_more_bytes_are_never_wanted_than_the_bound(size: int) -> None:
    longest = records(message(extension(21, bytes(16384 * 2))), size)
    answers = [read_client_hello(longest[:end]) for end in (MOST_BYTES - 1, MOST_BYTES, len(longest))]
    assert answers[1:] == [NO_HELLO, NO_HELLO]
    # The longest that is taken in records of this size is wanted up to its last byte.
    room = next(
        pad for pad in range(16384, 0, -1) if len(records(message(extension(21, bytes(pad))), size)) <= MOST_BYTES
    )
    fitting = records(message(extension(21, bytes(room))), size)
    wanted = None if size >= 60 else NO_HELLO  # else there are more than 256 records
    assert read_client_hello(fitting[:-1]) == wanted
