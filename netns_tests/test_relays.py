"""The relay loops and their owner: who answers when, who dies when, and whose events are whose."""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from netns_tests.both_ends import Bench, Seen, read, read_exactly
from netns_tests.watch import relay_processes, reset, until, workers
from tproxyd.config import Config
from tproxyd.datapath import Setup, WorkloadSetup, report
from tproxyd.interceptor import homes, loop_channel, loop_owner
from tproxyd.interceptor.relays import Relays
from tproxyd.net.namespaces import open_namespace
from tproxyd.testing import SIDECAR
from tproxyd.testing.daemon import open_daemon
from tproxyd.testing.plugin import OpenLab

CONFIG = '[capture]\nports = ["8080-8091"]\n[relay]\nworkers = 1\n'


@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_08_an_event_of_a_closed_connection_does_not_reach_a_new_one(open_lab: OpenLab, how: str) -> None:
    """A drain begins while a connection breaks and another one is in the backlog; the worker learns of all three at once.

    With "fin" the new client gets a truncated answer with an orderly end (outcome `closed`); with "reset" it is refused.
    """
    async with open_lab(SIDECAR) as lab, open_daemon(lab["host"], CONFIG) as daemon:
        bench = Bench(daemon, lab["client"], lab["host"], lab["host"].v4)
        old_client, old_app = await bench.pair(0)
        await old_client.send_all(b"hello")
        await read_exactly(old_app, 5)
        (worker,) = workers(daemon)
        os.kill(worker, signal.SIGSTOP)
        try:
            await trio.sleep(0.1)  # it acts when the worker is next to run
            client = await bench.client.connect(bench.address, 8081)
            await client.send_all(b"question")
            await reset(old_client)  # its event comes first: both sockets are closed, their numbers are free
            await trio.sleep(0.05)
            daemon.process.send_signal(signal.SIGTERM)
            await daemon.process.wait_for_output("stopping")
            await trio.sleep(0.5)  # then the order to tell when it is idle: the new client is accepted
            await (
                old_app.send_eof() if how == "fin" else reset(old_app)
            )  # then this, for a number that is taken again
            await trio.sleep(0.05)
        finally:
            os.kill(worker, signal.SIGCONT)

        async def answer() -> None:
            async with await bench.listeners[1].accept() as stream:
                assert await read_exactly(stream, 8) == b"question"
                for _ in range(5):
                    await stream.send_all(b"answer")
                    await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            with trio.move_on_after(3):
                seen = await read(client, Seen())
            nursery.cancel_scope.cancel()
        await client.aclose()
        await old_app.aclose()
        await bench.aclose()
        assert seen == Seen(bytearray(b"answer" * 5), "orderly")


@pytest.mark.parametrize("alone", [False, True], ids=["thread", "process"])
@pytest.mark.parametrize("question", ["count", "wait_idle"])
async def test_a_loop_may_answer_before_the_question_is_through(
    monkeypatch: pytest.MonkeyPatch, alone: bool, question: str
) -> None:
    """`count` fails so within some calls also undelayed (AttributeError); `wait_idle` needs a busy machine, for which a pause stands."""
    tell = loop_owner.LoopOwner._tell

    async def tell_slowly(self: loop_owner.LoopOwner, order: bytes, fds: Sequence[int] = ()) -> None:
        await tell(self, order, fds)
        await trio.sleep(0.05)

    monkeypatch.setattr(loop_owner.LoopOwner, "_tell", tell_slowly)
    with unused_listener() as listener, closing_fd(open_namespace("/proc/thread-self/ns/net")) as netns:
        relay = Relays([setup(alone)], ignore)
        async with trio.open_nursery() as nursery:
            await nursery.start(relay.serve)
            await relay.add(WorkloadSetup(name="x", config=Config(), listen=(("127.0.0.1", 1),)), [[listener]], netns)
            await getattr(relay, question)(*(["x"] if question == "wait_idle" else []))
            nursery.cancel_scope.cancel()


