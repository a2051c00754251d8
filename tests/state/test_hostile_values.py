"""Hostile pickles of values: an error of this library, nothing run, memory bounded."""

from __future__ import annotations

import dataclasses
import io
import pickle
import resource
import struct
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from cloudckpt.backends.errors import (
    CheckpointError,
    ConfigurationError,
    IntegrityError,
    UnsafeCheckpointError,
)
from cloudckpt.backends.state.values import loads, needs, prove_safe
from support import hostile
from support import value_classes as users
from support.hostile import called, known_as, text

PROTO = b"\x80\x04"
USERS = users.__name__
TUPLE = b")"
NUMPY = "numpy._core.multiarray"
BUFFER = ("numpy._core.numeric", "_frombuffer")


def new(module: str, name: str, state: bytes, *arguments: bytes) -> bytes:
    """Push an object that NEWOBJ makes and BUILD gives a state."""
    return known_as(module, name) + b"(" + b"".join(arguments) + b"t\x81" + state + b"b"


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return (
        b"\x8a" + bytes([len(data)]) + data
        if len(data) < 256
        else b"\x8b" + struct.pack("<i", len(data)) + data
    )


def content(data: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(data)) + data


def fields(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in values.items()) + b"u"


def dtype(code: str, state: bytes = b"") -> bytes:
    return called("numpy", "dtype", text(code), b"\x89", b"\x88") + (state and state + b"b")


def dtype_state(
    *,
    order: str = "<",
    inner: bytes = b"N",
    names: bytes = b"N",
    more: bytes = b"N",
    unit: bytes = b"",
    count: int = 1,
) -> bytes:
    one = number(1)
    parts = [text(order), inner, names, more, number(-1), number(-1), number(0)]
    if not unit:
        return tuple_of(number(3), *parts)
    return tuple_of(number(4), *parts, tuple_of(b"N", tuple_of(unit, number(count), one, one)))


def array(shape: bytes, kind: bytes, data: bytes, fortran: bytes = b"\x89") -> bytes:
    empty = called(NUMPY, "_reconstruct", known_as("numpy", "ndarray"), tuple_of(number(0)), content(b"b"))
    return empty + tuple_of(number(1), shape, kind, fortran, data) + b"b"


F8 = dtype("f8", dtype_state())
OBJECT = dtype("O8", dtype_state(order="|"))
DAY = content(b"\x07\xea\x01\x01" + bytes(6))
DATE = called("datetime", "date", content(b"\x07\xea\x01\x01"))
HUGE = number(1 << 62)
STORAGE = tuple_of(
    text("storage"), known_as("torch", "FloatStorage"), text("0"), text("cpu"), number(4)
) + b"Q"  # fmt: skip


def tensor(
    first: bytes,
    size: bytes,
    stride: bytes,
    storage: bytes = STORAGE,
    *,
    grad: bytes = b"\x89",
    more: bytes = b"",
) -> bytes:
    hooks = called("collections", "OrderedDict")
    return called("torch._utils", "_rebuild_tensor_v2", storage, first, size, stride, grad, hooks, more)


def stored(key: str = "0", place: str = "cpu", count: int = 4, kind: str = "FloatStorage") -> bytes:
    told = (text("storage"), known_as("torch", kind), text(key), text(place), number(count))
    return tuple_of(*told) + b"Q"


