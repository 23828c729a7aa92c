"""The administrator's socket: what can be asked there, by whom, with which verbs, and that whoever asks badly hurts nobody."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio

from netns_tests.asking import CONFIG, ask, auto, exchanges, median
from netns_tests.pods import CONFIG as POD_CONFIG
from netns_tests.pods import open_pods
from netns_tests.watch import Http, many, processes, relay_processes, resets_within, until, works
from netns_tests.way import BOTH_LAYOUTS, GATEWAY_V4, SIDECAR_V4, Way
from tproxyd import Connection, ConnectionStream, Forward, Handle, Record, open_interceptor
from tproxyd.config import config_from_mapping, load_config
from tproxyd.net.sockets import format_address
from tproxyd.testing import Finished, LabError, LabProcess, Node, serve_echo
from tproxyd.testing.daemon import TPROXYD, open_daemon
from tproxyd.testing.plugin import OpenLab

NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
STRANGER = ("setpriv", "--reuid=4321", "--regid=4321", "--clear-groups")
CHECKOUT = Path(__file__).parents[1]
GID = 4242  # of the group tproxyd, where a test has one


def exists(path: str) -> bool:
    return Path(path).exists()


async def tproxyd(node: Node, *arguments: str, code: int = 0) -> Finished:
    done = await node.run(*TPROXYD, *arguments, check=False)
    assert done.returncode == code, (arguments, done)
    if code:
        (line,) = done.stderr.splitlines()
        assert line.startswith("tproxyd: ")
    return done


def problem(answer: Http, status: int) -> str:
    """The sentence of an answer that refuses."""
    assert answer.status == status, answer.body
    content = json.loads(answer.body)
    assert content["error"] == content["problems"][0]
    assert "; " in content["error"], "no way out"
    return str(content["error"])


async def curl(node: Node, path: str, target: str, *as_whom: str, method: str = "GET") -> tuple[int, str]:
    """A request by somebody else; (0, what curl says) if it cannot even connect."""
    words = ("curl", "-sS", "-m", "5", "-X", method, "-w", "\n%{http_code}", "--unix-socket", path)
    done = await node.run(*as_whom, *words, f"http://x{target}", check=False)
    body, _, code = done.stdout.rpartition("\n")
    return int(code), body or done.stderr


async def listed(path: str, query: str = "") -> list[dict[str, Any]]:
    answer = await ask(path, f"/v1/connections{query}", within=20)
    assert answer.status == 200, answer.body
    content = json.loads(answer.body)
    connections: list[dict[str, Any]] = content["connections"]
    return connections


# What can be asked.


@GATEWAY_V4
async def test_each_resource_answers_and_says_what_is_wrong_with_a_request(way: Way) -> None:
    path = auto(way.proxy)
    async with open_daemon(way.proxy, CONFIG) as daemon:
        assert (await ask(path, "/healthz")).body == (await ask(path, "/readyz")).body == b"ok\n"
        status = json.loads((await ask(path, "/v1/status")).body)
        assert (status["pid"], status["admin_socket"], status["differences"]) == (daemon.process.pid, path, [])
        told = config_from_mapping(json.loads((await ask(path, "/v1/config")).body))
        assert told == load_config(way.file(CONFIG))
        assert "# Ruleset" in (await ask(path, "/v1/plan")).body.decode()
        for form in ("text", "nft", "shell", "json"):
            plan = await ask(path, f"/v1/plan?format={form}")
            assert plan.status == 200
            assert (form == "json") == ("application/json" in plan.head)
        assert "tables" in json.loads((await ask(path, "/v1/plan?format=json")).body)
        assert json.loads((await ask(path, "/v1/diff")).body) == {"differences": []}
        assert json.loads((await ask(path, "/v1/connections")).body) == {"connections": [], "more": False}
        assert (await ask(path, "/v1/status", "HEAD")).body == b""

        assert problem(await ask(path, "/v1/conections"), 404).endswith("is /v1/connections meant?")
        assert "there are /healthz" in problem(await ask(path, "/"), 404)
        refused = await ask(path, "/v1/drain")
        assert problem(refused, 405) == "GET is nothing that /v1/drain can do; use POST"
        assert "\r\nAllow: POST\r\n" in refused.head
        assert "\r\nAllow: HEAD, GET\r\n" in (await ask(path, "/v1/status", "DELETE")).head
        assert "there is no format 'yaml'" in problem(await ask(path, "/v1/plan?format=yaml"), 400)
        assert "no parameter 'sorce'" in problem(await ask(path, "/v1/connections?sorce=192.0.2.1"), 400)
        assert "no address, network or port" in problem(await ask(path, "/v1/connections?source=here"), 400)
        assert "no number of connections" in problem(await ask(path, "/v1/connections?limit=-1"), 400)
        assert "wait is 'x'" in problem(await ask(path, "/v1/drain?wait=x", "POST"), 400)
        for identity in ("0" * 16, "x", "0" * 15, "%00"):
            assert "there is no connection" in problem(await ask(path, f"/v1/connections/{identity}", "DELETE"), 404)
        assert await daemon.stop() == 0
    assert not exists(path)
    assert "Traceback" not in daemon.process.stderr_text


@GATEWAY_V4
async def test_the_log_level_is_another_one_from_now_on(way: Way) -> None:
    path = auto(way.proxy)
    async with open_daemon(way.proxy, CONFIG) as daemon:
        assert json.loads((await ask(path, "/v1/log-level")).body) == {"level": "info"}
        for body in (b"", b"{}", b'{"level": "loud"}', b'{"level": "info", "x": 1}', b"\xff"):
            assert '{"level": "debug"}' in problem(await ask(path, "/v1/log-level", "PUT", body), 400)
        changed = await ask(path, "/v1/log-level", "PUT", b'{"level": "error"}')
        assert (changed.status, json.loads(changed.body)) == (200, {"level": "error"})
        said = daemon.process.stderr_text
        assert await daemon.stop() == 0
    assert "stopping" not in daemon.process.stderr_text.removeprefix(said)


@pytest.mark.parametrize("number", [0, 1, 2])
@BOTH_LAYOUTS
async def test_living_connections_are_listed_and_one_of_them_is_ended(
    way: Way, nursery: trio.Nursery, number: int
) -> None:
    path, ended = auto(way.proxy), trio.Event()

    async def app(stream: trio.SocketStream) -> None:
        try:
            async for data in stream:
                await stream.send_all(data * 2)
        except trio.BrokenResourceError:
            ended.set()

    (listener,) = [way.app.listen(way.bind, 8080)]
    nursery.start_soon(trio.serve_listeners, app, [listener])
    async with open_daemon(way.proxy, CONFIG + f"[relay]\nworkers = {number}\n") as daemon:
        async with many(way.client, way.address, 5) as streams:
            for stream in streams:
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hellohello"
            connections = await listed(path)
            by_source = {one["source"]: one for one in connections}
            assert set(by_source) == {format_address(stream.socket.getsockname()) for stream in streams}
            for one in connections:
                assert (one["workload"], one["state"], one["rule"]) == ("host", "relaying", None)
                assert one["original_destination"] == format_address((way.address, 8080))
                assert (one["bytes_from_client"], one["bytes_from_upstream"]) == (5, 10)
                assert 0 < one["age_s"] < 5
            host, _, port = next(iter(by_source)).rpartition(":")
            for query, count in (
                (f"?source={host}", 5),
                (f"?source={host}:{port}", 1),
                (f"?destination=:8080&source={way.client.v4}/24", 5 if ":" not in way.address else 0),
                ("?destination=:8081", 0),
                ("?workload=host&limit=3", 3),
                ("?workload=web", 0),
            ):
                assert len(await listed(path, query)) == count, query

            victim, gone = streams[2], format_address(streams[2].socket.getsockname())
            identity = by_source[gone]["id"]
            closed = await ask(path, f"/v1/connections/{identity}", "DELETE")
            assert (closed.status, json.loads(closed.body)) == (200, {"closed": identity})
            assert await resets_within(victim, 1)
            with trio.fail_after(1):
                await ended.wait()
            record = await daemon.record(gone)
            assert (record["id"], record["outcome"], record["bytes_from_client"]) == (identity, "drained", 5)
            assert (await ask(path, f"/v1/connections/{identity}", "DELETE")).status == 404
            assert len(await listed(path)) == 4
            for stream in streams:
                if stream is not victim:
                    await stream.send_all(b"hello")
                    assert await stream.receive_some() == b"hellohello"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("number", [0, 2], ids=["thread", "processes"])
async def test_what_a_handler_has_is_listed_with_its_bytes_and_ended(
    open_lab: OpenLab, nursery: trio.Nursery, number: int
) -> None:
    records: list[Record] = []
    cancelled = trio.Event()

    async def echo(stream: ConnectionStream) -> None:
        try:
            async for data in stream:
                await stream.send_all(data)
        except trio.Cancelled:
            cancelled.set()
            raise

    async def policy(connection: Connection) -> Forward | Handle:
        return Handle(echo) if connection.workload == "pod-0" else Forward()

    config = POD_CONFIG | {"relay": {"workers": number}}
    async with (
        open_pods(open_lab, 2) as pods,
        open_interceptor(config, policy=policy, on_record=records.append) as interceptor,
    ):
        for pod in pods:
            await interceptor.add_workload(pod.name, netns=pod.netns)
            await nursery.start(serve_echo, pod.node, 8080)
        async with await pods[0].connect() as handled, await pods[1].connect() as relayed:
            await works(handled)
            await works(relayed)
            living = {one.workload: one async for one in interceptor.list_connections()}
            assert {name: one.state for name, one in living.items()} == {"pod-0": "handed", "pod-1": "relaying"}
            for one in living.values():
                assert (one.bytes_from_client, one.bytes_from_upstream) == (5, 5)
            (only,) = [one async for one in interceptor.list_connections(workload="pod-0")]
            assert await interceptor.close_connection(only.id)
            assert cancelled.is_set()
            assert await resets_within(handled, 1)
            await works(relayed)
            assert not await interceptor.close_connection(only.id)
            assert await interceptor.close_connection(living["pod-1"].id)
            assert await resets_within(relayed, 1)
        await until(lambda: len(records) == 2)
        assert {record.outcome for record in records} == {"drained"}
        assert [one async for one in interceptor.list_connections()] == []


async def test_what_a_handler_has_is_listed_and_ended_when_its_loop_has_died(open_lab: OpenLab) -> None:
    async def echo(stream: ConnectionStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async def policy(_: Connection) -> Handle:
        return Handle(echo)

    config = POD_CONFIG | {"relay": {"workers": 1}}
    async with open_pods(open_lab, 1) as (pod,), open_interceptor(config, policy=policy) as interceptor:
        await interceptor.add_workload(pod.name, netns=pod.netns)
        async with await pod.connect() as stream:
            await works(stream)
            (before,) = [one async for one in interceptor.list_connections()]
            (worker,) = relay_processes(os.getpid())
            os.kill(worker, signal.SIGKILL)
            await until(lambda: relay_processes(os.getpid()) not in ([], [worker]))
            await works(stream)
            (after,) = [one async for one in interceptor.list_connections(source=before.source)]
            assert (after.id, after.state, after.bytes_from_client) == (before.id, "handed", 10)
            assert [one async for one in interceptor.list_connections(destination=":1")] == []
            assert await interceptor.close_connection(after.id)
            assert await resets_within(stream, 1)


@GATEWAY_V4
async def test_a_long_list_holds_nobody_up(way: Way, nursery: trio.Nursery) -> None:
    """2,000 connections, listed by four at once and again and again, are served meanwhile; all are told, each once."""
    await nursery.start(serve_echo, way.app, 8080)
    path = auto(way.proxy)
    async with open_daemon(way.proxy, CONFIG), many(way.client, way.address, 2000) as streams:
        stream = streams[1234]
        await works(stream)
        alone = await exchanges(stream, 400)
        async with trio.open_nursery() as listing:
            counts: list[int] = []

            async def list_again() -> None:
                while True:
                    found = await listed(path)
                    assert len({one["id"] for one in found}) == len(found)
                    counts.append(len(found))

            for _ in range(4):
                listing.start_soon(list_again)
            beside: list[float] = []
            with trio.fail_after(60):
                while len(counts) < 8:
                    beside += await exchanges(stream, 100)
            listing.cancel_scope.cancel()
        assert set(counts) == {2000}
        print(f"ms alone {median(alone)}, beside {median(beside)}")
        assert (
            median(beside) < 5 * median(alone) + 2
        )  # its loop gives a tenth of its time; the test itself reads the lists


@GATEWAY_V4
async def test_a_worker_that_is_stopped_is_said_and_not_waited_for(way: Way) -> None:
    path = auto(way.proxy)
    async with open_daemon(way.proxy, CONFIG) as daemon:
        _, worker = processes(daemon)
        os.kill(worker, signal.SIGSTOP)
        try:
            assert "a relay loop has not answered" in problem(await ask(path, "/v1/connections"), 503)
            said = (await tproxyd(way.proxy, "connections", code=1)).stderr
            assert said.startswith("tproxyd: cannot list connections: a relay loop has not answered")
        finally:
            os.kill(worker, signal.SIGCONT)
        assert await listed(path) == []


# The verbs.


@GATEWAY_V4
async def test_the_verbs_at_work(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    node = way.proxy
    await tproxyd(node, "connections", code=69)
    async with open_daemon(node, CONFIG) as daemon:
        assert f"admin        {auto(node)}\n" in (await tproxyd(node, "status")).stdout
        async with many(way.client, way.address, 3) as streams:
            for stream in streams:
                await works(stream)
            lines = (await tproxyd(node, "connections")).stdout.splitlines()
            assert lines[0].split() == (
                ["id", "age", "state", "workload", "client", "destination", "upstream", "rule", "sent", "received"]
            )
            assert len(lines) == 4
            assert all(line.endswith("  -     5     5") for line in lines[1:])
            own = format_address(streams[0].socket.getsockname())
            told = json.loads((await tproxyd(node, "connections", "--json", "--source", own)).stdout)
            (one,) = told["connections"]
            assert one["source"] == own
            assert (await tproxyd(node, "connections", "--limit", "2")).stdout.endswith("and more than these 2\n")
            said = (await tproxyd(node, "connections", "--close", one["id"])).stdout
            assert said == f"connection {one['id']} is reset on both sides\n"
            assert await resets_within(streams[0], 1)
            again = await tproxyd(node, "connections", "--close", one["id"], code=1)
            assert "there is no connection" in again.stderr
            # On a terminal of 60 columns no line is longer.
            narrow = await node.run(
                "script", "-qec", "stty cols 60; unset COLUMNS; tproxyd connections", "/dev/null", env=in_path()
            )
            shown = narrow.stdout.replace("\r", "").splitlines()
            assert len(shown) == 3, shown
            assert max(map(len, shown)) <= 60, shown
            assert (await tproxyd(node, "drain")).stdout.startswith("draining: ")
            await daemon.process.wait_for_output("stopping")
            await tproxyd(node, "drain")  # again: nothing is ended by that
            await works(streams[1])
        assert await daemon.process.wait() == 0
    await tproxyd(node, "drain", code=69)


def in_path() -> dict[str, str]:
    """An environment in which `tproxyd` is the one that is tested."""
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@GATEWAY_V4
async def test_who_waits_for_the_end_of_a_drain_is_told(way: Way, nursery: trio.Nursery) -> None:
    await nursery.start(serve_echo, way.app, 8080)
    path = auto(way.proxy)
    async with open_daemon(way.proxy, CONFIG) as daemon, await way.client.connect(way.address, 8080) as stream:
        await works(stream)
        answers: list[Http] = []

        async def wait() -> None:
            answers.append(await ask(path, "/v1/drain?wait=1", "POST", within=20))

        async with trio.open_nursery() as waiting:
            for _ in range(3):
                waiting.start_soon(wait)
            await daemon.process.wait_for_output("stopping")
            assert (await ask(path, "/readyz")).status == 503
            await works(stream)
            assert answers == []
            await stream.send_eof()
        assert [json.loads(answer.body) for answer in answers] == [{"draining": False, "connections": 0}] * 3
        assert await daemon.process.wait() == 0
    assert daemon.process.stderr_text.count("stopping") == 1


@SIDECAR_V4
async def test_root_listens_in_the_directory_of_the_units_user(way: Way, tmp_path: Path) -> None:
    """Which is what /run/tproxyd is where the package is installed; root has given up to write where it likes."""
    os.chmod(tmp_path, 0o755)
    os.chown(tmp_path, 65534, 65534)
    node, path = way.proxy, str(tmp_path / "mine.sock")
    async with open_daemon(node, CONFIG + f'socket = "{path}"\n') as daemon:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        await tproxyd(node, "connections", "-c", str(way.file(CONFIG + f'socket = "{path}"\n')))
        assert await daemon.stop() == 0
    assert not exists(path)


@SIDECAR_V4
async def test_the_socket_is_found_by_the_configuration(way: Way, tmp_path: Path) -> None:
    node, path = way.proxy, str(tmp_path / "mine.sock")
    file = str(way.file(CONFIG + f'socket = "{path}"\n'))
    async with open_daemon(node, CONFIG + f'socket = "{path}"\n') as daemon:
        assert not exists(auto(node))
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert "-c FILE" in (await tproxyd(node, "connections", code=69)).stderr
        await tproxyd(node, "connections", "-c", file)
        assert await daemon.stop() == 0
    assert not exists(path)
    async with open_daemon(node, CONFIG + 'socket = ""\n'):
        off = str(way.file(CONFIG + 'socket = ""\n'))
        assert 'admin.socket is ""' in (await tproxyd(node, "connections", "-c", off, code=69)).stderr
        status = await tproxyd(node, "status")  # has another way
        assert "admin        no socket\n" in status.stdout


# Who may ask.


def with_group(file: Path) -> Path:
    """This machine's groups, and one more."""
    file.write_text(Path("/etc/group").read_text() + f"tproxyd:x:{GID}:\n")
    return file


