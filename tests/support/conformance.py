"""What every object store promises, as one inherited suite.

    class TestLocalStore(StoreConformance):
        @pytest.fixture
        def store(self, tmp_path): ...
        def raw_read(self, store, name): ...
        def raw_write(self, store, name, data): ...

Set-up and checks go round the store under test, through ``raw_read`` and ``raw_write``. What a store says
that it can't honour is not asked of it; instead, that it refuses honestly is. What a server behind a store
gets wrong goes into the fixture ``faults``: those tests must fail, and say so the day they don't.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import random
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import ClassVar, TypeVar
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudckpt.backends.errors import (
    CheckpointError,
    ConfigurationError,
    IntegrityError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
)
from cloudckpt.backends.stores.base import Create, ObjectInfo, ObjectStore, Overwrite, Part, Update, Upload

T = TypeVar("T")

AWKWARD_NAMES = (
    "with space",
    " leading and trailing ",
    "ünï/çødé/日本",
    "plus+plus",
    "per%20cent%",
    "a=b&c=d",
    "deep/er/and/deeper",
    ".metadata",
    "__0_0.0123456789abcdef.distcp",
)


class StoreConformance(ABC):
    """Tests of one store; subclasses bring the store and the way round it."""

    many: ClassVar[int] = 1500
    """Objects in the test of paging and of deletion in batches: above 1000, unless objects are dear."""
    shared_between_processes: ClassVar[bool] = True
    """Whether a process that unpickles the store finds the same objects."""

    lists_uploads: ClassVar[bool] = True
    """Whether the store can tell of uploads that nobody has ended."""

    @pytest.fixture
    @abstractmethod
    def store(self) -> ObjectStore:
        """An empty store."""

    @abstractmethod
    def raw_read(self, store: ObjectStore, name: str) -> bytes | None:
        """Read an object round the store; None where nothing is visible."""

    @abstractmethod
    def raw_write(self, store: ObjectStore, name: str, data: bytes) -> None:
        """Write an object round the store."""

    def beside(self, store: ObjectStore) -> ObjectStore:
        """Return an empty store of the same kind with another root."""
        pytest.skip("nothing is copied by this kind of store")

    def reopen(self, store: ObjectStore) -> ObjectStore:
        """Return the store as another process would have it."""
        copy = pickle.loads(pickle.dumps(store))
        assert isinstance(copy, ObjectStore)
        return copy

    @pytest.fixture
    def secrets(self) -> Sequence[str]:
        """Secrets that the store was given through its surroundings, and that no pickle of it may hold."""
        return ()

    @pytest.fixture
    def faults(self) -> Mapping[str, str]:
        """Tests that can't pass on the server behind the store, with the reason."""
        return {}

    @pytest.fixture
    def races(self) -> Mapping[str, str]:
        """Tests that the server behind the store fails when a race goes badly, with the reason."""
        return {}

    @pytest.fixture(autouse=True)
    def _expect_faults(
        self, request: pytest.FixtureRequest, faults: Mapping[str, str], races: Mapping[str, str]
    ) -> None:
        name = getattr(request.node, "originalname", request.node.name)
        if name in faults:
            request.applymarker(pytest.mark.xfail(reason=faults[name], strict=True))
        if name in races:
            request.applymarker(pytest.mark.xfail(reason=races[name], strict=False))

    # Whole objects

    @pytest.mark.parametrize("data", [b"", b"\0", b"some bytes", bytes(range(256)) * 1000])
    def test_what_is_put_is_visible_whole(self, store: ObjectStore, data: bytes) -> None:
        info = store.put("name", data, Overwrite())
        assert (info.name, info.size) == ("name", len(data))
        assert self.raw_read(store, "name") == data

    @pytest.mark.parametrize("data", [b"", b"some bytes"])
    def test_get_and_stat_report_what_is_there(self, store: ObjectStore, data: bytes) -> None:
        self.raw_write(store, "name", data)
        got, info = store.get("name")
        assert got == data
        assert (info.name, info.size) == ("name", len(data))
        assert info.version is not None
        stat = store.stat("name")
        assert (stat.name, stat.size, stat.version) == ("name", len(data), info.version)

    def test_the_version_changes_with_what_is_put(self, store: ObjectStore) -> None:
        first = store.put("name", b"first", Overwrite())
        assert store.stat("name").version == first.version
        second = store.put("name", b"other", Overwrite())
        assert second.version not in (None, first.version)
        assert store.get("name") == (b"other", store.stat("name"))
        assert store.stat("name").version == second.version

    def test_the_time_of_a_put_is_reported_with_its_zone(self, store: ObjectStore) -> None:
        store.put("name", b"data", Overwrite())
        modified = store.stat("name").modified
        assert modified is not None
        assert abs(datetime.now(UTC) - modified) < timedelta(hours=1)

    def test_what_another_wrote_or_deleted_is_seen_at_once(self, store: ObjectStore) -> None:
        other = self.reopen(store)
        assert store.list().objects == ()
        other.put("folder/name", b"one", Overwrite())
        assert store.stat("folder/name").size == 3
        assert [info.name for info in store.list().objects] == ["folder/name"]
        other.put("folder/name", b"three", Overwrite())
        assert store.get("folder/name")[0] == b"three"
        other.delete(["folder/name"])
        assert store.list().objects == ()
        with pytest.raises(ObjectNotFoundError):
            store.stat("folder/name")

    def test_a_reader_sees_the_old_object_or_the_new_never_a_mixture(self, store: ObjectStore) -> None:
        size = 1 << 16
        store.put("name", b"\0" * size, Overwrite())
        done = threading.Event()

        def rewrite() -> None:
            try:
                for value in range(1, 30):
                    store.put("name", bytes([value]) * size, Overwrite())
            finally:
                done.set()

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(rewrite)
            while not done.is_set():
                data, info = store.get("name")
                assert len(data) == info.size == size
                assert len(set(data)) == 1
            writing.result()

    @pytest.mark.parametrize("name", AWKWARD_NAMES)
    def test_names_mean_the_same_in_every_operation(self, store: ObjectStore, name: str) -> None:
        store.put(name, b"put", Overwrite())
        assert self.raw_read(store, name) == b"put"
        assert store.get(name)[0] == b"put"
        assert store.stat(name).name == name
        assert [info.name for info in store.list().objects] == [name]
        assert [info.name for info in store.list(name).objects] == [name]
        store.delete([name])
        assert self.raw_read(store, name) is None

        upload = store.begin_upload(name)
        if self.lists_uploads:
            assert [pending.upload for pending in store.pending_uploads(name)] == [upload]
        store.complete_upload(upload, [store.upload_part(upload, 1, 0, [memoryview(b"parts")])])
        assert self.raw_read(store, name) == b"parts"

    @pytest.mark.parametrize("operation", ["get", "stat", "read_into"])
    def test_a_missing_object_is_named_with_its_uri(self, store: ObjectStore, operation: str) -> None:
        self.raw_write(store, "folder/there", b"data")
        ask: Mapping[str, Callable[[str], object]] = {
            "get": store.get,
            "stat": store.stat,
            "read_into": lambda name: store.read_into(name, 0, _buffers([1])),
        }
        for name in ("missing", "folder", "folder/there/not"):
            with pytest.raises(ObjectNotFoundError) as caught:
                ask[operation](name)
            _assert_located(caught.value, store, name)

    # Conditions

    def test_create_makes_a_new_object(self, store: ObjectStore) -> None:
        if not store.capabilities.conditional_create:
            _assert_refuses(store, Create())
            return
        info = store.put("name", b"data", Create())
        assert info.version == store.stat("name").version
        assert self.raw_read(store, "name") == b"data"

    def test_create_leaves_what_is_there(self, store: ObjectStore) -> None:
        _need(store.capabilities.conditional_create)
        self.raw_write(store, "name", b"first")
        with pytest.raises(PreconditionFailedError) as caught:
            store.put("name", b"second", Create())
        _assert_located(caught.value, store, "name")
        assert self.raw_read(store, "name") == b"first"

    def test_of_sixteen_creators_one_wins(self, store: ObjectStore) -> None:
        _need(store.capabilities.conditional_create)
        won = _race(16, lambda racer: store.put("name", b"%d" % racer, Create()))
        assert len(won) == 1
        assert self.raw_read(store, "name") == b"%d" % won[0]

    def test_update_replaces_the_version_it_names(self, store: ObjectStore) -> None:
        if not store.capabilities.conditional_update:
            _assert_refuses(store, Update("version"))
            return
        first = store.put("name", b"first", Overwrite())
        assert first.version is not None
        second = store.put("name", b"second", Update(first.version))
        assert self.raw_read(store, "name") == b"second"
        assert second.version == store.stat("name").version

    def test_update_leaves_any_other_version(self, store: ObjectStore) -> None:
        _need(store.capabilities.conditional_update)
        first = store.put("name", b"first", Overwrite())
        assert first.version is not None
        store.put("name", b"other", Overwrite())
        with pytest.raises(PreconditionFailedError) as caught:
            store.put("name", b"late!", Update(first.version))
        _assert_located(caught.value, store, "name")
        assert self.raw_read(store, "name") == b"other"

    def test_update_makes_nothing_where_nothing_is(self, store: ObjectStore) -> None:
        _need(store.capabilities.conditional_update)
        version = store.put("name", b"data", Overwrite()).version
        assert version is not None
        store.delete(["name"])
        with pytest.raises((PreconditionFailedError, ObjectNotFoundError)) as caught:
            store.put("name", b"late", Update(version))
        _assert_located(caught.value, store, "name")
        assert self.raw_read(store, "name") is None

    def test_of_eight_updaters_of_one_version_one_wins(self, store: ObjectStore) -> None:
        _need(store.capabilities.conditional_update)
        version = store.put("name", b"old", Overwrite()).version
        assert version is not None
        won = _race(8, lambda racer: store.put("name", b"new%d" % racer, Update(version)))
        assert len(won) == 1
        assert self.raw_read(store, "name") == b"new%d" % won[0]

    # Listing and deletion

    def test_an_empty_store_lists_nothing(self, store: ObjectStore) -> None:
        assert store.list() == store.list("no/such/", delimiter=True)
        assert (store.list().objects, store.list().prefixes) == ((), ())

    def test_a_prefix_is_a_prefix_of_names_and_need_not_end_at_a_slash(self, store: ObjectStore) -> None:
        # No name is a folder of another: on a file system it can't be.
        names = ["a-b", "a/1", "a/2/x", "ab/1", "b", "step-1/.metadata", "step-10/.metadata"]
        for name in names:
            self.raw_write(store, name, name.encode())
        for prefix in ("", "a", "a/", "a/2", "ab", "step-1", "step-1/", "zzz", "a/1/"):
            listing = store.list(prefix)
            assert [info.name for info in listing.objects] == sorted(n for n in names if n.startswith(prefix))
            assert all(info.size == len(info.name) for info in listing.objects)
            assert listing.prefixes == ()

    def test_with_a_delimiter_it_stops_at_the_next_slash(self, store: ObjectStore) -> None:
        for name in ["run/step-1/x", "run/step-1/y/z", "run/step-10/x", "run/notes", "run.txt"]:
            self.raw_write(store, name, b"")

        def seen(prefix: str) -> tuple[list[str], tuple[str, ...]]:
            listing = store.list(prefix, delimiter=True)
            return [info.name for info in listing.objects], listing.prefixes

        assert seen("") == (["run.txt"], ("run/",))
        assert seen("run") == (["run.txt"], ("run/",))
        assert seen("run/") == (["run/notes"], ("run/step-1/", "run/step-10/"))
        assert seen("run/step-1") == ([], ("run/step-1/", "run/step-10/"))
        assert seen("run/step-1/") == (["run/step-1/x"], ("run/step-1/y/",))
        assert seen("nothing/") == ([], ())

    def test_many_objects_are_listed_once_each_in_order_and_deleted(self, store: ObjectStore) -> None:
        names = [f"many/{number:05d}" for number in range(self.many)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: store.put(name, b"x", Overwrite()), names))
        self.raw_write(store, "kept", b"x")
        assert [info.name for info in store.list("many/").objects] == names
        assert store.list("", delimiter=True).prefixes == ("many/",)
        store.delete(name for name in names)
        assert [info.name for info in store.list().objects] == ["kept"]

    def test_deleting_what_is_not_there_is_no_error(self, store: ObjectStore) -> None:
        self.raw_write(store, "folder/there", b"data")
        self.raw_write(store, "folder/kept", b"data")
        store.delete(["missing", "folder/there", "folder/missing", "no/such/folder/name"])
        store.delete(["folder/there"])
        store.delete([])
        assert [info.name for info in store.list().objects] == ["folder/kept"]

    # Ranges

    @pytest.mark.parametrize(
        ("offset", "lengths"),
        [(0, [1]), (0, [1000]), (999, [1]), (17, [1, 0, 500, 33]), (1000, []), (5, [0])],
    )
    def test_a_range_fills_exactly_its_buffers(
        self, store: ObjectStore, offset: int, lengths: list[int]
    ) -> None:
        data = _bytes(1000)
        self.raw_write(store, "name", data)
        buffers = _buffers(lengths)
        store.read_into("name", offset, buffers)
        assert b"".join(buffers) == data[offset : offset + sum(lengths)]

    def test_a_range_fills_thousands_of_small_buffers(self, store: ObjectStore) -> None:
        lengths = [number % 7 for number in range(3000)]
        data = _bytes(sum(lengths) + 20)
        self.raw_write(store, "name", data)
        buffers = _buffers(lengths)
        store.read_into("name", 11, buffers)
        assert b"".join(buffers) == data[11 : 11 + sum(lengths)]

    def test_what_is_said_to_have_arrived_is_there(self, store: ObjectStore) -> None:
        lengths = [1, 300_000, 5, *[100] * 2000, 0, 70_000, 3]
        data = _bytes(sum(lengths) + 20)
        self.raw_write(store, "name", data)
        memory = memoryview(bytearray(sum(lengths)))
        ends = list(itertools.accumulate(lengths))
        said: list[int] = []

        def arrived(count: int) -> None:
            assert memory[:count] == data[11 : 11 + count]
            said.append(count)

        buffers = [memory[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        store.read_into("name", 11, buffers, arrived=arrived)
        assert memory == data[11 : 11 + len(memory)]
        assert said == sorted(said), "only a second try starts over"
        assert said[-1:] in ([], [len(memory)])

    def test_a_range_fills_a_window_and_nothing_beside_it(self, store: ObjectStore) -> None:
        self.raw_write(store, "name", b"0123456789")
        memory = bytearray(b"." * 8)
        store.read_into("name", 2, [memoryview(memory)[3:6]])
        assert memory == b"...234.."

    def test_ranges_are_read_side_by_side(self, store: ObjectStore) -> None:
        data = _bytes(1 << 18)
        self.raw_write(store, "name", data)
        offsets = range(0, len(data), 1 << 13)

        def read(offset: int) -> bytes:
            buffers = _buffers([5000, 3192])
            store.read_into("name", offset, buffers)
            return b"".join(buffers)

        with ThreadPoolExecutor(8) as pool:
            assert b"".join(pool.map(read, offsets)) == data

    @pytest.mark.parametrize(("offset", "length"), [(0, 11), (9, 2), (10, 1), (100, 1)])
    def test_an_object_that_ends_too_early_is_an_integrity_error(
        self, store: ObjectStore, offset: int, length: int
    ) -> None:
        self.raw_write(store, "name", _bytes(10))
        with pytest.raises(IntegrityError) as caught:
            store.read_into("name", offset, _buffers([length]))
        _assert_located(caught.value, store, "name")

    # Multipart uploads

    def test_an_upload_is_invisible_until_it_is_complete(self, store: ObjectStore) -> None:
        first, last = _bytes(_part_size(store)), _bytes(100)
        upload = store.begin_upload("folder/name")
        self._assert_nothing_visible(store, "folder/name")
        parts = [store.upload_part(upload, 1, 0, [memoryview(first)])]
        self._assert_nothing_visible(store, "folder/name")
        parts.append(store.upload_part(upload, 2, len(first), [memoryview(last)]))
        self._assert_nothing_visible(store, "folder/name")
        info = store.complete_upload(upload, parts)
        assert self.raw_read(store, "folder/name") == first + last
        assert (info.name, info.size) == ("folder/name", len(first) + len(last))
        assert store.stat("folder/name").size == info.size
        assert store.stat("folder/name").version == info.version

    @pytest.mark.parametrize("size", [1, 1001])
    def test_a_single_part_may_be_of_any_size(self, store: ObjectStore, size: int) -> None:
        data = _bytes(size)
        upload = store.begin_upload("name")
        info = store.complete_upload(upload, [store.upload_part(upload, 1, 0, [memoryview(data)])])
        assert info.size == size
        assert self.raw_read(store, "name") == data

    def test_parts_may_be_sent_and_handed_over_in_any_order(self, store: ObjectStore) -> None:
        size = _part_size(store)
        data = _bytes(2 * size + 77)
        upload = store.begin_upload("name")
        parts = [
            store.upload_part(
                upload, number, (number - 1) * size, [memoryview(data)[(number - 1) * size :][:size]]
            )
            for number in ((1, 2, 3) if store.part_limits.in_order else (3, 1, 2))
        ]
        assert sorted((part.number, part.size) for part in parts) == [(1, size), (2, size), (3, 77)]
        assert store.complete_upload(upload, [parts[2], parts[0], parts[1]]).size == len(data)
        assert self.raw_read(store, "name") == data

    def test_a_part_may_be_sent_again(self, store: ObjectStore) -> None:
        size = _part_size(store)
        data = _bytes(size + 5)
        upload = store.begin_upload("name")
        # What a store takes in order it keeps; elsewhere what comes last counts.
        before = data[:size] if store.part_limits.in_order else bytes(size)
        store.upload_part(upload, 1, 0, [memoryview(before)])
        last = store.upload_part(upload, 2, size, [memoryview(data)[size:]])
        first = store.upload_part(upload, 1, 0, [memoryview(data)[:size]])
        store.complete_upload(upload, [first, last])
        assert self.raw_read(store, "name") == data

    def test_a_part_may_be_thousands_of_buffers_of_odd_lengths(self, store: ObjectStore) -> None:
        size = _part_size(store)
        data = _bytes(size + 3000 * 3)
        views, position = [memoryview(data)[: size - 1]], size - 1
        for length in itertools.cycle((1, 0, 5, 3, 2)):
            if position >= len(data):
                break
            views.append(memoryview(data)[position : position + length])
            position += length
        upload, said = store.begin_upload("name"), list[int]()
        part = store.upload_part(upload, 1, 0, views, departed=said.append)
        assert part.size == len(data)
        assert all(0 <= count <= len(data) for count in said)
        assert said == [] or len(data) in said, "a store that speaks of what goes out speaks of the end"
        store.complete_upload(upload, [part])
        assert self.raw_read(store, "name") == data

    def test_parts_are_sent_side_by_side(self, store: ObjectStore) -> None:
        size, count = _part_size(store), 8 if store.part_limits.min_size < 1 << 20 else 3
        data = _bytes(size * count)
        upload = store.begin_upload("name")

        def send(index: int) -> Part:
            view = memoryview(data)[index * size : (index + 1) * size]
            return store.upload_part(upload, index + 1, index * size, [view[:11], view[11:]])

        with ThreadPoolExecutor(1 if store.part_limits.in_order else 8) as pool:
            parts = list(pool.map(send, range(count)))
        store.complete_upload(upload, parts)
        assert self.raw_read(store, "name") == data

    def test_an_upload_begun_here_is_carried_on_and_completed_by_another_process(
        self, store: ObjectStore, other_process: Executor
    ) -> None:
        if not self.shared_between_processes:
            pytest.skip("the store belongs to one process")
        size = _part_size(store)
        data = _bytes(size + 9)
        upload = store.begin_upload("name")
        surroundings = dict(os.environ)
        sending = other_process.submit(_elsewhere, surroundings, _send, store, upload, 1, 0, data[:size])
        if store.part_limits.in_order:
            sending.result()
        parts = [_send(store, upload, 2, size, data[size:]), sending.result()]
        self._assert_nothing_visible(store, "name")
        info = other_process.submit(_elsewhere, surroundings, _complete, store, upload, parts).result()
        assert info.size == len(data)
        assert self.raw_read(store, "name") == data

    def test_an_aborted_upload_leaves_nothing(self, store: ObjectStore) -> None:
        upload = store.begin_upload("folder/name")
        store.upload_part(upload, 1, 0, [memoryview(b"data")])
        self.reopen(store).abort_upload(upload)
        self._assert_nothing_visible(store, "folder/name")
        assert list(store.pending_uploads()) == []

    def test_aborting_twice_is_no_error(self, store: ObjectStore) -> None:
        upload = store.begin_upload("name")
        store.abort_upload(upload)
        store.abort_upload(upload)

    def test_what_was_aborted_can_not_be_completed(self, store: ObjectStore) -> None:
        upload = store.begin_upload("name")
        part = store.upload_part(upload, 1, 0, [memoryview(b"data")])
        store.abort_upload(upload)
        with pytest.raises(StorageError) as caught:
            store.complete_upload(upload, [part])
        _assert_located(caught.value, store, "name")
        self._assert_nothing_visible(store, "name")

    def test_a_part_for_an_upload_that_was_aborted_is_refused(self, store: ObjectStore) -> None:
        upload = store.begin_upload("name")
        store.abort_upload(upload)
        # A store may keep a part that is smaller than it takes until the upload is completed.
        data = _bytes(_part_size(store))
        with pytest.raises(StorageError) as caught:
            store.upload_part(upload, 1, 0, [memoryview(data)])
        _assert_located(caught.value, store, "name")
        self._assert_nothing_visible(store, "name")

    def test_parts_that_the_store_does_not_hold_are_not_completed(self, store: ObjectStore) -> None:
        size = _part_size(store)
        upload = store.begin_upload("name")
        first = store.upload_part(upload, 1, 0, [memoryview(_bytes(size))])
        never_sent = replace(first, number=2, size=5, etag=first.etag and f'"{uuid.uuid4().hex}"')
        with pytest.raises((StorageError, IntegrityError)) as caught:
            store.complete_upload(upload, [first, never_sent])
        _assert_located(caught.value, store, "name")
        self._assert_nothing_visible(store, "name")
        store.abort_upload(upload)

    def test_pending_uploads_are_listed_until_they_end(self, store: ObjectStore) -> None:
        if not self.lists_uploads:
            assert list(store.pending_uploads()) == []
            pytest.skip("the store can't list uploads")
        uploads = [store.begin_upload(name) for name in ("a/1", "a/2", "b/1", "a/1")]
        for upload in uploads:
            store.upload_part(upload, 1, 0, [memoryview(b"data")])

        def pending(prefix: str = "") -> set[Upload]:
            found = list(self.reopen(store).pending_uploads(prefix))
            for item in found:
                assert item.started is None or abs(datetime.now(UTC) - item.started) < timedelta(hours=25)
            assert len({item.upload for item in found}) == len(found)
            return {item.upload for item in found}

        assert pending() == set(uploads)
        assert pending("a/") == {uploads[0], uploads[1], uploads[3]}
        assert pending("a/2") == {uploads[1]}
        assert pending("c") == set()
        part = store.upload_part(uploads[2], 1, 0, [memoryview(b"data")])
        store.complete_upload(uploads[2], [part])
        store.abort_upload(uploads[0])
        assert pending() == {uploads[1], uploads[3]}
        store.abort_upload(uploads[1])
        store.abort_upload(uploads[3])
        assert pending() == set()

    def test_an_upload_is_pending_until_it_ends_and_only_where_it_was_begun(self, store: ObjectStore) -> None:
        first, second = store.begin_upload("folder/name"), store.begin_upload("folder/name")
        other = self.reopen(store)
        part = store.upload_part(first, 1, 0, [memoryview(b"data")])
        assert other.is_pending(first) and other.is_pending(second)
        store.complete_upload(first, [part])
        store.abort_upload(second)
        assert not other.is_pending(first)
        assert not other.is_pending(second)

    @pytest.mark.parametrize(
        "upload_id", ["", "1", "0" * 32, "../../name", "http://127.0.0.1:9/o?upload_id=1"]
    )
    def test_what_is_no_upload_of_the_store_is_not_pending(self, store: ObjectStore, upload_id: str) -> None:
        store.abort_upload(store.begin_upload("name"))
        assert not store.is_pending(Upload("name", upload_id))

    # Copies that the store makes itself

    @pytest.mark.parametrize("size", [0, 1, 300_001])
    def test_an_object_is_copied_by_the_store_bit_by_bit(self, store: ObjectStore, size: int) -> None:
        to, data = self.beside(store), _bytes(size)
        store.put("folder/a name", data, Overwrite())
        copied = to.copy_from(store, store.stat("folder/a name"))
        assert copied is not None
        assert (copied.name, copied.size) == ("folder/a name", size)
        assert copied.version == to.stat("folder/a name").version
        assert to.get("folder/a name")[0] == data == store.get("folder/a name")[0]

    def test_a_copy_takes_the_place_of_what_has_its_name(self, store: ObjectStore) -> None:
        to = self.beside(store)
        store.put("name", b"new", Overwrite())
        to.put("name", b"older", Overwrite())
        assert to.copy_from(store, store.stat("name")) is not None
        assert to.get("name")[0] == b"new"

    def test_another_version_is_not_copied(self, store: ObjectStore) -> None:
        to = self.beside(store)
        store.put("name", b"first", Overwrite())
        info = store.stat("name")
        store.put("name", b"other", Overwrite())
        assert to.copy_from(store, info) is None
        assert to.list().objects == ()

    def test_what_is_not_there_is_not_copied(self, store: ObjectStore) -> None:
        to = self.beside(store)
        store.put("name", b"data", Overwrite())
        info = store.stat("name")
        store.delete(["name"])
        with contextlib.suppress(ObjectNotFoundError):
            assert to.copy_from(store, info) is None
        assert to.list().objects == ()

    def test_a_store_of_another_kind_is_not_copied_from(self, store: ObjectStore) -> None:
        info = store.put("name", b"data", Overwrite())
        assert store.copy_from(mock.create_autospec(ObjectStore, instance=True), info) is None

    # Values that travel

    def test_a_store_pickles_and_its_pickle_holds_no_secret(
        self, store: ObjectStore, secrets: Sequence[str]
    ) -> None:
        store.put("name", b"data", Overwrite())  # with connections made
        pickled = pickle.dumps(store)
        for secret in secrets:
            assert secret.encode() not in pickled
            assert secret not in repr(store)
        copy = pickle.loads(pickled)
        assert copy.uri == store.uri
        assert copy.capabilities == store.capabilities
        assert copy.get("name")[0] == b"data"

    def test_a_closed_store_may_be_used_again(self, store: ObjectStore) -> None:
        with store:
            store.put("name", b"data", Overwrite())
        assert store.get("name")[0] == b"data"
        store.close()
        store.close()

    def test_the_uri_has_no_slash_at_its_end_and_no_query(self, store: ObjectStore) -> None:
        assert "://" in store.uri
        assert not store.uri.endswith("/")
        assert "?" not in store.uri

    @settings(
        max_examples=25,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    @given(
        sent=st.lists(st.integers(0, 400), min_size=1, max_size=40),
        skipped=st.integers(0, 50),
        read=st.lists(st.integers(0, 400), max_size=40),
    )
    def test_any_split_into_buffers_comes_back_the_same_through_any_other(
        self, store: ObjectStore, sent: list[int], skipped: int, read: list[int]
    ) -> None:
        data = _bytes(sum(sent) or 1)
        views, position = [], 0
        for length in sent if sum(sent) else [1]:
            views.append(memoryview(data)[position : position + length])
            position += length
        name = uuid.uuid4().hex
        upload = store.begin_upload(name)
        store.complete_upload(upload, [store.upload_part(upload, 1, 0, views)])
        buffers = _buffers(read)
        offset = min(skipped, len(data))
        if offset + sum(read) > len(data):
            with pytest.raises(IntegrityError):
                store.read_into(name, offset, buffers)
        else:
            store.read_into(name, offset, buffers)
            assert b"".join(buffers) == data[offset : offset + sum(read)]

    def _assert_nothing_visible(self, store: ObjectStore, name: str) -> None:
        assert self.raw_read(store, name) is None
        assert store.list().objects == ()
        with pytest.raises(ObjectNotFoundError):
            store.stat(name)


def _send(store: ObjectStore, upload: Upload, number: int, offset: int, data: bytes) -> Part:
    return store.upload_part(upload, number, offset, [memoryview(data)])


def _complete(store: ObjectStore, upload: Upload, parts: list[Part]) -> ObjectInfo:
    return store.complete_upload(upload, parts)


def _elsewhere(surroundings: Mapping[str, str], function: Callable[..., T], *arguments: object) -> T:
    """Run in a process that was started before this test set its environment variables."""
    with mock.patch.dict(os.environ, surroundings):
        return function(*arguments)


def _race(racers: int, attempt: Callable[[int], object]) -> list[int]:
    """Run ``attempt`` in threads that start together; return which did not lose to a condition."""
    barrier = threading.Barrier(racers)

    def run(racer: int) -> int | None:
        barrier.wait(timeout=60)
        try:
            attempt(racer)
        except PreconditionFailedError:
            return None
        return racer

    with ThreadPoolExecutor(racers) as pool:
        return [racer for racer in pool.map(run, range(racers)) if racer is not None]


def _part_size(store: ObjectStore) -> int:
    """An odd size that any part may have."""
    limits = store.part_limits
    return -(-(max(limits.min_size, 1000) + 1) // limits.multiple) * limits.multiple


def _bytes(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def _buffers(lengths: Sequence[int]) -> list[memoryview]:
    return [memoryview(bytearray(length)) for length in lengths]


def _need(capability: bool) -> None:
    if not capability:
        pytest.skip("the store says that it can't honour this condition")


def _assert_refuses(store: ObjectStore, condition: Create | Update) -> None:
    with pytest.raises(ConfigurationError) as caught:
        store.put("name", b"data", condition)
    _assert_located(caught.value, store, "name")


def _assert_located(error: CheckpointError, store: ObjectStore, name: str) -> None:
    assert error.uri == store.uri
    assert error.object_name == name
