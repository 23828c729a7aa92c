"""The PROXY protocol, versions 1 and 2: the header that tells the next hop who the client is, made and read.

Knows bytes and addresses; refuses to know sockets, and whether a header is to be expected: the specification forbids to guess that (2).
The specification is HAProxy's doc/proxy-protocol.txt; the numbers in parentheses are its sections.

A header comes from whoever connects, so the reader says as early as it can that something is none, and what it spends is bounded by
MOST_BYTES: a byte more costs a look at a version 1 line of at most 107, or at the 16 fixed bytes of version 2, whose content is read
once, when it is complete. Read again and again, 1,300 TLVs that arrive byte by byte would be a second of work.
"""

from __future__ import annotations

import contextlib
from functools import cache
from socket import AF_INET, AF_INET6, AddressFamily, inet_ntop, inet_pton
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tproxyd.net.sockets import Address

__all__ = ["MOST_BYTES", "InvalidHeaderError", "ProxyHeader", "make_v1", "make_v2", "parse_header"]

MOST_BYTES = 4096
"""Bytes of a whole header at most, and so what a reader has to hold. nginx has the same bound. A header should fit into 536 bytes (2),
but those with a client's certificate in a TLV do not; the length field would allow 64 KiB."""

_V1_START = b"PROXY "
_V1_MOST = 107  # the longest line, its CRLF included (2.1)
_V1_FAMILIES = {"TCP4": AF_INET, "TCP6": AF_INET6}
_V1_UNKNOWN = "UNKNOWN"

# What begins like an address or port becomes one with one of these behind it, or never.
_HOST_ENDINGS = ("", "0", "0.0", "0.0.0", "0.0.0.0", ".0", ".0.0", ".0.0.0", ":", "::")  # noqa: S104  # binds nothing
_PORT_ENDINGS = ("", "0")

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"  # 2.2, as the rest
_FIXED = 16  # bytes: signature, version and command, family and protocol, length of what follows
_LOCAL, _PROXY = 0x20, 0x21
_UNSPEC, _TCP4, _TCP6 = 0x00, 0x11, 0x21
_ADDRESS_BYTES = {_TCP4: 12, 0x12: 12, _TCP6: 36, 0x22: 36, 0x31: 216, 0x32: 216}
"""Bytes before the first TLV, for TCP, UDP and Unix sockets. Other pairs of a family and a protocol do not say where the first would be."""

# TLVs: 2.2.1 to 2.2.3, and 2.2.5.
_ALPN, _AUTHORITY, _CRC32C, _UNIQUE_ID = 0x01, 0x02, 0x03, 0x05
_MOST_ALPN = 255  # its length is one byte in TLS (RFC 7301)
_MOST_AUTHORITY = 255  # HAProxy's bound; the specification has none, and a host name has at most 253
_MOST_UNIQUE_ID = 128

_CRC32C_POLYNOMIAL = 0x82F63B78  # Castagnoli's, its bits reversed (RFC 4960, appendix B)


class InvalidHeaderError(ValueError):
    """What arrived is no PROXY header, and more bytes would not make it one. The connection is to be aborted (2.1)."""


class ProxyHeader(NamedTuple):
    """What a header says, and its `length` in bytes, behind which the client's own data begin.

    `source` and `destination` are IP address and port, mapped IPv4 as IPv4; or both None, when the addresses of the connection itself count. Text
    that is not UTF-8, or has unprintable characters, is None as if it were not there: it reaches logs and other headers.
    """

    length: int
    source: tuple[str, int] | None = None
    destination: tuple[str, int] | None = None
    alpn: str | None = None
    authority: str | None = None
    unique_id: str | None = None


def make_v1(source: Address, destination: Address) -> bytes:
    """The line of version 1 (2.1). Raises ValueError for addresses of two families, or what is no address; mapped IPv4 is IPv4.

    A scope is left out: it means something on this host alone.
    """
    family, packed_source, packed_destination = _pair(source, destination)
    name = "TCP4" if family == AF_INET else "TCP6"
    hosts = f"{_v1_host(family, packed_source)} {_v1_host(family, packed_destination)}"
    return f"PROXY {name} {hosts} {source[1]} {destination[1]}\r\n".encode("ascii")


def make_v2(
    source: Address,
    destination: Address,
    *,
    alpn: str | None = None,
    authority: str | None = None,
    unique_id: str | None = None,
) -> bytes:
    """The header of version 2 (2.2), with a TLV for each text that is given. Raises ValueError as make_v1 does, and for a text that is
    too long: in UTF-8, `alpn` and `authority` have at most 255 bytes, `unique_id` 128."""
    family, packed_source, packed_destination = _pair(source, destination)
    content = b"".join(
        (
            packed_source,
            packed_destination,
            source[1].to_bytes(2, "big"),
            destination[1].to_bytes(2, "big"),
            _tlv(_ALPN, alpn, _MOST_ALPN),
            _tlv(_AUTHORITY, authority, _MOST_AUTHORITY),
            _tlv(_UNIQUE_ID, unique_id, _MOST_UNIQUE_ID),
        )
    )
    kind = _TCP4 if family == AF_INET else _TCP6
    return _SIGNATURE + bytes((_PROXY, kind)) + len(content).to_bytes(2, "big") + content


