"""The Checkpointer: steps that are saved, listed, loaded and let go of; on one rank and on two."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import wait
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard

import cloudckpt
from cloudckpt import Checkpointer, events, progress
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Overwrite
from cloudckpt.retention import PruningWriter, Retention
from cloudckpt.run import Run
from support import injected, states
from support.gcs import gcs_server
from support.places import Place
from support.ranks import RankPool, RankPools
from support.servers import S3Server

MINUTES = 60.0


def run_at(place: Place, **more: Any) -> Checkpointer:
    return Checkpointer(place.uri, **place.options, save_timeout=MINUTES, start_timeout=MINUTES, **more)


def training(seed: int) -> dict[str, Any]:
    """A model, its optimizer and a schedule, some steps on."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(1 + seed % 3):
        model(torch.rand(8, 30)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "ema": torch.rand(5),
        "nested": {"seen": 1000 + seed, "name": f"epoch {seed}"},
        "loss": 1 / (1 + seed),
    }


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    def described(state: dict[str, Any]) -> dict[str, Any]:
        return {
            key: value.state_dict() if hasattr(value, "state_dict") else value for key, value in state.items()
        }

    states.assert_bit_exact(described(one), described(other))


def numbered(step: int) -> dict[str, Any]:
    return {"t": torch.full((1000,), float(step)), "step": step}


