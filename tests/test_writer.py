"""The StorageWriter keeps what is committed, sends nothing in vain, and keeps its options."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointError
from cloudckpt.backends.save import object_layout
from cloudckpt.backends.save.object_layout import (
    distribute,
    estimated_size,
    part_size_for,
    part_size_in_place,
)
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Condition, ObjectInfo, ObjectStore, Part, PartLimits, Upload
from cloudckpt.backends.stores.memory import MemoryStore
from cloudckpt.backends.transfer import downloader
from cloudckpt.backends.transfer.downloader import Downloader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

OLD, NEW = {"x": torch.arange(100.0)}, {"x": -torch.arange(100.0)}


@pytest.fixture
def uri() -> str:
    return f"memory://writer-{uuid.uuid4().hex}/step-1"


def save(state: dict[str, Any], uri: str, **options: Any) -> None:
    dcp.save(state, storage_writer=cloudckpt.StorageWriter(uri, **options))


def loaded(uri: str) -> torch.Tensor:
    state = {"x": torch.empty(100)}
    dcp.load(state, storage_reader=cloudckpt.StorageReader(uri))
    return state["x"]


def failure(caught: pytest.ExceptionInfo[CheckpointException]) -> BaseException:
    (wrapped,) = caught.value.failures.values()
    return wrapped[0]


def objects(uri: str) -> list[str]:
    with open_store(Target.parse(uri)) as store:
        assert list(store.pending_uploads()) == []
        return [info.name for info in store.list().objects]


def test_an_existing_checkpoint_stops_a_save_before_a_byte_is_sent(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(OLD, uri)

    def refuse(self: ObjectStore, name: str) -> Upload:
        raise AssertionError(f"began to send {name}")

    monkeypatch.setattr("cloudckpt.backends.stores.memory.MemoryStore.begin_upload", refuse)
    with pytest.raises(CheckpointException) as caught:
        save(NEW, uri)
    error = failure(caught)
    assert isinstance(error, cloudckpt.CheckpointExistsError)
    assert error.uri == uri
    assert torch.equal(loaded(uri), OLD["x"])


def test_an_overwrite_switches_whole_and_removes_what_it_replaced(uri: str) -> None:
    save(OLD, uri)
    before = objects(uri)
    save(NEW, uri, overwrite=True)
    assert torch.equal(loaded(uri), NEW["x"])
    assert set(before) & set(objects(uri)) == {".metadata"}
    assert len(objects(uri)) == len(before)


def test_a_failed_overwrite_leaves_the_old_checkpoint_whole(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(OLD, uri)
    before = objects(uri)

    def fail(self: ObjectStore, upload: Upload, parts: Sequence[Part], **_: bool) -> ObjectInfo:
        raise cloudckpt.StorageError("no")

    with monkeypatch.context() as patch:
        patch.setattr("cloudckpt.backends.stores.memory.MemoryStore.complete_upload", fail)
        with pytest.raises(CheckpointException) as caught:
            save(NEW, uri, overwrite=True)
    assert isinstance(failure(caught), cloudckpt.CommitError)
    assert objects(uri) == before
    assert torch.equal(loaded(uri), OLD["x"])


def test_an_interrupt_during_the_commit_takes_nothing_away(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put = MemoryStore.put

    def interrupted(self: MemoryStore, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        info = put(self, name, data, condition)
        if name == ".metadata":
            raise KeyboardInterrupt
        return info

    with monkeypatch.context() as patch:
        patch.setattr(MemoryStore, "put", interrupted)
        with pytest.raises(CheckpointException):
            save(OLD, uri)
    assert torch.equal(loaded(uri), OLD["x"])


def test_an_interrupt_while_sending_leaves_nothing(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: DefaultSavePlanner, write_item: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DefaultSavePlanner, "resolve_data", interrupted)
        with pytest.raises(CheckpointException) as caught:
            save(OLD, uri)
    assert isinstance(failure(caught), KeyboardInterrupt)
    assert objects(uri) == []


def test_no_object_name_is_used_twice(uri: str) -> None:
    seen: set[str] = set()
    writer = cloudckpt.StorageWriter(uri, overwrite=True)
    for _ in range(3):
        dcp.save(OLD, storage_writer=writer)
        data = {name for name in objects(uri) if name.endswith(".distcp")}
        assert data
        assert not data & seen
        seen |= data


def test_a_plan_that_dcp_has_cached_gets_new_names(tmp_path: Path) -> None:
    seen: list[set[Path]] = []
    for step in range(3):
        planner = DefaultSavePlanner(enable_plan_caching=True)
        writer = cloudckpt.StorageWriter(tmp_path / f"step-{step}")
        dcp.save(OLD, storage_writer=writer, planner=planner)
        seen.append({path.relative_to(path.parent) for path in (tmp_path / f"step-{step}").glob("*.distcp")})
        assert torch.equal(loaded(f"{tmp_path}/step-{step}"), OLD["x"])
    assert not set.intersection(*seen)


def test_a_pickle_keeps_every_option_and_a_reset_too(uri: str) -> None:
    writer = cloudckpt.StorageWriter(f"{uri}?concurrency=3", overwrite=True, part_size="7MiB", retries=9)
    copy = pickle.loads(pickle.dumps(writer))
    for one in (writer, copy):
        one.reset(f"{uri}-other")
        assert one.checkpoint_id == f"{uri}-other"
        options = one._target.options
        assert (options.concurrency, options.part_size, options.retries) == (3, 7 << 20, 9)
        assert one._overwrite


def test_a_reset_without_an_id_stays_where_it_is(uri: str) -> None:
    writer = cloudckpt.StorageWriter(uri)
    writer.reset()
    assert writer.checkpoint_id == uri


@pytest.mark.parametrize(
    ("checkpoint_id", "valid"),
    [
        ("s3://bucket/x", True),
        ("gs://bucket/x", True),
        ("gcs://bucket/x", True),
        ("file:///x", True),
        ("/a/plain/path", True),
        (Path("relative"), True),
        ("memory://x", True),
        ("nosuchprotocol://x", False),
        ("s3://", False),
        ("", False),
        ("s3:bucket/x", False),
        ("file://", False),
        (cast(Any, None), False),
        (cast(Any, 5), False),
    ],
    ids=str,
)
def test_valid_checkpoint_ids_are_the_uris_of_the_contract(checkpoint_id: str | Path, valid: bool) -> None:
    assert cloudckpt.StorageWriter.validate_checkpoint_id(checkpoint_id) is valid
    assert cloudckpt.StorageReader.validate_checkpoint_id(checkpoint_id) is valid


@pytest.mark.parametrize("switch", ["false", 1, None])
def test_a_switch_that_is_not_a_bool_is_refused(uri: str, switch: Any) -> None:
    with pytest.raises(cloudckpt.ConfigurationError, match="overwrite"):
        cloudckpt.StorageWriter(uri, overwrite=switch)
    with pytest.raises(cloudckpt.ConfigurationError, match="trust"):
        cloudckpt.StorageReader(uri, trust=switch)


def test_a_repr_shows_where_and_no_secret() -> None:
    secret = uuid.uuid4().hex
    writer = cloudckpt.StorageWriter("s3://bucket/x", storage_options={"key": "k", "secret": secret})
    assert "s3://bucket/x" in repr(writer)
    assert secret not in repr(writer)


def test_a_value_that_cannot_be_saved_is_named(uri: str) -> None:
    with pytest.raises(CheckpointException) as caught:
        save({"x": OLD["x"], "deep": {"bad": lambda: 0}}, uri)
    error = failure(caught)
    assert isinstance(error, cloudckpt.ConfigurationError)
    assert "'deep.bad'" in str(error)
    assert (error.uri, error.rank) == (uri, 0)
    assert objects(uri) == []


class _Unpicklable(Exception):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


class _Raises(DefaultSavePlanner):
    def resolve_data(self, write_item: Any) -> Any:
        raise _Unpicklable(1, 2)


def test_an_error_that_cannot_travel_is_told_in_words(uri: str) -> None:
    with pytest.raises(CheckpointException) as caught:
        dcp.save(OLD, storage_writer=cloudckpt.StorageWriter(uri), planner=_Raises())
    error = failure(caught)
    assert isinstance(error, CheckpointError)
    assert "_Unpicklable: 1 and 2" in str(error)


class _Forgets(DefaultSavePlanner):
    """Plans every item and gives a rank one fewer to write."""

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return super().finish_plan(SavePlan(new_plan.items[1:]))


def test_a_planned_item_that_nobody_wrote_stops_the_commit(uri: str) -> None:
    with pytest.raises(CheckpointException) as caught:
        dcp.save(
            {"x": OLD["x"], "y": OLD["x"] + 1},
            storage_writer=cloudckpt.StorageWriter(uri),
            planner=_Forgets(),
        )
    error = failure(caught)
    assert isinstance(error, cloudckpt.CommitError)
    assert "no rank wrote 'x'" in str(error)
    assert objects(uri) == []


def test_a_save_whose_end_never_came_is_aborted_by_abort_and_by_the_next(tmp_path: Path) -> None:
    for clean in (cloudckpt.StorageWriter.abort, cloudckpt.StorageWriter.reset):
        writer = cloudckpt.StorageWriter(tmp_path / clean.__name__)
        planner = DefaultSavePlanner()
        planner.set_up_planner(OLD, is_coordinator=True)
        writer.set_up_storage_writer(True, rank=0)
        plans, _ = planner.create_global_plan([planner.create_local_plan()])
        writer.write_data(planner.finish_plan(plans[0]), planner).wait()
        with open_store(Target.parse(tmp_path / clean.__name__)) as store:
            assert len(list(store.pending_uploads())) == 1
            clean(writer)
            assert list(store.pending_uploads()) == []


def test_parts_smaller_than_the_store_takes_are_refused_at_once() -> None:
    writer = cloudckpt.StorageWriter("s3://bucket/x", part_size="1MiB", endpoint_url="http://127.0.0.1:1")
    with pytest.raises(cloudckpt.ConfigurationError, match="part_size=1048576"):
        writer.set_up_storage_writer(True, rank=0)


def test_a_ranks_data_are_one_object_unless_the_store_writes_them_again_to_complete_it(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"t{i}": torch.full((1 << 10,), float(i)) for i in range(8)}
    save(state, uri, part_size=1 << 12)
    assert len(objects(uri)) == 2, "the data and .metadata"
    monkeypatch.setattr(MemoryStore, "wants_several_objects", True)
    save(state, uri, part_size=1 << 12, concurrency=3, overwrite=True)
    assert len(objects(uri)) == 4


def test_a_huge_object_gets_parts_that_fit_the_store() -> None:
    planner = DefaultSavePlanner()
    planner.set_up_planner({"x": torch.zeros(1 << 20)})
    items = planner.create_local_plan().items
    options = Target.parse("memory://x", part_size=100).options
    nbytes = sum(map(estimated_size, items))
    assert part_size_for(nbytes, options, PartLimits(max_count=10)) * 10 >= 4 << 20
    assert part_size_for(nbytes, options, PartLimits(max_count=1 << 20)) == 100


_IN_PLACE = PartLimits(in_place=True)


@pytest.mark.parametrize(
    ("nbytes", "options", "limits", "mib"),
    [
        (1 << 20, {}, _IN_PLACE, 8),
        (1 << 28, {}, _IN_PLACE, 32),  # of 8 requests in flight, each has one
        (1 << 40, {}, _IN_PLACE, 128),
        (1 << 40, {"memory_limit": "48MiB"}, _IN_PLACE, 24),
        (1 << 40, {"part_size": "8MiB"}, _IN_PLACE, 8),
        (1 << 40, {}, PartLimits(max_size=100 << 20, in_place=True), 100),
        (1 << 40, {}, PartLimits(), 32),
    ],
)
def test_parts_that_need_no_memory_grow_with_what_there_is_to_send(
    nbytes: int, options: dict[str, Any], limits: PartLimits, mib: int
) -> None:
    given = Target.parse("memory://x", **options).options
    assert part_size_in_place(nbytes, 8, given, limits) == mib << 20


def test_a_large_save_has_long_parts_of_one_size_and_a_load_long_ranges_first(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In kibibytes here: what counts is the ratio of what there is to send to what is in flight."""
    sizes = ("_SHORTEST_PART_SIZE", 8), ("_PART_SIZE", 32), ("_LONGEST_PART_SIZE", 128)
    for name, size in (("_MIB", 1 << 10), *((name, kib << 10) for name, kib in sizes)):
        monkeypatch.setattr(object_layout, name, size)
    monkeypatch.setattr(downloader, "_LONGEST_READ", 128 << 10)
    monkeypatch.setattr(Downloader.__init__, "__defaults__", (32 << 10,))
    monkeypatch.setattr(MemoryStore, "part_limits", _IN_PLACE)
    parts, ranges = _sizes(monkeypatch, "upload_part"), _sizes(monkeypatch, "read_into")
    state = {f"t{i}": torch.full((1 << 13,), float(i)) for i in range(64)}  # 2 MiB
    save(state, uri)
    assert set(sorted(parts)[1:]) == {128 << 10}
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(loaded, storage_reader=cloudckpt.StorageReader(uri, concurrency=4))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert len(ranges) < 64 / 2 and max(ranges) <= 128 << 10
    assert sum(size < 64 << 10 for size in ranges) >= 4, "the last are short: none is waited for in the end"
    parts.clear()
    save(state, uri, overwrite=True, part_size=1 << 16)
    assert set(sorted(parts)[1:]) == {1 << 16}, "as the option says"
    parts.clear()
    save({name: tensor.reshape(64, -1).t() for name, tensor in state.items()} | {"v": b"x" * 9999}, uri + "0")
    assert set(sorted(parts)[1:]) == {32 << 10}, "the value is held until its part is sent"
    parts.clear()
    monkeypatch.setattr(MemoryStore, "part_limits", PartLimits())
    save(state, uri, overwrite=True)
    assert set(sorted(parts)[1:]) == {32 << 10}, "the store copies each part"


