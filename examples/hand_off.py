"""Gives connections to another process, the accepted sockets themselves: the other end of fd_receiver.py. `hand_off.py PORT PATH`, as root

Captures PORT here. Who listens at the Unix socket PATH gets each connection, with what is known of it; while nobody does, clients are refused.
"""

import signal
import sys

import trio

from tproxyd import Connection, HandOff, Refuse, open_interceptor


async def main(port: str, path: str) -> None:
    verdict = HandOff(path, otherwise=Refuse())  # or Forward(): rather past the other process than not at all

    async def policy(_: Connection) -> HandOff:
        return verdict

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with open_interceptor(
            {"capture": {"ports": [port]}},
            policy=policy,
            policy_timeout=1.0,  # seconds for the other process to take a connection from its queue
            on_record=lambda record: print(record.source, record.outcome, flush=True),
            own_namespace=True,
        ):
            print("captured", flush=True)
            async for _ in signals:
                break


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2])
