"""The weights of the objects of a pickle, and those of its memo."""

from __future__ import annotations

import pickletools
from array import array
from typing import Final

Weight = tuple[int, int, str]
"""Nodes, depth and kind."""

ATOM: Final[Weight] = (1, 0, "plain")
NAMED: Final[Weight] = (2, 0, "named")
"""A class or function by its name."""
FRESH: Final[Weight] = (1, 0, "fresh")
"""A dict that lies on the stack alone."""
INSTANCE: Final = "instance"
OTHER: Final = "other"
"""The kind of objects whose hash is computed from what is in them."""
KEPT: Final = "kept"
"""The kind of a dict that the memo has, too, and of what holds one."""
FIELDS: Final = "fields"
"""The kind of a tuple of three or more: the fields of an object that sets its own state."""
STATES: Final = frozenset({"fresh", FIELDS})
"""Kinds of what may be the state of an object in metadata."""
KEYS: Final = frozenset({"plain", "named", INSTANCE})
"""Kinds of what may be a key in metadata."""

OF_EACH: Final = 8
"""Bytes of memory that each element of a container takes at least."""
_BYTES: Final = {
    "EMPTY_LIST LIST": 72,
    "APPEND": 40,
    "APPENDS": 40,
    "EMPTY_DICT DICT": 80,
    "SETITEM SETITEMS": 168,
    "EMPTY_SET FROZENSET": 232,
    "TUPLE TUPLE1 TUPLE2 TUPLE3": 72,
    "REDUCE INST OBJ": 128,
    "NEWOBJ NEWOBJ_EX": 192,
}
_NAMES: Final = {name: taken for names, taken in _BYTES.items() for name in names.split()}
BYTES: Final = [0] * 256
"""Bytes of memory that an instruction's object takes in CPython, by the instruction's code."""
for _op in pickletools.opcodes:
    BYTES[ord(_op.code)] = _NAMES.get(_op.name, 0)

_COUNT_BYTES: Final = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
COUNTED: Final = {
    ord(op.code): _COUNT_BYTES[op.arg.n] for op in pickletools.opcodes if op.arg and op.arg.n in _COUNT_BYTES
}
LINES: Final = {
    ord(op.code): 2 if op.arg.name == "stringnl_noescape_pair" else 1
    for op in pickletools.opcodes
    if op.arg and op.arg.n == pickletools.UP_TO_NEWLINE
}
FIXED: Final = {ord(op.code): op.arg.n for op in pickletools.opcodes if op.arg and op.arg.n > 0}
"""Arguments of instructions, by code: bytes of the count before them, lines, and bytes."""


def kept(weight: Weight) -> Weight:
    """Return the weight of an object that is in two places."""
    nodes, depth, kind = weight
    return (nodes, depth, KEPT) if kind == "fresh" else weight


class Memo:
    """The weights of the memo's entries, two bytes for each: a pickle has millions, of a few weights.

    A pickle numbers its entries in order, by MEMOIZE, or itself, by PUT. Picklers do the one or the other.
    """

    def __init__(self) -> None:
        self.codes = array("H")
        self._weights: list[Weight] = []
        self._code: dict[Weight, int] = {}
        self._numbered: dict[int, Weight] | None = None

    def __len__(self) -> int:
        return len(self.codes) if self._numbered is None else len(self._numbered)

    def __getitem__(self, index: int) -> Weight:
        return self._weights[self.codes[index]] if self._numbered is None else self._numbered[index]

    def append(self, weight: Weight) -> None:
        """Add an entry with the next number."""
        code = self._code.get(weight)
        if self._numbered is not None:
            self._numbered[len(self._numbered)] = weight
        elif code is not None:
            self.codes.append(code)
        elif len(self._weights) >> 16:
            self.put(len(self), weight)
        else:
            self._code[weight] = len(self._weights)
            self.codes.append(len(self._weights))
            self._weights.append(weight)

    def put(self, index: int, weight: Weight) -> None:
        """Add or replace the entry of a number."""
        if self._numbered is None:
            self._numbered = {number: self._weights[code] for number, code in enumerate(self.codes)}
        self._numbered[index] = weight

    @property
    def is_in_order(self) -> bool:
        """True if all entries were numbered in order."""
        return self._numbered is None
