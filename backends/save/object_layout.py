"""The layout of objects: the object of each item, and the size of its parts."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from torch.distributed.checkpoint.planner import WriteItem

from cloudckpt.backends.config.options import Options
from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.stores.base import PartLimits

_MIB = 1 << 20
_PART_SIZE = 32 * _MIB
_SHORTEST_PART_SIZE = 8 * _MIB
_LONGEST_PART_SIZE = 128 * _MIB
_FRAMING = 2048
"""Bytes around a tensor's payload, at most; good for an estimate."""


def distribute(items: Sequence[WriteItem], part_size: int, most: int) -> list[list[WriteItem]]:
    """Spread items over objects of about equal size.

    An object is worth having from two parts on; ``most`` bounds their number. Items keep the plan's order
    within an object, and values of unknown size come first, in the first object.
    """
    if not items:
        return []
    sizes = [estimated_size(item) for item in items]
    count = max(1, min(most, sum(sizes) // (2 * part_size)))
    lightest = [(0, which) for which in range(count)]
    chosen = [0] * len(items)
    for position in sorted(range(len(items)), key=lambda at: -sizes[at]):
        load, which = lightest[0]
        chosen[position] = which
        heapq.heapreplace(lightest, (load + sizes[position], which))
    objects: list[list[WriteItem]] = [[] for _ in range(count)]
    for position in sorted(range(len(items)), key=lambda at: items[at].tensor_data is not None):
        objects[chosen[position] if items[position].tensor_data is not None else 0].append(items[position])
    return [held for held in objects if held]


def estimated_size(item: WriteItem) -> int:
    """Bytes that an item will take in its object; of values that are not serialised yet, the least.

    Of a shard, that is the rank's own chunk; ``WriteItem.tensor_storage_size`` is of the tensor of all ranks.
    """
    if item.tensor_data is None:
        return _FRAMING
    itemsize = item.tensor_data.properties.dtype.itemsize
    return math.prod(item.tensor_data.chunk.sizes) * itemsize + _FRAMING


def part_size_for(nbytes: int, options: Options, limits: PartLimits) -> int:
    """Return the configured part size, or one that keeps an object within the store's number of parts.

    Twice the room is left, for values whose size is not known before they are serialised.
    """
    return fitting_part_size(2 * nbytes, usual_part_size(options), limits)


def fitting_part_size(nbytes: int, usual: int, limits: PartLimits) -> int:
    """Return the usual part size, or what the store takes for an object of so many bytes."""
    least = max(usual, limits.min_size, math.ceil(nbytes / limits.max_count))
    return math.ceil(least / limits.multiple) * limits.multiple


def usual_part_size(options: Options) -> int:
    """Return the part size in bytes that ``part_size`` and ``memory_limit`` allow together."""
    return min(options.part_size or _PART_SIZE, options.memory_limit)


def part_size_in_place(nbytes: int, at_once: int, options: Options, limits: PartLimits) -> int:
    """Return the part size in bytes where parts are sent from the caller's memory.

    A part costs the processor some 2 ms, regardless of its size, so parts are long; but every transfer that
    may run should have one. It is the usual size for a store that copies a part, or takes parts one after
    another, where a long one that fails is a long way back.

    Args:
        nbytes: what the rank sends.
        at_once: transfers that may run now.
        options: of the store.
        limits: of the store.
    """
    usual = usual_part_size(options)
    if options.part_size is not None or not limits.in_place:
        return usual
    shared_out = nbytes // at_once // _MIB * _MIB
    # Half of the limit: what follows may have to be gathered after all, a part while another one is sent.
    most = min(_LONGEST_PART_SIZE, options.memory_limit // 2, limits.max_size)
    return max(limits.min_size, min(most, max(shared_out, _SHORTEST_PART_SIZE)))


def check_part_size(options: Options, limits: PartLimits, uri: str) -> None:
    """Refuse a part size that the store would refuse, before anything is sent.

    Raises:
        ConfigurationError: says which option to change, and to what.
    """
    part_size = options.part_size or usual_part_size(options)
    for name, value in (("memory_limit", options.memory_limit), ("part_size", part_size)):
        if value < limits.min_size:
            raise ConfigurationError(
                f"{name}={int(value)} is less than the smallest part that this store takes, "
                f"{limits.min_size} bytes",
                uri=uri,
                hint=f"Set {name} to {limits.min_size} or more",
            )
    if part_size > limits.max_size:
        raise ConfigurationError(
            f"part_size={int(part_size)} is more than the largest part that this store takes, "
            f"{limits.max_size} bytes",
            uri=uri,
            hint="Set part_size to less",
        )
