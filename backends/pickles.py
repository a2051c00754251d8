"""A look at a pickle before it is loaded, for memory and time that it claims and can't need.

A few dozen bytes can cost as much as their writer likes, before a single object can be judged:

- CPython's unpickler keeps its memo in an array that grows to whatever index an instruction names.
- It makes room for a string of bytes of whatever length is named, before it looks for them.
- A tuple of the same tuple twice, forty times over, is hashed 2**40 times when it becomes a key.
- A tuple nested 200,000 deep overflows the C stack when it is hashed.

So the instructions are followed, without making what they make: of every object only its nodes, shared ones
counted as often as they are met, and its depth.
"""

from __future__ import annotations

import pickletools
import re
from collections import defaultdict
from collections.abc import Callable, Sequence

_Weight = tuple[int, int]
"""Nodes and depth."""

_ATOM: _Weight = (1, 0)
_NAMED: _Weight = (2, 0)
"""A class or function by its name, told from anything else by this weight."""
_NODES = 100
"""Of one object, for each byte of the pickle; one shorter than ``_SMALL`` may have as many as that."""
_SMALL = 10_000
_WEIGHED = 4 << 20
"""Bytes: the metadata of some 16,000 tensors."""
_KEY_NODES = 1_000
"""Of a key: hashing it takes this long, each time."""
_DEPTH = 2_000
"""More than any pickler writes, which gives up at Python's recursion limit of 1,000."""


class _TooMuchError(Exception):
    """The pickle claims more than its length can need."""


def claims_too_much(data: bytes) -> bool:
    """Whether loading a pickle takes memory or time out of all proportion to its length.

    Weighing takes as long as loading does, so that beyond ``_WEIGHED`` bytes only memory is looked after: a
    hostile pickle of that size can still keep a loader busy for ever.

    One that is no pickle claims nothing from there on: the loader says what is wrong with it.
    """
    return weighs_too_much(data) if len(data) <= _WEIGHED else _memo_too_large(data)


def weighs_too_much(data: bytes, *, called: bool = False) -> bool:
    """The same, whatever time weighing takes.

    With ``called`` an object may be called that a call has returned, as it is in the pickle of a class within
    a class: for a loader that calls nothing but names, and writes out nothing of what it is given.
    """
    try:
        _Scales(data, called=called).weigh()
    except _TooMuchError:
        return True
    except (LookupError, ValueError):  # the loader stops here too
        return False
    return False


def _memo_too_large(data: bytes) -> bool:
    """Whether an instruction names a memo index beyond the pickle's length."""
    at = 0
    while at < len(data):
        run = _RUN.match(data, at)
        at = run.end() if run else at
        if at >= len(data) or data[at] == _STOP:
            return False
        code, at = data[at], at + 1
        if code == _LONG_BINPUT:
            if int.from_bytes(data[at : at + 4], "little") > len(data):
                return True
            at += 4
        elif code in _COUNTED:
            width = _COUNTED[code]
            at += width + int.from_bytes(data[at : at + width], "little")
            if at > len(data):
                return True
        elif code in _LINES:
            first = at
            for _ in range(_LINES[code]):
                at = data.find(b"\n", at) + 1
                if at == 0:
                    return False
            if code == _PUT and len(data[first:at]) > len(str(len(data))) + 1:
                return True
        else:
            return False  # no instruction, or one whose argument is cut off
    return False


