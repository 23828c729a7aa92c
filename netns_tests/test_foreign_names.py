"""Names and comments of other programs, made to be obeyed by a terminal or a root's shell: every verb shows them, and no more."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from tproxyd.testing import Lab, Node
from tproxyd.testing.daemon import TPROXYD, open_daemon

CONFIG = '[capture]\nports = ["8080"]\nwhen_down = "refuse"\n'
ESC = "\x1b[2J"
INTERFACE = "a$(id);b&'c"
OTHERS = f"""
table inet other {{
 chain c {{
  type filter hook prerouting priority -200
  meta mark set 0x5 comment "{ESC}"
 }}
}}
"""


async def said(node: Node, *arguments: str) -> str:
    """Both outputs of a verb, all of it lines of printable text."""
    done = await node.run(*TPROXYD, *arguments, check=False)
    text = done.stdout + done.stderr
    assert done.returncode in (0, 1, 3), text
    assert text.replace("\n", "").replace("\t", "").isprintable(), text
    return text


async def test_what_others_have_named_is_shown_and_not_obeyed(sidecar_lab: Lab, tmp_path: Path) -> None:
    """By the start, by each verb with a daemon, and by each after its death."""
    host, file = sidecar_lab["host"], tmp_path / "tproxyd.toml"
    file.write_text(CONFIG)
    await host.run("ip", "link", "add", f"x{ESC}", "type", "veth", "peer", "name", "other")
    await host.run("ip", "link", "set", f"x{ESC}", "up")
    await host.run("nft", "-f", "-", input=OTHERS)
    option = ("-c", str(file))
    async with open_daemon(host, CONFIG) as daemon:
        assert daemon.process.stderr_text.replace("\n", "").isprintable()
        assert r"\x1b[2J" in daemon.process.stderr_text
        assert r'comment "\x1b[2J"' in await said(host, "doctor", "--no-probe", *option)
        daemon.process.send_signal(signal.SIGKILL)
        await daemon.process.wait()
    await host.run("nft", "add", "rule", "inet", "tproxyd_guard", "guard", "counter", "comment", f'"{ESC}"')
    await host.run(*f"ip rule add priority 7000 iif x{ESC} fwmark 1 lookup 9 protocol 133".split(" "))
    assert r'comment "\x1b[2J"' in await said(host, "plan", "--diff", *option)
    for verb in ("status", "doctor", "plan --diff", "explain 192.0.2.1 192.0.2.2:8080", "apply", "revert"):
        text = await said(host, *verb.split(), *(() if verb == "revert" else option))
        assert r"x\x1b[2J" in text or verb == "revert", verb


async def test_a_remedy_for_an_interface_of_any_name_works(sidecar_lab: Lab, tmp_path: Path) -> None:
    """In a shell, with nothing of the name obeyed."""
    host, file = sidecar_lab["host"], tmp_path / "tproxyd.toml"
    file.write_text(CONFIG)
    await host.run("ip", "link", "add", INTERFACE, "mtu", "1200", "type", "veth", "peer", "name", "other")
    await host.run("ip", "link", "set", INTERFACE, "up")
    switch = Path("/proc/sys/net/ipv4/conf", INTERFACE, "route_localnet")
    host.call(switch.write_text, "1")
    async with open_daemon(host, CONFIG) as daemon:
        for check in ("route-localnet", "small-mtu"):
            text = await said(host, "doctor", "--no-probe", "-c", str(file))
            found = re.search(rf"{check}: .*\n.*\n    mend: (.*)", text)
            assert found is not None, text
            await host.run("sh", "-ec", found[1], env={"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"})
        text = await said(host, "doctor", "--no-probe", "-c", str(file))
        assert INTERFACE not in text
        assert await daemon.stop() == 0
