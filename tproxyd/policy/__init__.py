"""Pure: which connections are relayed, where to, and as whom. Two functions, asked once a connection.

`verdicts` has the rules, `sources` whose address an upstream connection bears. Both know addresses and the configuration; they refuse
to know sockets, the kernel and files.
"""

from tproxyd.policy.sources import Choice, Choose, Way, compile_source
from tproxyd.policy.verdicts import SPECIAL_NETWORKS, Decide, Verdict, compile_policy

__all__ = [
    "SPECIAL_NETWORKS",
    "Choice",
    "Choose",
    "Decide",
    "Verdict",
    "Way",
    "compile_policy",
    "compile_source",
]
