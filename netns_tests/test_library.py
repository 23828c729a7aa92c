"""An embedding program: `open_interceptor` in a process of somebody's own, in a node of the lab."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

import tproxyd
from netns_tests.watch import dial, resets_within, works
from netns_tests.way import GATEWAY_V4, SIDECAR_V4, Way
from tproxyd.net.sockets import format_address
from tproxyd.testing import Link, Route, Topology, serve_echo, serve_identity
from tproxyd.testing.plugin import OpenLab

# Serves until SIGTERM cancels it. Its on_record fails for the first connection, and prints the others.
PROGRAM = """
import signal, sys, trio
from tproxyd import config_from_mapping
from tproxyd.interceptor import open_interceptor

records = []
def on_record(record):
    records.append(record)
    print(record.source, record.outcome, flush=True)
    if len(records) == 1:
        raise ValueError("this program's own mistake")

async def main():
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            async for _ in signals:
                nursery.cancel_scope.cancel()
    print("cancelled", flush=True)

async def serve():
    async with open_interceptor(config_from_mapping({"capture": {"ports": ["8080"]}}), on_record=on_record, own_namespace=True) as interceptor:
        print("open", interceptor.listen, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


# Cancels `open_interceptor` at its n-th step, for every n until nothing is left to cancel, with a connection made and drained.
SWEEP = """
import contextlib, logging, os, sys, trio
from tproxyd import config_from_mapping, kernel
from tproxyd.interceptor import open_interceptor

class CancelAt(trio.abc.Instrument):
    def __init__(self, step, scope):
        self.step, self.scope, self.seen = step, scope, 0
    def before_task_step(self, task):
        self.seen += 1
        if self.seen == self.step:
            self.scope.cancel()

async def run():
    async with open_interceptor(config_from_mapping({"capture": {"ports": ["8080"]}}), on_record=lambda record: None, own_namespace=True) as interceptor:
        with trio.socket.socket() as client:
            with contextlib.suppress(ConnectionResetError):  # a self-call, and reset as fast as that
                await client.connect(("127.0.0.1", 15006))
            await trio.sleep(0.02)
            await interceptor.drain()

async def main():
    logging.disable(logging.CRITICAL)
    step = 0
    while True:
        step += 1
        files = len(os.listdir("/proc/self/fd"))
        with trio.CancelScope() as scope:
            instrument = CancelAt(step, scope)
            trio.lowlevel.add_instrument(instrument)
            try:
                await run()
            finally:
                trio.lowlevel.remove_instrument(instrument)
        left = kernel.observe()
        assert not (left.rules or left.routes or left.tables), (step, left)
        assert len(os.listdir("/proc/self/fd")) <= files + 1, (step, os.listdir("/proc/self/fd"))
        print("step", step, flush=True)
        if instrument.seen < step:
            break

trio.run(main)
print("swept", flush=True)
"""


@SIDECAR_V4
async def test_61_cancelled_at_any_step_it_takes_everything_down_and_never_hangs(way: Way) -> None:
    before = await way.proxy.dump()
    done = await way.proxy.run(
        sys.executable, "-c", SWEEP, timeout=240
    )  # 13 seconds of a processor, which others want, too
    assert done.stdout.endswith("swept\n")
    assert done.stdout.count("step") > 15
    assert await way.proxy.dump() == before


async def test_63_an_exception_in_one_connection_costs_no_other(way: Way, nursery: trio.Nursery) -> None:
    """And cancelling takes everything down: connections, listeners, kernel state."""
    before = await way.proxy.dump()
    await nursery.start(serve_identity, way.app, 8080)
    async with way.proxy.process(sys.executable, "-c", PROGRAM, collect=True) as program:
        await program.wait_for_output("open")
        async with await way.client.connect(way.address, 8080) as lives:
            assert b"peer" in await lives.receive_some()
            for _ in range(3):
                async with await way.client.connect(way.address, 8080) as stream:
                    own = format_address(stream.socket.getsockname())
                    await stream.send_eof()
                    assert json.loads(b"".join([chunk async for chunk in stream]))
                assert await program.wait_for_output(own) == f"{own} closed"
            program.send_signal(signal.SIGTERM)
            with pytest.raises(trio.BrokenResourceError):
                await lives.receive_some()
            own = format_address(lives.socket.getsockname())
        assert await program.wait_for_output(own) == f"{own} drained"
        await program.wait_for_output("cancelled")
        assert await program.wait() == 0
    assert "this program's own mistake" in program.stderr_text
    assert await way.proxy.dump() == before


@SIDECAR_V4
async def test_no_compiled_file_is_left_where_none_may_be(way: Way, tmp_path: Path) -> None:
    """Not by the relay process either, which does without the environment: root leaves nothing in somebody's checkout."""
    copy = tmp_path / "copy"
    shutil.copytree(Path(tproxyd.__file__).parent, copy / "tproxyd", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import tproxyd.daemon.cli as cli; print(cli.__file__); cli.main(['run', '--port', '8080'])"
    for environment, there in (({"PYTHONDONTWRITEBYTECODE": "1"}, False), ({"PYTHONPYCACHEPREFIX": ""}, True)):
        environment["PYTHONPATH"] = str(copy)
        async with way.proxy.process(sys.executable, "-c", code, collect=True, env=environment, cwd="/") as daemon:
            await daemon.wait_for_output("ready")
            daemon.send_signal(signal.SIGTERM)
            await daemon.wait()
        assert daemon.stdout_text.startswith(str(copy))
        assert bool(list(copy.rglob("__pycache__"))) == there


README = Path(__file__).parents[1] / "README.md"


@GATEWAY_V4
async def test_the_example_of_the_readme_does_what_it_says(way: Way, nursery: trio.Nursery) -> None:
    """As it stands there, but for the minute, which ends here when the test says so."""
    (example,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    minute = "await trio.sleep(60)"
    assert example.count(minute) == 1
    example = example.replace(minute, 'print("open", flush=True); await trio.to_thread.run_sync(input)')
    before = await way.proxy.dump()
    await nursery.start(serve_echo, way.app, 8080)
    await way.client.run("ip", "address", "add", "192.0.2.9/24", "dev", "eth0")
    async with way.proxy.process(sys.executable, "-c", example, collect=True, stdin=subprocess.PIPE) as program:
        assert program.stdin is not None
        await program.wait_for_output("open")
        async with await way.client.connect(way.address, 8080) as forwarded:
            await works(forwarded)
            async with await way.client.connect(way.address, 8081) as handled:
                assert b"".join([chunk async for chunk in handled]) == b"not today\n"
            refused = await dial(way.client, way.address, source="192.0.2.9")
            assert await resets_within(refused, 3)
            if refused is not None:
                await refused.aclose()
            await program.stdin.send_all(b"\n")  # the minute is over; what lives is drained
            await works(forwarded)
            await forwarded.send_eof()
            assert await forwarded.receive_some() == b""
        assert await program.wait() == 0, program.stderr_text
    records = program.stdout_text.splitlines()[1:]
    assert len(records) == 3, records
    for source, outcome in (("192.0.2.2", "closed"), ("192.0.2.2", "handled"), ("192.0.2.9", "refused_by_policy")):
        assert [one for one in records if f"source='{source}:" in one and f"outcome='{outcome}'" in one], (
            outcome,
            records,
        )
    assert await way.proxy.dump() == before


# Workload "pod" with upstreams dialled by this program, and a policy if there is a second word; prints records.
AGENT = """
import sys, trio
from tproxyd import Forward, open_interceptor

async def policy(connection):
    return Forward()

async def main():
    config = {"capture": {"ports": ["8080", "8082"]}, "relay": {"workers": 0}, "limits": {"max_connections": 50}, "policy": {"rule": [
        {"name": "past", "ports": ["8082"], "action": {"forward": sys.argv[2] + ":8081"}}]}}
    async with open_interceptor(config, policy=policy if sys.argv[3:] else None, on_record=lambda r: print(r.source, r.outcome, flush=True)) as interceptor:
        await interceptor.add_workload("pod", netns=int(sys.argv[1]), dial="agent")
        print("captured", flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.parametrize("policy", [(), ("policy",)])
async def test_a_connection_that_its_agent_would_dial_into_capture_again_is_a_self_call(
    open_lab: OpenLab, policy: tuple[str, ...], nursery: trio.Nursery
) -> None:
    """Without an end: one client was as many connections as there may be, within some hundredths of a second."""
    topology = Topology(
        links=(
            Link("agent:eth0", "pod:eth0", v4="192.0.2.0/24"),
            Link("agent:eth1", "client:eth0", v4="198.51.100.0/24"),
        ),
        routes=(Route("client", "0.0.0.0/0", "198.51.100.1"), Route("pod", "0.0.0.0/0", "192.0.2.1")),
        forwarding=("agent",),
    )
    async with open_lab(topology) as lab:
        pod = lab["pod"]
        await nursery.start(serve_identity, pod, 8081)
        async with pod.process("sleep", "infinity") as resident:
            words = (sys.executable, "-c", AGENT, str(resident.pid), pod.v4, *policy)
            async with lab["agent"].process(*words, collect=True) as agent:
                await agent.wait_for_output("captured")
                refused = await dial(lab["client"], pod.v4)
                assert await resets_within(refused, 3)
                if refused is not None:
                    await refused.aclose()
                await agent.wait_for_output("198.51.100.2:")
                async with await lab["client"].connect(
                    pod.v4, 8082
                ) as stream:  # a port that is not captured is no way back
                    assert json.loads(await stream.receive_some())["peer"].startswith("192.0.2.1:")
                await agent.wait_for_output("closed")
                outcomes = [line.split()[-1] for line in agent.stdout_text.splitlines()]
                assert outcomes == ["captured", "self_call", "closed"]
        nursery.cancel_scope.cancel()
