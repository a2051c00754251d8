"""A run against a model: saves, loads, damage, kills and rollbacks, with a dict as the oracle."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine

import cloudckpt
from cloudckpt import Checkpointer
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.load.read_lease import put_lease
from cloudckpt.backends.manage.set_aside import ASIDE
from cloudckpt.executor import ProcessExecutor
from cloudckpt.run import Run
from support.one_executor import one_executor
from support.places import Place
from support.servers import S3Server

STEPS = st.integers(0, 9)
MORE = st.integers(1, 3)
METRICS = st.integers(-5, 5).map(float)


@dataclass
class Model:
    """A run as a user thinks of it."""

    keep_last: int | None
    keep_every: int | None
    keep_best: int | None
    values: dict[int, float] = field(default_factory=dict)
    """Committed steps, and the value that each holds."""
    metrics: dict[int, float] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)
    pinned: set[int] = field(default_factory=set)
    loaded: int | None = None
    resumed: bool = False
    """The newest step was loaded."""
    own: set[int] = field(default_factory=set)
    """Steps that this process has tried to save."""
    aside: int = 0
    """Checkpoints that were set aside."""

    @property
    def newest(self) -> int | None:
        return max(self.values, default=None)

    def commit(self, step: int, value: float, metric: float | None) -> None:
        self.values[step] = value
        self.damaged.discard(step)
        self.metrics.pop(step, None)
        if metric is not None:
            self.metrics[step] = metric

    def refuses(self, step: int) -> bool:
        newer = {one for one in self.values if one > step}
        return bool(newer) and not (self.resumed and newer <= self.own)

    def retain(self, saved: int, loading: int | None) -> None:
        """Delete what the policy does not keep, in the order of the documentation."""
        if self.keep_last is None:
            return
        counted = [step for step in sorted(self.values) if step not in self.pinned]
        kept = {*counted[-self.keep_last :], *self.pinned, saved, self.loaded, loading}
        if self.keep_every is not None:
            kept |= {step for step in counted if step % self.keep_every == 0}
        if self.keep_best is not None:
            known = [(self.metrics[step], step) for step in counted if step in self.metrics]
            kept |= {step for _, step in sorted(known)[-self.keep_best :]}
        for step in set(self.values) - kept:
            self.forget(step)

    def forget(self, step: int) -> None:
        del self.values[step]
        self.metrics.pop(step, None)
        self.damaged.discard(step)

    def set_aside(self, step: int) -> None:
        self.forget(step)
        self.aside += 1


class Machine(RuleBasedStateMachine):
    """The run under test, and its model beside it."""

    executor: ProcessExecutor
    places: ClassVar[Iterator[Place]]
    killed = False

    @initialize(
        keep_last=st.integers(1, 3) | st.none(),
        keep_every=st.integers(2, 4) | st.none(),
        keep_best=st.integers(1, 2) | st.none(),
    )
    def begin(self, keep_last: int | None, keep_every: int | None, keep_best: int | None) -> None:
        if keep_last is None:
            keep_every = keep_best = None
        self.model = Model(keep_last, keep_every, keep_best)
        self.place = next(self.places)
        self.checkpointer = self.made()
        self.values = iter(range(1, 1000))

    def made(self) -> Checkpointer:
        model = self.model
        return Checkpointer(
            self.place.uri,
            keep_last=model.keep_last,
            keep_every=model.keep_every,
            keep_best=model.keep_best,
            preemption_grace=None,
            progress=False,
            **self.place.options,
        )

    def metric(self, metric: float) -> float | None:
        return metric if self.model.keep_best is not None else None

    def state(self) -> dict[str, torch.Tensor]:
        return {"t": torch.zeros(100)}

    @rule(more=MORE, metric=METRICS, reads=st.booleans())
    def save_next(self, more: int, metric: float, reads: bool) -> None:
        self.save(self.next(more), metric, reads)

    @rule(more=st.tuples(MORE, MORE, MORE), metric=METRICS)
    def save_three(self, more: tuple[int, int, int], metric: float) -> None:
        for one in more:
            self.save(self.next(one), metric, reads=False)

    @rule(step=STEPS, metric=METRICS)
    def save_any(self, step: int, metric: float) -> None:
        self.save(step, metric, reads=False)

    def next(self, more: int) -> int:
        return more + (self.model.newest if self.model.newest is not None else -1)

    def save(self, step: int, metric: float, reads: bool) -> None:
        """Save, with ``reads`` while another process loads the oldest step."""
        model, value = self.model, float(next(self.values))
        loading = min(model.values, default=None) if reads else None
        with contextlib.ExitStack() as stack:
            if loading is not None:
                lease = put_lease(self.run.at(loading), 0)
                assert lease is not None
                stack.callback(lease.end)
            stack.callback(model.own.add, step)
            if step in model.values:
                stack.enter_context(pytest.raises(cloudckpt.CheckpointExistsError))
            elif model.refuses(step):
                stack.enter_context(pytest.raises(cloudckpt.ConfigurationError, match="below the newest"))
            self.checkpointer.save(step, {"t": torch.full((100,), value)}, metric=self.metric(metric))
            model.commit(step, value, self.metric(metric))
            model.retain(step, loading)

    @precondition(lambda self: not self.killed)  # a new process takes seconds
    @rule(more=MORE, metric=METRICS)
    def crash(self, more: int, metric: float) -> None:
        """Kill the checkpoint process during a save. The step is whole then, or not there."""
        model, value, step = self.model, float(next(self.values)), self.next(more)
        self.killed, before = True, set(model.values)
        model.own.add(step)
        handle = self.checkpointer.async_save(
            step, {"t": torch.full((100,), value)}, metric=self.metric(metric)
        )
        if (pid := type(self).executor.pid) is not None:
            os.kill(pid, signal.SIGKILL)
        error = handle.exception(60)
        there = self.run.is_committed(step)
        assert there or error is not None
        if there and step not in before:
            model.commit(step, value, self.metric(metric))
        # Retention may have come to any part of its work.
        for gone in before - set(self.run.steps()):
            shadow = copy.deepcopy(model)
            shadow.retain(step, None)
            assert gone not in shadow.values
            model.forget(gone)

    @rule()
    def restart(self) -> None:
        """Go on as another process would."""
        self.checkpointer = self.made()
        self.model.loaded, self.model.resumed = None, False
        self.model.own.clear()

    @rule()
    def load_newest(self) -> None:
        self.load_one(self.model.newest, None)

    @precondition(lambda self: self.model.values)
    @rule(data=st.data(), discard=st.booleans())
    def load(self, data: st.DataObject, discard: bool) -> None:
        step = data.draw(st.sampled_from(sorted(self.model.values)))
        self.load_one(step, step, discard_newer=discard)

    def load_one(self, expected: int | None, asked: int | None, *, discard_newer: bool = False) -> None:
        state, model = self.state(), self.model
        with contextlib.ExitStack() as stack:
            if expected is None:
                stack.enter_context(pytest.raises(cloudckpt.CheckpointNotFoundError))
            elif expected in model.damaged:
                stack.enter_context(pytest.raises(cloudckpt.IntegrityError))
            assert self.checkpointer.load(state, asked, discard_newer=discard_newer) == expected
            assert expected is not None
            assert torch.equal(state["t"], torch.full((100,), model.values[expected]))
            model.loaded, model.resumed = expected, discard_newer or expected == model.newest
            if discard_newer:
                self.rolled_back(expected)

    @rule()
    def fall_back(self) -> None:
        state, model = self.state(), self.model
        whole = [step for step in model.values if step not in model.damaged]
        if not whole:
            with pytest.raises((cloudckpt.IntegrityError, cloudckpt.CheckpointNotFoundError)):
                self.checkpointer.load(state, fallback=True)
            return
        assert self.checkpointer.load(state, fallback=True) == max(whole)
        assert torch.equal(state["t"], torch.full((100,), model.values[max(whole)]))
        model.loaded, model.resumed = max(whole), True
        self.rolled_back(max(whole))  # all above are damaged

    @precondition(lambda self: self.model.values)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.model.values)))
        newer = sorted(one for one in self.model.values if one > step)
        assert self.checkpointer.rollback(step) == newer
        self.rolled_back(step)

    def rolled_back(self, step: int) -> None:
        for newer in [one for one in self.model.values if one > step]:
            self.model.set_aside(newer)

    @precondition(lambda self: len(self.model.values) > 1)
    @rule(data=st.data())
    def cut_off_rollback(self, data: st.DataObject) -> None:
        """Kill a rollback between two steps: the newest step is the one of before."""
        ordered = sorted(self.model.values)
        newer = data.draw(st.integers(1, len(ordered) - 1))
        done = data.draw(st.integers(0, newer - 1))
        real, calls = Run.set_aside, iter(range(100))

        def cut(run: Run, step: int) -> bool:
            if next(calls) == done:
                raise KeyboardInterrupt
            return real(run, step)

        with mock.patch.object(Run, "set_aside", cut), pytest.raises(KeyboardInterrupt):
            self.checkpointer.rollback(ordered[-1 - newer])
        for step in ordered[-newer:][:done]:
            self.model.set_aside(step)

    @precondition(lambda self: self.model.values)
    @rule(data=st.data(), kind=st.sampled_from(["flip", "cut", "delete", "metadata"]))
    def damage(self, data: st.DataObject, kind: str) -> None:
        step = data.draw(st.sampled_from(sorted(self.model.values)))
        if step in self.model.damaged:
            return  # the same bit twice is no damage
        there = self.place.child(self.run.folder(step))
        names = sorted(name for name in there.visible() if name.endswith(".distcp"))
        name = md.METADATA_NAME if kind == "metadata" else names[0] if names else None
        if name is None:
            return
        stored = bytearray(there.read(name))
        stored[len(stored) // 2] ^= 1
        if kind == "flip":
            info = next(iter(md.load(there.read(md.METADATA_NAME), uri="", name="").storage_data.values()))
            stored = bytearray(there.read(name))
            stored[info.offset + info.length // 2] ^= 1
        if kind == "delete":
            there.remove(name)
        else:
            there.write(name, bytes(stored[:-100] if kind == "cut" else stored))
        self.model.damaged.add(step)

    @precondition(lambda self: self.model.values)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.model.values)))
        self.checkpointer.pin(step)
        self.model.pinned.add(step)

    @precondition(lambda self: self.model.values)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.model.values)))
        self.checkpointer.unpin(step)
        self.model.pinned.discard(step)

    @property
    def run(self) -> Run:
        return self.checkpointer._run

    @invariant()
    def the_run_has_the_steps_of_the_model(self) -> None:
        if not hasattr(self, "model"):
            return
        assert self.checkpointer.all_steps() == sorted(self.model.values)
        assert self.checkpointer.latest_step() == self.model.newest

    @invariant()
    def what_was_set_aside_is_still_stored(self) -> None:
        if hasattr(self, "model"):
            names = self.place.visible()
            assert sum(ASIDE.fullmatch(name) is not None for name in names) == self.model.aside

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        for step, value in self.model.values.items():
            if step not in self.model.damaged:
                state = self.state()
                assert self.checkpointer.load(state, step) == step
                assert torch.equal(state["t"], torch.full((100,), value))


@pytest.fixture
def executor() -> Iterator[ProcessExecutor]:
    with one_executor() as executor:
        yield executor


def check(executor: ProcessExecutor, places: Iterator[Place], examples: int, steps: int) -> None:
    machine = type("Machine", (Machine,), {"places": places, "executor": executor})
    run_machine(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=[Phase.generate],  # a kill comes at another moment each time: nothing shrinks
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def in_folders(tmp_path: Path) -> Iterator[Place]:
    while True:
        yield Place.in_folder(tmp_path / uuid.uuid4().hex)


def on_moto(moto: S3Server) -> Iterator[Place]:
    bucket = Place.on_server(moto, moto.new_bucket())
    while True:
        yield bucket.child(uuid.uuid4().hex)


def test_a_run_in_a_folder_keeps_what_the_model_keeps(executor: ProcessExecutor, tmp_path: Path) -> None:
    check(executor, in_folders(tmp_path), examples=12, steps=20)


def test_a_run_on_s3_keeps_what_the_model_keeps(executor: ProcessExecutor, moto: S3Server) -> None:
    check(executor, on_moto(moto), examples=4, steps=15)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_thousand_runs_in_folders(executor: ProcessExecutor, tmp_path: Path) -> None:
    check(executor, in_folders(tmp_path), examples=1000, steps=40)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_three_hundred_runs_on_s3(executor: ProcessExecutor, moto: S3Server) -> None:
    check(executor, on_moto(moto), examples=300, steps=30)
