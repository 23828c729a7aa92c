"""What the kernel holds for a namespace, as text that is the same whenever the state is the same.

Knows rules, routes of every table, links with their addresses, the nft ruleset without its counters, and the network
sysctls; and what of them changes by itself and therefore stays out: route cache entries and their ages, counters, and the
sysctls in VOLATILE_SYSCTLS. Refuses to know which of it is tproxyd's: "everything is as it was" is the only claim that a
stranger's machine cares about, so everything is compared.

Everything here is blocking and reads the calling thread's namespace: run it with Node.call or Node.dump.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from tproxyd.kernel.nft import without_traffic
from tproxyd.testing.build import LabError

__all__ = ["VOLATILE_SYSCTLS", "KernelState", "activate_conntrack", "conntrack_count", "read_state"]

VOLATILE_SYSCTLS = re.compile(
    r"""^net\.(
        netfilter\.nf_conntrack_count       # a counter
        | netfilter\.nf_conntrack_max | nf_conntrack_max | netfilter\.nf_conntrack_buckets | netfilter\.nf_conntrack_expect_max
                                            # global, read-only in a namespace: another program may tune them meanwhile
        | ipv4\.tcp_fastopen_key            # made on first use of TCP Fast Open
        | ipv6\.conf\..*\.stable_secret     # reading fails until it is set
        | .*\.flush                         # a trigger, not a value
    )$""",
    re.VERBOSE,
)
"""Names that stay out of a KernelState. conf/*/mtu and the like stay in: nobody but a program changes those."""

_AF = {"v4": 2, "v6": 10}
_RTM_F_CLONED = 0x200  # linux/rtnetlink.h: a cache entry, such as a learned path MTU
_RTNH_STATE_FLAGS = 0x1 | 0x10 | 0x8 | 0x40  # dead, linkdown, offload, trap: states of the carrier and the hardware
_NFT_SECONDS = 20


@dataclass(frozen=True)
class KernelState:
    """One namespace's state. Equal means: a program that looked would find no difference. Print it, or `diff` two."""

    rules: tuple[str, ...]
    routes: tuple[str, ...]
    links: tuple[str, ...]
    nft: tuple[str, ...]
    sysctls: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(f"{field.name} {line}" for field in fields(self) for line in getattr(self, field.name))

    def diff(self, other: KernelState) -> str:
        """What must change to make `other` of this one: "- routes ..." and "+ nft ..." lines; empty if they are equal."""
        changes = []
        for field in fields(self):
            before, after = getattr(self, field.name), getattr(other, field.name)
            # Context lines only where order is meaning; in the others each line stands for itself.
            context = 2 if field.name == "nft" else 0
            for line in difflib.unified_diff(before, after, lineterm="", n=context):
                if not line.startswith(("---", "+++", "@@")):
                    changes.append(f"{line[0]} {field.name} {line[1:]}")
        return "\n".join(changes)


def read_state() -> KernelState:
    """Of the calling thread's namespace; 30 to 60 ms."""
    from pyroute2 import IPRoute

    with IPRoute() as netlink:
        names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in netlink.get_links()}
        links = sorted(_links(netlink))
        rules = [f"{family} {line}" for family, af in _AF.items() for line in _rules(netlink, af)]
        routes = sorted(f"{family} {line}" for family, af in _AF.items() for line in _routes(netlink, af, names))
    return KernelState(tuple(rules), tuple(routes), tuple(links), tuple(_ruleset()), tuple(_sysctls()))


def activate_conntrack() -> None:
    """Installs a foreign table whose ct rules make the kernel track every connection of the calling thread's namespace.

    As `node.call(activate_conntrack)`. Without it a namespace tracks nothing and conntrack_count proves nothing.
    """
    _nft(
        "-f",
        "-",
        text=(
            "table inet foreign_conntrack {\n"
            "  chain in {\n    type filter hook prerouting priority filter; policy accept;\n    ct state new counter\n  }\n"
            "  chain out {\n    type filter hook output priority filter; policy accept;\n    ct state new counter\n  }\n"
            "}\n"
        ),
    )


def conntrack_count() -> int:
    """Tracked connections of the calling thread's namespace; 0 where the kernel has not loaded conntrack at all."""
    try:
        with open("/proc/sys/net/netfilter/nf_conntrack_count", encoding="ascii") as file:
            return int(file.read())
    except FileNotFoundError:
        return 0


def _rules(netlink: Any, af: int) -> Iterator[str]:
    for message in netlink.get_rules(family=af):
        yield _text(message, ("dst_len", "src_len", "tos", "action", "flags"), skip=("FRA_SUPPRESS_PREFIXLEN",))


def _routes(netlink: Any, af: int, names: dict[int, str]) -> Iterator[str]:
    for message in netlink.get_routes(family=af):
        if message["flags"] & _RTM_F_CLONED:
            continue
        fields = {"flags": message["flags"] & ~_RTNH_STATE_FLAGS}
        device = names.get(message.get_attr("RTA_OIF"), "-")
        skip = ("RTA_CACHEINFO", "RTA_OIF")  # ages and use counts; the interface is told by its name
        line = _text(message, ("dst_len", "src_len", "tos", "proto", "scope", "type"), skip=skip)
        yield f"table={message.get_attr('RTA_TABLE') or message['table']} dev={device} {line} {fields}"


def _links(netlink: Any) -> Iterator[str]:
    addresses: dict[int, list[str]] = {}
    for message in netlink.get_addr():
        at = f"{message.get_attr('IFA_ADDRESS')}/{message['prefixlen']} flags={message.get_attr('IFA_FLAGS')}"
        addresses.setdefault(message["index"], []).append(at)
    for link in netlink.get_links():
        kind = link.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND")
        up = "up" if link["flags"] & 1 else "down"
        at = ", ".join(sorted(addresses.get(link["index"], [])))
        yield f"{link.get_attr('IFLA_IFNAME')} {link['index']} {kind} {up} mtu={link.get_attr('IFLA_MTU')} [{at}]"


def _text(message: Any, header: tuple[str, ...], skip: tuple[str, ...]) -> str:
    # All attributes, not a chosen few: what is not looked at could change unseen.
    attributes = sorted(
        f"{name.partition('_')[2].lower()}={value}" for name, value in message["attrs"] if name not in skip
    )
    return " ".join([*attributes, *(f"{name}={message[name]}" for name in header)])


def _ruleset() -> Iterator[str]:
    # Stateless: no counter or quota values, and no elements that come with the traffic. By the tables' names: the order in which they
    # were made has a meaning only for chains of the same priority.
    listing = without_traffic(_nft("-s", "list", "ruleset"))
    for table in sorted(re.split(r"^(?=table )", listing, flags=re.MULTILINE)):
        for line in table.splitlines():
            if line.strip():
                yield line.replace("\t", "  ")


def _nft(*arguments: str, text: str = "") -> str:
    path = shutil.which("nft", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise LabError("the lab needs the program nft: apt install nftables")
    done = subprocess.run(
        [path, *arguments], input=text, text=True, capture_output=True, timeout=_NFT_SECONDS, check=False
    )
    if done.returncode != 0:
        raise LabError(f"nft {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _sysctls() -> Iterator[str]:
    for directory, directories, files in os.walk("/proc/sys/net"):
        directories.sort()
        for name in sorted(files):
            path = os.path.join(directory, name)
            # The interface's own dots (eth0.5) would be taken for separators elsewhere; here it is only a label.
            label = path.removeprefix("/proc/sys/").replace("/", ".")
            if VOLATILE_SYSCTLS.match(label):
                continue
            try:
                with open(path, encoding="utf-8", errors="replace") as file:
                    yield f"{label} = {' '.join(file.read().split())}"
            except OSError:
                continue  # write-only, or gone with its interface while we looked
