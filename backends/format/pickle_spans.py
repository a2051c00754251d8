"""Spans of a pickle that repeat, weighed once.

The metadata of a large checkpoint is a few forms over and over: an item's key and value, with other numbers
and names in them. A span whose weight was found out is turned into a pattern, in which every number and
string is any number and any string, since each of them weighs the same. Where the pattern matches again, its
weight is known.
"""

from __future__ import annotations

import itertools
import pickletools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from cloudckpt.backends.format.pickle_weights import Weight

_MOST: Final = 64
"""Patterns that are tried."""
_LONGEST: Final = 4096
"""Bytes of a span."""
_FEWEST_OPS: Final = 3
_MOST_OPS: Final = 400
_PARTS: Final = 4096
"""Instructions of all patterns. Compiling them takes a second; those of a checkpoint have up to 2,000."""
_TEXT: Final = 16
"""Instructions whose compilation takes as long as that of one with text."""
_TRIES: Final = 1 << 15
"""Patterns tried in vain, beyond those that are paid for, until all are given up."""
_PAID: Final = 4
"""Tries in vain that a span pays for which comes after the same one as last time."""

_OP: Final = {op.name: ord(op.code) for op in pickletools.opcodes}


def _codes(names: str) -> frozenset[int]:
    return frozenset(_OP[name] for name in names.split())


_PLAIN: Final = _codes(
    "MEMOIZE NONE NEWTRUE NEWFALSE EMPTY_TUPLE EMPTY_LIST EMPTY_DICT MARK TUPLE TUPLE1 TUPLE2 TUPLE3 REDUCE "
    "NEWOBJ BUILD SETITEM SETITEMS APPEND APPENDS"
)
"""Instructions without an argument that a span may have."""
_CLOSING: Final = _codes(
    "EMPTY_TUPLE EMPTY_LIST EMPTY_DICT TUPLE TUPLE1 TUPLE2 TUPLE3 REDUCE NEWOBJ BUILD SETITEM SETITEMS "
    "APPEND APPENDS"
)
"""Instructions after which, and after whose MEMOIZE, an object may be complete."""
_CHANGING: Final = _codes(
    "MEMOIZE MARK TUPLE TUPLE1 TUPLE2 TUPLE3 REDUCE NEWOBJ NEWOBJ_EX BUILD SETITEM SETITEMS APPEND APPENDS "
    "ADDITEMS FROZENSET DICT LIST STACK_GLOBAL STOP POP POP_MARK DUP BINPUT LONG_BINPUT"
)
"""Instructions that go on with what lies on the stack."""
_INTEGERS: Final = _codes("BININT1 BININT2 BININT LONG1")
_GET, _FAR_GET = _OP["BINGET"], _OP["LONG_BINGET"]
_FLOAT = _OP["BINFLOAT"]


def _counted(code: int, longest: int) -> bytes:
    """Match an instruction whose argument has its length, of up to ``longest`` bytes, before it."""
    tens = [range(first, min(first + 16, longest + 1)) for first in range(0, longest + 1, 16)]
    return re.escape(bytes([code])) + _either(
        # Sixteen at a time: alternatives are tried one by one.
        b"(?=[%s-%s])" % (_escaped(some[0]), _escaped(some[-1]))
        + _either(_escaped(length) + b".{%d}" % length for length in some)
        for some in tens
    )


def _either(alternatives: Iterable[bytes]) -> bytes:
    return b"(?>" + b"|".join(alternatives) + b")"


def _escaped(byte: int) -> bytes:
    return b"\\x%02x" % byte


_INTEGER: Final = b"(?>K.|M..|J....|" + _counted(_OP["LONG1"], 7) + b")"
_COUNTED: Final = {code: _counted(code, 255) for code in (_OP["SHORT_BINUNICODE"], _OP["SHORT_BINBYTES"])}


