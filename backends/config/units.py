"""Sizes and lengths of time, as people read them."""

from __future__ import annotations

from typing import Final

_KIB: Final = 1024
_SIZES: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_THOUSAND: Final = 1000
_MINUTE: Final = 60
_HOUR: Final = 3600


def size(nbytes: float) -> str:
    """Return a number of bytes in at most ten characters, such as ``10.4 MiB``."""
    for unit in _SIZES[:-1]:
        if nbytes < _KIB:
            return f"{nbytes:.0f} {unit}" if unit == _SIZES[0] else f"{nbytes:.1f} {unit}"
        nbytes /= _KIB
    return f"{nbytes:.1f} {_SIZES[-1]}"


def seconds(length: float) -> str:
    """Return a length of time, such as ``41 ms``, ``2.1 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    if (milliseconds := round(length * _THOUSAND)) < _THOUSAND:
        return f"{milliseconds} ms"
    if round(length, 1) < _MINUTE:
        return f"{length:.1f} s"
    whole = round(length)
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    minutes = round(length / _MINUTE)
    return f"{minutes // _MINUTE:,} h {minutes % _MINUTE} min"
