"""Dials the upstream, as the client where that is possible, and says in the access log's words why it could not be had."""

from __future__ import annotations

import errno
import os
import socket

import trio

from tproxyd.datapath import EndedError, Outcome
from tproxyd.net.sockets import Address, format_address, open_upstream
from tproxyd.proxy.service import Service

__all__ = ["dial"]

_OUTCOMES: dict[int, Outcome] = {
    errno.ECONNREFUSED: "upstream_refused",
    errno.ECONNRESET: "upstream_reset",
    errno.ETIMEDOUT: "upstream_timeout",
    errno.ENETUNREACH: "upstream_unreachable",
    errno.EHOSTUNREACH: "upstream_unreachable",
    errno.ENETDOWN: "upstream_unreachable",
    errno.EHOSTDOWN: "upstream_unreachable",
    errno.ENONET: "upstream_unreachable",
    errno.ENOPROTOOPT: "upstream_unreachable",  # ICMP "protocol unreachable"
    errno.EPROTO: "upstream_unreachable",  # ICMPv6 "administratively prohibited" and its like
    errno.EACCES: "upstream_unreachable",  # a `prohibit` route, or ICMPv6 "policy fail"
    errno.EPERM: "upstream_unreachable",  # a firewall's output chain dropped it
    errno.EINVAL: "upstream_unreachable",  # a `blackhole` route
    errno.EADDRINUSE: "no_ports",
    errno.EADDRNOTAVAIL: "no_ports",
}


async def dial(service: Service, client: Address, destination: Address, *, local: bool) -> socket.socket:
    """A connection to the original destination, made within `upstream.connect_timeout`. The caller closes it.

    Towards another host with the client's own address and port, if `upstream.source` allows it; where that port cannot be had
    (a wildcard listener has it, a connection before is in TIME_WAIT) with the address alone, and else as the proxy. Towards an
    address of this host as the proxy: with the client's address the 4-tuple would be the one that was just intercepted. Raises
    EndedError.
    """
    keep = service.config.upstream.source == "auto" and not local
    sources = [client, (client[0], 0, *client[2:]), None] if keep else [None]
    for source in sources:
        try:
            with trio.fail_after(service.config.upstream.connect_timeout):
                return await _connect(source, destination)
        except trio.TooSlowError:
            raise EndedError("upstream_timeout") from None
        except OSError as error:
            outcome = _OUTCOMES.get(error.errno or 0, "error")
            if outcome == "no_ports" and source is not sources[-1]:
                continue
            if outcome == "error":
                service.complain(error, "cannot connect to %s", format_address(destination))
            elif outcome == "no_ports":
                service.complain(
                    error,
                    "no free port for a connection to %s; widen net.ipv4.ip_local_port_range",
                    format_address(destination),
                )
            raise EndedError(outcome) from error
    raise AssertionError("the last source returns or raises")


async def _connect(source: Address | None, destination: Address) -> socket.socket:
    family = socket.AF_INET6 if len(destination) == 4 else socket.AF_INET
    sock = open_upstream(family, source=source)
    try:
        number = sock.connect_ex(destination)
        if number == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number == 0 and sock.getsockname() == destination:
            # Nobody listens, and the kernel happened to pick the very port: the socket is connected to itself.
            number = errno.ECONNREFUSED
        if number:
            raise OSError(number, os.strerror(number))
    except BaseException:
        sock.close()
        raise
    return sock
