"""Garbage collection removes what dead saves left, and never a byte of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt.backends.gc import Garbage, collect_garbage
from cloudckpt.backends.store import Create, ObjectStore
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.target import Target

NOW = timedelta(0)
ORPHAN = f"step-2/__0_0.{'a' * 32}.distcp"


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run with one committed checkpoint."""
    uri = f"file://{tmp_path}/run"
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"x": torch.arange(10.0)}, storage_writer=cloudckpt.StorageWriter(f"{uri}/step-1"))
    return uri


@pytest.fixture
def store(run: str) -> Iterator[ObjectStore]:
    with open_store(Target.parse(run)) as opened:
        yield opened


def names(store: ObjectStore) -> list[str]:
    return [info.name for info in store.list().objects]


def test_a_checkpoint_is_not_garbage_however_old(run: str, store: ObjectStore) -> None:
    before = names(store)
    assert collect_garbage(run, older_than=NOW) == Garbage((), (), 0)
    assert names(store) == before


def test_what_a_dead_save_left_goes(run: str, store: ObjectStore) -> None:
    committed = names(store)
    store.put(ORPHAN, b"12345", Create())
    upload = store.begin_upload("step-2/__1_0." + "b" * 32 + ".distcp")
    store.upload_part(upload, 1, 0, [memoryview(b"part")])
    garbage = collect_garbage(run, older_than=NOW)
    assert garbage == Garbage((upload.name,), (ORPHAN,), 5)
    assert names(store) == committed
    assert list(store.pending_uploads()) == []


def test_a_put_of_metadata_that_was_killed_goes(run: str, store: ObjectStore) -> None:
    upload = store.begin_upload("step-2/.metadata")
    assert collect_garbage(run, older_than=NOW).uploads == (upload.name,)
    assert list(store.pending_uploads()) == []


def test_a_dry_run_says_the_same_and_removes_nothing(run: str, store: ObjectStore) -> None:
    store.put(ORPHAN, b"12345", Create())
    upload = store.begin_upload("step-2/__1_0." + "b" * 32 + ".distcp")
    assert collect_garbage(run, older_than=NOW, dry_run=True) == collect_garbage(run, older_than=NOW)
    assert upload.name not in names(store)


def test_what_is_young_may_belong_to_a_save_in_progress(run: str, store: ObjectStore) -> None:
    store.put(ORPHAN, b"12345", Create())
    store.begin_upload("step-2/__1_0." + "b" * 32 + ".distcp")
    assert collect_garbage(run) == Garbage((), (), 0)
    assert ORPHAN in names(store)
    assert len(list(store.pending_uploads())) == 1


def test_objects_that_an_overwrite_left_behind_go_and_the_checkpoint_stays(
    run: str, store: ObjectStore
) -> None:
    left = f"step-1/__0_7.{'c' * 32}.distcp"
    store.put(left, b"old", Create())
    assert collect_garbage(run, older_than=NOW).objects == (left,)
    state = {"x": torch.zeros(10)}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, storage_reader=cloudckpt.StorageReader(f"{run}/step-1"))
    assert torch.equal(state["x"], torch.arange(10.0))


@pytest.mark.parametrize(
    "name",
    ["step-2/__0_0.distcp", "step-2/notes.txt", "step-2/model.safetensors", f"x__0_0.{'a' * 32}.distcp"],
)
def test_names_of_others_are_never_touched(run: str, store: ObjectStore, name: str) -> None:
    store.put(name, b"not ours", Create())
    assert collect_garbage(run, older_than=NOW).objects == ()
    assert name in names(store)


def test_a_folder_whose_metadata_cannot_be_read_is_left_alone(run: str, store: ObjectStore) -> None:
    store.put(ORPHAN, b"12345", Create())
    store.put("step-2/.metadata", b"damaged", Create())
    assert collect_garbage(run, older_than=NOW).objects == ()
    assert ORPHAN in names(store)


def test_one_checkpoint_can_be_collected_by_its_own_uri(run: str, store: ObjectStore) -> None:
    store.put(ORPHAN, b"12345", Create())
    assert collect_garbage(f"{run}/step-1", older_than=NOW) == Garbage((), (), 0)
    assert collect_garbage(f"{run}/step-2", older_than=NOW).objects == (ORPHAN.removeprefix("step-2/"),)