@asynccontextmanager
async def open_with_group(node: Node, config: Path) -> AsyncIterator[LabProcess]:
    """A daemon on a machine that has a group tproxyd: in a mount namespace, for its eyes only."""
    with TemporaryDirectory() as directory:
        groups = with_group(Path(directory, "group"))
        script = f'mount --bind {groups} /etc/group && exec "$@"'
        words = ("unshare", "--mount", "sh", "-c", script, "sh", *TPROXYD, "run", "-c", str(config))
        async with node.process(*words, collect=True) as process:
            await process.wait_for_output("tproxyd: ready ")
            yield process
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0


@SIDECAR_V4
async def test_without_the_group_only_root_gets_in(way: Way) -> None:
    node, path = way.proxy, auto(way.proxy)
    async with open_daemon(node, CONFIG) as daemon:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert stat.S_IMODE(os.stat("/run/tproxyd").st_mode) == 0o755
        whom: tuple[str, ...]
        for whom in (NOBODY, STRANGER):
            code, said = await curl(node, path, "/v1/status", *whom)
            assert (code, "connect" in said) == (0, True)
            done = await node.run(*whom, *TPROXYD, "drain", check=False, env={"PYTHONPATH": str(CHECKOUT)})
            assert done.returncode == 77, done
            assert "use sudo" in done.stderr
        # Somebody has opened it to all: the peer is asked for, too.
        os.chmod(path, 0o666)
        own_root: tuple[str, ...] = (*STRANGER, "unshare", "--user", "--map-root-user")
        for whom in (NOBODY, STRANGER, own_root):
            code, said = await curl(node, path, "/v1/status", *whom)
            assert code == 403, whom
            assert "this is for root" in said
        assert (await curl(node, path, "/v1/status"))[0] == 200
        assert await daemon.stop() == 0


