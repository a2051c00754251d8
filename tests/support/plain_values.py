"""A table of values that a state may hold, and their loading in a fresh process.

Run as ``plain_values.py FOLDER``: loads each file of the folder by the loader and by ``torch.load``, compares
both with the value of the same name in the table, and prints the differences as JSON.
"""

from __future__ import annotations

import collections
import datetime as dt
import decimal
import fractions
import functools
import io
import json
import pathlib
import random
import sys
import types
import uuid
import zoneinfo
from typing import Any

import numpy as np
import torch

from cloudckpt.backends.state import values
from support import value_classes as users
from support.value_digest import digest

_PARIS = zoneinfo.ZoneInfo("Europe/Paris")


def _generator() -> Any:
    generator = torch.Generator()
    generator.manual_seed(3)
    return generator.get_state()


def table() -> dict[str, Any]:
    """Return the values by name; in every process the same."""
    rng = np.random.default_rng(5)
    legacy = np.random.RandomState(5)
    shared, memory = [1], torch.arange(4)
    mixed = np.empty(3, dtype=object)
    mixed[:] = [None, [1, 2], np.arange(2)]
    return {
        "None": None,
        "bool": True,
        "int": -5,
        "a large int": 10**400,
        "an int of more bits than LONG1 has": -(1 << 5000),
        "floats": (0.1, -0.0, float("inf"), float("-inf")),
        "nan": float("nan"),
        "complex": complex(-0.0, 2),
        "text": "é\0",
        "text with a lone surrogate": "a\ud800",
        "bytes": b"\x00\xff",
        "empty bytes": b"",
        "bytearray": bytearray(b"\x00\xff"),
        "empty": ((), [], {}, set(), frozenset()),
        "nested": [{"a": [1, (2.5, None)], 5: {"x"}, (1, "b"): b"z"}],
        "sets": ({1, "a", (2, 3)}, frozenset({b"x"})),
        "a shared list": (shared, shared),
        "range and slice": (range(1, 9, 2), slice(None, 5)),
        "constants": (..., NotImplemented),
        "torch's": (torch.bfloat16, torch.uint16, torch.device("cuda", 1), torch.Size([2, 3]), torch.strided),
        "OrderedDict": collections.OrderedDict([("b", 1), ("a", [2])]),
        "defaultdict": collections.defaultdict(list, {"a": [1]}),
        "defaultdict without a factory": collections.defaultdict(None, {"a": 1}),
        "Counter": collections.Counter("aab"),
        "deques": (collections.deque([1, 2], maxlen=5), collections.deque([[3]])),
        "SimpleNamespace": types.SimpleNamespace(a=1, b=[2]),
        "date": dt.date(2026, 1, 2),
        "datetime": dt.datetime(2026, 1, 2, 3, 4, 5, 6),  # noqa: DTZ001 - naive is meant
        "datetime in a zone": dt.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=_PARIS),
        "times": (dt.time(1, 2, 3, 4, fold=1), dt.time(1, tzinfo=dt.UTC)),
        "timedelta": dt.timedelta(-1, 2, 3),
        "timezones": (dt.UTC, dt.timezone(dt.timedelta(hours=-5), "EST"), _PARIS),
        "Decimals": (decimal.Decimal("1.10"), decimal.Decimal("-Infinity"), decimal.Decimal("1E+99999")),
        "Fraction": fractions.Fraction(-1, 3),
        "paths": (pathlib.Path("/data/x"), pathlib.Path(), pathlib.PureWindowsPath("C:\\x")),
        "UUID": uuid.UUID(int=5),
        "namedtuples": (users.Point(1, torch.ones(2)), users.Pair("a")),
        "Enums": (users.Mode.TRAIN, users.Mode.TEST, users.Mode.BOTH, users.Config.Kind.SMALL),
        "Enums of numbers and text": {users.Level.HIGH: 1, users.Word.A: 2, users.Mode.TEST: 3},
        "Flags": (users.Right.READ, users.Right.READ | users.Right.WRITE, users.Right(0)),
        "dataclasses": [users.Config(0.1, ["x"]), users.Frozen(2), users.Slotted(3), users.FrozenSlotted(4)],
        "a dataclass that looks at its fields": users.Watched(5),
        "streams": _streams(),
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "array of columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "array with holes": np.arange(10)[::3],
        "array without dimensions": np.array(2.5),
        "array without elements": np.zeros((3, 0), dtype=np.float16),
        "arrays of odd dtypes": [
            np.array([1, 2], dtype=code)
            for code in ("?", "u1", "<i4", "<f2", "g", "F", "G", "S3", "U2")
        ]
        + [np.zeros(2, dtype="V5")],
        "arrays of times": [
            np.array(["2026-01-02", "NaT"], dtype="M8[D]"),
            np.array([1, 2], dtype="m8[25ns]"),
            np.array(["NaT"], dtype="M8[D]"),
        ],
        "array of records": np.array(
            [(1, [2, 3], "x")], dtype=np.dtype([("a", "i2"), ("b", "f8", (2,)), ("c", "U3")], align=True)
        ),
        "array of nested records": np.zeros(2, dtype=[("a", [("b", ">u4")]), ("c", "M8[s]")]),
        "array of objects": mixed,
        "array of an object": np.array({"a": 1}, dtype=object),
        "scalars": [
            np.float64(0.5), np.float32(-0.0), np.float16(1), np.longdouble("0.1"), np.complex64(1j),
            np.int64(-3),
            np.uint8(255), np.bool_(True), np.str_("é"), np.str_(""), np.bytes_(b"x"), np.bytes_(b""),
            np.datetime64("2026-01-02T03"), np.timedelta64(5, "ms"), np.datetime64("NaT"),
        ],
        "scalar of a record": np.array([(1, 2.5)], dtype=[("a", "i2"), ("b", "f8")])[0],
        "keys of numpy's": {np.int64(3): 1, np.str_("x"): 2, np.float32(0.5): 3},
        "dtypes": [
            np.dtype("f8"), np.dtype(">i2"), np.dtype(object), np.dtype("M8[3h]"), np.dtype("U4"),
            np.dtype(("i4", (2, 3))), np.dtype([(("title", "a"), "i4"), ("b", "S2")]),
            np.dtype({"names": ["a", "b"], "formats": ["i4", "u1"], "offsets": [4, 0], "itemsize": 12}),
        ],
        "random states": (random.Random(3).getstate(), legacy.get_state(), legacy.get_state(legacy=False)),
        "states of bit generators": [
            rng.bit_generator.state,
            *(
                kind(3).state
                for kind in (np.random.MT19937, np.random.Philox, np.random.SFC64, np.random.PCG64DXSM)
            ),
        ],
        "torch.Generator's state": _generator(),
        "tensors": (torch.arange(6.0).view(2, 3).t(), torch.ones(2, requires_grad=True), torch.zeros(0, 3)),
        "tensors beside a date": (
            torch.tensor(2.5), torch.ones(3, dtype=torch.bfloat16)[1:],
            torch.tensor([1j]).conj(),
            torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False),
            torch.tensor([7], dtype=torch.uint16), torch.tensor([True]), dt.date(2026, 1, 2),
        ),
        "tensors of one storage beside a date": (memory, memory[2:], dt.date(2026, 1, 2)),
    }  # fmt: skip