def parse_header(data: bytes) -> ProxyHeader | None:
    """Reads the header at the beginning of a connection; `data` is all that has arrived, more than the header perhaps.

    None while it is not complete: then there are less than MOST_BYTES. Raises InvalidHeaderError as soon as it can be no header any more.
    """
    if _SIGNATURE.startswith(data[: len(_SIGNATURE)]):
        return _parse_v2(data)
    if _V1_START.startswith(data[: len(_V1_START)]):
        return _parse_v1(data) if len(data) >= len(_V1_START) else None
    raise InvalidHeaderError("it begins like neither version of a PROXY header")


def _parse_v1(data: bytes) -> ProxyHeader | None:
    line, newline, _ = data[:_V1_MOST].partition(b"\r\n")
    if newline:
        whole = True  # the last word is all there
    else:
        whole = line.endswith(b"\r")
        if len(line) + (1 if whole else 2) > _V1_MOST:
            raise InvalidHeaderError(f"no CRLF in the first {_V1_MOST} bytes")
        line = line.removesuffix(b"\r")
    text = line.decode("latin-1")  # never fails; what is not ASCII is no word below
    _, protocol, *words = text.split(" ")
    if not (words or whole):
        if not any(known.startswith(protocol) for known in (*_V1_FAMILIES, _V1_UNKNOWN)):
            raise InvalidHeaderError(f"the protocol begins with {protocol!r}")
        return None
    if protocol == _V1_UNKNOWN:
        # Whatever follows is to be ignored, but a lone CR or LF is nothing that a line has in it.
        if "\r" in text or "\n" in text:
            raise InvalidHeaderError("CR or LF within the line")
        return ProxyHeader(len(line) + 2) if newline else None
    if protocol not in _V1_FAMILIES:
        raise InvalidHeaderError(f"the protocol is {protocol!r}")
    if len(words) > 4 or (whole and len(words) < 4):
        raise InvalidHeaderError(f"{len(words)} words instead of two addresses and two ports")
    family = _V1_FAMILIES[protocol]
    if not whole:
        _check_beginning(family, words.pop(), of_host=len(words) < 2)
    hosts = [_read_host(family, word) for word in words[:2]]
    ports = [_read_port(word) for word in words[2:]]
    if not newline:
        return None
    return ProxyHeader(len(line) + 2, (hosts[0], ports[0]), (hosts[1], ports[1]))


def _check_beginning(family: AddressFamily, word: str, *, of_host: bool) -> None:
    """Raises InvalidHeaderError if nothing behind `word` makes an address or port of it."""
    for ending in _HOST_ENDINGS if of_host else _PORT_ENDINGS:
        with contextlib.suppress(InvalidHeaderError):
            if of_host:
                _read_host(family, word + ending)
            else:
                _read_port(word + ending)
            return
    raise InvalidHeaderError(f"no {'address' if of_host else 'port'} begins with {word!r}")


def _read_host(family: AddressFamily, word: str) -> str:
    # inet_pton is as strict about IPv4 as 2.1: four numbers, no leading zeros. Of IPv6 it also takes an IPv4 address at the end, which 2.1
    # does not foresee, but whoever writes what inet_ntop gives of a mapped address sends it.
    try:
        return _host(inet_pton(family, word))
    except (OSError, ValueError) as error:
        raise InvalidHeaderError(f"{word!r} is no address of the family that is told") from error


def _read_port(word: str) -> int:
    # isdecimal alone would let digits of other scripts pass, but Latin-1 has none.
    if len(word) > 5 or not word.isdecimal() or (word[0] == "0" and word != "0") or int(word) > 65535:
        raise InvalidHeaderError(f"{word!r} is no port")
    return int(word)


