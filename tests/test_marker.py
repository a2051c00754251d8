"""The marker of a save: there while it lasts, never back once it was taken away."""

from __future__ import annotations

import gc
import threading
import uuid
from collections.abc import Callable
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from s3torchconnector import S3ClientConfig
from s3torchconnector.dcp import BinaryPrefixStrategy, S3StorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointNotFoundError, CommitError, StorageError, UnansweredError
from cloudckpt.backends.manage.delete import delete_checkpoint
from cloudckpt.backends.manage.gc import Garbage, collect_garbage
from cloudckpt.backends.save.save_lease import MARKER, SaveLease
from cloudckpt.backends.stores.base import Capabilities, Condition, ObjectInfo
from cloudckpt.backends.stores.memory import MemoryStore
from support.outsiders import OnS3
from support.servers import S3Server

NOW = timedelta(0)
OFTEN = 0.01


class Watched(MemoryStore):
    """A memory store that tells its puts, and lets one of them fail."""

    conditional = True
    failure: Exception | None = None
    puts = 0

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(conditional_create=self.conditional, conditional_update=self.conditional)

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        info = super().put(name, data, condition)
        self.puts += 1
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return info


@pytest.fixture(params=[True, False], ids=["with conditions", "without"])
def store(request: pytest.FixtureRequest) -> Watched:
    watched = Watched(Target.parse(f"memory://marker-{uuid.uuid4().hex}"))
    watched.conditional = request.param
    return watched


def names(store: MemoryStore) -> list[str]:
    return [info.name for info in store.list().objects]


def until(condition: Callable[[], Any]) -> None:
    deadline = monotonic() + 30
    while not condition():
        assert monotonic() < deadline
        sleep(0.005)


def renewing_threads() -> int:
    return sum(thread.name == "cloudckpt-marker" for thread in threading.enumerate())


def begun(store: MemoryStore, every: float = OFTEN) -> SaveLease:
    return SaveLease(store, uuid.uuid4().hex, 0, every)


def test_it_is_renewed_while_the_save_lasts_and_goes_with_it(store: Watched) -> None:
    marker = begun(store)
    until(lambda: store.puts > 5)
    (name,) = names(store)
    assert MARKER.fullmatch(name)
    marker.check()
    marker.end()
    assert names(store) == []
    puts = store.puts
    sleep(5 * OFTEN)
    assert (names(store), store.puts) == ([], puts)


def test_one_that_was_taken_away_does_not_come_back_and_the_save_is_told(store: Watched) -> None:
    marker = begun(store)
    before = renewing_threads()
    store.delete(names(store))
    until(lambda: renewing_threads() < before)
    assert names(store) == []
    with pytest.raises(CommitError, match="taken for dead"):
        marker.check()


@pytest.mark.parametrize("failure", [UnansweredError("lost"), StorageError("no")], ids=["lost", "refused"])
def test_a_renewal_that_fails_is_not_the_last(store: Watched, failure: Exception) -> None:
    marker = begun(store)
    store.failure = failure
    until(lambda: store.failure is None)
    puts = store.puts
    until(lambda: store.puts > puts + 2)
    marker.check()
    marker.end()


def test_the_marker_of_a_writer_that_was_dropped_falls_silent(store: Watched) -> None:
    before = renewing_threads()
    marker = begun(store)
    assert renewing_threads() == before + 1
    del marker
    gc.collect()
    until(lambda: renewing_threads() == before)


@pytest.fixture
def run() -> str:
    return f"memory://marker-{uuid.uuid4().hex}"


def test_gc_during_a_save_leaves_it_alone_and_a_save_taken_for_dead_commits_nothing(run: str) -> None:
    found: list[Garbage] = []

    class Collecting(DefaultSavePlanner):
        """Collects garbage when the first item goes out."""

        silent_for = timedelta(minutes=10)

        def resolve_data(self, write_item: Any) -> Any:
            found.append(collect_garbage(run, older_than=NOW, silent_for=self.silent_for))
            return super().resolve_data(write_item)

    state = {"x": torch.arange(10.0)}
    dcp.save(state, storage_writer=cloudckpt.StorageWriter(f"{run}/1"), planner=Collecting())
    assert found == [Garbage((), (), 0)]

    hasty = Collecting()
    hasty.silent_for = NOW
    with pytest.raises(CheckpointException, match=r"aborted before|taken for dead"):
        dcp.save(state, storage_writer=cloudckpt.StorageWriter(f"{run}/2"), planner=hasty)
    store = MemoryStore(Target.parse(run))
    assert all(name.startswith("1/") for name in names(store))
    assert list(store.pending_uploads()) == []


