"""The first message of a TLS client, read for the names in it: the server it asks for (SNI) and the protocols that it offers (ALPN).

Knows the bytes of RFC 8446 (5.1 records, 4 handshake, 4.1.2 ClientHello), RFC 6066 (3, SNI) and RFC 7301 (3.1, ALPN); refuses to know
sockets, deadlines and policy. Answers nothing and changes nothing: the server behind gets every byte as it came. With Encrypted
ClientHello the name is the one outside, that of the host's provider.

A client writes what it likes, so what is malformed has no names, as what is no TLS has none: better the default verdict than a name
that the server reads otherwise. Until a message is complete a byte more costs a look at the headers of its records.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

__all__ = ["MOST_BYTES", "NO_HELLO", "ClientHello", "read_client_hello"]


class ClientHello(NamedTuple):
    """The host name as the client spelt it (letters, digits, hyphen, dot, underscore; at most 253), and the protocols in its order."""

    sni: str | None
    alpn: tuple[str, ...]


NO_HELLO = ClientHello(None, ())
"""What is no ClientHello, or one that is malformed or too long."""

_RECORD_HEADER = 5
_MOST_FRAGMENT = 16 * 1024  # bytes of a record's plaintext
_MOST_RECORDS = 256
"""Records of one hello. In records of a byte each it would else be 2,700, a millisecond to walk through for each byte that arrives.
In records of 64 bytes, their headers included, the longest hello fits."""

MOST_BYTES = _MOST_FRAGMENT + _RECORD_HEADER
"""Bytes of a hello at most, the headers of its records included: one full record. Browsers send 500 to 1,800."""

_RECORD_START = b"\x16\x03"  # content type handshake; any version of TLS
_CLIENT_HELLO = 1  # handshake type
_HELLO_HEADER = 4  # bytes: type, and length in three
_SERVER_NAME, _ALPN = 0, 16  # extensions
_HOST_NAME = 0  # the only type of a server name
_MOST_HOST_NAME = 253  # RFC 1035: 255 bytes on the wire
_HOST_CHARACTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._"
# What clients mix in to keep servers tolerant. As cipher or extension it is passed by like anything unknown; of these names some look
# like text (RFC 8701, 2).
_GREASE = frozenset(bytes((byte, byte)) for byte in range(0x0A, 0x100, 0x10))

_EXTENSION = struct.Struct("!HH")  # type, length


class _MalformedError(Exception):
    """Lengths that do not come out, or something twice."""


def read_client_hello(data: bytes) -> ClientHello | None:
    """Reads the ClientHello at the beginning of a connection; `data` is all that has arrived, more than the hello perhaps.

    None while more bytes are needed: then there are less than MOST_BYTES. NO_HELLO as soon as it is known to be none.
    """
    try:
        message = _message(data)
        return None if message is None else _names(message)
    except (_MalformedError, IndexError, struct.error):  # the last two: a number beyond the end
        return NO_HELLO


def _message(data: bytes) -> bytes | None:
    """The ClientHello without its header, put together from its records; None while it is not complete."""
    message = bytearray()
    end = 0  # where the message ends, once its header has told
    at = 0
    for _ in range(_MOST_RECORDS):
        # The first byte of an SSLv2 hello is a length with its highest bit set: no handshake.
        if not _RECORD_START.startswith(data[at : at + 2]):
            raise _MalformedError
        begin = at + _RECORD_HEADER
        if len(data) < begin:
            return None
        before = len(message)
        fragment = data[begin - 2] << 8 | data[begin - 1]
        if not 0 < fragment <= _MOST_FRAGMENT:
            raise _MalformedError
        at = begin + fragment
        message += data[begin:at]
        if message and message[0] != _CLIENT_HELLO:
            raise _MalformedError
        if not end and len(message) >= _HELLO_HEADER:
            end = _HELLO_HEADER + int.from_bytes(message[1:_HELLO_HEADER], "big")
        if not end:
            continue
        missing = end - before - fragment  # bytes that this record does not have
        least = at + (missing if missing <= 0 else missing + _RECORD_HEADER)
        if least > MOST_BYTES:
            raise _MalformedError
        if missing <= 0:
            return bytes(message[_HELLO_HEADER:end]) if len(data) >= least else None
    raise _MalformedError


def _names(hello: bytes) -> ClientHello:
    if hello[0] != 3 or hello[34] > 32:  # legacy_version; behind it 32 random bytes, then the length of the session id
        raise _MalformedError
    at = 35 + hello[34]
    ciphers = hello[at] << 8 | hello[at + 1]
    at += 2 + ciphers
    methods = hello[at]  # of compression
    at += 1 + methods
    if not ciphers or ciphers & 1 or not methods:
        raise _MalformedError
    if at == len(hello):
        return NO_HELLO  # without extensions, as very old clients send it
    if at + 2 + (hello[at] << 8 | hello[at + 1]) != len(hello):
        raise _MalformedError
    at += 2
    server_name = alpn = None
    while at < len(hello):
        kind, length = _EXTENSION.unpack_from(hello, at)
        begin = at + _EXTENSION.size
        at = begin + length
        if at > len(hello):
            raise _MalformedError
        # Which of two would count is up to the server; both must not be there.
        if kind == _SERVER_NAME:
            if server_name is not None:
                raise _MalformedError
            server_name = hello[begin:at]
        elif kind == _ALPN:
            if alpn is not None:
                raise _MalformedError
            alpn = hello[begin:at]
    return ClientHello(
        None if server_name is None else _read_server_name(server_name), () if alpn is None else _read_alpn(alpn)
    )


def _read_server_name(extension: bytes) -> str | None:
    at = _behind_list_length(extension)
    host = None
    while at < len(extension):
        kind = extension[at]
        begin = at + 3
        at = begin + (extension[at + 1] << 8 | extension[at + 2])
        if at > len(extension) or at == begin:
            raise _MalformedError
        if kind == _HOST_NAME:
            if host is not None:
                raise _MalformedError
            host = extension[begin:at]
    if host is None or len(host) > _MOST_HOST_NAME or host.translate(None, _HOST_CHARACTERS):
        return None
    return host.decode("ascii")


def _read_alpn(extension: bytes) -> tuple[str, ...]:
    at = _behind_list_length(extension)
    protocols = []
    while at < len(extension):
        begin = at + 1
        at = begin + extension[at]
        if at > len(extension) or at == begin:
            raise _MalformedError
        name = extension[begin:at]
        if name.isascii() and name not in _GREASE:
            protocol = name.decode("ascii")
            if protocol.isprintable():
                protocols.append(protocol)
    return tuple(protocols)


def _behind_list_length(extension: bytes) -> int:
    """Where the only list in an extension begins, which must end with it and have something in it."""
    if len(extension) < 3 or 2 + (extension[0] << 8 | extension[1]) != len(extension):
        raise _MalformedError
    return 2
