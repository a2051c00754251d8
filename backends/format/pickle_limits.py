"""A look at a pickle before it is loaded, for memory and time that it claims and can't need.

A few dozen bytes can cost as much as their writer likes, before a single object can be judged:

- CPython's unpickler keeps its memo in an array that grows to any index that an instruction names.
- It makes room for a string of bytes of any length that is named, before it looks for them.
- A tuple of the same tuple twice, forty times over, is hashed 2**40 times when it becomes a key.
- A tuple nested 200,000 deep overflows the C stack when it is hashed.
- An empty set is one byte in a pickle, and 232 in memory.
- A dict that thousands of objects have for their state is copied for each.

So the instructions are followed, without making what they make: of every object only its nodes, shared ones
counted as often as they are met, and its depth.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Sequence

from cloudckpt.backends.format.pickle_spans import Spans, is_end, is_too_long
from cloudckpt.backends.format.pickle_weights import (
    ATOM,
    BYTES,
    COUNTED,
    FIELDS,
    FIXED,
    FRESH,
    INSTANCE,
    KEPT,
    KEYS,
    LINES,
    NAMED,
    OF_EACH,
    OTHER,
    STATES,
    Memo,
    Weight,
    kept,
)

_NODES = 100
"""Of one object, for each byte of the pickle; one shorter than ``_SMALL`` may have as many as that."""
_SMALL = 10_000
_REPEATING = 64 << 10
"""Bytes from which a pickle is long enough for spans of it to repeat."""
_KEY_NODES = 1_000
"""Of a key: hashing it takes this long, each time."""
_TAKEN = 128
"""Bytes of memory for containers, for each byte of the pickle. Honest ones of nothing but dicts take 36."""
_TAKEN_STRICTLY = 48
"""The same of metadata, which takes 10 to 20."""
_PAIR = 2
_LONG_TEXT = 1024
"""Bytes from which text weighs more than an atom: a call may copy it."""
_HASHED_AS_IT_IS = 8
"""Bytes of a LONG1 instruction's argument, its length among them: an integer of up to 56 bits."""
_DEPTH = 2_000
"""More than any pickler writes, which gives up at Python's recursion limit of 1,000."""


class _TooMuchError(Exception):
    """The pickle claims more than its length can need."""


def claims_too_much(data: bytes, *, called: bool = False, strictly: bool = False) -> bool:
    """Return True if loading a pickle takes memory or time out of all proportion to its length.

    Takes time in proportion to its length. One that is no pickle claims nothing from there on: the loader
    says what is wrong with it.

    With ``called`` an object may be called that a call has returned, as it is in the pickle of a class within
    a class: for a loader that calls nothing but names, and writes out nothing of what it is given.

    With ``strictly`` it must be as DCP's metadata is, else it is said to claim too much. A key is text, a
    number of up to 56 bits or an instance of a class: thousands of others can have the same hash, and each is
    compared with all before it. No two objects have the same dict for their state: it is copied for each.
    It takes less memory, too.
    """
    try:
        _Scales(data, called=called, strictly=strictly).weigh()
    except _TooMuchError:
        return True
    except (LookupError, ValueError):  # the loader stops here too
        return False
    return False