class _Scales:
    """A pickle machine that holds weights instead of objects."""

    def __init__(self, data: bytes, *, called: bool = False) -> None:
        self._data = data
        self._called = called
        self._most = _NODES * max(_SMALL, len(data))
        self._stack: list[_Weight] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Weight] = {}

    def weigh(self) -> None:
        """Follow the instructions to the end.

        Raises:
            _TooMuchError: they claim too much.
            LookupError, ValueError: they can't be followed any further.
        """
        data, stack, memo = self._data, self._stack, self._memo
        at, end = 0, len(data)
        while at < end:
            code = data[at]
            at += 1
            if code == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif code == _BINGET:
                stack.append(memo[data[at]])
                at += 1
            elif (length := _ATOMS[code]) is not None:
                stack.append(_ATOM)
                at += length
            elif code == _STOP:
                return
            else:
                first, at = at, self._after(code, at)
                if at > end:
                    raise _TooMuchError
                _STEPS[code](self, data[first:at])

    def _after(self, code: int, at: int) -> int:
        """Where an argument ends."""
        if code in _COUNTED:
            width = _COUNTED[code]
            return at + width + int.from_bytes(self._data[at : at + width], "little")
        for _ in range(_LINES.get(code, 0)):
            at = self._data.index(b"\n", at) + 1
        return at + _FIXED.get(code, 0)

    def _make(self, parts: Sequence[_Weight]) -> None:
        """Push what is made of these."""
        nodes = 1 + sum(nodes for nodes, _ in parts)
        depth = 1 + max((depth for _, depth in parts), default=0)
        if nodes > self._most or depth > _DEPTH:
            raise _TooMuchError
        self._stack.append((nodes, depth))

    def _take(self, count: int) -> list[_Weight]:
        """Take what lies on top."""
        if len(self._stack) < count:
            raise LookupError
        parts = self._stack[-count:]
        del self._stack[-count:]
        return parts

    def _take_marked(self) -> list[_Weight]:
        """Take what lies above the mark."""
        mark = self._marks.pop()
        parts = self._stack[mark:]
        del self._stack[mark:]
        return parts

    def _hash(self, keys: Sequence[_Weight]) -> None:
        if any(nodes > _KEY_NODES for nodes, _ in keys):
            raise _TooMuchError

    def _call(self, parts: Sequence[_Weight]) -> None:
        # The loader would say so, and write out what may be as large as a list of lists.
        if parts[0] != _NAMED and not self._called:
            raise _TooMuchError
        self._make(parts)

    def _note(self, index: int) -> None:
        if index > len(self._data):  # every entry takes bytes to make
            raise _TooMuchError
        self._memo[index] = self._stack[-1]

    # One instruction each; what changes an object keeps its weight.

    def push(self, _: bytes) -> None:
        self._stack.append(_ATOM)

    def push_named(self, _: bytes) -> None:
        self._stack.append(_NAMED)

    def push_stack_named(self, _: bytes) -> None:
        self._take(2)
        self._stack.append(_NAMED)

    def push_long(self, argument: bytes) -> None:
        self._stack.append((1 + len(argument) // 8, 0))  # all of it is hashed, each time

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
        self._stack.append(self._stack[-1])

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

    def make_of_keys(self, _: bytes) -> None:
        parts = self._take_marked()
        self._hash(parts)
        self._make(parts)

    def make_of_items(self, _: bytes) -> None:
        parts = self._take_marked()
        self._hash(parts[::2])
        self._make(parts)

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
_PUT, _LONG_BINPUT = _code("PUT"), _code("LONG_BINPUT")
_COUNT_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_COUNTED = {
    ord(op.code): _COUNT_BYTES[op.arg.n] for op in pickletools.opcodes if op.arg and op.arg.n in _COUNT_BYTES
}
_LINES = {
    ord(op.code): 2 if op.arg.name == "stringnl_noescape_pair" else 1
    for op in pickletools.opcodes
    if op.arg and op.arg.n == pickletools.UP_TO_NEWLINE
}
_FIXED = {ord(op.code): op.arg.n for op in pickletools.opcodes if op.arg and op.arg.n > 0}

_STEPS: dict[int, Callable[[_Scales, bytes], None]] = {
    _code(op.name): _Scales.push for op in pickletools.opcodes if not op.stack_before and op.stack_after
} | {
    _code(name): step
    for step, names in (
        (_Scales.push_long, "LONG4"),
        (_Scales.get, "LONG_BINGET"),
        (_Scales.get_line, "GET"),
        (_Scales.put, "BINPUT LONG_BINPUT"),
        (_Scales.put_line, "PUT"),
        (_Scales.nothing, "PROTO FRAME READONLY_BUFFER BINPERSID"),
        (_Scales.mark, "MARK"),
        (_Scales.pop, "POP APPEND BUILD"),
        (_Scales.pop_marked, "POP_MARK APPENDS"),
        (_Scales.duplicate, "DUP"),
        (_Scales.make_of_one, "TUPLE1"),
        (_Scales.push_named, "GLOBAL EXT1 EXT2 EXT4"),
        (_Scales.push_stack_named, "STACK_GLOBAL"),
        (_Scales.call_with_one, "REDUCE NEWOBJ"),
        (_Scales.call_with_two, "NEWOBJ_EX"),
        (_Scales.make_of_two, "TUPLE2"),
        (_Scales.make_of_three, "TUPLE3"),
        (_Scales.make_of_marked, "TUPLE LIST INST OBJ"),
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


def _fixed_lengths() -> re.Pattern[bytes]:
    """Match a run of instructions whose arguments are of a fixed length."""
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for op in pickletools.opcodes:
        code, length = ord(op.code), op.arg.n if op.arg else 0
        if length >= 0 and code not in (_LONG_BINPUT, _STOP):
            by_length[length].append(code)
    kinds = (b"[" + re.escape(bytes(codes)) + b"]" + b".{%d}" % length for length, codes in by_length.items())
    return re.compile(b"(?:" + b"|".join(kinds) + b")*", re.DOTALL)


_RUN = _fixed_lengths()
