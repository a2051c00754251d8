"""A flipped byte anywhere is found, by verify and by a load that reads it, and named."""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo

import cloudckpt
from cloudckpt.backends.checksums import (
    ALGORITHMS,
    CRC32C,
    CRC64NVME,
    LARGEST_CHUNK,
    SMALLEST_CHUNK,
    Algorithm,
    Checks,
    Chunk,
    Chunks,
    Expected,
    Fragment,
    chunk_size,
    count_chunks,
    joined,
)
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointNotFoundError, IntegrityError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.manage.verify import Damage, _grouped, verify
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Create, ObjectStore, Overwrite
from cloudckpt.backends.stores.memory import MemoryStore
from cloudckpt.backends.transfer.byte_ranges import Arrival
from cloudckpt.backends.transfer.download_checksums import DownloadChecksums
from cloudckpt.backends.transfer.segments import View, Window
from cloudckpt.backends.transfer.upload_checksums import UploadChecksums
from support.places import new_place
from support.servers import S3Server

STATE: dict[str, Any] = {
    "large": torch.arange(300_000, dtype=torch.float32),
    "scattered": torch.arange(40_000, dtype=torch.int16).reshape(200, 200).t(),
    "strided": torch.arange(60_000, dtype=torch.float64)[::2],
    "small": torch.tensor(1.5),
    "empty": torch.empty(0),
    "value": {"step": 7, "words": ["a", "b"]},
}


def blank() -> dict[str, Any]:
    tensors = {name: torch.zeros_like(v) for name, v in STATE.items() if isinstance(v, torch.Tensor)}
    return {**tensors, "value": {"step": 0, "words": []}}


@pytest.fixture
def store() -> MemoryStore:
    """A checkpoint in memory of several objects and parts."""
    store = MemoryStore(Target.parse(f"memory://integrity-{uuid.uuid4().hex}"))
    writer = cloudckpt.StorageWriter(store.uri, part_size=200_001, concurrency=3)
    with mock.patch.object(MemoryStore, "wants_several_objects", new=True):
        dcp.save(STATE, storage_writer=writer)
    return store


def metadata_of(store: ObjectStore) -> Any:
    return md.load(store.get(".metadata")[0], uri=store.uri)


def names(store: ObjectStore) -> list[str]:
    return [info.name for info in store.list().objects]


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)


def item_at(store: ObjectStore, name: str, offset: int) -> tuple[str, _StorageInfo]:
    for index, info in metadata_of(store).storage_data.items():
        if info.relative_path == name and info.offset <= offset < info.offset + info.length:
            return index.fqn, info
    raise AssertionError("no item is there")


def positions(store: ObjectStore, name: str, chosen: random.Random, count: int) -> list[int]:
    """Return the ends of the object and of every item in it, and some places between."""
    infos = metadata_of(store).storage_data.values()
    size = store.stat(name).size
    ends = {
        at
        for info in infos
        if info.relative_path == name and info.length
        for at in (info.offset, info.offset + info.length - 1)
    }
    return sorted({0, size - 1, *ends, *(chosen.randrange(size) for _ in range(count))})


def load_error(uri: str, state: dict[str, Any]) -> BaseException:
    with pytest.raises(CheckpointException) as caught:
        dcp.load(state, storage_reader=cloudckpt.StorageReader(uri))
    ((error, _),) = caught.value.failures.values()
    return error


def test_a_whole_checkpoint_verifies(store: MemoryStore) -> None:
    told: list[int] = []
    found = verify(store.uri, observer=lambda _, size: told.append(size), memory_limit="1MiB")
    assert found.ok and not found.unverified
    assert found.items == len(metadata_of(store).storage_data)
    assert found.objects == len(names(store)) - 1 > 1
    assert found.size == sum(info.size for info in store.list().objects)
    assert sum(told) == found.size - store.stat(".metadata").size


