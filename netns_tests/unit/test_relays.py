"""The owner's side of a relay loop: answers that come at an awkward moment."""

from __future__ import annotations

import socket
from contextlib import suppress

import msgspec
import pytest
import trio
import trio.testing

from tproxyd.config import Config, config_from_mapping
from tproxyd.datapath import Counters, Setup, WorkloadSetup, report
from tproxyd.datapath.timers import Timed, Wheel
from tproxyd.interceptor import loop_channel, loop_owner
from tproxyd.proxy import Receivers


class Channel:
    """A loop that answers before `send` has returned."""

    def __init__(self, relay: loop_owner.LoopOwner, *answers: bytes) -> None:
        self._relay, self._answers = relay, answers

    async def send(self, _: bytes, __: object = ()) -> None:
        for answer in self._answers:
            self._relay._take(answer)


def relay_answering(*answers: bytes) -> loop_owner.LoopOwner:
    setup = Setup(config=Config(), limit=1, pipes=0, alone=True)
    relay = loop_owner.LoopOwner(setup, lambda _: None, None, 1.0, Receivers())
    relay._served["web"] = loop_owner.Served(WorkloadSetup(name="web", config=Config(), listen=()), (), 0)
    relay._channel = Channel(relay, *answers)  # type: ignore[assignment]  # what is used of one
    return relay


def counters(kind: bytes, moved: int) -> bytes:
    return kind + msgspec.msgpack.encode(report.Count({"web": Counters(bytes_from_client=moved)}))


async def test_idle_that_is_told_before_it_is_waited_for() -> None:
    with trio.fail_after(1):
        await relay_answering(report.IDLE + b"web").wait_idle("web")


async def test_counters_that_are_told_before_they_are_waited_for_and_a_report_right_behind_them() -> None:
    relay = relay_answering(counters(report.COUNTED, 50), counters(report.COUNTERS, 0))
    with trio.fail_after(1):
        await relay.count()
    assert relay.tally.total["web"].bytes_from_client == 50


async def test_all_who_wait_to_say_something_to_a_loop_that_has_died_are_told_the_same() -> None:
    """The second one in the queue asked for a file with the number -1, and its ValueError ended the whole interceptor."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        ours.setblocking(False)
        orders = loop_channel.Orders(ours)
        with suppress(BlockingIOError):
            while True:
                ours.send(b"as much as there is room for")

        async def say() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await orders.send(b"one more")

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(say)
            await trio.testing.wait_all_tasks_blocked()
            orders.close()


@pytest.mark.parametrize("networks", [0, 10_000])
def test_a_setup_of_any_size_goes_in_messages(networks: int) -> None:
    sources = [f"198.18.{number // 256}.{number % 256}/32" for number in range(networks)]
    config = config_from_mapping({"capture": {"ports": ["80"], "sources": sources}})
    setup = Setup(config=config, limit=1, pipes=0, alone=True)
    messages = report.split_setup(setup)
    assert (len(messages) > 1) == (networks > 0)
    assert max(map(len, messages)) <= report.MESSAGE
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for message in messages:
            ours.send(message)
        assert report.receive_setup(theirs) == setup
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.send(messages[0] if networks else b"")
        ours.shutdown(socket.SHUT_WR)
        assert report.receive_setup(theirs) is None


def test_a_wheel_is_never_early_and_late_by_a_32nd_at_most() -> None:
    for seconds in (0.3, 1.0, 60.0, 3600.0):
        for number in range(200):
            wheel: Wheel[Timed] = Wheel(seconds)
            member = Timed(1000 + number * seconds / 77)
            wheel.add(member)
            due = member.active + seconds
            assert due <= wheel.due <= due + seconds / 32 + 1e-6
            assert list(wheel.expire(wheel.due)) == [member]
            assert member.slot is None


def test_who_was_active_meanwhile_stays_in_the_wheel_unless_all_are_wanted() -> None:
    wheel: Wheel[Timed] = Wheel(1.0)
    member = Timed(10.0)
    wheel.add(member)
    member.active = 10.9
    assert list(wheel.expire(11.1)) == []
    assert member.slot is not None
    assert 11.9 <= wheel.due <= 11.9 + 1 / 32 + 1e-9
    member.active = 11.8
    assert list(wheel.expire(12.0, also_active=True)) == [member]


async def test_orders_of_many_tasks_to_a_loop_that_is_busy_wait_in_turn() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.setblocking(False)
        orders = loop_channel.Orders(ours)
        total = 1000  # more than the queue takes
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for number in range(total):
                    nursery.start_soon(orders.send, b"%1000d" % number)
                await trio.testing.wait_all_tasks_blocked()
                assert len(nursery.child_tasks) > 10
                theirs.setblocking(False)
                received: set[int] = set()
                while len(received) < total:
                    await trio.lowlevel.wait_readable(theirs)
                    received.add(int(theirs.recv(2000)))
        assert received == set(range(total))
        orders.close()