def _streams() -> list[Any]:
    streams = [io.BytesIO(b"abc"), io.StringIO("a\nb", newline="\r\n"), io.StringIO("x\ny", newline=None)]
    for stream in streams:
        stream.seek(2)
    return streams


def difference(one: Any, other: Any, path: str = "") -> str | None:
    """Return where two values differ, in class or in content, or None."""
    if type(one) is not type(other):
        return f"{path}: {type(one)} and {type(other)}"
    if not _parts(one):
        return None if _is_same(one, other) else f"{path}: {one!r} and {other!r}"[:300]
    mine, others = _parts(one), _parts(other)
    if len(mine) != len(others):
        return f"{path}: {one!r} and {other!r}"[:300]
    found = (difference(a, b, f"{path}[{at}]") for at, (a, b) in enumerate(zip(mine, others, strict=True)))
    return next((text for text in found if text), None)


def _parts(value: Any) -> list[Any]:
    """Return what a value is made of, in an order of its own."""
    match value:
        case set() | frozenset():
            return sorted(value, key=lambda one: (str(type(one)), repr(one)))
        case collections.defaultdict():
            return [value.default_factory, *(part for pair in value.items() for part in pair)]
        case dict():
            return [part for pair in value.items() for part in pair]
        case collections.deque():
            return [value.maxlen, *value]
        case types.SimpleNamespace() | users.Config() | users.Frozen() | users.Watched():
            return [part for pair in vars(value).items() for part in pair]
        case users.Slotted() | users.FrozenSlotted():
            return [value.a, value.b]
        case tuple() | list():
            return list(value)
        case io.BytesIO() | io.StringIO():
            return [value.getvalue(), value.tell(), getattr(value, "newlines", None)]
        case np.ndarray() if value.dtype.hasobject:
            return [value.shape, value.flags.fnc, *value.reshape(-1).tolist()]
        case _:
            return []


