"""Parts and ranges that a rank may have in flight: the option, or a share of the host's connections."""

from __future__ import annotations

import functools
import os
import resource
from typing import Final

from cloudckpt.backends.config.options import Options
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.stores.http.rates import NEAR, rates
from cloudckpt.backends.system.system_limits import local_ranks, pids_room

_OF_HOST: Final = 256
"""Connections in one direction that the ranks of a host share. At 90 MB/s each, they fill 180 Gbit/s."""
_MOST: Final = 64
"""Connections of one rank."""
_LEAST: Final = 8
_AT_FIRST: Final = 32
"""Connections of one rank at first, where no server has answered yet."""
_AT_FIRST_NEAR: Final = 4
_AT_FIRST_FAR: Final = (8, 64)
"""The fewest and the most connections of one rank to a distant server at first."""
_OF_LATENCY: Final = 1e3
"""Connections at first for each second until an answer begins: one a millisecond."""
_OF_THREADS: Final = 4
"""A rank's requests take one in so many of the threads that its control groups still let start."""
_OF_DESCRIPTORS: Final = 8
"""A rank's connections take one in so many of the descriptors that its process may have."""


def connections(options: Options) -> int:
    """Return how many requests to a distant server a rank may have in flight in one direction."""
    return options.concurrency if "concurrency" in options.model_fields_set else _share(os.getpid())


@functools.lru_cache(maxsize=1)
def _share(process: int) -> int:
    """Return a rank's share, found out once a process.

    The threads that are left change with each transfer, and connections are kept by this number.
    """
    del process
    ranks = local_ranks()
    allowed = [_MOST, _OF_HOST // ranks]
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        allowed.append(soft // _OF_DESCRIPTORS)
    if (room := pids_room()) is not None:
        allowed.append(room[0] // (_OF_THREADS * ranks))
    return max(_LEAST, min(allowed))


def at_first(most: int) -> int:
    """Return how many of ``most`` connections to use before their rate has been measured.

    Each waits for as long as an answer takes to begin, and a distant one also carries less: it grows by what
    is acknowledged in a round trip. So the more distant the server is, the more of them fill a network. The
    ranks of a host, which shares its network among them, share these as well.
    """
    latency = rates().latency
    if latency is None:
        return min(most, _AT_FIRST)
    if latency < NEAR:
        return min(most, _AT_FIRST_NEAR)
    fewest, greatest = _AT_FIRST_FAR
    return min(most, max(fewest, min(greatest, round(latency * _OF_LATENCY)) // local_ranks()))


def transfers(store: ObjectStore, options: Options) -> int:
    """Return how many parts or ranges a rank may have in flight."""
    return connections(options) if store.is_remote else options.concurrency