@SIDECAR_V4
async def test_members_of_the_group_may_look_and_nothing_else(way: Way) -> None:
    """By their first group, one of many others, and as root of a user namespace of their own."""
    node, path = way.proxy, auto(way.proxy)
    by_group = ("setpriv", "--reuid=4321", f"--regid={GID}", "--clear-groups")
    many_groups = ",".join(map(str, [*range(5000, 5400), GID]))
    one_of_many = ("setpriv", "--reuid=4321", "--regid=4321", f"--groups={many_groups}")
    own_root = (*by_group, "unshare", "--user", "--map-root-user")
    async with open_with_group(node, way.file(CONFIG)) as process:
        found = os.stat(path)
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o660, 0, GID)
        for whom in (by_group, one_of_many, own_root):
            for target in ("/v1/status", "/v1/config", "/v1/connections", "/readyz"):
                assert (await curl(node, path, target, *whom))[0] == 200, (whom, target)
            for method, target in (
                ("POST", "/v1/drain"),
                ("POST", "/v1/reload"),
                ("PUT", "/v1/log-level"),
                ("DELETE", "/v1/connections/0123456789abcdef"),
            ):
                code, said = await curl(node, path, target, *whom, method=method)
                assert code == 403, (whom, target)
                assert "may look" in said
        assert (await curl(node, path, "/v1/status", *STRANGER))[0] == 0
        assert "stopping" not in process.stderr_text
        done = await node.run(*by_group, *TPROXYD, "connections", check=False, env={"PYTHONPATH": str(CHECKOUT)})
        assert (done.returncode, done.stderr) == (0, "")
        done = await node.run(*by_group, *TPROXYD, "drain", check=False, env={"PYTHONPATH": str(CHECKOUT)})
        assert (done.returncode, "may look" in done.stderr) == (77, True)


