"""What an embedding program holds: plan, kernel state and relay loops put together, for any number of network namespaces."""

from tproxyd.interceptor.heritage import Heritage
from tproxyd.interceptor.interceptor import Interceptor, open_interceptor
from tproxyd.interceptor.keeper import KINDS
from tproxyd.interceptor.succession import Predecessor
from tproxyd.interceptor.workloads import Event, Workload

__all__ = ["KINDS", "Event", "Heritage", "Interceptor", "Predecessor", "Workload", "open_interceptor"]