def _parse_v2(data: bytes) -> ProxyHeader | None:
    if len(data) > 12 and data[12] not in (_LOCAL, _PROXY):
        raise InvalidHeaderError(f"version and command are 0x{data[12]:02x}")
    # Of a LOCAL header the family is to be ignored, too.
    if len(data) > 13 and data[12] == _PROXY and (data[13] >> 4 > 3 or data[13] & 0xF > 2):
        raise InvalidHeaderError(f"family and protocol are 0x{data[13]:02x}")
    if len(data) < _FIXED:
        return None
    length = _FIXED + int.from_bytes(data[14:16], "big")
    kind = data[13]
    tlvs_at = _FIXED + (0 if data[12] == _LOCAL else _ADDRESS_BYTES.get(kind, 0))
    if length > MOST_BYTES:
        raise InvalidHeaderError(f"{length} bytes, of which at most {MOST_BYTES} are taken")
    if length < tlvs_at:
        raise InvalidHeaderError(f"{length} bytes are too few for the addresses")
    if len(data) < length:
        return None
    if data[12] == _LOCAL:
        return ProxyHeader(length)
    header = data[:length]
    tlvs: dict[int, tuple[int, int]] = {}
    if kind in _ADDRESS_BYTES:
        tlvs = _find_tlvs(header, tlvs_at)
    elif kind == _UNSPEC:
        # It may have addresses of a length that nobody knows, which are to be ignored, or none and TLVs at once, as HAProxy sends them.
        with contextlib.suppress(InvalidHeaderError):
            tlvs = _find_tlvs(header, tlvs_at)
    if _CRC32C in tlvs:
        begin, end = tlvs[_CRC32C]
        if _crc32c(header[:begin] + bytes(end - begin) + header[end:]) != int.from_bytes(header[begin:end], "big"):
            raise InvalidHeaderError("its CRC32C is another")
    source = destination = None
    if kind in (_TCP4, _TCP6):
        size = 4 if kind == _TCP4 else 16
        ports = _FIXED + 2 * size
        source = _host(header[_FIXED : _FIXED + size]), int.from_bytes(header[ports : ports + 2], "big")
        destination = _host(header[_FIXED + size : ports]), int.from_bytes(header[ports + 2 : ports + 4], "big")
    return ProxyHeader(
        length,
        source,
        destination,
        _text(header, tlvs.get(_ALPN), _MOST_ALPN),
        _text(header, tlvs.get(_AUTHORITY), _MOST_AUTHORITY),
        _text(header, tlvs.get(_UNIQUE_ID), _MOST_UNIQUE_ID),
    )


def _find_tlvs(header: bytes, at: int) -> dict[int, tuple[int, int]]:
    """Where the value of each type begins and ends, from `at` to the end of the header; of one that is there twice the first counts."""
    found: dict[int, tuple[int, int]] = {}
    while at < len(header):
        begin = at + 3
        end = begin + int.from_bytes(header[at + 1 : begin], "big")
        if end > len(header):  # also when its length is not all there
            raise InvalidHeaderError("a TLV runs over the end")
        kind = header[at]
        # Each checksum would be computed without itself alone, so with two of them there is none that is right.
        if kind == _CRC32C and (end - begin != 4 or kind in found):
            raise InvalidHeaderError("its CRC32C is not four bytes, or there twice")
        if kind == _UNIQUE_ID and end - begin > _MOST_UNIQUE_ID:
            raise InvalidHeaderError(f"the unique id has {end - begin} bytes, more than {_MOST_UNIQUE_ID}")
        found.setdefault(kind, (begin, end))
        at = end
    return found


def _text(header: bytes, place: tuple[int, int] | None, most: int) -> str | None:
    if place is None or place[1] - place[0] > most:
        return None
    try:
        text = header[place[0] : place[1]].decode()
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() else None


def _tlv(kind: int, text: str | None, most: int) -> bytes:
    if text is None:
        return b""
    value = text.encode()
    if len(value) > most:
        raise ValueError(f"TLV 0x{kind:02x} with {len(value)} bytes: it has at most {most}")
    return bytes((kind, 0, len(value))) + value


def _pair(source: Address, destination: Address) -> tuple[AddressFamily, bytes, bytes]:
    """The family of both, and the addresses as bytes."""
    packed_source, packed_destination = _packed(source), _packed(destination)
    if len(packed_source) != len(packed_destination):
        raise ValueError(f"a header has addresses of one family, not {source[0]!r} and {destination[0]!r}")
    return (AF_INET if len(packed_source) == 4 else AF_INET6), packed_source, packed_destination


def _packed(address: Address) -> bytes:
    host, port = address[0], address[1]
    if not 0 <= port <= 65535:
        raise ValueError(f"{port} is no port")
    try:
        if ":" in host:
            return _unmapped(inet_pton(AF_INET6, host.partition("%")[0]))
        return inet_pton(AF_INET, host)
    except OSError as error:
        raise ValueError(f"{host!r} is no IP address") from error


def _unmapped(packed: bytes) -> bytes:
    return packed[12:] if packed.startswith(b"\0\0\0\0\0\0\0\0\0\0\xff\xff") else packed


def _host(packed: bytes) -> str:
    """The address as getpeername would give it."""
    packed = _unmapped(packed) if len(packed) == 16 else packed
    return inet_ntop(AF_INET if len(packed) == 4 else AF_INET6, packed)


def _v1_host(family: AddressFamily, packed: bytes) -> str:
    text = inet_ntop(family, packed)
    if family == AF_INET6 and "." in text:
        # IPv4-compatible: inet_ntop writes ::192.0.2.1, and 2.1 knows hexadecimal digits alone.
        text = f"::{packed[12] << 8 | packed[13]:x}:{packed[14] << 8 | packed[15]:x}"
    return text


def _crc32c(data: bytes) -> int:
    """A third of a millisecond for the longest header; zlib and binascii have only other polynomials."""
    table = _crc32c_table()
    crc = 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


@cache
def _crc32c_table() -> tuple[int, ...]:
    # Made when the first checksum arrives: most loops never see one.
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (_CRC32C_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return tuple(table)
