"""Python's collector of cyclic garbage, kept from going over what is growing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Final

_INTERPRETERS_OWN: Final = 1000
"""Objects that the interpreter itself froze: Python 3.12 begins with some hundred."""


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Collect nothing in the block, which makes very many objects and no cycles.

    The collector would go over all that has been made again and again, for nothing: half the time that a
    large checkpoint's metadata takes. Nor does it go over that afterwards as if it were new. Where two
    threads are in here at once, the first to leave turns it on again, which costs the other time and nothing
    else.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        _let_age()
        gc.enable()


def _let_age() -> None:
    """Make everything old, which the next collections of what is new leave alone."""
    if gc.get_freeze_count() <= _INTERPRETERS_OWN:  # else it would thaw what the application froze
        gc.freeze()
        gc.unfreeze()