WHO = """
import socket, sys
from tproxyd.net.peers import peer_of
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("up", flush=True)
while True:
    print(peer_of(listener.accept()[0]), flush=True)
"""


@SIDECAR_V4
async def test_whoever_has_no_number_in_the_daemon_s_user_namespace_is_nobody(way: Way) -> None:
    """A daemon in a user namespace in which only root has a number: two strangers look alike there, and like nobody."""
    with TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        path = f"{directory}/x"
        words = ("unshare", "--user", "--map-root-user", sys.executable, "-c", WHO, path)
        async with way.proxy.process(*words, collect=True) as who:
            await who.wait_for_output("up")
            os.chmod(path, 0o666)
            connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
            for whom in (STRANGER, NOBODY, ()):
                await way.proxy.run(*whom, sys.executable, "-c", connect, path)
            await until(lambda: who.stdout_text.count("Peer(") == 3)
    strangers, root = who.stdout_text.splitlines()[1:3], who.stdout_text.splitlines()[3]
    assert all("uid=None, gids=frozenset()" in line for line in strangers)
    assert re.search(r"uid=0, gids=frozenset\({0", root)


# Faults.


@SIDECAR_V4
async def test_56_a_socket_that_a_dead_daemon_left_is_replaced(way: Way) -> None:
    node, path = way.proxy, auto(way.proxy)
    async with open_daemon(node, CONFIG) as daemon:
        daemon.process.send_signal(signal.SIGKILL)
        await daemon.process.wait()
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    assert f"remove the administrator's socket {path}\n" in (await tproxyd(node, "revert")).stdout
    assert (await tproxyd(node, "revert")).stdout == "nothing to remove\n"
    async with open_daemon(node, CONFIG) as daemon:
        daemon.process.send_signal(signal.SIGKILL)
        await daemon.process.wait()
    assert "is one running" in (await tproxyd(node, "connections", code=69)).stderr
    async with open_daemon(node, CONFIG) as daemon:
        assert (await ask(path, "/healthz")).status == 200
        # A successor's is left alone.
        os.unlink(path)
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(path)
            assert await daemon.stop() == 0
            assert exists(path)
    os.unlink(path)