async def test_a_loop_that_dies_before_it_is_ready_does_not_hold_up_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one serves, and nobody is told: the daemon never says that it is ready."""
    start = homes.ProcessHome.start
    started = 0

    async def start_and_kill_first(self: homes.ProcessHome, channel: socket.socket) -> None:
        nonlocal started
        await start(self, channel)
        started += 1
        if started == 1:
            assert self._process is not None
            os.kill(self._process.pid, signal.SIGKILL)

    monkeypatch.setattr(homes.ProcessHome, "start", start_and_kill_first)
    relay = Relays([setup(True)], ignore)
    async with trio.open_nursery() as nursery:
        with trio.fail_after(3):
            await nursery.start(relay.serve)
        nursery.cancel_scope.cancel()


class Pauses:
    """What is said to loops, with a pause behind each order, as on a busy machine; `words` counts them by kind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.words = Counter[bytes]()
        send = loop_channel.Orders.send

        async def send_slowly(self_: loop_channel.Orders, order: bytes, fds: Sequence[int] = ()) -> None:
            await send(self_, order, fds)
            self.words[order[:1]] += 1
            await trio.sleep(0.05)

        monkeypatch.setattr(loop_channel.Orders, "send", send_slowly)


@pytest.mark.parametrize("what", ["removed", "added"])
async def test_what_changes_while_another_loop_takes_the_place_of_one_that_died_is_served_once_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The new one is told of all workloads. Of one that is removed meanwhile it was told, too, or twice of one that is added, and held its listener
    for good: nobody else could have the port."""
    pauses = Pauses(monkeypatch)
    with (
        unused_listener() as first,
        unused_listener() as second,
        closing_fd(open_namespace("/proc/thread-self/ns/net")) as netns,
    ):
        relay = Relays([setup(True)], ignore)

        async def add(name: str, listener: socket.socket) -> None:
            workload = WorkloadSetup(name=name, config=Config(), listen=(("127.0.0.1", 1),))
            await relay.add(workload, [[listener]], netns)

        async with trio.open_nursery() as nursery:
            await nursery.start(relay.serve)
            await add("a", first)
            if what == "removed":
                await add("b", second)
            (pid,) = relay_processes(os.getpid())
            pauses.words.clear()
            os.kill(pid, signal.SIGKILL)
            await until(lambda: pauses.words[report.SETUP_END if what == "added" else report.ADD])
            with trio.fail_after(3):
                if what == "added":
                    await add("b", second)
                await relay.remove("b")
            name = second.getsockname()
            second.close()
            with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
                client.connect(name)
            assert pauses.words[report.ADD] == {"removed": 1, "added": 2}[what]
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("then", ["nothing", "retire"])
async def test_listeners_that_a_paused_workload_is_to_shed_do_not_end_the_loop(
    caplog: pytest.LogCaptureFixture, open_lab: OpenLab, then: str
) -> None:
    """They were unwatched twice, when nobody waited there; when somebody did, and the workload retired, it was asked of a closed one who waits."""
    async with open_lab(SIDECAR) as lab:
        with (
            lab["host"].call(socket.create_server, ("127.0.0.1", 0)) as listener,
            closing_fd(lab["host"].call(open_namespace, "/proc/thread-self/ns/net")) as netns,
        ):
            relay = Relays([setup(False)], ignore)
            workload = WorkloadSetup(name="x", config=Config(), listen=(listener.getsockname(),))
            async with trio.open_nursery() as nursery:
                await nursery.start(relay.serve)
                await relay.add(workload, [[listener]], netns, paused=True)
                if then == "nothing":
                    with trio.fail_after(3):
                        await relay.shed(workload, [[]])
                else:
                    client = await lab["host"].connect("127.0.0.1", listener.getsockname()[1])
                    nursery.start_soon(relay.shed, workload, [[]])
                    await trio.testing.wait_all_tasks_blocked()
                    await relay.retire("x")
                    await client.aclose()
                with trio.fail_after(3):
                    for _ in range(5):  # by then it has looked again
                        await trio.sleep(0.02)
                        await relay.answer()
                nursery.cancel_scope.cancel()
    assert "ended unexpectedly" not in caplog.text


def setup(alone: bool) -> Setup:
    return Setup(config=Config(), limit=10, pipes=4, alone=alone)


@contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    yield fd
    os.close(fd)


def unused_listener() -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")  # a name of the kernel's choice, that is no file
    listener.listen()
    listener.setblocking(False)
    return listener


def ignore(lines: bytes) -> None:
    pass
