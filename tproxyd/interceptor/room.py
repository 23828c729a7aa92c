"""For how many connections a process has files, and what each relay loop is told of that.

Looked at once, at the start: later, connections have files here, too, and a reload has to fit into what was found.
"""

from __future__ import annotations

import os
import resource
from typing import Literal, NamedTuple

import msgspec

from tproxyd.config import Config
from tproxyd.datapath import Setup
from tproxyd.errors import ConfigError, KernelError
from tproxyd.net.proc_net import open_file_count
from tproxyd.plan import relay_capabilities

__all__ = ["Engine", "Room", "make_room", "with_engine"]

Engine = Literal["auto", "copy", "splice"]

# Files that connections leave to the rest of the process: listeners, a child's pipes, netlink, and some of the program around.
_RESERVED_FILES = 32
_MOST_PIPES = 1024  # of a loop
# Of all files, one in twenty for pipes, which take two each: a thousand pipes beside nine thousand connections.
_FILES_A_PIPE = 40


class Room(NamedTuple):
    """For how many connections there are files: `each` loop of so many `loops`; `used` files a process has besides, and `pipes`.
    `alone` and `asks` as in Setup."""

    files: int
    used: int
    pipes: int
    each: int
    loops: int
    alone: bool
    asks: bool

    def make_setups(self, config: Config, engine: Engine) -> list[Setup]:
        """What each relay loop is told. Raises ConfigError where `limits.max_connections` does not fit."""
        most = config.limits.max_connections
        if most == "auto":
            most = self.each * self.loops
        elif most > self.each * self.loops:
            need = self.used + 2 * -(-most // self.loops)
            # And what the pipes take of the higher limit.
            enough = min(need * _FILES_A_PIPE // (_FILES_A_PIPE - 2) + 2, need + 2 * _MOST_PIPES)
            raise ConfigError(
                f"`limits.max_connections` = {most} does not fit: {self.files} open files leave room for {self.each * self.loops} connections; "
                f"raise the limit of open files (LimitNOFILE, ulimit -n) to {enough} or more, "
                "or lower the number"
            )
        elif most < self.loops:
            raise ConfigError(
                f"`limits.max_connections` = {most} is less than one for each of `relay.workers` = {self.loops}; raise the one or lower the other"
            )
        # Shares that add up to the number exactly: it is never exceeded, whichever loop a connection comes to.
        return [
            Setup(
                config=with_engine(config, engine),
                limit=most // self.loops + (index < most % self.loops),
                pipes=self.pipes,
                alone=self.alone,
                keeps=relay_capabilities(config),
                asks=self.asks,
            )
            for index in range(self.loops)
        ]


def make_room(config: Config, *, asks: bool) -> Room:
    """For one relay loop in this process, or for as many as there are to be processes. Raises KernelError where
    there is room for none."""
    workers = config.relay.workers
    if workers == "auto":
        workers = len(os.sched_getaffinity(0))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = _RESERVED_FILES + (0 if workers else open_file_count())
    pipes = min(_MOST_PIPES, files // _FILES_A_PIPE)
    loops = max(workers, 1)
    room = (files - used - 2 * pipes) // 2
    if asks:  # every connection may be with the program, and has a file here then
        room = min(room, (files - open_file_count() - _RESERVED_FILES) // loops)
    if room < 1:
        raise KernelError(
            f"the limit of {files} open files leaves no room for connections; raise it (LimitNOFILE, ulimit -n)"
        )
    return Room(files, used, pipes, room, loops, workers > 0, asks)


def with_engine(config: Config, engine: Engine) -> Config:
    """The same config with this engine."""
    return msgspec.structs.replace(config, relay=msgspec.structs.replace(config.relay, engine=engine))