def sweep(store: MemoryStore, count: int) -> int:
    chosen, flips = random.Random(5), 0
    for name in names(store):
        data, _ = store.get(name)
        if name == ".metadata":
            for at in sorted({0, len(data) - 1, *(chosen.randrange(len(data)) for _ in range(count))}):
                store.put(name, flipped(data, at, at % 8), Overwrite())
                (damage,) = verify(store.uri).damages
                assert damage.object_name == name
                assert isinstance(load_error(store.uri, blank()), IntegrityError)
                flips += 1
            store.put(name, data, Overwrite())
            continue
        for at in positions(store, name, chosen, count):
            fqn, info = item_at(store, name, at)
            store.put(name, flipped(data, at, at % 8), Overwrite())
            (damage,) = verify(store.uri).damages
            assert (damage.object_name, damage.item) == (name, fqn)
            assert damage.offset is not None and damage.offset <= at < damage.offset + LARGEST_CHUNK
            if md.payload_of(info) is None or STATE[fqn].numel():
                error = load_error(store.uri, blank())
                assert isinstance(error, IntegrityError), at
                assert error.object_name == name
                assert repr(fqn) in error.message and f"bytes {damage.offset} to" in error.message
            flips += 1
        store.put(name, data, Overwrite())
    return flips


def test_a_flipped_byte_is_found_and_named(store: MemoryStore) -> None:
    assert sweep(store, 12) > 50
    assert verify(store.uri).ok


