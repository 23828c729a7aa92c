"""What is cancelled or fails half way, and what the next one who asks finds then."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import msgspec
import pytest
import trio

from tproxyd import kernel
from tproxyd.config import Config, config_from_mapping
from tproxyd.daemon import confirm
from tproxyd.datapath import Counters, Setup, WorkloadSetup, report
from tproxyd.errors import KernelError
from tproxyd.interceptor import keeper, loop_owner
from tproxyd.interceptor.threads import in_thread
from tproxyd.plan import Surroundings
from tproxyd.proxy import Receivers


async def test_61_a_step_is_done_also_when_it_is_cancelled_before_it_begins() -> None:
    done = []
    with trio.CancelScope() as scope:
        scope.cancel()
        await in_thread(lambda: done.append(1))
    assert done == [1]


class Step:
    """Fails with each of these errors once."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.calls = 0

    def __call__(self, *_: object, **__: object) -> list[kernel.Change]:
        self.calls += 1
        if self._errors:
            raise self._errors.pop()
        return []


@pytest.fixture
def make_keeper(monkeypatch: pytest.MonkeyPatch) -> Callable[[], keeper.Keeper]:
    """A keeper whose kernel has taken everything."""
    found = SimpleNamespace(warnings=(), surroundings=Surroundings())
    monkeypatch.setattr(kernel, "find_ssh_ports", lambda **_: set())
    monkeypatch.setattr(kernel, "preflight", lambda *_, **__: found)
    monkeypatch.setattr(kernel, "is_applied", lambda _: False)
    monkeypatch.setattr(kernel, "apply", lambda *_, **__: [])
    monkeypatch.setattr(keeper, "_own_tables", lambda _: kernel.Program())
    return lambda: keeper.Keeper(config_from_mapping({"capture": {"ports": ["80"]}}))


@pytest.mark.parametrize("how", ["leave", "revert"])
async def test_what_could_not_be_taken_away_is_taken_away_by_the_second_call(
    make_keeper: Callable[[], keeper.Keeper], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    kept = make_keeper()
    await kept.put()
    step = Step(KernelError("no"))
    monkeypatch.setattr(kernel, "revert", step)
    with pytest.raises(KernelError):
        await getattr(kept, how)()
    assert kept.capturing
    for _ in range(2):
        await kept.leave()
    assert step.calls == 2
    assert not kept.capturing


async def test_a_revert_that_fails_is_not_told_as_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "revert", Step(OSError("no file left")))
    wait = confirm._Wait()
    with pytest.raises(OSError, match="no file left"):
        await wait.revert()
    assert (wait.outcome, wait.ended.is_set()) == ("stopped", True)


async def test_61_a_revert_that_is_cancelled_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = confirm._Wait()
    done = Step()
    monkeypatch.setattr(kernel, "revert", done)
    with trio.CancelScope() as scope:
        scope.cancel()
        await wait.revert()
    assert (wait.outcome, done.calls) == ("reverted", 1)


class Channel:
    """Takes nothing at first, and then answers at once."""

    def __init__(self, relay: loop_owner.LoopOwner, answer: bytes) -> None:
        self._relay, self._answer = relay, answer
        self.blocked = trio.Event()

    async def send(self, _: bytes, __: object = ()) -> None:
        if not self.blocked.is_set():
            self.blocked.set()
            await trio.sleep_forever()
        self._relay._take(self._answer)


@pytest.mark.parametrize(
    ("question", "names", "answer"),
    [
        ("wait_idle", ["web"], report.IDLE + b"web"),
        ("count", [], report.COUNTED + msgspec.msgpack.encode(report.Count({"web": Counters()}))),
    ],
    ids=["wait_idle", "count"],
)
async def test_61_who_is_cancelled_while_asking_a_loop_leaves_nobody_without_an_answer(
    question: str, names: list[str], answer: bytes
) -> None:
    setup = Setup(config=Config(), limit=1, pipes=0, alone=True)
    relay = loop_owner.LoopOwner(setup, lambda _: None, None, 1.0, Receivers())
    relay._served["web"] = loop_owner.Served(WorkloadSetup(name="web", config=Config(), listen=()), (), 0)
    channel = Channel(relay, answer)
    relay._channel = channel  # type: ignore[assignment]  # what is used of one
    async with trio.open_nursery() as nursery:
        nursery.start_soon(getattr(relay, question), *names)
        await channel.blocked.wait()
        nursery.cancel_scope.cancel()
    with trio.fail_after(0.5):
        await getattr(relay, question)(*names)
    assert relay._idle == {}
    assert relay._counted is None