class _Scales:
    """A pickle machine that holds weights instead of objects."""

    def __init__(self, data: bytes, *, called: bool = False, strictly: bool = False) -> None:
        self._data = data
        self._called = called
        self._strictly = strictly
        self._most = _NODES * max(_SMALL, len(data))
        self._left = (_TAKEN_STRICTLY if strictly else _TAKEN) * max(_SMALL, len(data))
        """Bytes of memory that may still be taken, and nodes of text that may be compared."""
        self._stack: list[Weight] = []
        self._marks: list[int] = []
        self._memo = Memo()
        self._spans = Spans(data)

    def weigh(self) -> None:
        """Follow the instructions to the end.

        Raises:
            _TooMuchError: they claim too much.
            LookupError, ValueError: they can't be followed any further.
        """
        at, end, memo = 0, len(self._data), self._memo
        spans = self._spans if end > _REPEATING else None
        while 0 <= at < end:
            if spans is None:
                at = self._step(at)
            elif (found := spans.match(at, memo.codes)) is not None:
                span, at = found
                self._stack.extend(span.pushes)
                memo.codes.frombytes(span.memo)
                self._left -= span.cost
                if self._left < 0:
                    raise _TooMuchError
            else:
                at = self._span(at)
                if not (memo.is_in_order and spans.is_worthwhile):
                    spans = None

    def _step(self, at: int) -> int:
        """Follow the instruction at a position; return where the next one is, or -1 behind the last one."""
        data, stack = self._data, self._stack
        code = data[at]
        at += 1
        if code == _MEMOIZE:
            self._memo.append(kept(stack[-1]))
        elif code == _BINGET:
            stack.append(self._memo[data[at]])
            at += 1
        elif (length := _ATOMS[code]) is not None:
            stack.append(ATOM)
            at += length
        elif code == _STOP:
            return -1
        else:
            first, at = at, self._after(code, at)
            self._left -= BYTES[code]
            if at > len(data) or self._left < 0:
                raise _TooMuchError
            _STEPS[code](self, data[first:at])
        return at

    def _span(self, at: int) -> int:
        """Follow instructions for as long as they make a span, and learn it; return where the next one is."""
        data, outer, marks = self._data, self._stack, self._marks
        own: list[Weight] = []
        own_marks: list[int] = []
        self._stack, self._marks = own, own_marks
        before, positions, last, left = len(self._memo), [at], 0, self._left
        try:
            while 0 <= at < len(data) and not is_too_long(len(positions)):
                code = data[at]
                last = last if code == _MEMOIZE else code
                at = self._step(at)
                positions.append(at)
                if 0 <= at < len(data) and not own_marks and is_end(last, data[at], len(own)):
                    if self._memo.is_in_order:
                        codes = self._memo.codes
                        added = codes[before:].tobytes()
                        self._spans.learn(positions, own, added, codes, left - self._left)
                    break
        except LookupError:  # an instruction needs what lies below
            self._stack, self._marks = outer, marks
            self._take_over(own, own_marks)
            self._left += BYTES[data[at]]  # which the next line takes again
            return self._step(at)
        self._stack, self._marks = outer, marks
        self._take_over(own, own_marks)
        return at

    def _take_over(self, stack: list[Weight], marks: list[int]) -> None:
        below = len(self._stack)
        self._stack.extend(stack)
        self._marks.extend(below + mark for mark in marks)

    def _after(self, code: int, at: int) -> int:
        """Return the end of an argument."""
        if code in COUNTED:
            width = COUNTED[code]
            return at + width + int.from_bytes(self._data[at : at + width], "little")
        for _ in range(LINES.get(code, 0)):
            at = self._data.index(b"\n", at) + 1
        return at + FIXED.get(code, 0)

    def _make(self, parts: Sequence[Weight], kind: str = OTHER) -> None:
        """Push what is made of these."""
        nodes = 1 + sum(nodes for nodes, _, _ in parts)
        depth = 1 + max((depth for _, depth, _ in parts), default=0)
        if nodes > self._most or depth > _DEPTH:
            raise _TooMuchError
        if any(kind in ("fresh", KEPT) for _, _, kind in parts):
            kind = KEPT
        self._stack.append((nodes, depth, kind))

    def _take(self, count: int) -> list[Weight]:
        """Take what lies on top."""
        if len(self._stack) < count:
            raise LookupError
        parts = self._stack[-count:]
        del self._stack[-count:]
        return parts

    def _take_marked(self) -> list[Weight]:
        """Take what lies above the mark."""
        mark = self._marks.pop()
        parts = self._stack[mark:]
        del self._stack[mark:]
        self._left -= OF_EACH * len(parts)
        return parts

    def _hash(self, keys: Sequence[Weight]) -> None:
        for nodes, _, kind in keys:
            if (nodes > _KEY_NODES and kind != "plain") or (self._strictly and kind not in KEYS):
                raise _TooMuchError
            self._left -= nodes - 1  # text is compared with text of the same hash
        if self._left < 0:
            raise _TooMuchError

    def _call(self, parts: Sequence[Weight], kind: str = OTHER) -> None:
        # The loader would say so, and write out what may be as large as a list of lists.
        if parts[0] != NAMED and not self._called:
            raise _TooMuchError
        self._make(parts, kind)

    def _note(self, index: int) -> None:
        if index > len(self._data):  # every entry takes bytes to make
            raise _TooMuchError
        self._memo.put(index, kept(self._stack[-1]))

    # One instruction each; what changes an object keeps its weight.

    def push(self, _: bytes) -> None:
        self._stack.append(ATOM)

    def push_text(self, argument: bytes) -> None:
        size = len(argument)
        self._stack.append(ATOM if size < _LONG_TEXT else (1 + size // 8, 0, "plain"))

    def push_empty(self, _: bytes) -> None:
        self._stack.append(ATOM)

    def push_dict(self, _: bytes) -> None:
        self._stack.append(FRESH)

    def push_named(self, _: bytes) -> None:
        self._stack.append(NAMED)

    def push_stack_named(self, _: bytes) -> None:
        self._take(2)
        self._stack.append(NAMED)

    def push_long(self, argument: bytes) -> None:
        self._stack.append((1 + len(argument) // 8, 0, OTHER))  # all of it is hashed, each time

    def push_line(self, argument: bytes) -> None:
        self.push_long(argument)

    def push_counted(self, argument: bytes) -> None:
        self._stack.append(ATOM if len(argument) <= _HASHED_AS_IT_IS else (2, 0, OTHER))

    def make_instance(self, _: bytes) -> None:
        self._call(self._take(2), INSTANCE)

    def get(self, argument: bytes) -> None:
        self._stack.append(self._memo[int.from_bytes(argument, "little")])

    def get_line(self, argument: bytes) -> None:
        self._stack.append(self._memo[int(argument)])

    def put(self, argument: bytes) -> None:
        self._note(int.from_bytes(argument, "little"))

    def put_line(self, argument: bytes) -> None:
        self._note(int(argument))

    def nothing(self, _: bytes) -> None:
        pass

    def mark(self, _: bytes) -> None:
        self._marks.append(len(self._stack))

    def pop(self, _: bytes) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def pop_marked(self, _: bytes) -> None:
        self._take_marked()

    def duplicate(self, _: bytes) -> None:
        self._stack.append(kept(self._stack[-1]))

    def build(self, _: bytes) -> None:
        if self._stack.pop()[2] not in STATES and self._strictly:
            raise _TooMuchError

    def make_of_one(self, _: bytes) -> None:
        self._make(self._take(1))

    def make_of_two(self, _: bytes) -> None:
        self._make(self._take(2))

    def call_with_one(self, _: bytes) -> None:
        self._call(self._take(2))

    def call_with_two(self, _: bytes) -> None:
        self._call(self._take(3))

    def make_of_three(self, _: bytes) -> None:
        self._make(self._take(3))

    def make_of_marked(self, _: bytes) -> None:
        self._make(self._take_marked())

    def make_tuple(self, _: bytes) -> None:
        parts = self._take_marked()
        self._make(parts, FIELDS if len(parts) > _PAIR else OTHER)  # of two: a dict and another

    def make_of_keys(self, _: bytes) -> None:
        parts = self._take_marked()
        self._hash(parts)
        self._make(parts)

    def make_of_items(self, _: bytes) -> None:
        parts = self._take_marked()
        self._hash(parts[::2])
        self._make(parts, FRESH[2])

    def add_item(self, _: bytes) -> None:
        self._hash(self._take(2)[:1])

    def add_items(self, _: bytes) -> None:
        self._hash(self._take_marked()[::2])

    def add_keys(self, _: bytes) -> None:
        self._hash(self._take_marked())


_OPCODES = {op.name: op for op in pickletools.opcodes}


def _code(name: str) -> int:
    return ord(_OPCODES[name].code)


_MEMOIZE, _BINGET, _STOP = _code("MEMOIZE"), _code("BINGET"), _code("STOP")
_STEPS: dict[int, Callable[[_Scales, bytes], None]] = {
    _code(op.name): _Scales.push for op in pickletools.opcodes if not op.stack_before and op.stack_after
} | {
    _code(name): step
    for step, names in (
        (_Scales.push_empty, "EMPTY_LIST EMPTY_SET"),
        (_Scales.push_dict, "EMPTY_DICT"),
        (_Scales.push_long, "LONG4"),
        (_Scales.push_line, "INT LONG"),
        (_Scales.push_counted, "LONG1"),
        (_Scales.get, "LONG_BINGET"),
        (_Scales.get_line, "GET"),
        (_Scales.put, "BINPUT LONG_BINPUT"),
        (_Scales.put_line, "PUT"),
        (_Scales.nothing, "PROTO FRAME READONLY_BUFFER BINPERSID"),
        (_Scales.mark, "MARK"),
        (_Scales.pop, "POP APPEND"),
        (_Scales.build, "BUILD"),
        (_Scales.push_text, "BINUNICODE BINUNICODE8 BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINSTRING STRING"),
        (_Scales.pop_marked, "POP_MARK APPENDS"),
        (_Scales.duplicate, "DUP"),
        (_Scales.make_of_one, "TUPLE1"),
        (_Scales.push_named, "GLOBAL EXT1 EXT2 EXT4"),
        (_Scales.push_stack_named, "STACK_GLOBAL"),
        (_Scales.call_with_one, "REDUCE"),
        (_Scales.make_instance, "NEWOBJ"),
        (_Scales.call_with_two, "NEWOBJ_EX"),
        (_Scales.make_of_two, "TUPLE2"),
        (_Scales.make_of_three, "TUPLE3"),
        (_Scales.make_of_marked, "LIST INST OBJ"),
        (_Scales.make_tuple, "TUPLE"),
        (_Scales.make_of_keys, "FROZENSET"),
        (_Scales.make_of_items, "DICT"),
        (_Scales.add_item, "SETITEM"),
        (_Scales.add_items, "SETITEMS"),
        (_Scales.add_keys, "ADDITEMS"),
    )
    for name in names.split()
}
_ATOMS: list[int | None] = [None] * 256
"""Bytes of the argument, of instructions that push an atom and have one of a fixed length."""
for _op in pickletools.opcodes:
    if _STEPS.get(ord(_op.code)) is _Scales.push and (_op.arg is None or _op.arg.n > 0):
        _ATOMS[ord(_op.code)] = _op.arg.n if _op.arg else 0