async def refusal(node: Node, config: str) -> str:
    """The one sentence of a daemon that does not start, and leaves nothing."""
    before = await node.dump()
    with pytest.raises(LabError, match=r"ended with 71") as failed:
        async with open_daemon(node, config):
            pass
    (line,) = [line for line in str(failed.value).splitlines() if line.startswith("tproxyd: ")]
    assert await node.dump() == before
    return line


@SIDECAR_V4
async def test_56_what_is_no_old_socket_of_ours_is_left_alone(way: Way, tmp_path: Path) -> None:
    """A living one is refused, and its holder named; so is a file, and a socket where others may write."""
    node, path = way.proxy, tmp_path / "x.sock"
    config = CONFIG + f'socket = "{path}"\n'
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        assert await starts(node, config)  # it does not listen
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen(0)
        assert f"(pid {os.getpid()}) does; stop it" in await refusal(node, config)
        assert "a process with a full queue does; stop it" in await refusal(
            node, config
        )  # the first one's question is in it
    os.unlink(path)
    path.write_text("mine")
    assert "there is something else than a socket; remove it" in await refusal(node, config)
    assert path.read_text() == "mine"
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert "there is something else than a socket; remove it" in await refusal(node, config)
    path.unlink()
    os.chmod(tmp_path, 0o1777)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert "in a directory that others may write to" in await refusal(node, config)
    os.unlink(path)
    assert await starts(node, config)
    assert "No such file or directory; choose another" in await refusal(node, CONFIG + 'socket = "/no/where/x"\n')


async def starts(node: Node, config: str) -> bool:
    async with open_daemon(node, config) as daemon:
        return await daemon.stop() == 0


@SIDECAR_V4
async def test_56_capture_is_worth_more_than_a_socket_that_cannot_be_had(way: Way) -> None:
    """With "auto", where /run is not ours to write."""
    script = 'mount -t tmpfs -o ro none /run && exec "$@"'
    words = ("unshare", "--mount", "sh", "-c", script, "sh", *TPROXYD, "run", "-c", str(way.file(CONFIG)))
    async with way.proxy.process(*words, collect=True) as process:
        await process.wait_for_output("tproxyd: ready ")
        assert "Read-only file system; `tproxyd connections`" in process.stderr_text
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