@pytest.mark.soak
def test_every_tenth_thousand_flipped_bytes_are_found(
    store: MemoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    flips = sweep(store, 1500)
    with capsys.disabled():
        print(f"\n{flips} flipped bytes, each found and named")  # noqa: T201 - what the test is run for


def test_a_part_of_a_tensor_is_verified_without_the_rest(store: MemoryStore) -> None:
    (info,) = (i for x, i in metadata_of(store).storage_data.items() if x.fqn == "large")
    checks = md.checks_of(info, {info.relative_path: CRC64NVME})
    assert checks is not None
    head, payload, tail = checks.spans
    assert checks.with_framing(head, head + 8) == (0, head + 8)
    assert checks.with_framing(head + 8, head + payload) == (head + 8, head + payload + tail)
    assert checks.with_framing(head + 8, head + 16) == (head + 8, head + 16)
    assert len(checks.covering(head + 8, head + 16)) == 1


def test_a_load_of_something_else_does_not_mind(store: MemoryStore) -> None:
    (info,) = (i for x, i in metadata_of(store).storage_data.items() if x.fqn == "large")
    data, _ = store.get(info.relative_path)
    store.put(info.relative_path, flipped(data, info.offset + 5000), Overwrite())
    state = {"small": torch.tensor(0.0)}
    dcp.load(state, storage_reader=cloudckpt.StorageReader(store.uri))
    assert state["small"] == 1.5


def test_objects_that_are_missing_short_or_long_are_named_each(store: MemoryStore) -> None:
    missing, short, long = [name for name in names(store) if name != ".metadata"][:3]
    store.delete([missing])
    store.put(short, store.get(short)[0][:-1], Overwrite())
    store.put(long, store.get(long)[0] + b"x", Overwrite())
    damages = {damage.object_name: damage.problem for damage in verify(store.uri).damages}
    assert damages.keys() == {missing, short, long}
    assert "missing" in damages[missing]


def test_verifying_nothing_is_an_error() -> None:
    with pytest.raises(CheckpointNotFoundError):
        verify(f"memory://integrity-{uuid.uuid4().hex}")


def test_a_stock_checkpoint_has_nothing_to_compare_with(tmp_path: Any) -> None:
    dcp.save({"x": torch.arange(9.0)}, checkpoint_id=tmp_path)
    found = verify(tmp_path)
    assert found.ok and found.unverified == found.items == 1
    (path,) = tmp_path.glob("*.distcp")
    path.write_bytes(path.read_bytes()[:-1])
    assert [damage.object_name for damage in verify(tmp_path).damages] == [path.name]


def test_damage_reads_well() -> None:
    damage = Damage("a.distcp", "these are not the bytes that were saved", "layer.0", 4096)
    said = "a.distcp, item 'layer.0', from byte 4096: these are not the bytes that were saved"
    assert str(damage) == said


@pytest.mark.parametrize("option", ["auto", "crc64nvme", "crc32c", "none"])
@pytest.mark.parametrize("kind", ["moto", "ministack", "gcs"])
def test_every_choice_of_the_store_s_checksum_verifies(
    tmp_path: Path, s3_server_named: Callable[[str], S3Server], kind: str, option: str
) -> None:
    if (kind, option) == ("gcs", "crc64nvme"):
        pytest.skip("GCS knows CRC32C alone, and the option is refused")
    place = new_place(kind, tmp_path, s3_server_named)
    uri = place.uri
    options: dict[str, Any] = {**place.options, "checksum": option}
    dcp.save(STATE, storage_writer=cloudckpt.StorageWriter(uri, **options))
    assert verify(uri, **place.options).ok
    with open_store(Target.parse(uri, **options)) as store:
        metadata = metadata_of(store)
        (used,) = {
            checks.algorithm.name
            for i in metadata.storage_data.values()
            if (checks := md.checks_of(i, md.algorithms_of(metadata)))
        }
        asked_for = "crc64nvme" if (kind, option) == ("ministack", "auto") else option
        assert used == (asked_for if asked_for == "crc64nvme" else "crc32c")
        for name, size in md.sizes_of(metadata).items():
            data, _ = store.get(name)
            recorded = metadata.__dict__["cloudckpt"]["objects"][name]
            algorithm = ALGORITHMS[used]
            assert (len(data), recorded["checksum"]) == (size, algorithm.text(algorithm.of(data)))


@pytest.mark.parametrize("cut", [1, 16, 20, 36])
def test_metadata_without_its_own_checksum_is_damaged(store: MemoryStore, cut: int) -> None:
    store.put(".metadata", store.get(".metadata")[0][:-cut], Overwrite())
    with pytest.raises(IntegrityError, match="its checksum is gone"):
        metadata_of(store)
    (damage,) = verify(store.uri).damages
    assert damage.object_name == ".metadata"


def test_a_checkpoint_of_before_checksums_loads(store: MemoryStore) -> None:
    metadata = metadata_of(store)
    for info in metadata.storage_data.values():
        del info.__dict__["sums"], info.__dict__["spans"]
    del metadata.__dict__["cloudckpt"]["checksum"]
    for noted in metadata.__dict__["cloudckpt"]["objects"].values():
        del noted["checksum"]
    data = md.dump(metadata)
    store.put(".metadata", data[: -len(b"cloudckpt.crc64nvme:") - 16], Overwrite())
    state = blank()
    dcp.load(state, storage_reader=cloudckpt.StorageReader(store.uri))
    assert torch.equal(state["large"], STATE["large"])
    assert verify(store.uri).unverified == len(metadata.storage_data)


sizes = st.one_of(st.integers(0, 200), st.integers(60_000, 70_000), st.integers(100_000, 5_000_000))


@given(
    spans=st.lists(sizes, min_size=1, max_size=4), cuts=st.lists(st.floats(0, 1), max_size=5), data=st.data()
)
def test_checksums_of_parts_add_up_whatever_the_parts(
    spans: list[int], cuts: list[float], data: st.DataObject
) -> None:
    algorithm = data.draw(st.sampled_from(sorted(ALGORITHMS.values(), key=lambda one: one.name)))
    blob = memoryview(random.Random(sum(spans)).randbytes(sum(spans)))
    ends = sorted({0, len(blob), *(int(cut * len(blob)) for cut in cuts)})
    fragments = []
    for start, stop in itertools.pairwise(ends):
        part = part_fragments(algorithm, blob, spans, start, stop, data)
        assert algorithm.combine(part) == algorithm.of(blob[start:stop])
        fragments += part
    checks = Checks(algorithm, tuple(spans), b"".join(joined(algorithm, spans, fragments)))
    chunks = checks.covering(0, len(blob))
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])][: len(chunks)]
    for chunk in chunks:
        assert algorithm.packed(algorithm.of(blob[chunk.start : chunk.stop])) == chunk.expected
    if blob:
        assert chunks[-1].stop == len(blob)
        first = data.draw(st.integers(0, len(blob) - 1))
        last = data.draw(st.integers(first + 1, len(blob)))
        wanted = checks.covering(first, last)
        assert wanted == [chunk for chunk in chunks if chunk.start < last and chunk.stop > first]
        read = blob[wanted[0].start : wanted[-1].stop]
        together = checks.chunks(first, last)
        assert _found_damaged(checks, together, read, data) == []
        changed = bytearray(read)
        where = data.draw(st.integers(0, len(changed) - 1))
        changed[where] ^= 1
        hit = [chunk for chunk in wanted if chunk.start <= wanted[0].start + where < chunk.stop]
        assert _found_damaged(checks, together, memoryview(changed), data) == hit


