"""Advice from measured rates: options that beat the present ones by more than the noise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

_WORTH: Final = 0.10
"""What something has to be faster by to be worth a change, however little noise there is."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The options that rates depend on."""

    part_size: int
    """Bytes."""
    concurrency: int


@dataclass(frozen=True, slots=True)
class Measured:
    """The rates of one setting, in each of several rounds."""

    setting: Setting
    size: int
    """Bytes that each round moved."""
    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    """Of this process."""

    @property
    def rate(self) -> float:
        """Bytes a second, in the median round."""
        return self.size / statistics.median(self.seconds)

    @property
    def cpu_per_gib(self) -> float:
        """Seconds of the processor for each GiB, in the median round."""
        return statistics.median(self.cpu_seconds) * (1 << 30) / self.size

    @property
    def noise(self) -> float:
        """By which share of the median the rounds differ among themselves."""
        return (max(self.seconds) - min(self.seconds)) / statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Advice:
    """Options to set, in one direction."""

    options: str
    """As in a URI's query: ``part_size=64MiB&concurrency=16``; empty where the present ones do."""
    why: str


def advised(measured: Sequence[Measured], present: Setting, *, parts: bool = True) -> Advice:
    """Advise on the options of one direction by what was measured.

    Args:
        measured: settings, the present one among them.
        present: the setting now.
        parts: whether the size of parts matters in this direction.
    """
    known = [one for one in measured if len(one.seconds) > 1]  # the noise of one round is unknown
    now = next((one for one in known if one.setting == present), None)
    if now is None:
        return Advice("", "too little was measured to say")
    fastest = max(known, key=lambda one: one.rate)
    if fastest is now:
        return Advice("", "the present options do: nothing that was tried is faster")
    if not (needed := _beaten(now, fastest)):
        noise = max(_WORTH, now.noise, fastest.noise)
        return Advice("", f"the present options do: nothing beats them by more than the noise ({noise:.0%})")
    # Of those that are as fast, the one with the fewest requests.
    as_fast = [one for one in known if _beaten(now, one) and not _beaten(one, fastest)]
    best = min(as_fast, key=lambda one: (-one.setting.part_size, one.setting.concurrency), default=fastest)
    needed = _beaten(now, best) or needed
    options = f"concurrency={best.setting.concurrency}"
    if parts:
        options = f"part_size={_spelt(best.setting.part_size)}&{options}"
    gain = best.rate / now.rate - 1
    return Advice(options, f"{gain:.0%} faster than the present options, with {needed:.0%} of noise")


def _beaten(one: Measured, other: Measured) -> float:
    """Return the noise that another setting's gain over this one exceeds; 0 where it does not."""
    needed = max(_WORTH, one.noise, other.noise)
    return needed if other.rate / one.rate - 1 > needed else 0.0


def _spelt(nbytes: int) -> str:
    """Return a size as an option takes it."""
    for unit, length in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes % length == 0:
            return f"{nbytes // length}{unit}"
    return str(nbytes)
