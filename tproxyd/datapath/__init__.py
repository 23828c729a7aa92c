"""What a connection leaves behind, shared by everything that relays. No trio, no pyroute2: a relay process stays small."""

from tproxyd.datapath.record import EndedError, Outcome, Record

__all__ = ["EndedError", "Outcome", "Record"]
