"""What a listing does not show yet, or shows still, where something is deleted or reused on its word."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.convert import convert_lease, safetensors
from cloudckpt.backends.copy.copy import copy_checkpoint
from cloudckpt.backends.copy.journal import JOURNAL_NAME
from cloudckpt.backends.manage.delete import delete_unread
from cloudckpt.backends.manage.gc import collect_garbage
from cloudckpt.backends.save import stale_attempts
from cloudckpt.backends.save.save_lease import SaveLease
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Create, Overwrite
from cloudckpt.retention import Retention, prune, superseded
from cloudckpt.run import Run
from support import roles
from support.lagging import Lag, lagging_listings

AN_HOUR = timedelta(hours=1)


@pytest.fixture
def lag() -> Iterator[Lag]:
    with lagging_listings() as lag:
        yield lag


@pytest.fixture
def run() -> Run:
    return Run(Target.parse(f"memory://{uuid.uuid4().hex}"))


def saved(run: Run, *steps: int) -> None:
    for step in steps:
        roles.save(run.at(step).uri, name="a")


def loads(uri: str) -> bool:
    return all(torch.equal(value, roles.state_of("a")[key]) for key, value in roles.load(uri).items())


def age(target: Target, part: str = "", by: timedelta = AN_HOUR) -> None:
    """Make objects older, those that have this in their name."""
    root = target.uri.removeprefix("memory:/")
    for name, file in MemoryFileSystem.store.items():
        if name.startswith(f"{root}/") and part in name:
            file.modified = datetime.now(UTC) - by


def names(target: Target) -> set[str]:
    with open_store(target) as store:
        return {info.name for info in store.list().objects}


def test_a_committed_step_that_is_not_listed_as_such_is_not_swept(run: Run, lag: Lag) -> None:
    saved(run, 1, 2)
    age(run.target)
    lag.hidden.append(lambda name: name.endswith(".metadata") and not name.startswith(run.folder(2)))
    prune(run, Retention(keep_last=5))
    assert loads(run.at(1).uri)


def test_steps_that_are_listed_and_gone_stand_for_none_that_are_there(run: Run, lag: Lag) -> None:
    saved(run, 1, 2, 3, 4)
    with open_store(run.target) as store:
        lag.keep(store)
    for step in (3, 4):
        cloudckpt.delete_checkpoint(run.at(step))
    retention = Retention(keep_last=2)
    committed = {step: one for step, one in run.started().items() if one.state == "committed"}
    assert sorted(committed) == [1, 2, 3, 4] and retention.superseded(committed) == [1, 2]
    assert superseded(run, committed, retention) == []
    assert prune(run, retention) == []
    assert loads(run.at(1).uri) and loads(run.at(2).uri)


def test_a_milestone_that_is_gone_makes_room_for_the_next_step(run: Run, lag: Lag) -> None:
    saved(run, 1, 2, 3)
    with open_store(run.target) as store:
        lag.keep(store)
    cloudckpt.delete_checkpoint(run.at(1))
    assert prune(run, Retention(keep_last=1, keep_every=AN_HOUR)) == []
    assert loads(run.at(2).uri)


def test_a_pin_that_is_not_listed_keeps_a_step(run: Run, lag: Lag) -> None:
    saved(run, 1, 2)
    run.pin(1)
    lag.hide(".cloudckpt-pin")
    assert prune(run, Retention(keep_last=1)) == []
    assert loads(run.at(1).uri)


def test_a_lease_that_is_listed_as_it_was_is_read(run: Run, lag: Lag) -> None:
    saved(run, 1, 2)
    lease = ".cloudckpt-load." + "e" * 32
    with open_store(run.at(1)) as store:
        store.put(lease, b"{}", Overwrite())
        age(run.at(1), lease)
        lag.keep(store)
        store.put(lease, b"{}", Overwrite())
        shown = {info.name: info for info in store.list().objects}
    assert not delete_unread(run.at(1))
    assert loads(run.at(1).uri) and lease in shown


def test_what_was_set_aside_a_moment_ago_is_not_collected(run: Run, lag: Lag) -> None:
    saved(run, 1, 2)
    age(run.target, by=timedelta(days=2))
    with open_store(run.target) as store:
        before = {info.name for info in store.list().objects if info.name.endswith(".distcp")}
        lag.keep(store)
    assert run.set_aside(2)
    lag.hide(".cloudckpt-aside")
    collect_garbage(run.target)
    prune(run, Retention(keep_last=1))
    lag.ghosts.clear()
    collect_garbage(run.target)
    assert before <= names(run.target)


def test_ranks_that_saved_without_each_other_and_are_not_listed_keep_their_objects(
    run: Run, lag: Lag
) -> None:
    saved(run, 1)
    with open_store(run.at(1)) as store:
        data, _ = store.get(".metadata")
        store.put("__0.metadata", data, Create())
        store.delete([".metadata"])
    age(run.target, by=timedelta(days=2))
    lag.hide("__0.metadata")
    before = names(run.target)
    collect_garbage(run.target)
    assert before <= names(run.target)


def test_a_copy_that_goes_on_unseen_is_not_collected(run: Run, lag: Lag) -> None:
    saved(run, 1)
    with open_store(run.at(1)) as store:
        store.delete([".metadata"])
        age(run.target, by=timedelta(days=2))
        store.put(JOURNAL_NAME, b"{}", Create())
    lag.hide(JOURNAL_NAME)
    before = names(run.target)
    collect_garbage(run.target)
    assert before <= names(run.target)


def test_a_copy_does_not_rely_on_objects_that_are_gone(run: Run, lag: Lag) -> None:
    saved(run, 1)
    copy_checkpoint(run.at(1), run.at(2))
    with open_store(run.at(2)) as store:
        lag.keep(store)
    cloudckpt.delete_checkpoint(run.at(2))
    copied = copy_checkpoint(run.at(1), run.at(2))
    assert copied.sent + copied.copied_by_store > 0
    assert loads(run.at(2).uri)


def test_files_whose_index_is_not_listed_yet_are_whole(run: Run, lag: Lag) -> None:
    with open_store(run.target) as store:
        plan = convert_lease.Plan(("a.safetensors",), "a.index.json")
        lease = convert_lease.take(store, plan)
        lease.leave()
        store.put("a.safetensors", b"data", Create())
        store.put("a.index.json", b"{}", Create())
        age(run.target, ".cloudckpt-convert")
        lag.hide("a.index.json")
        convert_lease.remove_dead(store)
        assert store.holds("a.safetensors") and store.holds("a.index.json")


def test_an_index_that_is_not_listed_yet_is_replaced_before_its_files(run: Run, lag: Lag) -> None:
    with open_store(run.target) as store:
        store.put("model-00001-of-00001.safetensors", b"data", Create())
        store.put(safetensors.INDEX, b"{}", Create())
        lag.hide(safetensors.INDEX)
        assert safetensors.written_before(store)[0] == safetensors.INDEX


def test_objects_of_a_save_whose_marker_is_not_listed_outlive_a_dead_attempt(run: Run, lag: Lag) -> None:
    """It replaces the step that was committed a moment ago, and a dead attempt has left its marker there."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone = {"process": ended.pid, "started": 1}
    dead, living = (f"__0_0.{one * 32}.distcp" for one in "de")
    with open_store(run.at(1)) as store, open_store(run.target) as of_run:
        store.put(dead, b"dead", Create())
        saved(run, 1)
        SaveLease(store, "d" * 32, 0, notes=gone).leave()
        store.put(living, b"living", Create())
        removed = stale_attempts.remove_dead(of_run, run.folder(1))
        assert len(removed) == 2
        assert not store.holds(dead) and store.holds(living)
