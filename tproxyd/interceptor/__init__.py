"""What an embedding program holds: plan, kernel state and relay loops put together, for any number of network namespaces."""

from tproxyd.interceptor.interceptor import Interceptor, open_interceptor
from tproxyd.interceptor.keeper import KINDS
from tproxyd.interceptor.workloads import Event, Workload

__all__ = ["KINDS", "Event", "Interceptor", "Workload", "open_interceptor"]
