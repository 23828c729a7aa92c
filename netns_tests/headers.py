"""What tests of PROXY headers share: HAProxy and nginx, which read and send them by code that is not ours, and a real client's first TLS bytes.

Refuses to use tproxyd's own codec: `Told` is read by hand after HAProxy's doc/proxy-protocol.txt (2.2).
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from tproxyd.testing import LabProcess, Node

__all__ = ["SIGNATURE", "Told", "client_hello", "open_haproxy", "open_nginx", "read_told", "to_the_end", "v2_header"]

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")

_DEFAULTS = """
defaults
    mode http
    timeout connect 5s
    timeout client 10s
    timeout server 10s
"""


@asynccontextmanager
async def open_haproxy(
    node: Node, directory: Path, text: str, *listens: str | tuple[str, int]
) -> AsyncIterator[LabProcess]:
    """HAProxy with these sections; ready when it listens where `listens` says (path, or address and port)."""
    file = directory / "haproxy.cfg"
    file.write_text(_DEFAULTS + text, encoding="utf-8")
    async with node.process("haproxy", "-db", "-f", str(file), collect=True) as process:
        await _until_it_listens(node, process, listens)
        yield process


@asynccontextmanager
async def open_nginx(node: Node, directory: Path, server: str, *listens: tuple[str, int]) -> AsyncIterator[LabProcess]:
    """nginx with one server of this content; ready when it listens."""
    places = "".join(
        f"{name}_temp_path {directory}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    file = directory / "nginx.conf"
    file.write_text(
        f"daemon off;\nmaster_process off;\npid {directory}/nginx.pid;\nerror_log stderr;\nevents {{}}\n"
        f"http {{\naccess_log off;\ndefault_type text/plain;\n{places}server {{\n{server}\n}}\n}}\n",
        encoding="utf-8",
    )
    async with node.process("nginx", "-c", str(file), "-e", "stderr", collect=True) as process:
        await _until_it_listens(node, process, listens)
        yield process


async def _until_it_listens(node: Node, process: LabProcess, listens: Sequence[str | tuple[str, int]]) -> None:
    with trio.fail_after(10):
        for place in listens:
            while True:
                assert process.returncode is None, process.stderr_text
                try:
                    if isinstance(place, str):
                        await (await trio.open_unix_socket(place)).aclose()
                    else:
                        await (await node.connect(*place)).aclose()
                    break
                except (OSError, RuntimeError):  # not there yet
                    await trio.sleep(0.02)


@dataclass
class Told:
    """What a header of version 2 says, and what stands behind it. `tlvs` by type."""

    command: int
    source: str
    destination: str
    tlvs: dict[int, bytes]
    rest: bytes


async def read_told(stream: trio.abc.ReceiveStream) -> Told:
    """Reads a header of version 2 from the beginning of a connection, and what comes with it."""
    data = b""
    while len(data) < 16 or len(data) < 16 + int.from_bytes(data[14:16], "big"):
        chunk = await stream.receive_some(65536)
        assert chunk, f"the connection ended after {data!r}"
        data += bytes(chunk)
    assert data[:12] == SIGNATURE
    size = {0x11: 4, 0x21: 16}[data[13]]
    end = 16 + int.from_bytes(data[14:16], "big")
    hosts = [ipaddress.ip_address(data[at : at + size]) for at in (16, 16 + size)]
    at = 16 + 2 * size
    ports = [int.from_bytes(data[at : at + 2], "big"), int.from_bytes(data[at + 2 : at + 4], "big")]
    at += 4
    tlvs = {}
    while at < end:
        length = int.from_bytes(data[at + 1 : at + 3], "big")
        tlvs[data[at]] = data[at + 3 : at + 3 + length]
        at += 3 + length
    assert at == end
    source, destination = (
        f"[{host}]:{port}" if size == 16 else f"{host}:{port}" for host, port in zip(hosts, ports, strict=True)
    )
    return Told(data[12], source, destination, tlvs, data[end:])


def v2_header(
    source: str, source_port: int, destination: str, port: int, *, tlvs: bytes = b"", command: int = 0x21
) -> bytes:
    """A header of version 2, as a proxy in front would send it."""
    hosts = [ipaddress.ip_address(text).packed for text in (source, destination)]
    content = b"".join((*hosts, source_port.to_bytes(2, "big"), port.to_bytes(2, "big"), tlvs))
    return (
        SIGNATURE + bytes((command, 0x11 if len(hosts[0]) == 4 else 0x21)) + len(content).to_bytes(2, "big") + content
    )


def client_hello(name: str = "app.example", protocols: Sequence[str] = ("h2", "http/1.1")) -> bytes:
    """The first bytes of a real TLS client, OpenSSL."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(list(protocols))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname=name)
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake without a server")


async def to_the_end(stream: trio.abc.ReceiveStream) -> bytes:
    """All that comes, up to the FIN."""
    with trio.fail_after(10):
        data = b""
        while chunk := await stream.receive_some(65536):
            data += bytes(chunk)
        return data
