"""Terminates mutual TLS in front of an app that knows none: clients need a certificate of one authority. `mtls.py PORT`, as root

Captures PORT here; the app is where the client wanted to go, and gets plain text. Try it from another host, with the files that it prints the place of:

    openssl s_client -connect HOST:PORT -servername app.example -verify_return_error -CAfile ca.pem -cert client.pem -key client.key
"""

import signal
import socket
import ssl
import struct
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import trio

from tproxyd import Connection, ConnectionStream, Handle, open_interceptor

HANDSHAKE = 10.0  # seconds


def make_certificates(directory: Path) -> None:
    """ca, app and client, .pem and .key each. By the openssl program, which is everywhere; a mesh has them from its control plane."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE"]
    for name, subject, more in (
        ("ca", "/CN=an authority for a day", []),
        ("app", "/CN=app", [*signed, "-addext", "subjectAltName=DNS:app.example"]),
        ("client", "/CN=client", signed),
    ):
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem"]
        command = ["openssl", "req", "-x509", *key, "-subj", subject, *more, *files]
        subprocess.run(command, cwd=directory, check=True, capture_output=True)


def make_context(directory: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "app.pem", directory / "app.key")
    context.load_verify_locations(directory / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED  # this is the "mutual"
    return context


async def dial(target: tuple[str, int] | str) -> trio.SocketStream:
    """The app, where the configuration would forward to: an address and port, or the path of a Unix socket."""
    if isinstance(target, str):
        return await trio.open_unix_socket(target)
    return await trio.open_tcp_stream(*target)


async def serve(context: ssl.SSLContext, stream: ConnectionStream) -> None:
    client = trio.SSLStream(stream, context, server_side=True)
    try:
        with trio.fail_after(HANDSHAKE):
            await client.do_handshake()
    except (trio.BrokenResourceError, trio.TooSlowError) as error:
        # The client is not told why: trio keeps the alert to itself. It sees the end of a stream in which TLS has not ended.
        print("refused", stream.connection.source[0], error.__cause__ or "no handshake", flush=True)
        return
    print("accepted", stream.connection.source[0], client.getpeercert()["subject"], flush=True)
    async with await dial(stream.connection.target) as app, trio.open_nursery() as nursery:
        nursery.start_soon(to_app, client, app)
        async for chunk in app:  # what the client does not take is not read: back-pressure needs no more than this
            await client.send_all(chunk)
        await client.aclose()  # says that this was all; TLS has no half-close that peers can be trusted with
        nursery.cancel_scope.cancel()


async def to_app(client: trio.SSLStream[ConnectionStream], app: trio.SocketStream) -> None:
    try:
        async for chunk in client:
            await app.send_all(chunk)
    except trio.BrokenResourceError:  # the client, or somebody between, ended it without saying so in TLS
        app.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset: this was not all
        raise
    await app.send_eof()


async def main(port: str) -> None:
    with TemporaryDirectory() as name, trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        make_certificates(Path(name))
        context = make_context(Path(name))

        async def handler(stream: ConnectionStream) -> None:
            await serve(context, stream)

        async def policy(_: Connection) -> Handle:
            return Handle(handler)

        async with open_interceptor({"capture": {"ports": [port]}}, policy=policy, own_namespace=True):
            print("certificates in", name, flush=True)
            async for _ in signals:
                break


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