ONE = tuple_of(number(1))
MALFORMED: dict[str, bytes] = {
    # Names that are known, called as no pickler calls them.
    "bytes of a number": called("builtins", "bytes", number(1 << 40)),
    "bytearray of a number": called("builtins", "bytearray", number(1 << 40)),
    "bytes by another codec": called("_codecs", "encode", text("x" * 10), text("zlib")),
    "bytes of what is no text": called("_codecs", "encode", b"N", text("latin1")),
    "a set of a number": called("builtins", "set", number(5)),
    "a set of lists": called("builtins", "set", b"](]]e"),
    "a frozenset of a text": called("builtins", "frozenset", text("x" * 10)),
    "a range of text": called("builtins", "range", text("a"), text("b"), text("c")),
    "a range of too many": called("builtins", "range", *[number(1)] * 4),
    "a slice of nothing": called("builtins", "slice"),
    "a complex of text": called("builtins", "complex", text("1j"), text("1")),
    "an OrderedDict of pairs that are none": called("collections", "OrderedDict", b"](NNe"),
    "an OrderedDict with attributes": called("collections", "OrderedDict") + fields(a=b"N") + b"b",
    "a defaultdict of eval": called("collections", "defaultdict", known_as("builtins", "dict")) + b"N" + b"a",
    "a defaultdict of a number": called("collections", "defaultdict", number(5)),
    "a Counter of a list": called("collections", "Counter", b"]"),
    "a Counter with a state": called("collections", "Counter") + fields(update=b"N") + b"b",
    "a deque of a length below its items": called("collections", "deque", TUPLE, number(1)) + b"(NNe",
    "a deque of no length": called("collections", "deque", TUPLE, text("x")),
    "a namespace of a number": called("types", "SimpleNamespace") + b"}K\x01K\x02sb",
    "a date of nothing": called("datetime", "date"),
    "a date of three bytes": called("datetime", "date", content(b"abc")),
    "a date of numbers": called("datetime", "date", number(2026), number(1), number(1)),
    "a datetime of a text": called("datetime", "datetime", text("2026-01-01")),
    "a datetime of a zone that is a dict": called("datetime", "datetime", DAY, b"}"),
    "a timedelta of text": called("datetime", "timedelta", text("a"), number(0), number(0)),
    "a timedelta beyond all": called("datetime", "timedelta", HUGE, number(0), number(0)),
    "a timezone of a number": called("datetime", "timezone", number(0)),
    "a zone that leads out": called("zoneinfo", "ZoneInfo._unpickle", text("../../etc/passwd"), b"\x88"),
    "a zone by its root": called("zoneinfo", "ZoneInfo._unpickle", text("/etc/passwd"), b"\x88"),
    "a Decimal of a tuple": called("decimal", "Decimal", TUPLE),
    "a Decimal of a word": called("decimal", "Decimal", text("word")),
    "a Fraction by zero": called("fractions", "Fraction", number(1), number(0)),
    "a Fraction of many digits": called("fractions", "Fraction", text("9" * 100_000)),
    "a path of a number": called("pathlib", "PosixPath", number(5)),
    "a path of Windows": called("pathlib", "WindowsPath", text("x")),
    "a UUID of too much": new("uuid", "UUID", fields(int=number(1 << 200))),
    "a UUID of a text": new("uuid", "UUID", fields(int=text("x"))),
    "a UUID with a __class__": new("uuid", "UUID", fields(int=number(1), __class__=b"N")),
    "a stream of text": new("_io", "BytesIO", tuple_of(text("x"), number(0), b"N")),
    "a stream at the end of the world": new("_io", "BytesIO", tuple_of(content(b"x"), HUGE, b"N")),
    "a stream with attributes": new("_io", "BytesIO", tuple_of(content(b"x"), number(0), fields(read=b"N"))),
    "a stream of an odd newline": new("_io", "StringIO", tuple_of(text("x"), text("x"), number(0), b"N")),
    "a stream without a state": known_as("_io", "BytesIO") + b")\x81",
    "a stream that is called": called("_io", "BytesIO", content(b"x")),
    # numpy's.
    "an array of fewer bytes": array(tuple_of(number(4)), F8, content(bytes(8))),
    "an array of more bytes": array(ONE, F8, content(bytes(16))),
    "an array of a huge shape": array(tuple_of(HUGE, HUGE), F8, content(b"")),
    "an array of a negative shape": array(tuple_of(number(-1)), F8, content(bytes(8))),
    "an array of two negative sizes": array(tuple_of(number(-1), number(-1)), F8, content(bytes(8))),
    "an array of too many dimensions": array(tuple_of(*[number(1)] * 100), F8, content(bytes(8))),
    "an array of a shape of text": array(tuple_of(text("1")), F8, content(bytes(8))),
    "an array of elements without bytes": array(tuple_of(HUGE), dtype("S0"), content(b"")),
    "an array of objects from bytes": array(ONE, OBJECT, content(bytes(8))),
    "an array of fewer objects": array(tuple_of(HUGE), OBJECT, b"](Ne"),
    "an array of numbers from a list": array(ONE, F8, b"](K\x05e"),
    "an array of no dtype": array(ONE, text("f8"), content(bytes(8))),
    "an array that is something else": called(
        NUMPY, "_reconstruct", known_as("builtins", "dict"), TUPLE, content(b"b")
    ),
    "an array without a state": called(
        NUMPY, "_reconstruct", known_as("numpy", "ndarray"), ONE, content(b"b")
    ),
    "an array from the buffer of a text": called(*BUFFER, text("x"), F8, ONE, text("C")),
    "an array of objects from a buffer": called(*BUFFER, content(bytes(8)), OBJECT, ONE, text("C")),
    "a scalar of fewer bytes": called(NUMPY, "scalar", F8, content(b"x")),
    "a scalar of an object": called(NUMPY, "scalar", OBJECT, content(bytes(8))),
    "a scalar of a list": called(NUMPY, "scalar", F8, b"]"),
    "a dtype by its whole description": dtype("i4,(1000000000,1000000000)f8"),
    "a dtype by a name": dtype("object"),
    "a dtype of a huge text": dtype("U99999999999999999999"),
    "a dtype of a number": called("numpy", "dtype", number(5), b"\x89", b"\x88"),
    "a dtype of no arguments": called("numpy", "dtype"),
    "a dtype of a state too short": dtype("f8", tuple_of(number(3))),
    "a dtype of an odd order": dtype("f8", dtype_state(order="x")),
    "a dtype of huge dimensions": dtype("V8", dtype_state(order="|", inner=tuple_of(F8, tuple_of(HUGE)))),
    "a dtype of fields that are missing": dtype(
        "V8", dtype_state(order="|", names=tuple_of(text("a")), more=b"}")
    ),
    "a dtype of a field beyond": dtype(
        "V8", dtype_state(order="|", names=tuple_of(text("a")), more=fields(a=tuple_of(F8, number(99))))
    ),
    "a time of an odd unit": dtype("M8", dtype_state(unit=content(b"__import__"))),
    "a time of no unit": dtype("M8", dtype_state(unit=text("s"))),
    "a time of a unit of nothing": dtype("M8", dtype_state(unit=content(b"s"), count=0)),
    # Tensors.
    "a tensor beyond its storage": tensor(number(0), tuple_of(number(5)), ONE),
    "a tensor of a huge size": tensor(number(0), tuple_of(HUGE), ONE),
    "a tensor of a huge step": tensor(number(0), tuple_of(number(2)), tuple_of(HUGE)),
    "a tensor of a negative size": tensor(number(0), tuple_of(number(-1)), ONE),
    "a tensor of a negative step": tensor(number(3), tuple_of(number(2)), tuple_of(number(-1))),
    "a tensor before its storage": tensor(number(-1), ONE, ONE),
    "a tensor of text": tensor(number(0), tuple_of(text("1")), ONE),
    "a tensor of fewer steps": tensor(number(0), ONE, TUPLE),
    "a tensor without a storage": tensor(number(0), ONE, ONE, b"N"),
    "a tensor that is a conjugate of a real one": tensor(number(0), ONE, ONE, more=fields(conj=b"\x88")),
    "a tensor with odd marks": tensor(number(0), ONE, ONE, more=fields(grad=b"\x88")),
    "a tensor that asks for gradients with text": tensor(number(0), ONE, ONE, grad=text("x")),
    "a storage of a huge count": tensor(number(0), ONE, ONE, stored(count=1 << 62)),
    "a storage of a negative count": tensor(number(0), ONE, ONE, stored(count=-1)),
    "a storage of another record": tensor(number(0), ONE, ONE, stored(key="../data.pkl")),
    "a storage that is not there": tensor(number(0), ONE, ONE, stored(key="7")),
    "a storage of fewer bytes": tensor(number(0), ONE, ONE, stored(count=2)),
    "a storage on the meta device": tensor(number(0), ONE, ONE, stored(place="meta")),
    "a storage of what is none": tensor(
        number(0), ONE, ONE, tuple_of(text("storage"), b"N", text("0"), text("cpu"), number(4)) + b"Q"
    ),
    "a storage as a value": STORAGE,
    "two kinds of a storage": tuple_of(
        tensor(number(0), ONE, ONE), tensor(number(0), ONE, ONE, stored(kind="IntStorage"))
    ),
    "a parameter of a number": called(
        "torch._utils", "_rebuild_parameter", number(1), b"\x89", called("collections", "OrderedDict")
    ),
    "torch.Size of text": called("torch", "Size", tuple_of(text("1"))),
    "torch.Size of a huge number": called("torch", "Size", tuple_of(number(1 << 100))),
    "a device of a number": called("torch", "device", number(5)),
    "a device that there is not": called("torch", "device", text("nowhere")),
    "a layout that there is not": called("torch.serialization", "_get_layout", text("torch.nowhere")),
    # Names where values belong, and other games.
    "a class as a value": b"](" + known_as("builtins", "list") + b"e",
    "a class in a tuple": tuple_of(tuple_of(known_as("numpy", "ndarray"))),
    "a class as a key": b"}" + known_as("builtins", "list") + b"Ns",
    "a class as an argument": called(USERS, "Point", known_as("builtins", "list"), b"N"),
    "a call of what is no name": DATE + b")R",
    "a call with what is no tuple": known_as("datetime", "date") + b"]R",
    "BUILD on a builtin": known_as("builtins", "list") + fields(append=b"N") + b"b",
    "BUILD on a list": b"]" + fields(append=b"N") + b"b",
    "BUILD twice": new("uuid", "UUID", fields(int=number(1))) + fields(int=number(2)) + b"b",
    "BUILD on a date": DATE + fields(year=b"N") + b"b",
    "APPEND to a date": DATE + b"N" + b"a",
    "SETITEM of a date": DATE + b"NN" + b"s",
    "an attribute of an attribute": called("builtins", "getattr", DATE, text("year")),
    "keywords": known_as("datetime", "date") + b")" + fields(year=number(1)) + b"\x92",
    "a memo that is not there": b"j\xff\x00\x00\x00",
    "a value in itself": called("collections", "deque") + b"\x94h\x00a",
    "a tuple in itself through a set": b"\x8f\x94(h\x00\x85\x90",
    "a key that can't be one": b"}" + array(ONE, F8, content(bytes(8))) + b"Ns",
    "a tensor as a key": b"}" + tensor(number(0), ONE, ONE) + b"Ns",
    "a key with a hash of its own": b"}" + called(USERS, "Hashed", number(1)) + b"Ns",
    "the same deep in a key": b"}" + tuple_of(tuple_of(called(USERS, "Hashed", number(1)))) + b"Ns",
    "a dataclass as a key": b"}" + new(USERS, "Frozen", fields(a=number(1))) + b"Ns",
}  # fmt: skip
UNSAFE: dict[str, bytes] = {
    "a function": called(USERS, "function"),
    "a class of no known kind": new(USERS, "Plain", fields(a=number(1))),
    "a dataclass that pickles in its own way": new(USERS, "Restoring", fields(a=number(1))),
    "an Enum of a value that it lacks": called(USERS, "Guessing", number(5)),
    "an Enum of a member that it lacks": called(
        "builtins", "getattr", known_as(USERS, "Guessing"), text("NONE")
    ),
    "an attribute of a class": called("builtins", "getattr", known_as(USERS, "Config"), text("__init__")),
    "an attribute of an Enum": called("builtins", "getattr", known_as(USERS, "Guessing"), text("_missing_")),
    "a Flag of bits that it lacks": called(USERS, "Right", number(1 << 4000)),
    "a negative Flag": called(USERS, "Right", number(-1)),
    "a namedtuple of too many": called(USERS, "Point", *[number(1)] * 3),
    "a dataclass of fields that it lacks": new(USERS, "Watched", fields(a=b"N", b=b"N")),
    "a dataclass without its fields": known_as(USERS, "Watched") + b")\x81",
    "a dataclass with a __class__": new(USERS, "Config", fields(rate=b"N", name=b"N", __class__=b"N")),
    "a module of a module": called(f"{USERS}", "enum.Enum", number(1)),
    "a name in the script": called("__main__", "Anything", number(1)),
    "a name with dots of a dunder": called(USERS, "Config.__init__.__globals__", number(1)),
    "a class of ours": new("cloudckpt.backends.errors", "CheckpointError", fields(a=number(1))),
    "a defaultdict of a function": called("collections", "defaultdict", known_as(USERS, "function")),
    "numpy's loader": called("numpy", "load", text("/etc/passwd")),
    "numpy's own unpickler": called("numpy.random._pickle", "__bit_generator_ctor", text("PCG64")),
    "a lazy module of torch's": known_as("torch", "_dynamo"),
    "a shell beside a date": tuple_of(DATE, called("os", "system", text("true"))),
    "eval beside a date": tuple_of(DATE, called("builtins", "eval", text("1"))),
    "a pipe beside a date": tuple_of(DATE, called("subprocess", "Popen", text("true"))),
}  # fmt: skip


