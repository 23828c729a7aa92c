"""Captures port 8080 in every network namespace of a directory, for as long as it is there. `watch_directory.py [/run/netns]`, as root

`ip netns` and most CNI runtimes mount the namespaces of pods there, one a file. Prints what happens to them, a line of JSON an event.
"""

import os
import signal
import sys

import msgspec
import trio

from tproxyd import Interceptor, open_interceptor

CONFIG = {"capture": {"ports": ["8080"]}, "upstream": {"target": "loopback"}}  # to apps that listen at 127.0.0.1, too


def look(directory: str) -> dict[str, tuple[int, int]]:
    """By name, which namespace is there: device and inode, because a pod that is made anew may have the name of the last one."""
    found: dict[str, tuple[int, int]] = {}
    for entry in os.scandir(directory):
        try:
            status = entry.stat()
        except FileNotFoundError:  # gone since
            continue
        found[entry.name] = (status.st_dev, status.st_ino)
    return found


async def follow(directory: str, interceptor: Interceptor) -> None:
    """Tells the whole snapshot whenever it is another one. What cannot be captured is none of the others' trouble, and is tried again."""
    before: dict[str, tuple[int, int]] | None = None
    while True:
        now = look(directory)
        if now != before:
            before = now
            await interceptor.sync_workloads({name: os.path.join(directory, name) for name in now})
        await trio.sleep(1)  # not inotify: a mount over a file, which makes a namespace of it, is no event there


async def tell(interceptor: Interceptor, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    async with interceptor.events() as events:
        task_status.started()
        async for event in events:
            print(msgspec.json.encode(event).decode(), flush=True)


async def main(directory: str) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with open_interceptor(CONFIG) as interceptor:
            async with trio.open_nursery() as nursery:
                await nursery.start(tell, interceptor)  # it hears from the first one on
                nursery.start_soon(follow, directory, interceptor)
                async for _ in signals:
                    break
                nursery.cancel_scope.cancel()  # nothing is added any more
            with trio.move_on_after(10):  # seconds for living connections to end
                await interceptor.drain()


if __name__ == "__main__":
    trio.run(main, sys.argv[1] if len(sys.argv) > 1 else "/run/netns")