@given(spans=st.lists(sizes, min_size=1, max_size=4), most=st.integers(1, 3 << 20))
def test_verify_reads_all_chunks_once_in_groups_no_larger_than_allowed(spans: list[int], most: int) -> None:
    sums = random.Random(most).randbytes(count_chunks(spans) * CRC32C.width)
    checks = Checks(CRC32C, tuple(spans), sums)
    groups = list(_grouped(checks.chunks(0, sum(spans)), most))
    each = [[chunk for one in group for chunk in one.each()] for group in groups]
    assert list(itertools.chain.from_iterable(each)) == checks.covering(0, sum(spans))
    for group, its in zip(groups, each, strict=True):
        assert len(its) == 1 or group[-1].stop - group[0].start <= most
    for one, other in itertools.pairwise(each):
        assert other[0].stop - one[0].start > most, "it would have fitted into the group before"


def _found_damaged(
    checks: Checks, chunks: Sequence[Chunks], blob: memoryview, data: st.DataObject
) -> list[Chunk]:
    """Have the bytes arrive in some steps, with a start over, into some buffers, not all of them told of."""
    start = data.draw(st.integers(0, 100))
    cuts = sorted({0, blob.nbytes, *data.draw(st.lists(st.integers(0, blob.nbytes), max_size=3))})
    views = tuple(blob[a:b] for a, b in itertools.pairwise(cuts))
    told: list[list[Chunk]] = []
    checking = DownloadChecksums([(Expected(checks, chunks, told.append), Arrival(start, blob, views))])
    for _ in range(data.draw(st.integers(0, 2))):
        checking.arrived(0)
        for count in sorted(data.draw(st.lists(st.integers(0, start + blob.nbytes), max_size=4))):
            checking.arrived(count)
    checking.finish()
    (damaged,) = told
    return damaged


def part_fragments(  # noqa: PLR0917 - what a part is
    algorithm: Algorithm, blob: memoryview, spans: Sequence[int], start: int, stop: int, data: st.DataObject
) -> list[Fragment]:
    """Send a part in some steps, perhaps again from its start, not all of them told of."""
    pieces, buffers, at = [], [], 0
    for span in spans:
        first, last = max(start, at), min(stop, at + span)
        if first < last:
            pieces.append((View(blob[at : at + span]), first - at, last - at))
            buffers.append(blob[first:last])
        at += span
    tally = UploadChecksums(algorithm, Window(start, tuple(pieces)), buffers)
    for _ in range(data.draw(st.integers(0, 2))):
        for count in sorted(data.draw(st.lists(st.integers(0, stop - start), max_size=4))):
            tally.departed(count)
    return tally.finish()


def test_the_chunk_sizes_of_the_format_stand() -> None:
    assert [chunk_size(n) for n in (0, 1, 4 << 20, (4 << 20) + 1, 32 << 20, 1 << 40)] == [
        SMALLEST_CHUNK,
        SMALLEST_CHUNK,
        SMALLEST_CHUNK,
        2 * SMALLEST_CHUNK,
        LARGEST_CHUNK,
        LARGEST_CHUNK,
    ]
    assert (SMALLEST_CHUNK, LARGEST_CHUNK, CRC64NVME.of(b"123456789")) == (65536, 524288, 0xAE8B14860A799888)


def test_checksums_that_cannot_be_those_of_the_item_are_refused(store: MemoryStore) -> None:
    metadata = metadata_of(store)
    info = next(iter(metadata.storage_data.values()))
    for spans, sums in [
        ((info.length + 1,), b""),
        ((-1, info.length + 1), b""),
        ("x", b""),
        ((info.length,), b"1"),
    ]:
        info.__dict__.update(spans=spans, sums=sums)
        with pytest.raises(IntegrityError):
            md.load(md.dump(metadata), uri=store.uri)
    store.put("unrelated", b"", Create())