def test_a_zone_that_is_not_here_is_said() -> None:
    zone = called("zoneinfo", "ZoneInfo._unpickle", text("No/Where"), b"\x88")
    assert isinstance(error := refused(with_pickle(zone)), ConfigurationError)
    assert "No/Where" in error.message and "tzdata" in str(error.hint)


def with_pickle(pushed: bytes) -> bytes:
    """A value's archive with a tensor's payload and any pickle."""
    stream = io.BytesIO()
    torch.save(torch.ones(4), stream)
    return hostile.archive(hostile.records(stream.getvalue()) | {"archive/data.pkl": PROTO + pushed + b"."})


def refused(data: bytes) -> CheckpointError:
    """The error that a value is refused with, by each that reads it; nothing runs, and it takes no memory."""
    users.RAN.clear()
    before, known = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, set(sys.modules)
    errors: list[CheckpointError] = []
    for read in (loads, prove_safe, needs):
        with pytest.raises(CheckpointError) as raised:
            read(data, "some.key")
        errors.append(raised.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert {type(error) for error in errors} == {type(errors[0])}
    assert users.RAN == []
    assert not {name for name in set(sys.modules) - known if not name.startswith(("torch", "encodings"))}
    return errors[0]


@pytest.mark.parametrize("what", MALFORMED)
def test_what_no_pickler_writes_is_damage(what: str) -> None:
    error = refused(with_pickle(MALFORMED[what]))
    assert isinstance(error, IntegrityError), error
    assert "'some.key'" in error.message


@pytest.mark.parametrize("what", UNSAFE)
def test_what_is_not_known_to_be_harmless_is_unsafe(what: str) -> None:
    error = refused(with_pickle(UNSAFE[what]))
    assert isinstance(error, UnsafeCheckpointError), error
    assert "'some.key'" in error.message and error.hint and error.classes


@pytest.mark.parametrize("what", hostile.PUSHES)
def test_what_is_hostile_everywhere_is_harmless_here(what: str) -> None:
    users.RAN.clear()
    for pushed in (
        hostile.PUSHES[what],
        tuple_of(DATE, hostile.PUSHES[what]),
        b"}" + hostile.PUSHES[what] + b"Ns",
    ):
        try:
            loads(with_pickle(pushed), "x")
        except CheckpointError:
            continue
    assert users.RAN == []


@pytest.mark.parametrize("push", [b"]", b"(", b"}N"])
def test_nesting_ten_thousand_deep_is_an_error_or_a_value(push: bytes) -> None:
    close = {b"]": b"a", b"(": b"t", b"}N": b"s"}[push]
    pushed = tuple_of(DATE, push * 10_000 + b"N" + close * 10_000)
    with pytest.raises(IntegrityError):
        prove_safe(with_pickle(pushed), "x")


def test_the_honest_forms_of_what_is_refused_are_read() -> None:
    """The pickles above are refused for what is wrong with them, and not for how they are written."""
    honest: Any = [
        (array(tuple_of(number(2)), F8, content(bytes(16))), np.zeros(2)),
        (array(ONE, OBJECT, b"](Ne"), np.array([None])),
        (called(NUMPY, "scalar", F8, content(bytes(8))), np.float64(0)),
        (tensor(number(1), tuple_of(number(3)), ONE), torch.ones(3)),
        (called(USERS, "Guessing", number(1)), users.Guessing.A),
        (new(USERS, "Watched", fields(a=number(1))), users.Watched(1)),
        (called(USERS, "Point", number(1), b"N"), users.Point(1, None)),
        (new("_io", "BytesIO", tuple_of(content(b"x"), number(1), b"N")), None),
        (called("collections", "deque", TUPLE, number(2)) + b"(NNe", None),
        (called("types", "SimpleNamespace") + fields(a=number(1)) + b"b", types.SimpleNamespace(a=1)),
    ]
    for pushed, expected in honest:
        value = loads(with_pickle(tuple_of(DATE, pushed)), "x")[1]
        if isinstance(expected, np.ndarray | torch.Tensor):
            assert type(value) is type(expected) and value.tolist() == expected.tolist()
        elif expected is not None:
            assert value == expected


def test_a_class_with_a_metaclass_of_its_own_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meta(type):
        def __getattribute__(cls, name: str) -> Any:
            users.RAN.append(name)
            return type.__getattribute__(cls, name)

    class Odd(metaclass=Meta):
        pass

    dataclasses.dataclass(Odd)
    monkeypatch.setattr(users, "Odd", Odd, raising=False)
    refused(with_pickle(new(USERS, "Odd", fields(a=number(1)))))
