"""A value that is accepted is restored exactly in a fresh process; every other one is refused by name."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime as dt
import enum
import functools
import io
import json
import os
import pathlib
import pickle
import random
import re
import struct
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cloudckpt.backends.errors import ConfigurationError, IntegrityError, UnsafeCheckpointError
from cloudckpt.backends.state import values as loading
from cloudckpt.backends.state.values import dumps, load_tensor, loads, prove_safe, refusal
from support import hostile, plain_values, value_digest
from support import value_classes as users
from support.plain_values import difference, table
from support.value_digest import digest

TABLE = table()


def saved(value: object, protocol: int = 2) -> bytes:
    """What stock DCP stores."""
    stream = io.BytesIO()
    torch.save(value, stream, pickle_protocol=protocol)
    return stream.getvalue()


def in_a_fresh_process(folder: Path, seed: str) -> dict[str, Any]:
    tests = str(Path(plain_values.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": tests, "PYTHONHASHSEED": seed}
    command = [sys.executable, plain_values.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert not done.returncode, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_every_value_of_the_table_is_restored_exactly_in_a_fresh_process(tmp_path: Path) -> None:
    for number, value in enumerate(TABLE.values()):
        (tmp_path / str(number)).write_bytes(dumps(value).getbuffer())
        (tmp_path / f"{number}.digest").write_text(digest(value).hex())
    report = in_a_fresh_process(tmp_path, "5")
    assert report["found"] == {}
    assert report["ran"] == []
    assert report["count"] == len(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_every_value_of_the_table_is_accepted(name: str) -> None:
    assert refusal(TABLE[name]) is None


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", TABLE)
def test_pickles_of_stock_dcp_load_whatever_their_protocol(name: str, protocol: int) -> None:
    value = TABLE[name]
    if protocol < 4 and name in {"datetime in a zone", "times"}:
        pytest.skip("protocols before 4 drop fold")
    assert difference(value, loads(saved(value, protocol), "x")) is None


def test_names_of_other_versions_of_numpy_and_python_load() -> None:
    for value, ours, theirs in (
        (np.arange(3), b"numpy._core.multiarray", b"numpy.core.multiarray"),
        (np.float32(0.5), b"numpy._core.multiarray", b"numpy.core.multiarray"),
        (pathlib.Path("/a/b"), b"cpathlib\n", b"cpathlib._local\n"),
    ):
        parts = hostile.records(saved(value))
        if theirs in parts["archive/data.pkl"]:  # as Python 3.13 has it
            ours, theirs = theirs, ours  # noqa: PLW2901 - the other way round
        assert ours in parts["archive/data.pkl"]
        parts["archive/data.pkl"] = parts["archive/data.pkl"].replace(ours, theirs)
        assert difference(value, loads(hostile.archive(parts), "x")) is None


class InScript(enum.Enum):
    A = 1


InScript.__module__ = "__main__"


def local_class() -> Any:
    @dataclasses.dataclass
    class Local:
        a: int = 1

    return Local()


def shadowed() -> Any:
    cls = dataclasses.make_dataclass("Config", ["a"])
    cls.__module__, cls.__qualname__ = users.__name__, "Config"
    return cls(1)


def with_an_attribute(value: Any) -> Any:
    value.extra = 1
    return value


def holding_itself() -> Any:
    value: list[Any] = []
    value.append((1, value))
    return value


def iter_of_nothing() -> Iterator[int]:
    yield from ()


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def laughing() -> Any:
    value: Any = ()
    for _ in range(40):
        value = (value, value)
    return value


class Sub(torch.Tensor):
    pass


REFUSED: dict[str, tuple[Any, str | None, str, str]] = {
    # the value, the path, a part of its class's name, and a part of the hint
    "a lambda": ({"a": [lambda: 1]}, "['a'][0]", "function", "name"),
    "a method": ([[].append], "[0]", "builtin_function_or_method", "name"),
    "a partial": (functools.partial(int, base=2), "", "functools.partial", "arguments"),
    "a module": (types, "", "module", "name"),
    "a class": ((int,), "[0]", "type", "name"),
    "a lock": ({1: threading.Lock()}, "[1]", "_thread.lock", "Leave it out"),
    "a generator": (iter_of_nothing(), "", "generator", "list"),
    "a file": ([sys.__stdout__], "[0]", "", "name and position"),
    "a pattern": (re.compile("x"), "", "re.Pattern", "pattern"),
    "a view": (memoryview(b"x"), "", "memoryview", "bytes"),
    "torch.Generator": (torch.Generator(), "", "torch._C.Generator", "get_state()"),
    "random.Random": (random.Random(), "", "random.Random", "getstate()"),
    "numpy's Generator": (np.random.default_rng(0), "", "Generator", "bit_generator.state"),
    "numpy's BitGenerator": ((np.random.PCG64(0),), "[0]", "PCG64", ".state"),
    "numpy's RandomState": (np.random.RandomState(0), "", "RandomState", "get_state()"),
    "a masked array": (np.ma.array([1]), "", "MaskedArray", "numpy.array"),
    "a matrix": (np.ones((1, 1)).view(np.matrix), "", "matrix", "numpy.array"),
    "a recarray": (np.zeros(1, dtype=[("a", "i4")]).view(np.recarray), "", "recarray", "numpy.array"),
    "an array of records": (np.zeros(1, dtype=np.dtype((np.record, [("a", "i4")]))), "", "ndarray", ""),
    "an array of objects in fields": (np.zeros(1, dtype=[("a", object)]), "", "ndarray", ""),
    "an array of an odd object": (np.array([1, object()], dtype=object), "[1]", "object", ""),
    "an array of the other byte order": (np.array([1], dtype=">i4"), "", "ndarray", "numpy.array"),
    "a dtype with metadata": (np.dtype("i4", metadata={"a": 1}), "", "Int32DType", ""),
    "a text of numpy's that ends in zeros": (np.str_("a\0"), "", "numpy.str_", ""),
    "a number of numpy's of another class": (np.longlong(1), "", "numpy.longlong", ""),
    "a stream of translated newlines": (io.StringIO("a\r\nb", newline=None), "", "StringIO", "getvalue()"),
    "a DTensor's kin": ((Sub(),), "[0]", "Sub", "dict or a list"),
    "a meta tensor": (([torch.ones(1, device="meta")],), "[0][0]", "torch.Tensor", "to_empty()"),
    "a sparse tensor": ((torch.eye(2).to_sparse(),), "[0]", "torch.Tensor", "dict or a list"),
    "a tensor with a graph": ((torch.ones(1, requires_grad=True) * 2,), "[0]", "torch.Tensor", "detach()"),
    "a tensor with attributes": ((with_an_attribute(torch.ones(1)),), "[0]", "torch.Tensor", "detach()"),
    "a module of torch's": ((torch.nn.Linear(1, 1),), "[0]", "Linear", "state_dict()"),
    "a tensor as a key": ({torch.ones(1): 1}, "[tensor([1.])]", "torch.Tensor", "key"),
    "a key with a hash of its own": ({users.Hashed.A: 1}, "[<Hashed.A: 1>]", "Hashed", "key"),
    "a dataclass as a key": ({users.Frozen(): 1}, "[Frozen(a=1)]", "Frozen", "key"),
    "a subclass of dict": ({"a": users.MyDict(x=1)}, "['a']", "MyDict", "dict"),
    "a subclass of int": (type("Step", (int,), {})(5), "", "Step", "int()"),
    "a Counter with attributes": (with_an_attribute(collections.Counter("a")), "", "Counter", "beside"),
    "a factory of the user's": (collections.defaultdict(users.Plain), ".default_factory", "type", "list"),
    "a class of no known kind": (types.SimpleNamespace(a=users.Plain()), ".a", "Plain", "trust=True"),
    "a dataclass that pickles in its own way": (users.Restoring(), "", "Restoring", "trust=True"),
    "a dataclass with an attribute more": (with_an_attribute(users.Config()), "", "Config", ""),
    "a field of a dataclass": ([users.Config(rate=users.Plain())], "[0].rate", "Plain", ""),
    "a field of a namedtuple": (users.Point(1, lambda: 1), ".y", "function", ""),
    "an Enum of the script": (InScript.A, "", "InScript", "Move the class to a module"),
    "a class in a function": (local_class(), "", "Local", "Move the class to a module"),
    "a class whose name is another's": ([shadowed()], "[0]", "Config", "Move the class to a module"),
    "a list in itself": (holding_itself(), "[0][1]", "list", "apart"),
    "too many levels": (nested(300), "[0]" * 201, "list", "fewer levels"),
    "the same tuple over and over": (laughing(), "", "tuple", "once"),
    "a large key": ({tuple(range(5000)): 1}, None, "tuple", "key"),
    "a datetime of another zone": (
        dt.datetime(2026, 1, 1, tzinfo=type("Zone", (dt.tzinfo,), {})()), ".tzinfo", "Zone", "ZoneInfo",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_restored_is_refused_with_its_place_its_class_and_the_cure(name: str) -> None:
    value, path, class_name, hint = REFUSED[name]
    found = refusal(value)
    assert found is not None
    assert path is None or found.path == path
    assert class_name in found.class_name
    assert hint in found.hint and found.hint
    assert found.reason


@pytest.mark.parametrize(
    "value", [users.Plain(), {"a": re.compile("x")}, (InScript.A.value, users.Restoring())]
)
def test_what_pickles_by_reference_is_accepted_with_trust(value: Any) -> None:
    assert refusal(value) is not None
    assert refusal(value, trust=True) is None


@pytest.mark.parametrize(
    "name", ["a lambda", "a lock", "numpy's str", "a tensor with a graph", "a class in a function"]
)
def test_what_does_not_survive_pickling_is_refused_even_with_trust(name: str) -> None:
    value = REFUSED[name][0] if name in REFUSED else np.str_("a\0")
    assert refusal(value, trust=True) is not None


def test_a_class_on_torchs_list_is_accepted_and_loaded() -> None:
    value = {"a": (users.Plain(), dt.date(2026, 1, 2))}
    with torch.serialization.safe_globals([users.Plain]):
        assert refusal(value) is None
        assert vars(loads(dumps(value).getbuffer(), "x")["a"][0]) == {"a": 1}
    with pytest.raises(UnsafeCheckpointError, match=r"value_classes\.Plain"):
        loads(dumps(value).getbuffer(), "x")


def test_an_error_names_every_missing_class_at_once() -> None:
    value = [
        users.Plain(),
        re.compile("x"),
        {"f": users.function},
        torch.eye(2).to_sparse(),
        dt.date(2026, 1, 2),
    ]
    users.RAN.clear()
    with pytest.raises(UnsafeCheckpointError) as caught:
        loads(saved(value), "some.key")
    assert caught.value.classes == (
        "re._compile", "support.value_classes.Plain", "support.value_classes.function",
        "torch._utils._rebuild_sparse_tensor",
    )  # fmt: skip
    assert all(name in str(caught.value) for name in (*caught.value.classes, "'some.key'", "trust=True"))
    assert users.RAN == []


def test_a_class_that_is_not_imported_is_to_be_imported_first(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved((users.Mode.TRAIN, users.Config()))
    monkeypatch.delitem(sys.modules, users.__name__)
    with pytest.raises(UnsafeCheckpointError, match=r"Import support\.value_classes before the load"):
        loads(data, "x")
    assert users.__name__ not in sys.modules


def test_a_class_that_has_changed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved((users.Config(), 1))
    monkeypatch.setattr(
        users, "Config", shadow := dataclasses.make_dataclass("Config", ["rate", "name", "more"])
    )
    shadow.__module__ = users.__name__
    with pytest.raises(UnsafeCheckpointError, match=r"'more' in the class and not in the instance"):
        loads(data, "x")


def test_a_tensor_on_a_device_that_is_not_there_is_said() -> None:
    parts = hostile.records(saved((torch.ones(1), dt.date(2026, 1, 2))))
    parts["archive/data.pkl"] = parts["archive/data.pkl"].replace(b"X\x03\0\0\0cpu", b"X\x07\0\0\0cuda:99")
    with pytest.raises(ConfigurationError, match="cuda:99"):
        loads(hostile.archive(parts), "x")


def test_with_trust_a_class_that_is_gone_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(users.Plain())
    monkeypatch.delattr(users, "Plain")
    with pytest.raises(ConfigurationError, match="Plain"):
        loads(data, "x", trust=True)


def test_a_payload_of_the_other_byte_order_is_turned_round() -> None:
    parts = hostile.records(saved((torch.arange(3, dtype=torch.int32), dt.date(2026, 1, 2))))
    tensor, _ = loads(hostile.archive({**parts, "archive/byteorder": b"big"}), "x")
    assert tensor.tolist() == [0, 1 << 24, 2 << 24]


def test_what_was_proven_reads_the_same_by_stock() -> None:
    for value in TABLE.values():
        again = torch.load(prove_safe(dumps(value).getbuffer(), "x"), weights_only=False)
        assert difference(value, again) is None


def test_a_tensor_saved_whole_is_loaded_and_nothing_else() -> None:
    assert load_tensor(saved(torch.ones(2)), "x", trust=False).tolist() == [1, 1]
    with pytest.raises(IntegrityError, match="a date, not a tensor"):
        load_tensor(saved(dt.date(2026, 1, 2)), "x", trust=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda one: [one],
        lambda one: (one,),
        lambda one: {"a": one},
        lambda one: collections.deque([one]),
        lambda one: collections.OrderedDict(a=one),
        lambda one: types.SimpleNamespace(a=one),
        users.Config,
        lambda one: users.Point(one, 1),
        lambda one: np.array([one, None], dtype=object),
    ],
    ids=["list", "tuple", "dict", "deque", "OrderedDict", "namespace", "dataclass", "namedtuple", "array"],
)
def test_the_deepest_value_that_is_accepted_is_restored(make: Any) -> None:
    deepest: Any = None
    value: Any = 1
    while refusal(value) is None:
        deepest, value = value, make(value)
    again = loads(dumps(deepest).getbuffer(), "x")
    assert digest(again) == digest(deepest)


# --- digests


def shuffled(value: Any) -> Any:
    return dict(reversed(value.items()))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({8, 0, 16}, {16, 8, 0}),
        (torch.arange(4.0).reshape(2, 2).t(), torch.tensor([[0.0, 2], [1, 3]])),
        (np.asfortranarray(np.ones((2, 2))), np.ones((2, 2))),
        ("a" * 3, "aaa"),
    ],
)
def test_equal_values_have_equal_digests(one: Any, other: Any) -> None:
    assert digest(one) == digest(other)


def test_different_values_have_different_digests() -> None:
    different: list[Any] = [
        0, 0.0, -0.0, False, None, "", b"", "0", (), [], {}, set(), frozenset(), [0], [[0]], [0, 0], (0,),
        {0: 0}, {0},
        1 << 64, 1 << 65, np.int64(0), np.int32(0), np.array(0), np.array([0]), np.zeros(1, "f4"),
        np.zeros(1, ">f4"), torch.zeros(1), torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1),
        torch.nn.Parameter(torch.zeros(1)), users.Mode.TRAIN, users.Level.HIGH, users.Point(0, 0),
        users.Pair(0, 0), users.Config(0), users.Frozen(0), dt.date(2026, 1, 1),
        dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.timedelta(0),
        collections.OrderedDict(a=1, b=2), collections.OrderedDict(b=2, a=1), collections.deque(),
        float("nan"), collections.deque(maxlen=1), collections.Counter(), collections.defaultdict(list),
        torch.float32, torch.int8, users.Plain(),
    ]  # fmt: skip
    assert len({digest(one) for one in different}) == len(different)


def test_padding_does_not_change_a_digest() -> None:
    dtype = np.dtype([("a", "u1"), ("b", "f8")], align=True)
    number = struct.pack("<d", 0.5)
    one, other = (np.frombuffer(b"\5" + bytes([fill]) * 7 + number, dtype) for fill in (1, 2))
    assert one.tobytes() != other.tobytes()
    assert digest(one) == digest(other)


def test_values_work_where_numpy_can_not_be_imported() -> None:
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        f"sys.path.insert(0, {str(Path(value_digest.__file__).parents[1])!r})\n"
        "from cloudckpt.backends.state.values import dumps, loads, refusal\n"
        "from support.value_digest import digest\n"
        "import datetime, torch\n"
        "value = {'a': (datetime.date(2026, 1, 2), torch.Size([2]), {3})}\n"
        "assert refusal(value) is None and refusal(object()) is not None\n"
        "assert digest(loads(dumps(value).getbuffer(), 'x')) == digest(value)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr


def test_a_check_of_many_numbers_asks_each_for_nothing() -> None:
    assert refusal(list(range(1_000_000))) is None
    with contextlib.suppress(pickle.PicklingError):
        assert refusal([1 << 40] * 1000) is None


def test_plain_values_are_loaded_by_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "parse", None)
    for value in (5, {"a": [1, "x", (2.5, None)]}, (torch.ones(2),)):
        assert difference(value, loads(dumps(value).getbuffer(), "x")) is None
