"""The plan of a benchmark: the settings to try, and a limit on the bytes to move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cloudckpt.backends.config.options import Options
from cloudckpt.backends.save.object_layout import part_size_in_place
from cloudckpt.backends.stores.base import PartLimits
from cloudckpt.backends.transfer.downloader import LARGEST_READ
from cloudckpt.bench.advice import Setting

ROUNDS: Final = 3
_MOST_REQUESTS: Final = 64


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a benchmark."""

    present: Setting
    up: tuple[Setting, ...]
    down: tuple[Setting, ...]
    size: int
    """Bytes that each round of each setting moves."""

    @property
    def most_up(self) -> int:
        """Bytes that go up at most: a round to warm up, then all, and what is read."""
        return self.size * (2 + ROUNDS * len(self.up))

    @property
    def most_down(self) -> int:
        """Bytes that come down at most."""
        return self.size * (1 + ROUNDS * len(self.down))


def plan_for(options: Options, limits: PartLimits, size: int) -> Plan:
    """Plan to try the present options, and others near them, by moving ``size`` bytes at a time."""
    many = options.concurrency
    part = part_size_in_place(size, many, options, limits)
    present = Setting(_rounded(part, limits), many)
    requests = sorted({1, max(1, many // 2), many, *(min(_MOST_REQUESTS, times * many) for times in (2, 4))})
    up = [present]
    # More requests than there are parts have nothing to send: smaller parts go with them.
    up += [Setting(_rounded(min(part, size // count), limits), count) for count in requests]
    sizes = (part // 4, part // 2, min(2 * part, limits.max_size, options.memory_limit, size // 2))
    up += [Setting(_rounded(one, limits), many) for one in sizes]
    down = [present, *(Setting(part, count) for count in requests if count * LARGEST_READ <= size)]
    # The present ones come first, for time may run out.
    return Plan(present, tuple(dict.fromkeys(up)), tuple(dict.fromkeys(down)), size)


def _rounded(nbytes: int, limits: PartLimits) -> int:
    """Return the nearest size below that a part may have, or the smallest."""
    least = -(-limits.min_size // limits.multiple) * limits.multiple
    return max(least, nbytes // limits.multiple * limits.multiple)
