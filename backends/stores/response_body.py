"""Filling buffers from the body of an answer, in few calls and without copies where that can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from http.client import HTTPException, HTTPResponse
from typing import Any

from cloudckpt.backends.store import Arrived
from cloudckpt.backends.stores.runs import runs
from cloudckpt.backends.stores.socket_body import read_blocking

ReadInto = Callable[[Any], int]

_WINDOW = 1 << 20
"""Bytes read at once, before whoever sums them hears of it: enough to be worth a turn at the lock."""
_UNCUT = 1 << 18
"""Bytes from which a buffer is read at once, where that takes one call. Shorter calls are more calls, and
what they read is no warmer: it has waited in the kernel."""
_SMALL = 1 << 15
"""Bytes below which a buffer is not read into by itself: a call costs more than copying so many."""


class BrokenOffError(Exception):
    """A body ended before its length, or stalled."""


def fill(
    response: Any, buffers: Sequence[memoryview], arrived: Arrived | None, otherwise: ReadInto | None = None
) -> None:
    """Fill the buffers from urllib3's ``response``.

    urllib3 itself reads into memory of its own and copies from there, which costs as much again; below it is
    http.client's response, for which it has no public name. ``otherwise`` is what to read with where that is
    not to be gone round.

    Raises:
        BrokenOffError: it ends too early.
    """
    below = getattr(response, "_fp", None) if otherwise is None else None
    straight = below if isinstance(below, HTTPResponse) else None
    readinto: ReadInto = straight.readinto if straight is not None else otherwise or response.readinto
    uncut = _UNCUT if straight is not None and read_blocking(straight) else None
    scratch, done = memoryview(b""), 0
    for run in runs(buffers, _WINDOW, uncut=uncut):
        size = sum(piece.nbytes for piece in run)
        if size >= len(run) * _SMALL:
            for piece in run:
                _read_fully(readinto, piece)
        else:
            scratch = scratch or memoryview(bytearray(_WINDOW))
            _read_fully(readinto, scratch[:size])
            at = 0
            for piece in run:
                piece[:] = scratch[at : at + piece.nbytes]
                at += piece.nbytes
        done += size
        if arrived is not None:
            arrived(done)
    if straight is not None and straight.isclosed():
        response.release_conn()  # urllib3 has not seen that all is read


def _read_fully(readinto: ReadInto, piece: memoryview) -> None:
    filled = 0
    while filled < piece.nbytes:
        try:
            got = readinto(piece[filled:])
        except (HTTPException, OSError) as error:  # from below what urllib3 words errors for
            raise BrokenOffError(f"after {filled:,} bytes of a buffer") from error
        if not got:
            raise BrokenOffError(f"the connection ended after {filled:,} bytes of {piece.nbytes:,}")
        filled += got