@dataclass(slots=True)
class Span:
    """A span: its pattern, what it leaves on the stack, and the codes of what it adds to the memo.

    Attributes:
        parts: patterns of its instructions, one after another.
        far: places among them of those that take an entry of the memo by a long number, with the code that
            this entry has and the number that it had.
        pushes: weights.
        memo: codes.
        cost: bytes of memory that it takes.
    """

    parts: list[bytes]
    far: list[tuple[int, int, int]]
    pushes: Sequence[Weight]
    memo: bytes
    cost: int
    pattern: re.Pattern[bytes] = field(init=False)
    following: Span | None = None
    """The span that came after it last time."""
    _is_settled: bool = False

    def __post_init__(self) -> None:
        self.pattern = re.compile(b"".join(self.parts), re.DOTALL)

    def end(self, data: bytes, at: int, codes: Sequence[int]) -> int:
        """Return where the span ends that begins here, or 0 if it does not."""
        found = self.pattern.match(data, at)
        if found is None:
            return 0
        if self.far:
            taken = [int.from_bytes(index, "little") for index in found.groups()]
            for index, (_, code, _) in zip(taken, self.far, strict=True):
                if index >= len(codes) or codes[index] != code:
                    return 0
            if not self._is_settled:
                self._settle(taken)
        return found.end()

    def _settle(self, taken: Sequence[int]) -> None:
        """Expect the entries that are the same this time in all spans: classes, and names of attributes."""
        self._is_settled = True
        varying: list[tuple[int, int, int]] = []
        for index, one in zip(taken, self.far, strict=True):
            place, _, before = one
            if index == before:
                self.parts[place] = re.escape(b"j" + index.to_bytes(4, "little"))
            else:
                varying.append(one)
        self.far = varying
        self.pattern = re.compile(b"".join(self.parts), re.DOTALL)


class Spans:
    """The spans of one pickle."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._known: list[Span] = []
        self._last: Span | None = None
        self._left = _TRIES
        self._parts = _PARTS

    @property
    def is_worthwhile(self) -> bool:
        """True while spans repeat."""
        return self._left > 0

    def match(self, at: int, codes: Sequence[int]) -> tuple[Span, int] | None:
        """Return the known span that begins here, and where it ends.

        Args:
            at: a position in the pickle.
            codes: of the memo's entries.
        """
        last = self._last
        expected = last.following if last is not None else None
        if expected is not None and (end := expected.end(self._data, at, codes)):
            self._last = expected
            self._left += _PAID
            return expected, end
        for tried, span in enumerate(self._known):
            if end := span.end(self._data, at, codes):
                if last is not None:
                    last.following = span
                self._last = span
                self._left -= tried
                return span, end
        self._left -= max(1, len(self._known))
        self._last = None
        return None

    def learn(
        self,
        positions: Sequence[int],
        pushes: Sequence[Weight],
        memo: bytes,
        codes: Sequence[int],
        cost: int,
    ) -> None:
        """Learn a span from one that was weighed.

        Args:
            positions: where its instructions begin, and where it ends.
            pushes: what it left on the stack.
            memo: the codes of what it added to the memo.
            codes: of all entries of the memo.
            cost: bytes of memory that it takes.
        """
        if len(self._known) >= _MOST or len(positions) <= _FEWEST_OPS:
            return
        if positions[-1] - positions[0] > _LONGEST:
            return
        data = self._data
        parts: list[bytes] = []
        far: list[tuple[int, int, int]] = []
        for first, end in itertools.pairwise(positions):
            code = data[first]
            if code in _INTEGERS:
                parts.append(_INTEGER)
            elif code in _COUNTED:
                parts.append(_COUNTED[code])
            elif code == _FAR_GET:
                index = int.from_bytes(data[first + 1 : end], "little")
                far.append((len(parts), codes[index], index))
                parts.append(b"j(....)")
            elif code == _FLOAT:
                parts.append(b"G.{8}")
            elif code == _GET or code in _PLAIN:
                parts.append(re.escape(data[first:end]))
            else:
                return
        self._parts -= len(parts) + (_TEXT - 1) * sum(data[first] in _COUNTED for first in positions[:-1])
        if self._parts < 0:
            return
        self._known.insert(0, Span(parts, far, tuple(pushes), memo, cost))


def is_end(code: int, following: int, held: int) -> bool:
    """Return True if a span can end here.

    Args:
        code: the last instruction that is no MEMOIZE.
        following: the next one.
        held: objects that the span has left on the stack.
    """
    return held > 1 and code in _CLOSING and following not in _CHANGING


def is_too_long(ops: int) -> bool:
    """Return True if so many instructions make no span."""
    return ops > _MOST_OPS
