"""Files made to do harm: nothing in them is run or believed, and an error of this library says so."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch._utils import _rebuild_tensor_v2
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

import cloudckpt
from cloudckpt.backends.errors import CheckpointError, IntegrityError, UnsafeCheckpointError
from cloudckpt.backends.format import metadata as md
from support.places import Place


class Claim:
    """A tensor of this many elements in a storage of ``held``, as a pickle may claim it."""

    def __init__(
        self,
        size: tuple[int, ...],
        stride: tuple[int, ...] = (1,),
        *,
        first: int = 0,
        held: Any = 4,
        key: Any = "0",
    ) -> None:
        self.arguments = size, stride, first
        self.storage = held, key

    def __reduce__(self) -> Any:
        size, stride, first = self.arguments
        return _rebuild_tensor_v2, (
            Storage(*self.storage),
            first,
            size,
            stride,
            False,
            OrderedDict(),
        )


class Storage:
    """What a pickle asks for by a persistent id."""

    def __init__(self, held: Any, key: Any) -> None:
        self.told = ("storage", torch.FloatStorage, key, "cpu", held)


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.told if isinstance(obj, Storage) else None


def archive(state: object, records: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file as torch.save writes it, of any pickle and any records."""
    data, stream = io.BytesIO(), io.BytesIO()
    if isinstance(state, bytes):
        data.write(state)
    else:
        Pickler(data, protocol=2).dump(state)
    with zipfile.ZipFile(stream, "w", compression) as zipped:
        for name, content in {"data.pkl": data.getvalue(), "version": b"3\n", **records}.items():
            zipped.writestr(f"archive/{name}", content)
    return stream.getvalue()


FOUR = {"data/0": struct.pack("4f", 1, 2, 3, 4)}


class Harm:
    """What leaves a file behind when it is run."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._path}",)


CLAIMS = {
    "more elements than there are": archive({"x": Claim((5,))}, FOUR),
    "as many as there could never be": archive({"x": Claim((1 << 40,))}, FOUR),
    "elements beyond the end": archive({"x": Claim((2,), first=3)}, FOUR),
    "elements before the beginning": archive({"x": Claim((2,), first=-1)}, FOUR),
    "the same element without end": archive({"x": Claim((1 << 40,), (0,))}, FOUR),
    "steps beyond the end": archive({"x": Claim((2,), (1 << 40,))}, FOUR),
    "a negative size": archive({"x": Claim((-1,))}, FOUR),
    "a larger storage than its record": archive({"x": Claim((4,), held=1 << 40)}, FOUR),
    "a storage that nothing can hold": archive({"x": Claim((4,), held=1 << 70)}, FOUR),
    "a storage of less than nothing": archive({"x": Claim((0,), held=-1)}, FOUR),
    "a storage that is not counted": archive({"x": Claim((1,), held="4")}, FOUR),
    "a record that is missing": archive({"x": Claim((4,), key="1")}, FOUR),
    "a record that is the pickle": archive({"x": Claim((4,), key="../data.pkl")}, FOUR),
    "a record without a name": archive({"x": Claim((4,), key=0)}, FOUR),
    "two sizes of a record": archive({"x": Claim((4,)), "y": Claim((2,), held=2)}, FOUR),
    "a pickle that ends": archive(b"\x80\x02}", FOUR),
    "a pickle that grows": archive(b"\x80\x02]r\xff\xff\xff\x7f.", FOUR),
    "a pickle that is compressed": archive({"x": Claim((4,))}, FOUR, compression=zipfile.ZIP_DEFLATED),
    "nothing else": archive({"x": Claim((4,))}, {}),
}  # fmt: skip


def refused(path: Path, tmp_path: Path) -> CheckpointError:
    """The error that says what is wrong with a file; nothing comes of it, and it takes no memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError) as raised:
        cloudckpt.convert(path, tmp_path / "again")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert not (tmp_path / "again").exists()
    return raised.value