def damage(place: Place, step: int) -> None:
    """Flip a byte of the step's first tensor."""
    there = place.child(f"step-{step:010}")
    stored = md.load(there.read(md.METADATA_NAME), uri=there.uri).storage_data
    info = next(info for info in stored.values() if md.payload_of(info) is not None)
    data = bytearray(there.read(info.relative_path))
    data[info.offset + info.length // 2] ^= 1
    there.write(info.relative_path, bytes(data))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the Checkpointer has logged."""
    return [record.message for record in caplog.records if record.name == "cloudckpt.checkpointer"]


def test_a_training_state_is_saved_in_the_background_and_loaded_into_a_new_one(place: Place) -> None:
    saved, again = training(1), training(1)
    with run_at(place) as checkpointer:
        checkpointer.warmup(saved)
        assert checkpointer.latest_step() is None
        before = datetime.now(UTC)
        handle = checkpointer.async_save(100, saved)
        with torch.no_grad():
            for parameter in saved["model"].parameters():
                parameter.zero_()
        info = handle.result(MINUTES)
        assert (info.step, info.uri) == (100, f"{place.uri}/step-0000000100")
        data = {name for name in place.child("step-0000000100").visible() if name != md.METADATA_NAME}
        assert info.objects == len(data)
        assert info.size == sum(len(place.child("step-0000000100").read(name)) for name in data)
        assert before - timedelta(seconds=1) < info.committed_at < datetime.now(UTC) + timedelta(seconds=1)
        assert 0 < info.seconds < MINUTES
        assert handle.progress.phase == "done"
        assert handle.staged.done()
        loaded = training(2)
        assert checkpointer.load(loaded) == 100
        assert_alike(loaded, again)


class Container(torch.optim.Optimizer, Stateful):
    """An optimizer of optimizers that says itself what its state is, as torchtitan's does."""

    def __init__(self, models: list[nn.Module]) -> None:
        self.optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
        super().__init__([one for model in models for one in model.parameters()], {})

    def state_dict(self) -> dict[str, Any]:
        return {str(number): one.state_dict() for number, one in enumerate(self.optimizers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for number, one in enumerate(self.optimizers):
            one.load_state_dict(state_dict[str(number)])


def test_an_optimizer_that_is_stateful_by_its_class_is_asked_itself(folder: Place) -> None:
    def trained(steps: int) -> dict[str, Any]:
        torch.manual_seed(0)
        models: list[nn.Module] = [nn.Linear(3, 2), nn.Linear(3, 2)]
        container = Container(models)
        for _ in range(steps):
            for model, optimizer in zip(models, container.optimizers, strict=True):
                model(torch.rand(4, 3)).square().sum().backward()
                optimizer.step()
        return {"optimizer": container}

    with run_at(folder) as checkpointer:
        checkpointer.save(1, trained(2))
        loaded = trained(1)
        checkpointer.load(loaded)
    assert_alike(loaded, trained(2))


def test_only_the_newest_steps_stay_and_those_that_are_kept_for_good(place: Place) -> None:
    with run_at(place, keep_last=2, keep_every=40) as checkpointer:
        for step in range(10, 100, 10):
            checkpointer.save(step, numbered(step))
        assert checkpointer.all_steps() == [40, 80, 90]
        assert checkpointer.latest_step() == 90
        state = numbered(0)
        assert checkpointer.load(state, step=40) == 40
        states.assert_bit_exact(state, numbered(40))
    folders = {name.partition("/")[0] for name in place.visible()}
    assert folders == {"step-0000000040", "step-0000000080", "step-0000000090"}


def test_the_best_steps_stay_however_old_they_are(folder: Place) -> None:
    metrics = {1: 0.5, 2: 0.9, 4: 0.7, 6: 0.9, 7: 0.1, 8: -1.0}
    with run_at(folder, keep_last=1, keep_best=2) as checkpointer:
        for step, metric in metrics.items():
            checkpointer.save(step, numbered(step), metric=metric)
        assert checkpointer.all_steps() == [2, 6, 8]
    with run_at(folder, keep_last=1, keep_best=2) as checkpointer:  # as another process would know them
        checkpointer.save(9, numbered(9), metric=1.5)
        checkpointer.save(10, numbered(10), metric=-1.5)
        assert checkpointer.all_steps() == [6, 9, 10]


def test_a_step_is_there_when_its_commit_is_whoever_made_it(folder: Place, tmp_path: Path) -> None:
    with run_at(folder) as one, run_at(folder) as other:
        one.save(1, numbered(1))
        assert other.latest_step() == 1
        other.save(2, numbered(2))
        assert one.all_steps() == [1, 2]
        step = folder.child("step-0000000002")
        step.remove(md.METADATA_NAME)
        for stray in ("step-0000000003/__0_0.distcp", "step-7/.metadata"):
            (tmp_path / "run" / stray).parent.mkdir()
            folder.write(stray, b"no commit of a step")
        assert one.latest_step() == other.latest_step() == 1
        assert one.all_steps() == [1]


def test_a_step_that_is_not_there_is_said_to_be_missing(folder: Place) -> None:
    with run_at(folder) as checkpointer:
        with pytest.raises(cloudckpt.CheckpointNotFoundError, match="no step of this run"):
            checkpointer.load(numbered(0))
        checkpointer.save(1, numbered(1))
        with pytest.raises(cloudckpt.CheckpointNotFoundError, match="step-0000000002"):
            checkpointer.load(numbered(0), step=2)


def test_a_damaged_step_is_named_and_with_fallback_the_one_before_it_is_loaded(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with run_at(place) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, numbered(step))
        for step in (2, 3):
            damage(place, step)
        with pytest.raises(cloudckpt.IntegrityError, match="step-0000000003") as caught:
            checkpointer.load(numbered(0))
        assert any("step 2 is the newest before it" in note for note in caught.value.__notes__)
        with pytest.raises(cloudckpt.IntegrityError, match="step-0000000002"):
            checkpointer.load(numbered(0), step=2, fallback=True)  # this one was asked for
        state = numbered(0)
        with caplog.at_level(logging.WARNING, "cloudckpt"):
            assert checkpointer.load(state, fallback=True) == 1
        states.assert_bit_exact(state, numbered(1))
        said = [record.message for record in caplog.records if record.name == "cloudckpt.loading"]
        assert [line.partition(":")[0].partition(",")[0] for line in said] == [
            "step 3 is damaged",
            "step 2 is damaged",
            "step 3 is set aside",
            "step 2 is set aside",
        ]
        assert checkpointer.all_steps() == [1]
        damage(place, 1)
        with pytest.raises(cloudckpt.IntegrityError, match="step-0000000001"):
            checkpointer.load(numbered(0), fallback=True)


def test_a_save_that_failed_in_the_background_is_raised_where_the_run_is_touched_next(folder: Place) -> None:
    checkpointer = run_at(folder, snapshots=2)
    checkpointer.save(1, numbered(1))
    checkpointer.async_save(1, numbered(1))
    with pytest.raises(cloudckpt.CheckpointExistsError) as caught:
        checkpointer.wait()
    assert "it is the save of step 1 that failed, in the background" in caught.value.__notes__
    checkpointer.wait()  # once is enough

    heard = checkpointer.async_save(1, numbered(1))
    assert isinstance(heard.exception(MINUTES), cloudckpt.CheckpointExistsError)
    checkpointer.wait()  # it has been told to who asked

    failed = checkpointer.async_save(1, numbered(1))
    while not failed.done():
        pass
    with pytest.raises(cloudckpt.CheckpointExistsError):
        checkpointer.async_save(2, numbered(2))
    checkpointer.async_save(1, numbered(1))
    with pytest.raises(cloudckpt.CheckpointExistsError):
        checkpointer.close()
    assert checkpointer.all_steps() == [1]


def test_an_error_in_the_block_is_not_hidden_by_a_save_that_failed(folder: Place) -> None:
    def fail() -> None:
        with run_at(folder) as checkpointer:
            checkpointer.save(1, numbered(1))
            checkpointer.async_save(1, numbered(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_failures_are_told_and_training_goes_on_where_that_is_wanted(
    folder: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "cloudckpt"), run_at(folder, on_failure="warn") as checkpointer:
        checkpointer.save(1, numbered(1))
        checkpointer.async_save(1, numbered(1))
        checkpointer.wait()
        checkpointer.async_save(2, numbered(2)).result(MINUTES)
        with pytest.raises(cloudckpt.CheckpointExistsError):
            checkpointer.save(2, numbered(2))  # whoever waits for a save hears of it
    assert sum("the save of step 1 failed" in said for said in told(caplog)) == 1


def test_a_step_is_replaced_where_that_is_allowed(folder: Place) -> None:
    with run_at(folder, overwrite=True) as checkpointer:
        checkpointer.save(1, numbered(1))
        checkpointer.save(1, numbered(5))
        state = numbered(0)
        checkpointer.load(state)
        states.assert_bit_exact(state, numbered(5))


def test_a_pinned_step_stays_until_it_is_unpinned(place: Place) -> None:
    with run_at(place, keep_last=1) as checkpointer:
        checkpointer.save(1, numbered(1))
        checkpointer.pin(1)
        checkpointer.save(2, numbered(2))
        checkpointer.save(3, numbered(3))
        assert checkpointer.all_steps() == [1, 3]
        checkpointer.unpin(1)
        checkpointer.save(4, numbered(4))
        assert checkpointer.all_steps() == [4]
        with pytest.raises(cloudckpt.CheckpointNotFoundError, match="to pin"):
            checkpointer.pin(3)
    assert {name.partition("/")[0] for name in place.visible()} == {"step-0000000004"}


def test_a_deletion_that_was_cut_off_is_finished_after_the_next_commit(place: Place) -> None:
    with run_at(place) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, numbered(step))
    with open_store(Target.parse(place.uri, **place.options)) as store:
        # Both lack their metadata; the second is a save's that is silent, which is gc's business.
        store.delete(["step-0000000001/.metadata", "step-0000000002/.metadata"])
        store.put(f"step-0000000002/.cloudckpt-save.{'0' * 32}", b"{}", Overwrite())
    with run_at(place, keep_last=5) as checkpointer:
        checkpointer.save(4, numbered(4))
    folders = {name.partition("/")[0] for name in place.visible()}
    assert folders == {"step-0000000002", "step-0000000003", "step-0000000004"}


def test_whatever_fails_in_retention_is_no_failure_of_the_save(
    folder: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with run_at(folder) as checkpointer:
        checkpointer.save(1, numbered(1))
    run = Run(Target.parse(folder.uri))
    with mock.patch.object(Run, "started", side_effect=KeyError("lost")):
        dcp.save(numbered(2), storage_writer=PruningWriter(run, 2, Retention(keep_last=1)))
    assert run.steps() == [1, 2]
    assert "older steps stay until the next one: KeyError: 'lost'" in caplog.text


def test_a_single_process_raises_what_its_state_does_at_once_and_as_it_is(folder: Place) -> None:
    error = injected.Unpicklable("mine")
    state = {"sullen": injected.Sullen()}
    with run_at(folder) as checkpointer:
        checkpointer.save(1, state)
        state["sullen"].saving = state["sullen"].loading = lambda: error
        calls: list[Callable[[], object]] = [
            lambda: checkpointer.warmup(state),
            lambda: checkpointer.save(2, state),
            lambda: checkpointer.load(state),
        ]
        for call in calls:
            with pytest.raises(injected.Unpicklable) as caught:
                call()
            assert caught.value is error
        for place in ("read_metadata", "local_plan", "read_data", "take"):
            with injected.raising(place, lambda: error), pytest.raises(injected.Unpicklable) as caught:
                checkpointer.load({"sullen": injected.Sullen()})
            assert caught.value is error
        assert checkpointer.load({"sullen": injected.Sullen()}) == 1


def test_steps_between_those_of_the_policy_are_skipped(folder: Place) -> None:
    with run_at(folder, every_steps=3) as checkpointer:
        handles = [checkpointer.async_save(step, numbered(step)) for step in range(7)]
        checkpointer.wait()
        assert [handle.cancelled() for handle in handles] == [step % 3 != 0 for step in range(7)]
        assert checkpointer.all_steps() == [0, 3, 6]
        checkpointer.save(7, numbered(7))
        assert checkpointer.latest_step() == 7


def test_steps_are_saved_when_it_is_time_on_every_rank_or_on_none(pool: RankPool, tmp_path: Path) -> None:
    place = Place.in_folder(tmp_path / "run")

    def on_rank(rank: int) -> list[bool]:
        late = [0.0]
        real = time.monotonic
        saved: list[bool] = []
        with run_at(place, every_seconds=1000, every_steps=5, snapshots=2) as checkpointer:
            for step in range(1, 7):
                if step in {2, 3, 6}:
                    late[0] += 600.0
                with mock.patch("cloudckpt.schedule.time") as clock:
                    clock.monotonic = lambda: real() + (late[0] if rank == 0 else 0.0)
                    handle = checkpointer.async_save(step, numbered(step))
                    saved.append(not handle.cancelled())
                    wait([handle])
        return saved

    one, two = pool(on_rank)
    # 1,200 seconds have passed at step 3, step 5 is a multiple of 5, and 600 are not enough for step 6.
    assert one == two == [False, False, True, False, True, False]


def test_everything_that_happens_is_told_in_its_order(
    folder: Place, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[events.Event] = []

    def note(event: events.Event) -> None:
        told.append(event)
        if isinstance(event, events.Committed) and event.step == 2:
            raise ZeroDivisionError("what is told of an event is nobody's trouble")

    with run_at(folder, keep_last=1, on_event=note, on_failure="warn") as checkpointer:
        infos = [checkpointer.save(step, numbered(step)) for step in (1, 2)]
        checkpointer.async_save(2, numbered(2))
        checkpointer.wait()
        checkpointer.load(numbered(0))
    where = [(event.step, type(event).__name__) for event in told]
    saved = ["Staged", "Planned", "Uploaded", "Committed"]
    assert where == [
        *((1, name) for name in saved),
        *((2, name) for name in saved),
        (2, "Pruned"),
        (2, "Staged"),
        (2, "Failed"),
        (2, "Loaded"),
    ]
    assert [event.info for event in told if isinstance(event, events.Committed)] == infos
    assert [event.steps for event in told if isinstance(event, events.Pruned)] == [(1,)]
    assert all(event.size >= 4000 for event in told if isinstance(event, events.Uploaded | events.Planned))
    (failed,) = (event for event in told if isinstance(event, events.Failed))
    assert isinstance(failed.error, cloudckpt.CheckpointExistsError)
    assert {event.rank for event in told} == {0}
    assert sum("on_event raised" in record.message for record in caplog.records) == 1


def test_a_long_save_says_how_far_it_is(
    folder: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_TELL", 0.0)
    state = {"t": torch.ones(16 << 20)}
    for wanted in (True, False):
        caplog.clear()
        with caplog.at_level(logging.INFO, "cloudckpt"), run_at(folder, progress=wanted) as checkpointer:
            checkpointer.save(2 - wanted, state)
            checkpointer.load(state, 2 - wanted)
        said = [record.message for record in caplog.records if record.name == "cloudckpt.progress"]
        assert all(re.fullmatch(r"step 1, rank 0: \w+, 0\.\d\d of 0\.\d\d GiB", line) for line in said)
        phases = {line.split()[4].rstrip(",") for line in said}
        assert ("writing" in phases, "loading" in phases) == (wanted, wanted)


def test_on_a_terminal_there_is_a_bar(
    folder: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    state = {"t": torch.ones(16 << 20)}
    with run_at(folder) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.load(state)
    shown = capsys.readouterr().err
    assert "step 1, rank 0" in shown and "64.0M" in shown and "writing" in shown and "loading" in shown
    assert not progress.Bars(None)._bars


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("progress", "loud"),
        ("every_seconds", 0),
        ("keep_last", 0),
        ("keep_last", True),
        ("keep_every", 5),  # without keep_last
        ("keep_every", timedelta(0)),
        ("keep_best", 5),
        ("every_steps", 0),
        ("preemption_grace", 0),
        ("every_steps", 2.5),
        ("on_failure", "ignore"),
        ("snapshots", 3),
        ("on_busy", "panic"),
        ("trust", "yes"),
        ("overwrite", 1),
        ("keep_lsat", 3),
    ],
)
def test_what_can_not_be_meant_is_refused(tmp_path: Path, argument: str, value: Any) -> None:
    with pytest.raises(cloudckpt.ConfigurationError, match=argument):
        Checkpointer(f"file://{tmp_path}/run", **{argument: value})


def test_a_metric_that_is_no_number_is_refused(folder: Place) -> None:
    with run_at(folder) as checkpointer:
        with pytest.raises(cloudckpt.ConfigurationError, match="a note is a number"):
            checkpointer.async_save(1, numbered(1), metric="good")  # type: ignore[arg-type]
        assert checkpointer.all_steps() == []


@pytest.mark.parametrize("step", [-1, 10**10, True, 1.0, "1", None])
def test_what_is_no_step_is_refused_before_anything_is_saved(folder: Place, step: Any) -> None:
    with run_at(folder) as checkpointer:
        with pytest.raises(cloudckpt.ConfigurationError, match="whole number"):
            checkpointer.async_save(step, numbered(1))
        assert checkpointer.all_steps() == []


def test_a_state_that_can_not_be_meant_is_refused(folder: Place) -> None:
    model, stranger = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(stranger.parameters(), lr=1)
    with run_at(folder) as checkpointer:
        for state in ([1], {"optimizer": optimizer}, {"model": model, "optimizer": optimizer}, {1: 2}):
            with pytest.raises(cloudckpt.ConfigurationError):
                checkpointer.async_save(1, state)  # type: ignore[arg-type]
        assert checkpointer.all_steps() == []


def test_a_run_that_can_not_be_written_to_is_known_before_step_0(moto: S3Server) -> None:
    place = Place.on_server(moto, "a-bucket-that-is-not-there")
    with run_at(place) as checkpointer, pytest.raises(cloudckpt.StorageError, match="not-there"):
        checkpointer.warmup()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"rng_1": torch.zeros(2)}, r"'rng_1', which the checkpoint does not have .* It has 'rng_0'"),
        ({"a": 1, "b": {"c": 2}}, r"'a' and 1 more, which the checkpoint does not have"),
        ({"rng_0": torch.zeros(3)}, r"'rng_0' has size \(3,\) in the state and \(2,\) in the checkpoint"),
    ],
)
def test_a_state_that_asks_for_what_a_step_does_not_have_is_told(
    folder: Place, asked: dict[str, Any], said: str
) -> None:
    with run_at(folder) as checkpointer:
        checkpointer.save(1, {"rng_0": torch.ones(2), "lr": 0.1})
        with pytest.raises(cloudckpt.ConfigurationError, match=said) as caught:
            checkpointer.load(asked)
        assert caught.value.uri is not None
        assert caught.value.uri.endswith("step-0000000001")


def test_an_optimizer_takes_its_first_step_in_training(folder: Place) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with run_at(folder) as checkpointer:
        checkpointer.warmup({"model": model, "optimizer": optimizer})
    assert optimizer.state_dict()["state"] == {}


@pytest.fixture
def pool(rank_pool: RankPools) -> RankPool:
    return rank_pool(2)


def sharded(value: float) -> dict[str, Any]:
    """A model that two ranks share, with an optimizer that has made a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer, "step": int(value)}


def values_of(state: dict[str, Any]) -> list[torch.Tensor]:
    model, optimizer = state["model"], state["optimizer"]
    tensors = [parameter.to_local() for parameter in model.parameters()]
    tensors += [held["exp_avg"].to_local() for held in optimizer.state.values()]
    return [tensor.detach().clone() for tensor in tensors]


def test_what_one_rank_asks_for_in_vain_is_told_on_every_rank(pool: RankPool, tmp_path: Path) -> None:
    def on_rank(rank: int) -> tuple[str, int | None]:
        with cloudckpt.Checkpointer(f"file://{tmp_path}/run") as checkpointer:
            checkpointer.save(1, {"rng_0": torch.ones(2)})
            with pytest.raises(cloudckpt.ConfigurationError) as caught:
                checkpointer.load({f"rng_{rank}": torch.zeros(2)})
            return caught.value.message, caught.value.rank

    assert pool(on_rank) == [("the state asks for 'rng_1', which the checkpoint does not have", 1)] * 2


def test_two_ranks_save_and_load_what_they_share_and_always_agree(pool: RankPool, tmp_path: Path) -> None:
    place = Place.in_folder(tmp_path / "run")

    def on_rank(rank: int) -> tuple[Any, ...]:
        with run_at(place, keep_last=2) as checkpointer:
            state = sharded(3.0)
            checkpointer.warmup(state)
            for step in (1, 2, 3):
                handle = checkpointer.async_save(step, state)
            info = handle.result(MINUTES)
            steps, latest = checkpointer.all_steps(), checkpointer.latest_step()
            expected = values_of(state)
            other = sharded(4.0)
            assert checkpointer.load(other) == 3
            assert all(map(torch.equal, values_of(other), expected))
            dist.barrier()
            if rank == 0:
                damage(place, 3)
            dist.barrier()
            with pytest.raises(cloudckpt.IntegrityError):
                checkpointer.load(other)
            return info.size, info.objects, steps, latest, checkpointer.load(other, fallback=True)

    one, two = pool(on_rank)
    assert one == two
    assert one[2:] == ([2, 3], 3, 2)


def test_ranks_fetch_the_metadata_once(pool: RankPool) -> None:
    with gcs_server() as server:
        place = Place.on_gcs(server, server.new_bucket())

        def on_rank(rank: int) -> None:
            with run_at(place) as checkpointer:
                state = sharded(3.0)
                checkpointer.save(1, state)
                dist.barrier()
                if rank == 0:
                    server.reset()
                dist.barrier()
                checkpointer.load(sharded(4.0), 1)

        pool(on_rank)
        read = [path for method, path, *_ in server.requests() if method == "GET" and ".metadata" in path]
        assert len(read) == 1, read


def test_a_question_that_fails_fails_on_every_rank(pool: RankPool, moto: S3Server) -> None:
    place = Place.on_server(moto, "a-bucket-that-is-not-there")

    def on_rank(_rank: int) -> str:
        with run_at(place) as checkpointer:
            with pytest.raises(cloudckpt.StorageError) as caught:
                checkpointer.latest_step()
            return str(caught.value)

    one, two = pool(on_rank)
    assert one == two


def test_a_failure_that_rank_0_learns_of_later_is_raised_by_every_rank_then(
    pool: RankPool, tmp_path: Path
) -> None:
    place = Place.in_folder(tmp_path / "run")

    def on_rank(rank: int) -> list[str]:
        not_yet: dict[str, Any] = {"failed": property(lambda _: False), "done": lambda _: False}
        with run_at(place, snapshots=2) as checkpointer:
            checkpointer.save(1, numbered(1))
            wait([checkpointer.async_save(1, numbered(1))])
            with (
                mock.patch.multiple(cloudckpt.SaveHandle, **not_yet)
                if rank == 0
                else contextlib.nullcontext()
            ):
                second = checkpointer.async_save(2, numbered(2))
            wait([second])
            with pytest.raises(cloudckpt.CheckpointExistsError) as caught:
                checkpointer.async_save(3, numbered(3))
            assert checkpointer.async_save(4, numbered(4)).result(MINUTES).step == 4
        return caught.value.__notes__

    one, two = pool(on_rank)
    assert one[-1] == two[-1] == "it is the save of step 1 that failed, in the background"


def test_a_failure_is_raised_by_every_rank_at_the_same_call(pool: RankPool, tmp_path: Path) -> None:
    place = Place.in_folder(tmp_path / "run")

    def on_rank(rank: int) -> list[str]:
        ends: list[str] = []
        with run_at(place, snapshots=2) as checkpointer:
            checkpointer.save(1, numbered(1))
            failing = checkpointer.async_save(1, numbered(1))
            if rank == 0:
                while not failing.done():
                    pass
            else:
                assert isinstance(
                    failing.exception(MINUTES), cloudckpt.CheckpointExistsError
                )  # heard here alone
            for step in (2, 3):
                try:
                    ends.append(f"{checkpointer.async_save(step, numbered(step)).result(MINUTES).step}")
                except cloudckpt.CheckpointExistsError as error:
                    ends.append(f"{type(error).__name__}: {error.__notes__[-1]}")
            assert checkpointer.all_steps() == [1, 3]
        return ends

    one, two = pool(on_rank)
    assert (
        one == two == ["CheckpointExistsError: it is the save of step 1 that failed, in the background", "3"]
    )
