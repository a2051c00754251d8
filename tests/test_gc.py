"""Garbage collection removes what dead saves left, and never a byte of a checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.copy.journal import JOURNAL_NAME
from cloudckpt.backends.errors import ConfigurationError, StorageError
from cloudckpt.backends.manage.gc import Garbage, collect_garbage
from cloudckpt.backends.save.save_lease import marker_name
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Create, ObjectStore, Upload
from cloudckpt.backends.stores.local.store import LocalStore
from cloudckpt.backends.stores.object_names import PIN, probe_name
from cloudckpt.retention import drop
from cloudckpt.run import Run
from support.places import Place

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


# While saves are in progress


COLLECTING = """
import json, sys, cloudckpt
uri, options = sys.argv[1], json.loads(sys.argv[2])
cloudckpt.collect_garbage(uri, older_than=0, **options)
print("begun", flush=True)
while True:
    cloudckpt.collect_garbage(uri, older_than=0, **options)
"""


@contextlib.contextmanager
def collected_all_the_time(place: Place) -> Iterator[None]:
    """Have another process collect everything that no save in progress owns, again and again."""
    arguments = ["-W", "ignore", "-c", COLLECTING, place.uri, json.dumps(place.options)]
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == b"begun\n"
            yield
            assert other.poll() is None, "the collector failed"
        finally:
            other.kill()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_saves_and_deletions_succeed_while_another_process_collects_with_no_age(place: Place) -> None:
    state = {"x": torch.arange(10.0)}
    run = Run(Target.parse(place.uri, **place.options))
    with collected_all_the_time(place):
        for number in range(30 if place.server is None else 6):
            run.prove()
            step = place.child(run.folder(number % 4))
            dcp.save(state, storage_writer=step.writer(overwrite=True))
            loaded = {"x": torch.zeros(10)}
            dcp.load(loaded, storage_reader=step.reader())
            assert torch.equal(loaded["x"], state["x"])
            if number % 3 == 0:
                drop(run, number % 4)


@pytest.mark.parametrize("name", ["a lease", "a probe", "a pin", "a journal", "metadata"])
def test_a_put_in_progress_is_no_upload_and_one_whose_process_died_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    names = {
        "a lease": marker_name("a" * 32),
        "a probe": probe_name(),
        "a pin": PIN,
        "a journal": JOURNAL_NAME,
        "metadata": ".metadata",
    }
    store = LocalStore(Target.parse(tmp_path / "run"))
    found: list[Any] = []
    fsync = os.fsync

    def look(fd: int) -> None:
        paths = list((tmp_path / "run").iterdir())
        for path in paths if len(paths) == 1 else ():  # until the object is visible, too
            os.utime(path, (0, 0))
            found.append(list(store.pending_uploads()))
            found.append(collect_garbage(tmp_path / "run", older_than=0, silent_for=0))
            upload_id = path.name.split(".")[-2]
            store.abort_upload(Upload(names[name], upload_id))
            assert path.exists()
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", look)
        store.put(names[name], b"data", Create())
    assert found and all(one in ([], Garbage((), (), 0)) for one in found)
    assert store.get(names[name])[0] == b"data"
    store.delete([names[name]])

    left = store.begin_upload(names[name])  # as a put leaves it whose process was killed
    if name != "metadata":
        assert collect_garbage(tmp_path / "run", older_than=0) == Garbage((), (), 0)
    assert collect_garbage(tmp_path / "run", older_than=0, silent_for=0).uploads == (left.name,)


def test_a_probe_is_not_removed_while_it_may_be_in_use(place: Place) -> None:
    target = Target.parse(place.uri, **place.options)
    name = probe_name()
    with open_store(target) as store:
        store.put(name, b"", Create())
        assert collect_garbage(target, older_than=timedelta(days=-1)).traces == ()
        assert store.holds(name)
        found = collect_garbage(target, older_than=timedelta(days=-1), silent_for=timedelta(days=-1))
        assert found.traces == (name,)


@pytest.mark.parametrize("name", ["older_than", "silent_for"])
@pytest.mark.parametrize("age", [float("nan"), float("inf"), -float("inf"), True, "1d", None, 1e300])
def test_an_age_that_is_none_is_refused(run: str, name: str, age: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is") as caught:
        collect_garbage(run, **{name: age})
    assert caught.value.hint


def test_ages_are_timedeltas_or_seconds_of_any_length(run: str, store: ObjectStore) -> None:
    store.put(ORPHAN, b"12345", Create())
    for age in (timedelta.max, 1e10, 3600, timedelta(hours=1)):
        assert collect_garbage(run, older_than=age).objects == ()
        assert collect_garbage(run, silent_for=age).objects == ()
    assert collect_garbage(run, older_than=timedelta.min, dry_run=True).objects == (ORPHAN,)
    assert collect_garbage(run, older_than=-60.5).objects == (ORPHAN,)


# Folders that became empty


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def three_steps(tmp_path: Path) -> Run:
    run = Run(Target.parse(tmp_path / "run"))
    for step in range(3):
        with pytest.warns(UserWarning, match="single process"):
            dcp.save({"x": torch.arange(10.0)}, storage_writer=cloudckpt.StorageWriter(run.at(step)))
    return run


def test_a_deleted_step_leaves_no_folder(three_steps: Run, tmp_path: Path) -> None:
    drop(three_steps, 0)
    cloudckpt.delete_checkpoint(three_steps.at(1).uri)
    assert steps_in(tmp_path / "run") == [three_steps.folder(2)]
    drop(three_steps, 2)
    assert steps_in(tmp_path / "run") == []


def test_a_step_of_a_run_behind_a_symbolic_link_leaves_no_folder(three_steps: Run, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    drop(Run(Target.parse(tmp_path / "link")), 1)
    assert steps_in(tmp_path / "run") == [three_steps.folder(0), three_steps.folder(2)]
    moved = tmp_path / "elsewhere"
    (tmp_path / "run" / three_steps.folder(2)).rename(moved)
    (tmp_path / "run" / three_steps.folder(2)).symlink_to(moved)
    drop(three_steps, 2)  # a link that the user made stays, and so does what it leads to
    assert list(moved.iterdir()) == [] and (tmp_path / "run" / three_steps.folder(2)).is_symlink()


def test_a_folder_of_a_step_with_a_file_of_the_user_stays(three_steps: Run, tmp_path: Path) -> None:
    (tmp_path / "run" / three_steps.folder(0) / "notes.txt").touch()
    drop(three_steps, 0)
    assert steps_in(tmp_path / "run" / three_steps.folder(0)) == ["notes.txt"]


def test_the_folder_of_a_uri_stays_and_so_do_empty_folders_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "run" / "empty").mkdir(parents=True)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"x": torch.arange(10.0)}, storage_writer=cloudckpt.StorageWriter(tmp_path / "run"))
    cloudckpt.delete_checkpoint(tmp_path / "run")
    collect_garbage(tmp_path / "run", older_than=0, silent_for=0)
    assert steps_in(tmp_path / "run") == ["empty"]


@pytest.mark.parametrize("dry_run", [True, False])
def test_empty_folders_of_steps_are_garbage_once_they_are_old(tmp_path: Path, dry_run: bool) -> None:
    """As a save leaves one that is killed before its first file, and releases before this one left all."""
    for name in ("step-0000000001", "group/step-0000000002", "step-3", "empty/deeper"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "group")
    assert collect_garbage(tmp_path, older_than=0) == Garbage((), (), 0)
    found = collect_garbage(tmp_path, older_than=0, silent_for=0, dry_run=dry_run)
    assert found.traces == ("group/step-0000000002/", "step-0000000001/")
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    steps = {"step-0000000001", "group/step-0000000002"} if dry_run else set()
    assert left == {"group", "step-3", "empty", "empty/deeper", "link"} | steps


def test_a_failed_save_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    uri = Run(Target.parse(tmp_path / "run")).at(1).uri

    def refuse(*_: Any, **__: Any) -> Any:
        raise StorageError("no")

    monkeypatch.setattr(LocalStore, "upload_part", refuse)
    with pytest.raises(CheckpointException), pytest.warns(UserWarning, match="single process"):
        dcp.save({"x": torch.arange(10.0)}, storage_writer=cloudckpt.StorageWriter(uri))
    assert steps_in(tmp_path / "run") == []


def test_of_several_ranks_that_abort_the_last_one_removes_the_folder_of_the_step(tmp_path: Path) -> None:
    target = Run(Target.parse(tmp_path / "run")).at(1)
    first, second = LocalStore(target), LocalStore(target)
    uploads = [store.begin_upload(f"__{rank}_0") for rank, store in enumerate((first, second))]
    first.abort_upload(uploads[0])
    second.abort_upload(uploads[1])
    assert steps_in(tmp_path / "run") == []


CHURNING = """
import sys
from cloudckpt.backends.stores.base import Overwrite
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.config.target import Target
with open_store(Target.parse(sys.argv[1])) as store:
    for _ in range(200):
        store.put(sys.argv[2], b"x", Overwrite())
        store.delete([sys.argv[2]])
"""


def test_processes_that_write_and_delete_in_one_folder_never_fail_each_other(tmp_path: Path) -> None:
    step = Run(Target.parse(tmp_path / "run")).at(1).uri
    others = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", CHURNING, step, name])
        for name in ("one", "two")
    ]
    assert [other.wait() for other in others] == [0, 0]
    assert steps_in(tmp_path / "run") == []
