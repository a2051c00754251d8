"""``cloudckpt.convert``: every kind of tensor, sharded or shared, and never a half-written destination."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import subprocess
import sys
import threading
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.serialization import config

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.convert import convert_lease, torch_writer
from cloudckpt.backends.convert.state_source import Entry, boxes, make_up
from cloudckpt.backends.errors import (
    CheckpointError,
    CheckpointExistsError,
    ConfigurationError,
    IntegrityError,
)
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.transfer.segments import Fetched
from support.commands import save
from support.conversions import by_name, from_checkpoint
from support.faults import Fault, FaultyStore, InjectedFault, Journal
from support.places import Place
from support.ranks import RankPools
from support.states import DTYPES, assert_bit_exact, content

PEAK = Path(__file__).parent / "support" / "peak_convert.py"
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def every_kind() -> dict[str, torch.Tensor]:
    """Every dtype, with every odd shape."""
    shapes = {"matrix": (5, 3), "scalar": (), "empty": (0, 4), "odd": (1, 7, 1)}
    kinds = {str(dtype).removeprefix("torch."): dtype for dtype in (*DTYPES, *UNSIGNED)}
    return {
        f"{kind}.{name}": content(kind, shape, torch.uint8).to(dtype)
        for (kind, dtype), (name, shape) in itertools.product(kinds.items(), shapes.items())
    }


@pytest.fixture
def committed(folder: Place) -> Place:
    """A checkpoint of every kind of tensor."""
    return save(folder.child("ckpt"), every_kind())


def test_every_dtype_and_shape_goes_through_a_torch_file(committed: Place, tmp_path: Path) -> None:
    cloudckpt.convert(committed.uri, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert archive.testzip() is None
    assert_bit_exact(torch.load(tmp_path / "m.pt", weights_only=True), every_kind())
    cloudckpt.convert(tmp_path / "m.pt", tmp_path / "again")
    assert_bit_exact(from_checkpoint(dcp.FileSystemReader(tmp_path / "again")), every_kind())


def test_a_torch_file_is_laid_out_as_torch_reckons(
    committed: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloudckpt.convert(committed.uri, tmp_path / "m.pt")
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")  # torch compares what it reckons with what is there
    patched: Any = config  # its module makes it, out of a checker's sight
    with patched.patch({"load.calculate_storage_offsets": True}):
        assert_bit_exact(torch.load(tmp_path / "m.pt", weights_only=True, mmap=True), every_kind())
    assert all(
        one.data_ptr() % 64 == 0 for one in torch.load(tmp_path / "m.pt", mmap=True).values() if one.numel()
    )


def test_a_torch_file_of_more_than_four_gib_is_one_that_torch_and_zip_read(tmp_path: Path) -> None:
    entries = [Entry("x", torch.uint8, (5 << 30,), (1,)), Entry("y", torch.float32, (4,), (1,))]
    stand_ins = torch_writer.stand_ins({entry.key: entry for entry in entries})
    fetched = {id(stand_ins[entry.key]): entry for entry in entries}
    source: Any = mock.Mock()
    source.segment = lambda entry, seen: Fetched(source, entry.key, entry.nbytes, entry.dtype.itemsize, seen)
    planned = torch_writer.planned(stand_ins, fetched, source, threading.Event())
    with (tmp_path / "m.pt").open("wb") as file:  # a sparse one
        for segment in planned.segments:
            if isinstance(segment, Fetched):
                total: Any = segment.seen
                total.__self__._pieces[0] = (segment.nbytes, zlib.crc32(bytes(16)))  # right for the second
                file.seek(segment.nbytes, os.SEEK_CUR)
            else:
                file.write(segment.window(0, segment.nbytes, memoryview(b"")))
        assert file.tell() == planned.size
    loaded = torch.load(tmp_path / "m.pt", weights_only=True, mmap=True)
    assert loaded["x"].shape == (5 << 30,) and loaded["y"].tolist() == [0, 0, 0, 0]
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert archive.read("archive/data/1") == bytes(16)
        assert archive.getinfo("archive/data/0").file_size == 5 << 30
        assert zlib.crc32(bytes(16)) == archive.getinfo("archive/data/0").CRC


def test_every_dtype_that_safetensors_have_goes_through_them(committed: Place, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"complex64.matrix \(complex64\).*complex128.scalar \(complex128\)"
    ):
        cloudckpt.convert(committed.uri, tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()
    state = {name: tensor for name, tensor in every_kind().items() if not tensor.is_complex()}
    save(committed.child("real"), state)
    cloudckpt.convert(committed.child("real").uri, tmp_path / "m.safetensors")
    assert_bit_exact(by_name(safetensors.torch.load_file(tmp_path / "m.safetensors")), by_name(state))
    cloudckpt.convert(tmp_path / "m.safetensors", tmp_path / "again")
    assert_bit_exact(by_name(from_checkpoint(dcp.FileSystemReader(tmp_path / "again"))), by_name(state))


def test_what_the_safetensors_library_writes_is_read(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in every_kind().items() if not tensor.is_complex()}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors", metadata={"made": "elsewhere"})
    cloudckpt.convert(tmp_path / "m.safetensors", tmp_path / "again")
    assert_bit_exact(by_name(from_checkpoint(dcp.FileSystemReader(tmp_path / "again"))), by_name(state))


@pytest.mark.parametrize("uri", ["memory://{}.pt", "memory://{}/m.pt", "dir://m.pt", "dir://a/b/m.pt"])
def test_any_file_system_has_files(uri: str, committed: Place, tmp_path: Path) -> None:
    options = {"storage_options": {"path": str(tmp_path), "target_protocol": "file"}}
    target = Target.parse(uri.format(uuid.uuid4().hex), **(options if uri.startswith("dir") else {}))
    assert cloudckpt.convert(committed.uri, target).files == (target.uri,)
    again = cloudckpt.convert(target, tmp_path / "again.pt")
    assert (again.tensors, again.source) == (len(every_kind()), target.uri)
    assert_bit_exact(torch.load(tmp_path / "again.pt"), every_kind())


@pytest.mark.parametrize(
    "uri", ["/m.pt", "file:///a/m%20n.pt", "s3://b/m.pt", "s3://b/a/m.pt", "memory://m", "memory://a/m"]
)
def test_a_file_is_in_a_folder(uri: str) -> None:
    target = Target.parse(uri)
    folder, name = target.parted()
    assert (folder.child(name).uri, name) == (target.uri, target.uri.rpartition("/")[2])
    with pytest.raises(ConfigurationError, match="this names no file"):
        Target.parse("s3://bucket.pt").parted()


def shards() -> dict[str, torch.Tensor]:
    return {name: content(name, (70, 130), torch.float32) for name in ("rows", "columns")} | {
        "cube": content("cube", (9, 11, 13), torch.bfloat16),
        "uneven": content("uneven", (3,), torch.int64),
    }


def save_sharded(rank: int, place: Place) -> None:
    mesh = init_device_mesh("cpu", (2,))
    placements = {"rows": Shard(0), "columns": Shard(1), "cube": Shard(1), "uneven": Shard(0)}
    state = {name: distribute_tensor(one, mesh, [placements[name]]) for name, one in shards().items()}
    dcp.save(state, storage_writer=place.writer())


def test_shards_are_put_together(folder: Place, rank_pool: RankPools, tmp_path: Path) -> None:
    there = folder.child("ckpt")
    rank_pool(2)(save_sharded, there)
    # Parts end in the middle of rows, of elements, and of shards.
    small = "?part_size=4001&memory_limit=1MiB"
    for name in ("m.pt", "m.safetensors", "again"):
        cloudckpt.convert(there.uri, f"file://{tmp_path}/{name}{small}")
    assert_bit_exact(by_name(torch.load(tmp_path / "m.pt")), by_name(shards()))
    assert_bit_exact(by_name(safetensors.torch.load_file(tmp_path / "m.safetensors")), by_name(shards()))
    assert_bit_exact(by_name(from_checkpoint(dcp.FileSystemReader(tmp_path / "again"))), by_name(shards()))
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert archive.testzip() is None


def test_what_a_stock_writer_wrote_is_converted(tmp_path: Path) -> None:
    state = {"large": content("large", (600, 600), torch.float32), "nested": {"x": [torch.ones(3), {"y": 1}]}}
    dcp.save(state, checkpoint_id=tmp_path / "stock")
    cloudckpt.convert(tmp_path / "stock", f"file://{tmp_path}/m.pt?part_size=64KiB")
    assert_bit_exact(torch.load(tmp_path / "m.pt"), state)


def tangled() -> dict[str, Any]:
    """Tensors that share memory, or lie in it in every way that a torch file can say."""
    base = content("base", (12, 10), torch.float32)
    conjugated = torch.view_as_complex(content("complex", (6, 2), torch.float32)).conj()
    return {
        "tied": {"in": base, "out": base},
        "views": [base[3:5], base.t(), base[:, 1:8:3], base[2:2]],
        "expanded": base[0].expand(5, 10),
        "conjugated": conjugated,
        "imaginary": torch.view_as_complex(content("other", (6, 2), torch.float32)).conj().imag,
        "parameter": torch.nn.Parameter(base[4].clone()),
        "within": (base[1], {"deep": base[2]}),
        "plain": {"list": [1, 2], "bytes": b"x", "none": None, "range": range(3)},
    }


def test_views_and_ties_of_a_torch_file_become_tensors_of_their_own(tmp_path: Path) -> None:
    torch.save(tangled(), tmp_path / "m.pt")
    cloudckpt.convert(f"file://{tmp_path}/m.pt", f"file://{tmp_path}/ours?part_size=100")
    torch_save_to_dcp(tmp_path / "m.pt", tmp_path / "stock")
    ours, stock = (dcp.FileSystemReader(tmp_path / name) for name in ("ours", "stock"))
    assert_bit_exact(from_checkpoint(ours), from_checkpoint(stock))
    assert cloudckpt.verify(tmp_path / "ours").ok


def test_safetensors_refuse_what_shares_memory_and_take_views_that_do_not(tmp_path: Path) -> None:
    base = content("base", (12, 10), torch.float32)
    torch.save({"in": base, "out": base, "other": torch.ones(3)}, tmp_path / "tied.pt")
    with pytest.raises(ConfigurationError, match=r"memory in common.*in, out"):
        cloudckpt.convert(tmp_path / "tied.pt", tmp_path / "tied.safetensors")
    cloudckpt.convert(tmp_path / "tied.pt", tmp_path / "one.safetensors", key="o")
    assert safetensors.torch.load_file(tmp_path / "one.safetensors").keys() == {"out", "other"}
    torch.save({"low": base[:6], "high": base[6:].t()}, tmp_path / "views.pt")
    cloudckpt.convert(tmp_path / "views.pt", tmp_path / "views.safetensors")
    found = safetensors.torch.load_file(tmp_path / "views.safetensors")
    assert_bit_exact(by_name(found), {"high": base[6:].t().contiguous(), "low": base[:6]})


def test_what_had_to_be_negated_is_no_value_that_safetensors_leave_out(tmp_path: Path) -> None:
    torch.save({"x": tangled()["imaginary"], "y": torch.ones(3)}, tmp_path / "m.pt")
    with pytest.raises(ConfigurationError, match=r"x \(conjugated or negated\)"):
        cloudckpt.convert(tmp_path / "m.pt", tmp_path / "m.safetensors")


def test_sparse_and_quantised_tensors_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"fine": torch.ones(3), "thin": torch.eye(3).to_sparse()}, tmp_path / "m.pt")
    with pytest.raises(
        ConfigurationError, match="'thin' is a tensor of another kind than a plain one: sparse_coo"
    ):
        cloudckpt.convert(tmp_path / "m.pt", tmp_path / "again")
    dcp.save(torch.load(tmp_path / "m.pt"), storage_writer=cloudckpt.StorageWriter(tmp_path / "ckpt"))
    for name in ("n.pt", "n.safetensors", "again"):
        with pytest.raises(ConfigurationError, match="'thin' is a tensor of another kind"):
            cloudckpt.convert(tmp_path / "ckpt", tmp_path / name)
        assert not (tmp_path / name).exists()
    cloudckpt.convert(tmp_path / "ckpt", tmp_path / "n.pt", key="fine")


def test_a_file_that_holds_no_state_is_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    with pytest.raises(ConfigurationError, match="this file holds a list, and a state is a dict"):
        cloudckpt.convert(tmp_path / "list.pt", tmp_path / "again")
    torch.save({"x": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigurationError, match=r"not what torch\.save has written since version 1\.6"):
        cloudckpt.convert(tmp_path / "old.pt", tmp_path / "again")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:  # as torch.jit.save writes it
        archive.writestr("script/data.pkl", b"")
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(ConfigurationError, match=r"not what torch\.save writes"):
        cloudckpt.convert(tmp_path / "script.pt", tmp_path / "again")


def test_a_state_of_nothing_is_converted_where_it_can_be(folder: Place, tmp_path: Path) -> None:
    there = save(folder.child("ckpt"), {})
    cloudckpt.convert(there.uri, tmp_path / "m.pt")
    assert torch.load(tmp_path / "m.pt", weights_only=True) == {}
    cloudckpt.convert(tmp_path / "m.pt", tmp_path / "again")
    assert from_checkpoint(dcp.FileSystemReader(tmp_path / "again")) == {}
    save(folder.child("values"), {"epoch": 3})
    for source in ("ckpt", "values"):
        with pytest.raises(ConfigurationError, match="there is no tensor to convert"):
            cloudckpt.convert(folder.child(source).uri, tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("shape", "parts", "whole"),
    [
        ((), [((), ())], True),
        ((), [], False),
        ((), [((), ()), ((), ())], False),
        ((0, 3), [], True),
        ((4,), [((0,), (2,)), ((2,), (2,))], True),
        ((4,), [((0,), (2,)), ((1,), (2,))], False),
        ((4,), [((0,), (3,)), ((2,), (1,))], False),
        ((4,), [((2,), (4,))], False),
        ((4,), [((0,), (2,)), ((9,), (2,))], False),
        ((4,), [((0,), (4,)), ((2,), (0,))], True),
        ((2, 4), [((0, 0), (2, 1)), ((0, 1), (2, 3))], True),
        ((2, 4), [((0, 0), (2, 2)), ((0, 1), (2, 2))], False),
        ((2, 2), [((r, c), (1, 1)) for r in range(2) for c in range(2)], True),
        ((2, 2), [((0, 0), (1, 2)), ((0, 0), (2, 1))], False),
    ],
)
def test_shards_make_up_a_tensor_or_do_not(
    shape: tuple[int, ...], parts: list[tuple[tuple[int, ...], tuple[int, ...]]], whole: bool
) -> None:
    assert make_up(shape, parts) is whole


def test_boxes_are_what_a_range_of_elements_fills() -> None:
    for shape in ((), (7,), (3, 4), (2, 3, 4), (4, 1, 3), (1, 5, 1)):
        tensor = torch.arange(torch.Size(shape).numel()).view(shape)
        for first, last in itertools.combinations(range(tensor.numel() + 1), 2):
            found: list[int] = []
            for offsets, lengths in boxes(shape, first, last):
                box = tensor
                for dim, (at, length) in enumerate(zip(offsets, lengths, strict=True)):
                    box = box.narrow(dim, at, length)
                found += box.reshape(-1).tolist()
            assert found == list(range(first, last))


@contextlib.contextmanager
def faulty(at: str, fault: Fault | None) -> Iterator[Journal]:
    """Let the stores below a URI fail."""
    journal = Journal()

    def opened(target: Target) -> Any:
        store = open_store(target)
        return FaultyStore(store, fault, journal) if target.uri.startswith(at) else store

    with (
        mock.patch("cloudckpt.backends.convert.convert.open_store", opened),
        mock.patch("cloudckpt.backends.dcp_base.open_store", opened),
    ):
        yield journal


KINDS = {"m.pt": None, "m.safetensors": None, "hf": "safetensors", "again": None}
WRITING = ("begin_upload", "upload_part", "complete_upload", "put")


@pytest.mark.parametrize("name", KINDS)
def test_whatever_call_fails_nothing_is_to_be_seen(name: str, folder: Place, tmp_path: Path) -> None:
    source = save(folder.child("ckpt"), {f"t{n}": torch.full((3000,), float(n)) for n in range(4)})

    def convert(number: str) -> None:
        target = f"file://{tmp_path}/out/{number}/{name}?part_size=9000"
        cloudckpt.convert(source.uri, target, to=KINDS[name], shard_size=24_000)

    with faulty(f"file://{tmp_path}/out", None) as journal:
        convert("good")
    assert journal.calls["upload_part"] >= 6
    tried = 0
    for operation in WRITING:
        for call in range(1, journal.calls[operation] + 1):
            if operation == "put" and name == "again" and call == 1:
                continue  # the marker of a save in progress
            tried += 1
            with faulty(f"file://{tmp_path}/out", Fault(operation, 0, call)), pytest.raises(CheckpointError):
                convert(f"{operation}-{call}")
            left = [one for one in (tmp_path / "out").rglob("*") if one.is_file() and "good" not in one.parts]
            assert not left, (operation, call)
    assert tried >= 8


def test_a_source_that_fails_leaves_nothing(folder: Place, tmp_path: Path) -> None:
    source = save(folder.child("ckpt"), {f"t{n}": torch.full((300_000,), float(n)) for n in range(4)})
    for name, to in KINDS.items():
        with faulty(source.uri, Fault("read_into", 0, 3)), pytest.raises(InjectedFault):
            cloudckpt.convert(source.uri, f"file://{tmp_path}/out/{name}?part_size=100000", to=to)
        assert not [one for one in (tmp_path / "out").rglob("*") if one.is_file()]


def test_an_index_is_never_there_without_its_files(folder: Place, tmp_path: Path) -> None:
    source = save(folder.child("ckpt"), {f"t{n}": torch.full((300,), float(n)) for n in range(4)})
    seen: list[set[str]] = []
    convert = functools.partial(
        cloudckpt.convert, source.uri, tmp_path / "out", to="safetensors", shard_size=1200, overwrite=True
    )

    def look(store: Any, operation: str, act: Callable[[], Any], *_: Any) -> Any:
        names = {info.name for info in open_store(Target.parse(tmp_path / "out")).list().objects}
        seen.append({name for name in names if not convert_lease.LEASE.fullmatch(name)})
        return act()

    for _ in range(2):
        with faulty(f"file://{tmp_path}/out", None), mock.patch.object(FaultyStore, "_through", look):
            convert()
    files = {f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)}
    index = {"model.safetensors.index.json"}
    assert len(seen) > 20 and files in seen
    assert all(names >= files for names in seen if names & index)


def test_small_tensors_are_read_together(folder: Place, tmp_path: Path) -> None:
    source = save(folder.child("ckpt"), {f"t{n}": torch.full((30,), float(n)) for n in range(200)})
    for name in ("m.pt", "m.safetensors", "again"):
        with faulty(source.uri, None) as journal:
            cloudckpt.convert(source.uri, tmp_path / name)
        assert journal.calls["read_into"] < 20


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
def test_a_source_that_is_overwritten_meanwhile_is_noticed(name: str, folder: Place, tmp_path: Path) -> None:
    cloudckpt.convert(save(folder.child("ckpt"), {"x": torch.ones(3)}).uri, tmp_path / name)

    def overwrite(_: int) -> None:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes())

    for target in ("again", "n.pt", "n.safetensors"):
        with pytest.raises(IntegrityError, match="overwritten while it was read"):
            cloudckpt.convert(tmp_path / name, tmp_path / target, begun=overwrite)
        assert not (tmp_path / target).exists()


def test_a_rival_that_is_faster_is_left_alone(folder: Place, tmp_path: Path) -> None:
    source = save(folder.child("ckpt"), {"x": torch.ones(3)})

    def rival(_: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "m.safetensors").write_bytes(b"theirs")

    def too_late(_: str, __: int) -> None:
        rival(0)

    with pytest.raises(CheckpointExistsError, match="meanwhile"):
        cloudckpt.convert(source.uri, tmp_path / "out" / "m.safetensors", observer=too_late)
    assert (tmp_path / "out" / "m.safetensors").read_bytes() == b"theirs"


def test_converting_takes_no_more_memory_than_it_may(tmp_path: Path) -> None:
    limit, slack = 16 << 20, 24 << 20  # the largest tensor has 64 MiB
    command = [sys.executable, str(PEAK), str(tmp_path), "128", str(limit)]
    environment = {**os.environ, "PYTHONPATH": str(PEAK.parent.parent)}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    grown = [int(number) for number in ran.stdout.split()]
    assert len(grown) == 5 and max(grown) <= limit + slack
