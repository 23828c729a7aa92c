"""The listeners of one namespace: opened where the plan says, or taken from systemd, for each relay loop its own.

Knows addresses, and who has a port that is not free; refuses to know how clients come to be steered there.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tproxyd.config import Config
from tproxyd.errors import KernelError
from tproxyd.net.namespaces import call_in_namespace
from tproxyd.net.proc_net import port_holder
from tproxyd.net.sockets import equip_listener, format_address, listening_address, open_listener, spread_by_source

__all__ = ["Listeners", "open_listeners", "require_free_port"]

_log = logging.getLogger(__name__)

Listeners = list[list[socket.socket]]
"""Of each loop its own."""


@contextmanager
def open_listeners(
    config: Config,
    listen: Sequence[tuple[str, int]],
    loops: int,
    netns: int | None = None,
    *,
    inherited: Sequence[socket.socket] = (),
) -> Iterator[Listeners]:
    """Listeners at these addresses for each of so many loops, in the calling thread's namespace or in another one; closed at the end of the block.
    `inherited` are taken where they fit, with what waits in their queues, and closed otherwise, with a word in the log. Raises KernelError that names who has the port."""
    with ExitStack() as stack:
        ready = _sort_inherited(config, listen, loops, inherited)
        for sock in (one for found in ready.values() for one in found):
            stack.enter_context(sock)

        def open_all() -> Listeners:
            return [
                [
                    ready[address, port][index]
                    if (address, port) in ready
                    else stack.enter_context(
                        _listen(config, address, port, backlog=config.listen.backlog, shared=loops > 1)
                    )
                    for address, port in listen
                ]
                for index in range(loops)
            ]

        opened = open_all() if netns is None else call_in_namespace(netns, open_all)
        if loops > 1 and config.limits.max_connections_per_source:
            for listener in opened[0]:
                if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
                    _log.warning(
                        "relay processes share a listener that systemd has passed: each counts max_connections_per_source for itself"
                    )
                    continue
                # What one client has is counted where all of it arrives.
                spread_by_source(listener, loops)
        yield opened


def require_free_port(config: Config, listen: Sequence[tuple[str, int]]) -> None:
    """Raises what `open_listeners` would raise in the calling thread's namespace. Accepts nothing."""
    for address, port in listen:
        _listen(config, address, port, backlog=None).close()


def _sort_inherited(
    config: Config, listen: Sequence[tuple[str, int]], loops: int, inherited: Sequence[socket.socket]
) -> dict[tuple[str, int], list[socket.socket]]:
    """Those that listen where the plan says, for each loop one. All others are closed."""
    found: dict[tuple[str, int], list[socket.socket]] = {}
    seen: set[int] = set()
    for sock in inherited:
        inode = os.fstat(sock.fileno()).st_ino
        if inode in seen:  # of a socket unit, and stored besides by a daemon that had it from another one
            sock.close()
            continue
        seen.add(inode)
        address = listening_address(sock)
        if address is None:
            _refuse(sock, listen, "does not listen for TCP")
        elif address[:2] not in listen:
            _refuse(sock, listen, f"listens on {format_address(address)}")
        elif address[0] == "::" and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            _refuse(sock, listen, "takes IPv4, too (BindIPv6Only=ipv6-only is missing)")
        else:
            try:
                equip_listener(sock, transparent=not config.redirects)
                sock.setblocking(False)
                sock.listen(config.listen.backlog)
            except OSError as error:
                _refuse(sock, listen, f"cannot be made transparent ({error.strerror})")
            else:
                found.setdefault(address[:2], []).append(sock)
    for name, socks in list(found.items()):
        if len(socks) == 1:  # of a socket unit, or of a daemon with one loop: the loops share it
            socks += [socks[0].dup() for _ in range(loops - 1)]
        elif len(socks) != loops:
            for sock in found.pop(name):
                _refuse(
                    sock, listen, f"is one of {len(socks)} on {format_address(name)}, and relay.workers is {loops} now"
                )
    return found


def _refuse(sock: socket.socket, listen: Sequence[tuple[str, int]], why: str) -> None:
    places = ", ".join(map(format_address, listen))
    _log.warning(
        "a socket that systemd has passed %s, and is closed: listeners of this configuration are %s", why, places
    )
    sock.close()


def _listen(config: Config, address: str, port: int, *, backlog: int | None, shared: bool = False) -> socket.socket:
    try:
        return open_listener(address, port, backlog=backlog, shared=shared, transparent=not config.redirects)
    except OSError as error:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        holder = port_holder(port, family=family) if error.errno == errno.EADDRINUSE else None
        way_out = (
            "is the machine out of files or memory?"
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
            else "choose another listen.port or stop what uses it"
        )
        raise KernelError(
            f"cannot listen on {format_address((address, port))}: {error.strerror}{f', by {holder}' if holder else ''}; {way_out}"
        ) from error
