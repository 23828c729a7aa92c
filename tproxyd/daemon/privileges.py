"""The daemon gives up what it will not need, before it does anything else: docs/privileges.md.

What it takes more for comes before that: whoever is in the way is named by a look at files of his process, and so is an SSH server found. Processes of
uid 0 that hold more than this one are as little its to see afterwards as another user's.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from tproxyd import kernel
from tproxyd.config import Config
from tproxyd.daemon.admin_socket import admin_path, readers_gid
from tproxyd.daemon.comparison import ssh_ports_here
from tproxyd.daemon.lock import find_holder
from tproxyd.interceptor.listeners import require_free_port
from tproxyd.interceptor.privileges import needs_here, require_needs
from tproxyd.net.capabilities import keep_capabilities, missing_capabilities, to_read_code
from tproxyd.net.ownership import hold_namespace
from tproxyd.net.sockets import listening_address
from tproxyd.plan import make_plan

__all__ = ["Seen", "give_up_privileges"]

_TO_SEE_FILES = ("CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH")


class Seen(NamedTuple):
    """What nobody sees later: at which ports this host's SSH is; and what to warn of."""

    ssh_ports: frozenset[int]
    warnings: tuple[str, ...]


def give_up_privileges(
    config: Config, inherited: Sequence[socket.socket] = (), *, alone: bool = True, also: Collection[str] = ()
) -> Seen:
    """Keeps what the daemon needs for its config, for good. While there is one thread. `inherited`: listeners that it has been given; `alone`: there is no predecessor
    that lives, and has the namespace and the ports. `also`: what else is kept.

    Raises CapabilityError where something is missing, and KernelError that names who has the namespace or a port.
    """
    require_needs(config)
    if alone:
        _name_who_is_in_the_way(config, inherited)
    seen = Seen(frozenset(ssh_ports_here()), tuple(_unseen(config)))
    _join_readers()
    # A successor has no more than this one, and may have relay processes where this one has none.
    successors = () if config.redirects else ("CAP_NET_RAW",)
    needed = [need.capability for need in needs_here(config)]
    keep_capabilities({*needed, *successors, *also, *_to_listen(config), *to_read_code()}, pass_on=True)
    return seen


def _to_listen(config: Config) -> tuple[str, ...]:
    """Where the directory of the administrator's socket is another user's, as the units' /run/tproxyd is, root writes there by this alone."""
    path = admin_path(config.admin.socket)
    if path is not None and os.geteuid() == 0:
        with suppress(OSError):  # it is not there: then it will be root's
            if os.stat(os.path.dirname(path)).st_uid != 0:
                return ("CAP_DAC_OVERRIDE",)
    return ()


def _join_readers() -> None:
    """Whose the administrator's socket is to be: to give a file of one's own to a group of one's own takes no capability."""
    gid = readers_gid()
    if gid is not None and gid not in (os.getegid(), *os.getgroups()):
        with suppress(OSError):  # a user's daemon is in it, or its socket is nobody else's
            os.setgroups([*os.getgroups(), gid])


def _unseen(config: Config) -> Iterator[str]:
    missing = missing_capabilities(_TO_SEE_FILES if os.geteuid() else _TO_SEE_FILES[:1])
    if missing and any(ports.first < ports.last for ports in config.capture.ports):
        yield (
            f"an SSH server is looked for at port 22 alone, and captured at any other that a range of capture.ports has: to see more takes {' and '.join(missing)} "
            "(at the start, and given up then); name such ports in capture.exclude_ports"
        )


def _name_who_is_in_the_way(config: Config, inherited: Sequence[socket.socket]) -> None:
    if find_holder() is not None:
        hold_namespace("start", answer=1).close()  # has its reasons, unless the other one has gone meanwhile
    listen = make_plan(config, surroundings=kernel.look_around()).listen
    ours = {address[:2] for sock in inherited if (address := listening_address(sock)) is not None}
    require_free_port(config, [address for address in listen if address not in ours])
    if config.admin.metrics is not None:
        from tproxyd.daemon.metrics import open_metrics_socket  # late: who has no metrics need not load it

        open_metrics_socket(config.admin.metrics).close()
