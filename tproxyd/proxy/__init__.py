"""Connections as trio tasks: accepted, dialled, relayed, recorded. The life of one is `connection.serve_connection`."""

from tproxyd.proxy.connection import Service
from tproxyd.proxy.listener import serve_listener

__all__ = ["Service", "serve_listener"]
