"""The relay loop and what a connection leaves behind. No trio, no pyroute2: a relay process stays small.

Accept, decide, dial, relay, record: `connection.Connection` is the life of one; `loop.RelayLoop` drives them.
"""

from tproxyd.datapath.listing import LivingConnection
from tproxyd.datapath.pipes import splice_error
from tproxyd.datapath.record import Outcome, Record
from tproxyd.datapath.report import CONNECT_SECONDS, Counters, EndedOrder, LogLine, Setup, WorkloadSetup

__all__ = [
    "CONNECT_SECONDS",
    "Counters",
    "EndedOrder",
    "LivingConnection",
    "LogLine",
    "Outcome",
    "Record",
    "Setup",
    "WorkloadSetup",
    "splice_error",
]
