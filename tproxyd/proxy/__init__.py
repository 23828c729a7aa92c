"""Connections that the embedding program wants to see: its policy is asked in a trio task, and a handler of its own gets a stream.

What the configuration refuses never comes here; with a policy, everything else does. It costs a task, and goes back to the relay loop
if the answer is to forward it.
"""

from tproxyd.proxy.handed import Complaints, serve_handed
from tproxyd.proxy.handoff import Receivers, receive_connections
from tproxyd.proxy.stream import ConnectionStream, Relaying, Sides
from tproxyd.proxy.verdict import Connection, Forward, Handle, HandOff, Policy, Refuse

__all__ = [
    "Complaints",
    "Connection",
    "ConnectionStream",
    "Forward",
    "HandOff",
    "Handle",
    "Policy",
    "Receivers",
    "Refuse",
    "Relaying",
    "Sides",
    "receive_connections",
    "serve_handed",
]
