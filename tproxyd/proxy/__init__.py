"""Connections as trio tasks: accepted, dialled, relayed, recorded. The life of one is `connection.serve_connection`."""

from tproxyd.proxy.listener import serve_listener
from tproxyd.proxy.relay import ResetWatch
from tproxyd.proxy.service import Service

__all__ = ["ResetWatch", "Service", "serve_listener"]