def _is_same(one: Any, other: Any) -> bool:
    match one:
        case torch.Tensor():
            return (
                one.dtype == other.dtype
                and one.device == other.device
                and one.stride() == other.stride()
                and one.requires_grad == other.requires_grad
                and one.is_conj() == other.is_conj()
                and torch.equal(one, other)
            )
        case np.ndarray():
            return (
                bool(one.dtype == other.dtype)
                and one.shape == other.shape
                and one.flags.fnc == other.flags.fnc
                and other.flags.writeable
                and digest(one) == digest(other)
            )
        case np.generic():
            return bool(one.dtype == other.dtype) and digest(one) == digest(other)
        case np.dtype():
            return bool(one == other) and one.fields == other.fields and one.alignment == other.alignment
        case dt.datetime() | dt.time():
            return bool(one == other) and one.fold == other.fold and repr(one) == repr(other)
        case float() | complex() | decimal.Decimal():
            return repr(one) == repr(other)
        case _:
            return bool(one == other)


def by_stock(data: bytes) -> Any:
    """Load a value as stock DCP does."""
    return torch.load(io.BytesIO(data), weights_only=False)


def proven(data: bytes) -> Any:
    """Load a value as DCP's planner does where it is given what was proven."""
    return torch.load(values.prove_safe(data, "x"), weights_only=False)


def main(folder: str) -> None:
    """Load each file and print the differences."""
    found: dict[str, str] = {}
    expected = table()
    users.RAN.clear()
    for number, (name, value) in enumerate(expected.items()):
        data = (pathlib.Path(folder) / str(number)).read_bytes()
        for how, again in (
            ("loads", functools.partial(values.loads, data, "x")),
            ("torch.load", functools.partial(by_stock, data)),
            ("prove_safe", functools.partial(proven, data)),
        ):
            try:
                wrong = difference(value, again())
            except Exception as error:  # noqa: BLE001 - it is reported
                wrong = f"{type(error).__name__}: {error}"
            if wrong is None and values.needs(data, "x"):
                wrong = "a class that is not imported"
            if wrong:
                found[f"{name} by {how}"] = wrong
        if digest(value).hex() != (pathlib.Path(folder) / f"{number}.digest").read_text():
            found[f"{name}'s digest"] = "another one than in the process that saved it"
    sys.stdout.write(json.dumps({"found": found, "ran": users.RAN, "count": len(expected)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
