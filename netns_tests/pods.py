"""Workloads for an embedding program: pods that all look alike, each with a client of its own, and what is seen of them.

All pods have the same addresses, and so have all clients: what is said of one must not be taken for another's.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from tproxyd.interceptor import Event, Interceptor, keeper
from tproxyd.net.sockets import format_address
from tproxyd.testing import KernelState, Lab, Link, Node, Topology
from tproxyd.testing.plugin import OpenLab

__all__ = [
    "CONFIG",
    "Pod",
    "Seen",
    "Slow",
    "ask",
    "listen_to_events",
    "open_pods",
    "path_of",
    "served_right",
    "topology",
]

CONFIG: dict[str, Any] = {"capture": {"ports": ["8080"]}, "relay": {"workers": 0}}
"""What most tests capture, by a loop in the test's own process: so its files and threads are looked at with the test's."""


class Pod:
    """A namespace that is to be captured, and its client's."""

    def __init__(self, name: str, lab: Lab) -> None:
        self.name = name
        self.node, self.client = lab[name], lab[f"client-{name}"]
        self.netns = self.node.netns

    async def connect(self, port: int = 8080, *, family: str = "v4") -> trio.SocketStream:
        """From the client to the pod. The caller closes it."""
        return await self.client.connect(getattr(self.node, family), port)


def topology(names: Iterable[str]) -> Topology:
    """Each on a link of its own, all of them with the same addresses."""
    return Topology(
        links=tuple(
            Link(f"{name}:eth0", f"client-{name}:eth0", v4="192.0.2.0/24", v6="2001:db8:1::/64") for name in names
        )
    )


@asynccontextmanager
async def open_pods(open_lab: OpenLab, count: int) -> AsyncIterator[list[Pod]]:
    """pod-0, pod-1, and so on; at the end each holds what it held at the beginning, to the last rule."""
    names = [f"pod-{number}" for number in range(count)]
    async with open_lab(topology(names)) as lab:
        pods = [Pod(name, lab) for name in names]
        before = [await pod.node.dump() for pod in pods]
        yield pods
        await all_as_before(pods, before)


async def all_as_before(pods: list[Pod], before: list[KernelState]) -> None:
    for pod, state in zip(pods, before, strict=True):
        assert await pod.node.dump() == state, pod.name


def path_of(node: Node) -> str:
    """A path to its namespace, as long as the lab is open."""
    return f"/proc/{os.getpid()}/fd/{node.netns}"


async def ask(pod: Pod, port: int = 8080, *, family: str = "v4") -> tuple[tuple[str, int], tuple[str, int], str]:
    """What `serve_identity` in the pod says: (the client's own address, as whom the server sees it, what it was dialled by)."""
    with trio.fail_after(5):
        async with await pod.connect(port, family=family) as stream:
            own = stream.socket.getsockname()[:2]
            answer = json.loads(await stream.receive_some())
    host, _, number = answer["peer"].rpartition(":")
    return own, (host.strip("[]"), int(number)), answer["local"]


async def served_right(pod: Pod, families: Iterable[str] = ("v4", "v6")) -> None:
    """Intercepted, for the port is another one, with the client's own address, and where it was going."""
    for family in families:
        own, seen, local = await ask(pod, family=family)
        assert seen[0] == own[0]
        assert seen[1] != own[1], "not intercepted"
        assert local == format_address((getattr(pod.node, family), 8080))


class Seen:
    """The events so far; `until` waits for one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._more = trio.Event()

    def tell(self, event: Event) -> None:
        self.events.append(event)
        self._more.set()
        self._more = trio.Event()

    async def until(self, kind: str, workload: str, *, within: float = 5.0) -> Event:
        """Takes it, and all that came before it, off the list."""
        with trio.fail_after(within):
            while True:
                for number, event in enumerate(self.events):
                    if (event.kind, event.workload) == (kind, workload):
                        del self.events[: number + 1]
                        return event
                await self._more.wait()


class Slow:
    """Keeps whoever is about to be captured waiting, as a busy machine does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        take = keeper.Keeper._take

        def slowly(this: keeper.Keeper) -> None:
            self.begun.set()
            assert self.may_go_on.wait(10)
            take(this)

        monkeypatch.setattr(keeper.Keeper, "_take", slowly)


@asynccontextmanager
async def listen_to_events(interceptor: Interceptor) -> AsyncIterator[Seen]:
    seen = Seen()

    async def listen(*, task_status: trio.TaskStatus[None]) -> None:
        async with interceptor.events() as events:
            task_status.started()
            async for event in events:
                seen.tell(event)

    async with trio.open_nursery() as nursery:
        await nursery.start(listen)
        yield seen
        nursery.cancel_scope.cancel()
