"""A look at a pickle before it is loaded, for memory that it claims and can't need.

CPython's unpickler keeps its memo in an array that grows to whatever index an instruction names, so that a
dozen bytes can claim gigabytes. Every entry takes bytes of the pickle to make, so an index beyond its
length is never honest.
"""

from __future__ import annotations

import pickletools
import re
from collections import defaultdict

_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_PUT, _LONG_BINPUT, _STOP = b"p"[0], b"r"[0], b"."[0]


def claims_too_much(data: bytes) -> bool:
    """Whether an instruction names a memo index beyond the pickle's length.

    A pickle that is cut off or is none claims nothing: the loader says what is wrong with it.
    """
    at = 0
    while at < len(data):
        run = _FIXED.match(data, at)
        at = run.end() if run else at
        if at >= len(data) or data[at] == _STOP:
            return False
        code, at = data[at], at + 1
        if code == _LONG_BINPUT:
            if int.from_bytes(data[at : at + 4], "little") > len(data):
                return True
            at += 4
        elif code in _LENGTHS:
            width = _LENGTHS[code]
            at += width + int.from_bytes(data[at : at + width], "little")
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


def _fixed_lengths() -> re.Pattern[bytes]:
    """Match a run of instructions whose arguments are of a fixed length."""
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for op in pickletools.opcodes:
        code, length = ord(op.code), op.arg.n if op.arg else 0
        if length >= 0 and code not in (_LONG_BINPUT, _STOP):
            by_length[length].append(code)
    kinds = (b"[" + re.escape(bytes(codes)) + b"]" + b".{%d}" % length for length, codes in by_length.items())
    return re.compile(b"(?:" + b"|".join(kinds) + b")*", re.DOTALL)


_FIXED = _fixed_lengths()
_LENGTHS = {
    ord(op.code): _LENGTH_BYTES[op.arg.n]
    for op in pickletools.opcodes
    if op.arg and op.arg.n in _LENGTH_BYTES
}
_LINES = {
    ord(op.code): 2 if op.arg.name == "stringnl_noescape_pair" else 1
    for op in pickletools.opcodes
    if op.arg and op.arg.n == pickletools.UP_TO_NEWLINE
}
