"""What an embedding program holds: plan, kernel state and relay loops put together for a network namespace."""

from tproxyd.interceptor.interceptor import Interceptor, open_interceptor
from tproxyd.interceptor.keeper import KINDS

__all__ = ["KINDS", "Interceptor", "open_interceptor"]
