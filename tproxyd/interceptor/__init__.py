"""What an embedding program holds: plan, kernel state and relay loops put together for a network namespace."""

from tproxyd.interceptor.interceptor import Interceptor, open_interceptor

__all__ = ["Interceptor", "open_interceptor"]