def test_an_honest_file_made_by_hand_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(archive({"x": Claim((2, 2), (2, 1))}, FOUR))
    cloudckpt.convert(tmp_path / "m.pt", tmp_path / "again")
    found = {"x": torch.zeros(2, 2)}
    dcp.load(found, checkpoint_id=tmp_path / "again")
    assert found["x"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("what", CLAIMS)
def test_what_a_torch_file_claims_is_not_believed(what: str, tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(CLAIMS[what])
    error = refused(tmp_path / "m.pt", tmp_path)
    assert isinstance(error, IntegrityError), error
    assert (error.uri, error.object_name) == (f"file://{tmp_path}", "m.pt")


def test_what_a_torch_file_would_run_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(archive({"x": Claim((4,)), "y": Harm(tmp_path / "harm")}, FOUR))
    error = refused(tmp_path / "m.pt", tmp_path)
    assert isinstance(error, UnsafeCheckpointError) and "system" in str(error)
    assert not (tmp_path / "harm").exists()


def sizes(data: bytearray, at: int) -> None:
    data[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFF00, 0xFFFFFF00)


def offset(data: bytearray, at: int) -> None:
    data[at + 42 : at + 46] = struct.pack("<I", 0xFFFFFF00)


def padding(data: bytearray, at: int) -> None:
    (local,) = struct.unpack_from("<I", data, at + 42)
    data[local + 28 : local + 30] = b"\xff\xff"


@pytest.mark.parametrize("lie", [sizes, offset, padding])
def test_where_a_directory_says_a_record_is_is_not_believed(
    lie: Callable[[bytearray, int], None], tmp_path: Path
) -> None:
    data = bytearray(archive({"x": Claim((4,))}, FOUR))
    lie(data, data.rindex(b"PK\x01\x02"))
    (tmp_path / "m.pt").write_bytes(data)
    assert isinstance(refused(tmp_path / "m.pt", tmp_path), IntegrityError)


def test_a_torch_file_that_is_cut_off_or_altered_is_never_more_than_an_error(tmp_path: Path) -> None:
    torch.save(
        {"x": torch.arange(40.0), "y": [1, {"z": torch.ones(3, 3).t()}], "t": (torch.ones(2), 1)},
        tmp_path / "m.pt",
    )
    whole = (tmp_path / "m.pt").read_bytes()
    cuts = [whole[:length] for length in range(0, len(whole), 97)]
    source = random.Random(5)
    for _ in range(150):
        altered = bytearray(whole)
        for _ in range(source.randint(1, 4)):
            altered[source.randrange(len(altered))] = source.randrange(256)
        cuts.append(bytes(altered))
    failed = 0
    for number, data in enumerate(cuts):
        (tmp_path / "m.pt").write_bytes(data)
        try:
            cloudckpt.convert(tmp_path / "m.pt", tmp_path / f"again-{number}")
        except CheckpointError:
            failed += 1
            assert not (tmp_path / f"again-{number}").exists()
    assert failed > len(whole) // 97


def tensors(header: object, size: int = 16, *, length: int | None = None) -> bytes:
    """A safetensors file of any header."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(data) if length is None else length).to_bytes(8, "little") + data + bytes(size)


def one(**changed: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changed}}


HEADERS = {
    "no file": b"",
    "a header longer than the file": tensors(one(), length=1 << 20),
    "a header longer than any": tensors(one(), length=(1 << 64) - 1),
    "a header that is no JSON": tensors(b"{"),
    "a header that is no text": tensors(b"\xff\xfe"),
    "a header that is no object": tensors([1, 2]),
    "a header nested too deeply": tensors(b'{"x":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "a name twice": tensors(b'{"x":{},"x":{}}'),
    "no description": tensors({"x": 3}),
    "an unknown type": tensors(one(dtype="F33")),
    "no type": tensors(one(dtype=["F32"])),
    "more elements than bytes": tensors(one(shape=[1 << 40])),
    "a product that overflows": tensors(one(shape=[1 << 33, 1 << 33, 0, 4])),
    "a product that takes for ever": tensors(one(shape=[1 << 61] * 200_000)),
    "a number of a thousand digits": tensors(b'{"x":{"shape":[' + b"9" * 5000 + b"]}}"),
    "less than nothing": tensors(one(shape=[-4])),
    "a fraction": tensors(one(shape=[4.0])),
    "a truth": tensors(one(shape=[True], data_offsets=[0, 4]), 4),
    "bytes beyond the end": tensors(one(data_offsets=[16, 32])),
    "bytes before the beginning": tensors(one(data_offsets=[-16, 0])),
    "bytes backwards": tensors(one(data_offsets=[16, 0])),
    "three offsets": tensors(one(data_offsets=[0, 16, 32])),
    "an end before the file's": tensors(one(), 20),
    "an end after the file's": tensors(one(), 12),
    "tensors over one another": tensors(one() | {"y": {**one()["x"], "shape": [2], "data_offsets": [8, 16]}}),
    "a hole": tensors(one() | {"y": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}}, 32),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", HEADERS)
def test_what_a_safetensors_header_claims_is_not_believed(what: str, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(HEADERS[what])
    error = refused(tmp_path / "m.safetensors", tmp_path)
    assert isinstance(error, IntegrityError), error
    assert error.object_name == "m.safetensors"


INDICES: dict[str, Any] = {
    "no JSON": b"{",
    "no map": {"weight_map": [1]},
    "nothing": {},
    "a file elsewhere": {"weight_map": {"x": "../m.safetensors"}},
    "a file of another kind": {"weight_map": {"x": "m.pt"}},
    "a file that is missing": {"weight_map": {"x": "m.safetensors", "y": "n.safetensors"}},
    "a tensor that is missing": {"weight_map": {"x": "m.safetensors", "y": "m.safetensors"}},
    "a tensor too few": {"weight_map": {"z": "m.safetensors"}},
}


@pytest.mark.parametrize("what", INDICES)
def test_what_an_index_claims_is_not_believed(what: str, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(tensors(one()))
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "m.safetensors").write_bytes(tensors(one()))
    index = INDICES[what]
    (folder / "model.safetensors.index.json").write_bytes(
        index if isinstance(index, bytes) else json.dumps(index).encode()
    )
    error = refused(folder, tmp_path)
    assert error.uri == f"file://{folder}"


PATHS: dict[str, Any] = {
    "a list without end": {"x": ("x", 1 << 40)},
    "a place before the first": {"x": ("x", -1)},
    "no place": {"x": ()},
    "a place within a tensor": {"x": ("a",), "y": ("a", "b")},
    "one place for two": {"x": ("a",), "y": ("a",)},
    "a list with names": {"x": ("a", 0), "y": ("a", "b")},
    "a place too deep": {"x": ("a",) * 100_000},
}


@pytest.mark.parametrize("what", PATHS)
def test_where_a_checkpoint_places_its_entries_is_not_believed(
    what: str, folder: Place, tmp_path: Path
) -> None:
    there = folder.child("ckpt")
    dcp.save({"x": torch.ones(2), "y": torch.ones(2)}, storage_writer=there.writer())
    metadata = md.load(there.read(md.METADATA_NAME), uri=there.uri)
    metadata.planner_data = PATHS[what]
    there.write(md.METADATA_NAME, md.dump(metadata))
    with pytest.raises(IntegrityError):
        cloudckpt.convert(there.uri, tmp_path / "m.pt")
    assert not (tmp_path / "m.pt").exists()


SHARDS: dict[str, tuple[tuple[int, ...], list[tuple[int, int]]]] = {
    "a hole": ((9,), [(0, 6)]),
    "a hole and an overlap": ((9,), [(0, 6), (3, 3)]),
    "less than nothing": ((-6,), [(0, 6)]),
    "more than there can be": ((1 << 61,), [(0, 1 << 61)]),
    "more than is stored": ((1 << 40,), [(0, 1 << 40)]),
    "one beyond the end": ((6,), [(3, 6)]),
}


@pytest.mark.parametrize("what", SHARDS)
def test_shards_that_do_not_make_up_a_tensor_are_found_out(what: str, folder: Place, tmp_path: Path) -> None:
    there = folder.child("ckpt")
    dcp.save({"x": torch.ones(6)}, storage_writer=there.writer())
    metadata = md.load(there.read(md.METADATA_NAME), uri=there.uri)
    entry: Any = metadata.state_dict_metadata["x"]
    (info,) = metadata.storage_data.values()
    shape, chunks = SHARDS[what]
    entry.size = torch.Size(shape)
    entry.chunks = [ChunkStorageMetadata(torch.Size([at]), torch.Size([size])) for at, size in chunks]
    metadata.storage_data = {MetadataIndex("x", one.offsets): info for one in entry.chunks}
    there.write(md.METADATA_NAME, md.dump(metadata))
    for name in ("m.pt", "m.safetensors", "again"):
        with pytest.raises(IntegrityError, match="'x'"):
            cloudckpt.convert(there.uri, tmp_path / name)
        assert not (tmp_path / name).exists()
