"""A node agent at its smallest: captures port 8080 in one network namespace that is not its own. `agent.py NAME NETNS`, as root

NETNS is a process id, or a path such as /run/netns/web or /proc/4242/ns/net. Prints a record a connection; Ctrl-C and SIGTERM end it in order.
"""

import signal
import sys

import trio

from tproxyd import TproxydError, open_interceptor

CONFIG = {"capture": {"ports": ["8080"]}, "relay": {"workers": 0}}  # 0: no process besides this one


async def main(name: str, netns: str) -> int:
    # Without a receiver SIGTERM would kill the program, and what it has put into the namespace would stay there.
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with open_interceptor(CONFIG, on_record=lambda record: print(record, flush=True)) as interceptor:
            try:
                await interceptor.add_workload(name, netns=int(netns) if netns.isdecimal() else netns)
            except TproxydError as error:  # one sentence, for whoever has typed this
                print(error, file=sys.stderr)
                return error.exit_code
            print("captured", flush=True)
            async for _ in signals:
                break
            with trio.move_on_after(10):  # seconds for living connections to end
                await interceptor.drain()
    return 0


if __name__ == "__main__":
    sys.exit(trio.run(main, sys.argv[1], sys.argv[2]))
