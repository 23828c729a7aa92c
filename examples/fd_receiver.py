"""Takes the connections that a policy hands off with `HandOff(path)`: standard library only, nothing of tproxyd. `fd_receiver.py PATH`

One message a connection on a SOCK_SEQPACKET socket: JSON, and the accepted socket as a descriptor. tproxyd/proxy/handoff.py has the keys.
"""

import base64
import contextlib
import json
import os
import socket
import struct
import sys
import threading


def serve(told: dict[str, str], client: socket.socket) -> None:
    read_before = base64.b64decode(told["data"])  # belongs before what the socket still gives; normally b""
    with client, contextlib.suppress(OSError):
        seen = {"name": client.getsockname()[:2], "peer": client.getpeername()[:2], "read": len(read_before)}
        client.sendall(json.dumps({**told, **seen}).encode() + b"\n")


def receive(sender: socket.socket) -> None:
    with sender:
        _, uid, _ = struct.unpack("iII", sender.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        while uid in (0, os.getuid()):  # nobody else is to say who a client is
            message, fds, _, _ = socket.recv_fds(sender, 65536, 1)
            if not message:
                return  # the interceptor has ended
            for fd in fds:
                serve(json.loads(message), socket.socket(fileno=fd))


def main(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # of an earlier run
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen()
        print("listening", flush=True)
        while True:
            threading.Thread(target=receive, args=(listener.accept()[0],), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1])