def _sizes(monkeypatch: pytest.MonkeyPatch, method: str) -> list[int]:
    """Note how many bytes each call of a store's method is given buffers of."""
    act, found = getattr(MemoryStore, method), list[int]()

    def noting(*arguments: Any, **keywords: Any) -> Any:
        (buffers,) = (one for one in arguments if isinstance(one, list))
        found.append(sum(buffer.nbytes for buffer in buffers))
        return act(*arguments, **keywords)

    monkeypatch.setattr(MemoryStore, method, noting)
    return found


def test_items_spread_over_objects_of_equal_size_and_values_come_first() -> None:
    planner = DefaultSavePlanner()
    planner.set_up_planner({f"t{i}": torch.zeros(1 << 18) for i in range(8)} | {"v": 1})
    items = planner.create_local_plan().items
    spread = distribute(items, 1 << 20, 4)
    assert len(spread) == 4
    assert spread[0][0].index.fqn == "v"
    assert sorted(sum(item.tensor_data is not None for item in held) for held in spread) == [2, 2, 2, 2]
    assert len(distribute(items, 1 << 30, 4)) == 1
    whole = torch.Size([64 << 18])
    shards = [
        replace(item, tensor_data=replace(item.tensor_data, size=whole)) if item.tensor_data else item
        for item in items
    ]
    shape = [[item.index.fqn for item in held] for held in spread]
    assert [[item.index.fqn for item in held] for held in distribute(shards, 1 << 20, 4)] == shape
    assert len(distribute(shards, 1 << 24, 4)) == 1, "what the other ranks hold is not this rank's"
    assert distribute([], 1 << 20, 4) == []
