"""The record of one connection: filled while it lives, handed over once, at its end."""

from __future__ import annotations

import errno
import time
from typing import Literal

import msgspec

__all__ = ["UPSTREAM_OUTCOMES", "Outcome", "Record", "wall_clock"]

Outcome = Literal[
    "closed",
    "refused_by_policy",
    "self_call",
    "upstream_refused",
    "upstream_unreachable",
    "upstream_timeout",
    "upstream_reset",
    "client_reset",
    "idle_timeout",
    "half_close_timeout",
    "drained",
    "handled",
    "handed_over",
    "limit",
    "no_ports",
    "policy_error",
    "worker_lost",
    "error",
]
"""How a connection ended. `error` is an end that nobody foresaw; the log has its cause."""

UPSTREAM_OUTCOMES: dict[int, Outcome] = {
    errno.ECONNREFUSED: "upstream_refused",
    errno.ECONNRESET: "upstream_reset",
    errno.EPIPE: "upstream_reset",
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
    errno.ENOENT: "upstream_refused",  # no such Unix socket
}
"""How it ended where the kernel gave this error for the upstream."""


class Record(msgspec.Struct, kw_only=True):
    """One connection, in the fields and the order of the access log.

    Addresses are `ip:port` or `[ip6]:port`. `ts` is the end of the connection, RFC 3339 in UTC with milliseconds, and
    `duration_ms` the time from accept to that end. What is not known is None. `rule` None means the default policy.
    """

    ts: str = ""
    id: str
    workload: str = "host"
    direction: Literal["inbound", "outbound"] = "inbound"
    protocol: Literal["tcp", "udp"] = "tcp"
    source: str | None = None
    original_destination: str | None = None
    upstream: str | None = None
    upstream_source: str | None = None
    rule: str | None = None
    sni: str | None = None
    alpn: str | None = None
    bytes_from_client: int = 0
    bytes_from_upstream: int = 0
    duration_ms: float = 0.0
    outcome: Outcome = "error"


def wall_clock(now: float) -> str:
    """`ts` for a moment on time.time()."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03d}Z"
