"""Going back in a run: damaged steps, rollbacks, and what retention must leave alone."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt import Checkpointer
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import AccessDeniedError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.load.read_lease import READ_LEASE
from cloudckpt.backends.manage.set_aside import ASIDE
from cloudckpt.backends.stores.local.store import LocalStore
from cloudckpt.loading import Loading
from cloudckpt.retention import drop
from cloudckpt.run import Run
from support import commands, slow_reader
from support.living import end, living
from support.one_executor import one_executor
from support.places import Place
from support.ranks import RankPool, RankPools


@pytest.fixture(autouse=True, scope="module")
def _one_executor() -> Iterator[None]:
    with one_executor():
        yield


def run_at(place: Place, **more: Any) -> Checkpointer:
    return Checkpointer(place.uri, preemption_grace=None, progress=False, **place.options, **more)


def numbered(step: int) -> dict[str, Any]:
    return {"t": torch.full((1000,), float(step))}


def folder_of(place: Place, step: int) -> Place:
    return place.child(f"step-{step:010}")


def damage(place: Place, step: int) -> None:
    """Cut a data object of a step short."""
    there = folder_of(place, step)
    data = {name: there.read(name) for name in there.visible() if name.endswith(".distcp")}
    largest = max(data, key=lambda name: len(data[name]))
    there.write(largest, data[largest][:100])


def hold(checkpointer: Checkpointer, step: int, value: float | None = None) -> None:
    """Check that a step holds its value."""
    state = numbered(-1)
    assert checkpointer.load(state, step) == step
    assert state["t"].unique().tolist() == [step if value is None else value]


@pytest.fixture
def run(folder: Place) -> Iterator[Checkpointer]:
    with run_at(folder) as checkpointer:
        for step in (10, 20, 30):
            checkpointer.save(step, numbered(step))
        yield checkpointer


def test_a_job_that_falls_back_saves_the_damaged_step_again(place: Place) -> None:
    """A job resumes in a loop: load what is whole, train up to the damaged step, save it."""
    with run_at(place) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, numbered(step))
        for step in (2, 3):
            damage(place, step)
        state = numbered(0)
        assert checkpointer.load(state, fallback=True) == 1
        assert checkpointer.all_steps() == [1]
        for step in (2, 3):
            checkpointer.save(step, numbered(step + 100))
        assert checkpointer.load(state, fallback=True) == 3
        hold(checkpointer, 2, 102)


def test_damage_of_every_step_sets_none_aside(folder: Place, run: Checkpointer) -> None:
    for step in (10, 20, 30):
        damage(folder, step)
    with pytest.raises(cloudckpt.IntegrityError, match="step-0000000010"):
        run.load(numbered(0), fallback=True)
    assert run.all_steps() == [10, 20, 30]


def test_a_job_that_may_not_write_falls_back_all_the_same(
    folder: Place, run: Checkpointer, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder, 30)

    def refuse(self: LocalStore, name: str, *args: Any) -> None:
        raise AccessDeniedError("read-only", uri=self.uri, object_name=name)

    state = numbered(0)
    with mock.patch.object(LocalStore, "put", refuse):
        assert run.load(state, fallback=True) == 20
    assert state["t"].unique().tolist() == [20]
    assert "step 30 is damaged and could not be set aside" in caplog.text
    assert "lease" not in caplog.text
    assert run.all_steps() == [10, 20, 30]


@pytest.mark.parametrize("way", ["load", "rollback"])
def test_going_back_makes_a_step_the_newest_and_keeps_the_newer_objects(place: Place, way: str) -> None:
    with run_at(place, keep_last=2) as checkpointer:
        for step in (10, 20, 30):
            checkpointer.save(step, numbered(step))
        before = {name for name in place.visible() if name.endswith(".distcp")}
        state = numbered(0)
        if way == "load":
            assert checkpointer.load(state, step=20, discard_newer=True) == 20
            assert state["t"].unique().tolist() == [20]
        else:
            assert checkpointer.rollback(20) == [30]
        assert checkpointer.all_steps() == [20]
        assert checkpointer.latest_step() == 20
        assert before <= set(place.visible())
        for step in (25, 30):
            checkpointer.save(step, numbered(step + 1))
        hold(checkpointer, 30, 31)


def test_a_save_below_the_newest_step_is_refused_with_the_cure(run: Checkpointer) -> None:
    assert run.load(numbered(0), step=10) == 10
    handle = run.async_save(11, numbered(11))
    with pytest.raises(cloudckpt.ConfigurationError, match="below the newest committed step, 30") as caught:
        handle.result(60)
    assert "discard_newer=True" in str(caught.value)
    assert "rollback(" in str(caught.value)
    with pytest.raises(cloudckpt.CheckpointExistsError):
        run.save(20, numbered(0))
    assert run.all_steps() == [10, 20, 30]
    run.load(numbered(0), step=10, discard_newer=True)
    assert run.save(11, numbered(11)).step == 11
    assert run.all_steps() == [10, 11]


def test_a_save_below_the_newest_step_that_was_asked_for_stays(folder: Place, run: Checkpointer) -> None:
    with run_at(folder, keep_last=1, overwrite=True) as other:
        other.save(15, numbered(15))
        assert other.all_steps() == [15, 30]
        other.save(10, numbered(11))
        assert other.all_steps() == [10, 30]
        hold(other, 10, 11)


def test_a_job_that_has_loaded_the_newest_step_may_save_below_its_own(
    folder: Place, run: Checkpointer
) -> None:
    with pytest.raises(cloudckpt.ConfigurationError):
        run.save(25, numbered(25))  # nothing was loaded
    run.load(numbered(0))
    run.save(25, numbered(25))
    assert run.all_steps() == [10, 20, 25, 30]
    run.load(numbered(0), step=25)
    with pytest.raises(cloudckpt.ConfigurationError):
        run.save(26, numbered(26))
    with run_at(folder) as other:
        other.load(numbered(0))
        with pytest.raises(cloudckpt.ConfigurationError):
            other.save(26, numbered(26))  # another job saved what is above


def test_a_rollback_to_a_step_that_is_not_there_changes_nothing(run: Checkpointer) -> None:
    with pytest.raises(cloudckpt.CheckpointNotFoundError, match="step-0000000015"):
        run.rollback(15)
    with pytest.raises(cloudckpt.CheckpointNotFoundError, match="step-0000000015"):
        run.load(numbered(0), step=15, discard_newer=True)
    with pytest.raises(cloudckpt.ConfigurationError):
        run.rollback(-1)
    assert run.all_steps() == [10, 20, 30]


def test_a_load_that_fails_discards_nothing(folder: Place, run: Checkpointer) -> None:
    damage(folder, 10)
    with pytest.raises(cloudckpt.IntegrityError):
        run.load(numbered(0), step=10, discard_newer=True)
    assert run.all_steps() == [10, 20, 30]


def test_the_newest_step_is_set_aside_last(run: Checkpointer) -> None:
    """A reader finds the newest step of before, or the one that was gone back to, and none between."""
    seen: list[int | None] = []
    set_aside = Run.set_aside

    def observed(self: Run, step: int) -> bool:
        seen.append(self.newest())
        done = set_aside(self, step)
        seen.append(self.newest())
        return done

    with mock.patch.object(Run, "set_aside", observed):
        run.rollback(10)
    assert seen == [30, 30, 30, 10]


def test_a_rollback_is_undone_by_renaming(folder: Place, run: Checkpointer) -> None:
    run.rollback(20)
    there = Path(folder.uri.removeprefix("file://")) / "step-0000000030"
    (aside,) = there.glob(".cloudckpt-aside.*")
    aside.rename(there / ".metadata")
    assert run.latest_step() == 30
    hold(run, 30)


def test_a_listing_shows_what_was_set_aside(folder: Place, run: Checkpointer) -> None:
    run.rollback(20)
    ran = commands.run("ls", folder.uri)
    assert ran.status == 0
    assert "set aside" in ran.out
    listed = commands.run("ls", folder.uri, "--json").json["checkpoints"]
    states = {one["step"]: one["state"] for one in listed}
    assert states == {10: "committed", 20: "committed", 30: "set aside"}


def age(place: Place, days: float) -> None:
    """Make every object of a run in a folder so much older."""
    then = time.time() - timedelta(days=days).total_seconds()
    for path in Path(place.uri.removeprefix("file://")).rglob("*"):
        os.utime(path, (then, then))


def test_retention_deletes_after_a_day_what_was_set_aside_and_not_pinned(folder: Place) -> None:
    with run_at(folder, keep_last=5) as checkpointer:
        for step in (10, 20, 30):
            checkpointer.save(step, numbered(step))
        checkpointer.pin(30)
        checkpointer.rollback(10)
        checkpointer.save(11, numbered(11))
        assert sum(bool(ASIDE.fullmatch(name)) for name in folder.visible()) == 2
        age(folder, 1.1)
        checkpointer.save(12, numbered(12))
        assert [name for name in folder.visible() if "0000000020" in name] == []
        assert (
            len([name for name in folder.visible() if "0000000030" in name]) == 4
        )  # data, metadata, notice, pin
        assert checkpointer.all_steps() == [10, 11, 12]


def test_gc_keeps_what_was_set_aside_for_a_day_and_then_removes_it(folder: Place, run: Checkpointer) -> None:
    dcp.save({"t": torch.ones(10)}, checkpoint_id=folder_of(folder, 40).uri.removeprefix("file://"))
    run.save(50, numbered(50))
    run.pin(50)
    run.rollback(30)
    run.save(50, numbered(51))  # beside the one that was set aside
    before = set(folder.visible())
    cloudckpt.collect_garbage(folder.uri)
    assert set(folder.visible()) == before
    run.unpin(50)
    planned = cloudckpt.collect_garbage(folder.uri, older_than=0, dry_run=True)
    assert set(folder.visible()) == before - {f"{Run(Target.parse(folder.uri)).folder(50)}/.cloudckpt-pin"}
    removed = cloudckpt.collect_garbage(folder.uri, older_than=0)
    assert removed == planned
    assert not any(ASIDE.fullmatch(name) for name in folder.visible())
    assert [name for name in folder.visible() if "0000000040" in name] == []
    assert run.all_steps() == [10, 20, 30, 50]
    hold(run, 50, 51)


def test_retention_keeps_the_step_that_the_job_loaded(folder: Place, run: Checkpointer) -> None:
    with run_at(folder, keep_last=1) as job:
        job.load(numbered(0), step=30)
        for step in (31, 32, 33):
            job.save(step, numbered(step))
        assert job.all_steps() == [30, 33]
        hold(job, 30)
    with run_at(folder, keep_last=1) as following:
        assert following.load(numbered(0)) == 33
        following.save(34, numbered(34))
        assert following.all_steps() == [33, 34]


def test_retention_leaves_a_step_that_another_process_loads(place: Place, tmp_path: Path) -> None:
    with run_at(place, keep_last=1) as checkpointer:
        checkpointer.save(1, numbered(1))
        with slow_reader.reading(place, "1", tmp_path) as reader:
            assert any(READ_LEASE.fullmatch(name) for name in place.visible())
            for step in (2, 3):
                checkpointer.save(step, numbered(step))
            assert checkpointer.all_steps() == [1, 3]
            assert reader.finish() == "1 [1.0]"
        assert not any(READ_LEASE.fullmatch(name) for name in place.visible())
        checkpointer.save(4, numbered(4))
        assert checkpointer.all_steps() == [4]


def test_a_load_that_begins_while_its_step_is_deleted_finds_all_objects(place: Place, tmp_path: Path) -> None:
    """Retention has looked for leases, and deletes ``.metadata`` after the reader has read it."""
    target = Target.parse(place.uri, **place.options)
    with run_at(place, keep_last=1) as checkpointer:
        checkpointer.save(1, numbered(1))
        with slow_reader.reading(place, "1", tmp_path) as reader:
            with mock.patch("cloudckpt.backends.manage.delete.is_read", side_effect=[False, True]):
                assert drop(Run(target), 1)
            assert checkpointer.all_steps() == []
            assert reader.finish() == "1 [1.0]"
        for step in (2, 3):
            checkpointer.save(step, numbered(step))
        assert [name for name in place.visible() if "0000000001" in name] == []  # the deletion was finished


def test_the_lease_of_a_reader_that_was_killed_expires(folder: Place, tmp_path: Path) -> None:
    with run_at(folder, keep_last=1) as checkpointer:
        checkpointer.save(1, numbered(1))
        with slow_reader.reading(folder, "1", tmp_path):
            pass  # killed at the end of the block
        checkpointer.save(2, numbered(2))
        assert checkpointer.all_steps() == [1, 2]
        age(folder, 0.01)
        checkpointer.save(3, numbered(3))
        assert checkpointer.all_steps() == [3]
        assert {name.partition("/")[0] for name in folder.visible()} == {"step-0000000003"}


def test_a_load_of_the_newest_step_goes_on_where_that_is_deleted_meanwhile(
    folder: Place, run: Checkpointer
) -> None:
    load, target = Loading.load, Target.parse(folder.uri)

    def late(self: Loading, state: Any, step: int, *args: Any) -> str:
        if step == 30:
            cloudckpt.delete_checkpoint(Run(target).at(step))
        return load(self, state, step, *args)

    state = numbered(0)
    with mock.patch.object(Loading, "load", late):
        assert run.load(state) == 20
    assert state["t"].unique().tolist() == [20]
    assert run.all_steps() == [10, 20]
    assert not any(ASIDE.fullmatch(name) for name in folder.visible())


def test_a_load_leaves_no_lease_and_no_folder_behind(folder: Place, run: Checkpointer) -> None:
    before = set(folder.visible())
    run.load(numbered(0))
    with pytest.raises(cloudckpt.CheckpointNotFoundError):
        run.load(numbered(0), step=99)
    damage(folder, 30)
    with pytest.raises(cloudckpt.IntegrityError):
        run.load(numbered(0))
    assert set(folder.visible()) == before
    assert not (Path(folder.uri.removeprefix("file://")) / "step-0000000099").exists()


def test_a_metric_that_orders_nothing_is_refused(folder: Place) -> None:
    with run_at(folder, keep_last=1, keep_best=1) as checkpointer:
        for metric in (math.nan, torch.tensor(math.nan)):
            with pytest.raises(cloudckpt.ConfigurationError, match="NaN"):
                checkpointer.save(1, numbered(1), metric=metric)  # type: ignore[arg-type]
        with pytest.raises(cloudckpt.ConfigurationError, match="keep_best=1 needs a metric"):
            checkpointer.save(1, numbered(1))
        assert checkpointer.all_steps() == []
        checkpointer.save(1, numbered(1), metric=-math.inf)
    with run_at(folder) as checkpointer, pytest.raises(cloudckpt.ConfigurationError, match="NaN"):
        checkpointer.save(2, numbered(2), metric=math.nan)


@pytest.fixture
def pool(rank_pool: RankPools) -> Iterator[RankPool]:
    pool = rank_pool(2)
    yield pool
    pool(end)


def test_two_ranks_go_back_together(pool: RankPool, folder: Place) -> None:
    uri = folder.uri

    def save(rank: int) -> None:
        for step in (1, 2, 3):
            living(uri).save(step, {"t": torch.full((10,), float(step)), f"own_{rank}": step})

    def back(rank: int) -> tuple[Any, ...]:
        checkpointer, state = living(uri), {"t": torch.zeros(10), f"own_{rank}": 0}
        fallen = checkpointer.load(state, fallback=True), checkpointer.all_steps(), state[f"own_{rank}"]
        loaded = checkpointer.load(state, step=1, discard_newer=True)
        return *fallen, loaded, checkpointer.latest_step(), checkpointer.save(2, state).step

    def differently(rank: int) -> str:
        with pytest.raises(cloudckpt.ConfigurationError) as caught:
            living(uri).rollback(rank + 1)
        return str(caught.value)

    pool(save)
    damage(folder, 3)
    assert pool(back) == [(2, [1, 2], 2, 1, 1, 2)] * 2
    one, two = pool(differently)
    assert one == two
    assert "rollback(1)" in one
    assert "rollback(2)" in one


def test_a_step_of_stock_dcp_that_was_set_aside_is_put_back_whole(folder: Place, run: Checkpointer) -> None:
    there = Path(folder.uri.removeprefix("file://")) / "step-0000000040"
    dcp.save({"t": torch.full((1000,), 40.0)}, checkpoint_id=there)
    copy = folder.child("copy")
    shutil.copytree(there, copy.uri.removeprefix("file://"))
    run.rollback(30)
    run.save(40, numbered(41))
    hold(run, 40, 41)
    (aside,) = there.glob(".cloudckpt-aside.*")
    assert aside.read_bytes() == (Path(copy.uri.removeprefix("file://")) / md.METADATA_NAME).read_bytes()
    aside.replace(there / ".metadata")
    hold(run, 40)
