"""A server and a client of very many short connections, each a process of its own: a script, run by its path, with the standard library alone.

    connector.py serve ADDRESS PORT                     until it is killed; says "serving"
    connector.py one-by-one ADDRESS PORT COUNT client   one after the other, and the client closes first; or `server`
    connector.py at-once ADDRESS PORT COUNT server      all of them live at one moment

The client says in a line of JSON how many it made in how many seconds, how long the slowest took, which took very long (number and seconds),
and what went wrong. The first byte of a connection says who closes first.
"""

import json
import resource
import selectors
import socket
import sys
import time

LONG = 0.5  # seconds; a SYN that is lost costs one second
PATIENCE = 15.0  # seconds that one connection may take
AT_ONE_GO = 64  # connections that are begun before it is looked at those that are there: fewer than any backlog


def serve(address: str, port: int) -> None:
    waiting = selectors.DefaultSelector()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family, backlog=4096) as listener:
        listener.setblocking(False)
        waiting.register(listener, selectors.EVENT_READ)
        print("serving", flush=True)
        while True:
            for key, _ in waiting.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if sock is not listener:
                    serve_one(waiting, sock)
                    continue
                for _ in range(AT_ONE_GO):
                    try:
                        accepted, _ = listener.accept()
                    except BlockingIOError:
                        break
                    accepted.setblocking(False)
                    waiting.register(accepted, selectors.EVENT_READ)


def serve_one(waiting: selectors.BaseSelector, sock: socket.socket) -> None:
    try:
        word = sock.recv(16)
        if word and word != b"bye":
            sock.sendall(word)
    except OSError:
        word = b""
    if word in (b"", b"server", b"bye"):
        waiting.unregister(sock)
        sock.close()


def make_one_by_one(address: str, port: int, count: int, first: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    word = first.encode()
    slow: list[tuple[int, float]] = []
    wrong: list[str] = []
    slowest = 0.0
    start = begun = time.monotonic()
    for number in range(count):
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.settimeout(PATIENCE)
            try:
                sock.connect((address, port))
                sock.sendall(word)
                if sock.recv(16) != word or (first == "server" and sock.recv(16)):
                    raise OSError("another answer")
            except OSError as error:
                wrong.append(f"{number}: {error!r}")
        now = time.monotonic()
        slowest = max(slowest, now - begun)
        if now - begun > LONG:
            slow.append((number, round(now - begun, 3)))
        begun = now
    tell(count, start, slowest, slow, wrong)


def make_at_once(address: str, port: int, count: int, first: str) -> None:
    """Each is answered, then all live; then the first one to close does so."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    waiting = selectors.DefaultSelector()
    begun: dict[socket.socket, tuple[int, float]] = {}
    slow: list[tuple[int, float]] = []
    wrong: list[str] = []
    slowest = 0.0
    live: list[socket.socket] = []
    start = time.monotonic()
    for number in range(count):
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        begun[sock] = number, time.monotonic()
        sock.connect_ex((address, port))
        waiting.register(sock, selectors.EVENT_WRITE)
        while begun and (number == count - 1 or len(begun) >= AT_ONE_GO):
            ready = waiting.select(PATIENCE)
            if not ready:
                wrong += [f"{late}: no answer" for late, _ in begun.values()]
                begun.clear()
            for key, events in ready:
                one = key.fileobj
                assert isinstance(one, socket.socket)
                try:
                    if events & selectors.EVENT_WRITE:
                        one.send(b"stay")
                        waiting.modify(one, selectors.EVENT_READ)
                        continue
                    if one.recv(16) != b"stay":
                        raise OSError("another answer")
                except OSError as error:
                    wrong.append(f"{begun[one][0]}: {error!r}")
                waiting.unregister(one)
                which, since = begun.pop(one)
                took = time.monotonic() - since
                slowest = max(slowest, took)
                if took > LONG:
                    slow.append((which, round(took, 3)))
                live.append(one)
    for sock in live:
        if first == "server":
            sock.setblocking(True)
            sock.settimeout(PATIENCE)
            sock.sendall(b"bye")
            if sock.recv(16):
                wrong.append("more than the end")
        sock.close()
    tell(count, start, slowest, slow, wrong)


def tell(count: int, start: float, slowest: float, slow: list[tuple[int, float]], wrong: list[str]) -> None:
    seconds = round(time.monotonic() - start, 3)
    print(
        json.dumps(
            {"count": count, "seconds": seconds, "slowest": round(slowest, 4), "slow": slow, "wrong": wrong[:20]}
        ),
        flush=True,
    )


def main() -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    what, address, port, *rest = sys.argv[1:]
    if what == "serve":
        serve(address, int(port))
    else:
        make = make_at_once if what == "at-once" else make_one_by_one
        make(address, int(port), int(rest[0]), rest[1])


if __name__ == "__main__":
    main()