@pytest.mark.parametrize("before", [None, {"x": torch.zeros(10)}], ids=["new", "overwritten"])
@pytest.mark.parametrize("marker_alone", [False, True])
def test_a_save_that_gc_took_for_dead_in_the_very_moment_of_its_commit_takes_it_back(
    run: str, monkeypatch: pytest.MonkeyPatch, before: Any, marker_alone: bool
) -> None:
    """The process stops after its look at the marker, gc collects, and it wakes up."""
    if before is not None:
        dcp.save(before, storage_writer=cloudckpt.StorageWriter(run))
    store = MemoryStore(Target.parse(run))
    old = names(store)
    check = SaveLease.check

    def stopped(self: SaveLease) -> None:
        check(self)
        if marker_alone:
            store.delete(name for name in names(store) if MARKER.fullmatch(name))
        else:
            collect_garbage(run, older_than=NOW, silent_for=NOW)

    monkeypatch.setattr(SaveLease, "check", stopped)
    new, loaded = {"x": torch.arange(10.0)}, {"x": torch.ones(10)}
    if marker_alone:
        dcp.save(new, storage_writer=cloudckpt.StorageWriter(run, overwrite=True))
        dcp.load(loaded, storage_reader=cloudckpt.StorageReader(run))
        assert torch.equal(loaded["x"], new["x"])
        return
    with pytest.raises(CheckpointException, match="taken for dead"):
        dcp.save(new, storage_writer=cloudckpt.StorageWriter(run, overwrite=True))
    assert names(store) == old
    if before is not None:
        dcp.load(loaded, storage_reader=cloudckpt.StorageReader(run))
        assert torch.equal(loaded["x"], before["x"])


def test_a_save_that_is_silent_and_young_keeps_its_marker(run: str) -> None:
    store = MemoryStore(Target.parse(run))
    marker = begun(store, every=60)
    upload = store.begin_upload(f"__0_0.{'a' * 32}.distcp")
    assert collect_garbage(run, silent_for=NOW) == Garbage((), (), 0)
    marker.check()
    assert collect_garbage(run, silent_for=NOW, older_than=NOW).uploads == (upload.name,)
    assert names(store) == []
    marker.leave()


def test_deleting_removes_the_metadata_first_and_leaves_a_save_in_progress_alone(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{run}/1"
    state = {"x": torch.arange(10.0)}
    dcp.save(state, storage_writer=cloudckpt.StorageWriter(uri))
    store = MemoryStore(Target.parse(uri))
    committed = names(store)
    other = f"__0_0.{'a' * 32}.distcp"
    upload = store.begin_upload(other)
    deleted: list[str] = []
    delete = MemoryStore.delete

    def noted(self: MemoryStore, names: Any) -> None:
        chosen = list(names)
        deleted.extend(chosen)
        delete(self, chosen)

    monkeypatch.setattr(MemoryStore, "delete", noted)
    assert sorted(delete_checkpoint(uri)) == committed
    assert deleted[0] == ".metadata" and sorted(deleted) == committed
    assert [pending.upload for pending in store.pending_uploads()] == [upload]
    with pytest.raises(CheckpointNotFoundError):
        delete_checkpoint(uri)


def test_a_checkpoint_whose_metadata_cannot_be_read_can_be_deleted(run: str) -> None:
    uri = f"{run}/1"
    dcp.save({"x": torch.arange(10.0)}, storage_writer=cloudckpt.StorageWriter(uri))
    store = MemoryStore(Target.parse(uri))
    (data,) = [name for name in names(store) if name != ".metadata"]
    MemoryStore._files.fget(store)[f"{store._root}.metadata"].write(b"damaged")  # type: ignore[attr-defined]
    assert delete_checkpoint(uri) == (".metadata",)
    assert names(store) == [data]
    assert collect_garbage(uri, older_than=NOW).objects == (data,)


def test_the_metadata_of_single_ranks_goes_too(run: str) -> None:
    uri = f"{run}/1"
    for rank in range(2):
        writer = cloudckpt.StorageWriter(uri)
        writer.set_up_storage_writer(is_coordinator=True, rank=rank, use_collectives=False)
        planner = DefaultSavePlanner()
        planner.set_up_planner({"x": torch.arange(10.0)}, writer.storage_meta(), is_coordinator=True)
        plans, metadata = planner.create_global_plan([planner.create_local_plan()])
        (plan,) = writer.prepare_global_plan(plans)
        results = writer.write_data(planner.finish_plan(plan), planner).wait()
        writer.finish(metadata, [results])
    store = MemoryStore(Target.parse(uri))
    assert {"__0.metadata", "__1.metadata"} < set(names(store))
    delete_checkpoint(uri)
    assert names(store) == []


def test_data_in_folders_below_a_checkpoint_stay_and_the_log_says_so(
    moto: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in moto.environment.items():
        monkeypatch.setenv(name, value)
    bucket = moto.new_bucket()
    writer = S3StorageWriter(
        "us-east-1",
        f"s3://{bucket}/1",
        s3client_config=S3ClientConfig(force_path_style=True),
        prefix_strategy=BinaryPrefixStrategy(epoch_num=2),
    )
    dcp.save({"x": torch.arange(10.0)}, storage_writer=writer)
    (data,) = OnS3(moto, bucket, "1/").visible() - {".metadata"}
    assert "/" in data
    assert delete_checkpoint(f"s3://{bucket}/1") == (".metadata",)
    assert OnS3(moto, bucket, "1/").visible() == {data}
    assert f"stay behind, such as {data}" in caplog.text
