"""`.metadata` is read without running it, and means what stock DCP means by it."""

from __future__ import annotations

import enum
import io
import os
import pickle
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
)

from cloudckpt.backends.errors import IntegrityError, UnsafeCheckpointError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.format.tensor_archive import Payload

PAYLOAD = Payload(700, torch.float32, (1, 4))


@pytest.fixture
def stock(tmp_path: Path) -> bytes:
    """The `.metadata` of a checkpoint that stock DCP wrote."""
    state = {
        "a": torch.randn(4, 4),
        "n": {"b": torch.randn(3).bfloat16(), "l": [1, torch.zeros(2)]},
        "p": (1, "x"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path / "stock")
    return (tmp_path / "stock" / ".metadata").read_bytes()


def test_stock_metadata_is_read_as_pickle_reads_it(stock: bytes) -> None:
    mine, theirs = md.load(stock, uri="memory://x"), pickle.loads(stock)
    assert mine.storage_data == theirs.storage_data
    assert mine.state_dict_metadata == theirs.state_dict_metadata
    assert mine.planner_data == theirs.planner_data
    assert type(mine) is Metadata
    assert {type(index) for index in mine.storage_data} == {MetadataIndex}
    assert {type(info) for info in mine.storage_data.values()} == {_StorageInfo}


class _AsIn3112(pickle.Pickler):
    """Early releases of Python 3.11, such as 3.11.2, pickle an enumeration's members by their names."""

    def reducer_override(self, one: object) -> Any:
        return (getattr, (type(one), one.name)) if isinstance(one, enum.Enum) else NotImplemented


def test_members_of_enumerations_are_read_as_any_python_pickles_them(stock: bytes) -> None:
    theirs, sink = pickle.loads(stock), io.BytesIO()
    _AsIn3112(sink).dump(theirs)
    assert b"getattr" in sink.getvalue()
    mine = md.load(sink.getvalue(), uri="memory://x")
    assert mine.state_dict_metadata == theirs.state_dict_metadata
    assert mine.storage_data == theirs.storage_data


@pytest.mark.parametrize(
    ("of", "name"),
    [
        (_MEM_FORMAT_ENCODING, "__class__"),
        (_MEM_FORMAT_ENCODING, "mro"),
        (_MEM_FORMAT_ENCODING, 0),
        (Metadata, "TORCH_CHANNELS_LAST"),
        (getattr, "__self__"),
        ("text", "format"),
    ],
)
def test_nothing_else_is_got_by_getattr(of: object, name: object) -> None:
    class Got:
        def __reduce__(self) -> Any:
            return getattr, (of, name)

    with pytest.raises(UnsafeCheckpointError, match="getattr"):
        md.load(pickle.dumps(Got()), uri="memory://x")


def test_what_was_read_pickles_again_for_the_other_ranks(stock: bytes) -> None:
    again = pickle.loads(pickle.dumps(md.load(stock, uri="memory://x")))
    assert again.state_dict_metadata == pickle.loads(stock).state_dict_metadata


def test_extras_ride_along_and_stock_classes_carry_them() -> None:
    info = md.storage_info("__0_0.distcp", 10, 900, PAYLOAD)
    metadata = Metadata({"x": BytesStorageMetadata()}, storage_data={MetadataIndex("x"): info})
    md.add_extras(metadata, "an id", "0.1.0", {})
    read = md.load(md.dump(metadata), uri="memory://x")
    assert md.save_id_of(read) == "an id"
    assert md.payload_of(read.storage_data[MetadataIndex("x")]) == PAYLOAD
    assert md.objects_of(read) == {"__0_0.distcp"}
    assert md.payload_of(pickle.loads(md.dump(metadata)).storage_data[MetadataIndex("x")]) == PAYLOAD


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("where", ["instead of the metadata", "inside the planner's data"])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path, where: str) -> None:
    trap = _Runs(tmp_path / "ran")
    hostile = trap if where == "instead of the metadata" else Metadata({}, planner_data=trap, storage_data={})
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.mkdir") as caught:
        md.load(pickle.dumps(hostile), uri="s3://b/x")
    assert caught.value.uri == "s3://b/x"
    assert caught.value.object_name == ".metadata"
    assert not (tmp_path / "ran").exists()


def test_trust_lets_it_run(tmp_path: Path) -> None:
    metadata = Metadata({}, planner_data=_Runs(tmp_path / "ran"), storage_data={})
    md.load(pickle.dumps(metadata), uri="memory://x", trust=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch.distributed.checkpoint.metadata", "Metadata.__init__"),
        ("torch.distributed.checkpoint.metadata", "os"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch", "ops"),
    ],
)
def test_only_the_exact_names_of_metadata_classes_are_known(module: str, name: str) -> None:
    data = b"\x80\x04" + pickle.SHORT_BINUNICODE + bytes([len(module)]) + module.encode()
    data += pickle.SHORT_BINUNICODE + bytes([len(name)]) + name.encode() + pickle.STACK_GLOBAL + b"."
    with pytest.raises(UnsafeCheckpointError):
        md.load(data, uri="memory://x")


def test_a_pickle_cannot_change_the_classes_of_this_process() -> None:
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=4)
    pickler.dump(MetadataIndex)
    class_only = stream.getvalue()[:-1]
    state = pickle.dumps((None, {"fqn": "poisoned", "__eq__": 5}), protocol=4)[2:-1]
    frame = state[9:] if state[:1] == pickle.FRAME else state
    before = dict(vars(MetadataIndex))
    with pytest.raises(IntegrityError):
        md.load(class_only + frame + pickle.BUILD + b".", uri="memory://x")
    assert dict(vars(MetadataIndex)) == before


@pytest.mark.parametrize("cut", [0, 1, 10, -1, -100])
def test_truncated_metadata_is_damaged_not_a_crash(stock: bytes, cut: int) -> None:
    with pytest.raises(IntegrityError) as caught:
        md.load(stock[:cut], uri="s3://b/x")
    assert "s3://b/x" in str(caught.value)


@pytest.mark.parametrize(
    "info",
    [
        _StorageInfo("/etc/passwd", 0, 10),
        _StorageInfo("../other/__0_0.distcp", 0, 10),
        _StorageInfo("a/../../b", 0, 10),
        _StorageInfo("__0_0.distcp", -1, 10),
        _StorageInfo("__0_0.distcp", 0, -10),
        _StorageInfo(5, 0, 10),  # type: ignore[arg-type]
        md.storage_info("__0_0.distcp", 0, 10, Payload(11, torch.int8)),
        md.storage_info("__0_0.distcp", 0, 10, Payload(0, torch.int8, (-1,))),
        md.storage_info("__0_0.distcp", 0, 10, Payload(0, cast(Any, "int8"))),
        "not an info",
    ],
    ids=lambda info: str(vars(info)) if isinstance(info, _StorageInfo) else str(info),
)
def test_places_that_no_writer_writes_are_refused(info: object) -> None:
    metadata = Metadata({"x": BytesStorageMetadata()}, storage_data={MetadataIndex("x"): info})
    with pytest.raises(IntegrityError, match="not consistent"):
        md.load(pickle.dumps(metadata), uri="memory://x")


@pytest.mark.parametrize(
    "other", [5, [], {"storage_data": {}}, Metadata({}), Metadata(cast(Any, []), storage_data={})], ids=str
)
def test_other_pickles_are_not_metadata(other: object) -> None:
    with pytest.raises(IntegrityError):
        md.load(pickle.dumps(other), uri="memory://x")
