"""The benchmark: tproxyd beside other transparent proxies, in one run, on one machine (`sudo make bench`).

Knows the peers (HAProxy, nginx, Envoy, a C relay, no proxy at all), the load (`load.c`) and the goals of docs/performance.md. tproxyd never
imports it.

The idea. Absolute figures of a shared machine drift by 40 % within minutes, so only ratios count, and only those between
neighbours in time: in every round each peer has its turn (A B C ... A B C ...), each figure is divided by HAProxy's of the same
round, and what is told is the median of those ratios and their range. All peers have one worker thread, keep the client's address (and
port, where they can), listen on the same port behind the same kernel state, which `tproxyd apply` has made, and are started for
their turn and ended after it. No figure without proof that the proxy was in the path: see `rig`.

Everything is as close to each program's defaults as transparency lets it be. None of the peers writes an access log;
tproxyd does, and counts, for those are its defaults.

Nothing is pinned to a core: client, proxy and server share them all, as the kernel likes it. Tried (5 rounds each, two cores, other
work beside it): the proxy on one core and client and server on the other. The ratios' ranges became wider, not narrower (new connections, C relay:
0.92-1.53 instead of 0.85-1.22; nginx: 0.74-1.88 instead of 0.61-0.97), since a pinned proxy cannot get out of the way of what else runs. What
moves the figures is other programs. While one of them holds one of two cores, everything here shares the other: a kept-alive connection
takes 42 us and 6,000 new ones a second are possible; left alone it is 80 to 100 us and 11,000. So every cell tells how much of the cores others
used (`Cell.others`: 0 to 9 % when nothing else runs); where three rounds or more were left alone, only those count, and the end of a run says
whether it was quiet. CPU time per GB and per
connection hardly knows the difference.
"""
