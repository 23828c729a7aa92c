"""A handler that understands HTTP/1.1: refuses a path, and tells the app who its client is. `http_aware.py PORT`, as root

h11 reads what is said on either side, request after request, and writes it anew for the other. So what is decided about one request is not got round
by how the next one is framed, as it could be if everything behind the first head were passed on unread (`stream.relay_to`).
"""

import signal
import sys

import h11
import trio

from tproxyd import Connection, ConnectionStream, Handle, open_interceptor

REFUSED = b"/admin"  # as it is written; who protects something has to know how else the app lets a path be written
OURS = {b"connection", b"keep-alive", b"upgrade", b"x-forwarded-for"}  # headers that no client says to the app


class Side:
    """One side of the conversation: what h11 knows of it, and its bytes."""

    def __init__(self, role: type[h11.CLIENT] | type[h11.SERVER], stream: trio.abc.Stream) -> None:
        self.http, self._stream = h11.Connection(role), stream

    async def receive(self) -> h11.Event | None:
        """None where nothing more is expected of that side."""
        while (event := self.http.next_event()) is h11.NEED_DATA:
            self.http.receive_data(bytes(await self._stream.receive_some()))
        return event if isinstance(event, h11.Event) else None

    async def send(self, event: h11.Event) -> None:
        if data := self.http.send(event):
            await self._stream.send_all(data)

    async def answer(self, status: int) -> None:
        """No body, and the end of the conversation."""
        await self.send(h11.Response(status_code=status, headers=[("content-length", "0"), ("connection", "close")]))
        await self.send(h11.EndOfMessage())


async def exchange(client: Side, app: Side, source: str) -> bool:
    """One request and its response; whether there may be another."""
    try:
        request = await client.receive()
    except h11.RemoteProtocolError as error:
        await client.answer(error.error_status_hint)
        return False
    if not isinstance(request, h11.Request):
        return False
    if request.target.startswith(REFUSED) or request.method == b"CONNECT":
        await client.answer(403)
        return False
    headers = [(name, value) for name, value in request.headers if name not in OURS]
    headers.append((b"x-forwarded-for", source.encode()))
    await app.send(h11.Request(method=request.method, target=request.target, headers=headers))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pass_on, client, app)  # beside the response: the app may have to say "100 Continue" first
        await pass_on(app, client)
        nursery.cancel_scope.cancel()
    return all(state is h11.DONE for side in (client, app) for state in side.http.states.values())


async def pass_on(source: Side, sink: Side) -> None:
    """To the end of a message."""
    while isinstance(event := await source.receive(), h11.InformationalResponse | h11.Response | h11.Data):
        await sink.send(event)
    await sink.send(event or h11.EndOfMessage())


async def dial(target: tuple[str, int] | str) -> trio.SocketStream:
    """The app, where the configuration would forward to: an address and port, or the path of a Unix socket."""
    if isinstance(target, str):
        return await trio.open_unix_socket(target)
    return await trio.open_tcp_stream(*target)


async def handle(stream: ConnectionStream) -> None:
    async with await dial(stream.connection.target) as upstream:
        client, app = Side(h11.SERVER, stream), Side(h11.CLIENT, upstream)
        try:
            while await exchange(client, app, stream.connection.source[0]):
                client.http.start_next_cycle()
                app.http.start_next_cycle()
        except* h11.ProtocolError:
            stream.abort()  # one side stopped in the middle: to the other one that must not look like an end


async def policy(_: Connection) -> Handle:
    return Handle(handle)


async def main(port: str) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with open_interceptor({"capture": {"ports": [port]}}, policy=policy, own_namespace=True):
            print("captured", flush=True)
            async for _ in signals:
                break


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
