"""The folder store after a power cut: every folder that POSIX allows is built, and its steps are loaded."""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

import cloudckpt
from cloudckpt import retention
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.convert.convert import convert
from cloudckpt.backends.copy.copy import copy_checkpoint
from cloudckpt.backends.errors import CheckpointError
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.local import durable_io
from cloudckpt.backends.stores.local import store as local
from cloudckpt.retention import PruningWriter, Retention
from cloudckpt.run import Run
from support import power_cuts, roles

Name = str
"""Whose state a step holds."""
SHORT, LONG = (512, 2), (65536, 6)
"""Folders after one cut, at most, and pieces of a file that may be there or not."""


@dataclass(frozen=True)
class Scenario:
    """What is there before, what is done, and what there is to be seen of it."""

    act: Callable[[Path], object]
    before: Callable[[Path], object] = lambda _: None
    always: tuple[tuple[str, frozenset[Name]], ...] = ()
    """Steps that are there at any moment, and the states that each may hold."""
    done: tuple[tuple[str, Name], ...] = ()
    """Steps that are there once the act has returned."""
    either: tuple[tuple[str, Name], ...] = ()
    """Steps of which one is there at any moment."""
    load: Callable[[Path, str], dict[str, torch.Tensor]] = lambda root, step: roles.load(str(root / step))
    listed: Callable[[Path], list[str]] = lambda root: [
        one.parent.relative_to(root).as_posix() for one in root.rglob(".metadata")
    ]


@dataclass
class Verdict:
    """What was found in all folders."""

    folders: int = 0
    unloadable: int = 0
    vanished: int = 0
    worst: str = ""

    def __str__(self) -> str:
        return f"{self.folders} folders, {self.unloadable} unloadable, {self.vanished} vanished"


def step(number: int) -> str:
    return Run(Target.parse("memory://x")).folder(number)


def save(root: Path, number: int, name: Name, *, overwrite: bool = False) -> None:
    uri = str(root / "run" / step(number))
    roles.save_by(cloudckpt.StorageWriter(uri, overwrite=overwrite, concurrency=1), name)


def save_and_prune(root: Path, number: int, name: Name) -> None:
    run = Run(Target.parse(str(root / "run"), concurrency=1))
    roles.save_by(PruningWriter(run, number, Retention(keep_last=1), clears=True), name)


def stock_save(root: Path, number: int, name: Name, *, threads: int = 1) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an overwrite
        roles.save_by(FileSystemWriter(root / "run" / step(number), thread_count=threads), name)


def stock_load(root: Path, at: str) -> dict[str, torch.Tensor]:
    state = {name: torch.zeros_like(tensor) for name, tensor in roles.state_of("").items()}
    dcp.load(state, storage_reader=FileSystemReader(root / at), no_dist=True)
    return state


def saved(*steps: tuple[int, Name]) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        for number, name in steps:
            save(root, number, name)

    return act


def stock_saved(*steps: tuple[int, Name]) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        for number, name in steps:
            stock_save(root, number, name)

    return act


def at(number: int) -> str:
    return f"run/{step(number)}"


def made_and_saved(root: Path) -> None:
    """Save into a folder that another process made and did not live to sync."""
    (root / "run").mkdir()
    (root / "run" / step(1)).mkdir()
    save(root, 1, "a")


def copied(root: Path) -> None:
    copy_checkpoint(str(root / at(1)), str(root / "copies" / step(1)))


def converted(root: Path, *, to: str) -> None:
    convert(str(root / at(1)), str(root / "out" / to), to=None if "." in to else "checkpoint")


def load_file(root: Path, name: str) -> dict[str, torch.Tensor]:
    if name.endswith(".pt"):
        loaded: dict[str, torch.Tensor] = torch.load(root / name, weights_only=True)
        return loaded
    return roles.load(str(root / name))


def files_and_steps(root: Path) -> list[str]:
    found = [one.parent.relative_to(root).as_posix() for one in root.rglob(".metadata")]
    return found + [one.relative_to(root).as_posix() for one in root.rglob("*.pt")]


A, AB = frozenset({"a"}), frozenset({"a", "b"})
OURS = {
    "first save": Scenario(functools.partial(save, number=1, name="a"), done=((at(1), "a"),)),
    "first save, folders just made": Scenario(made_and_saved, done=((at(1), "a"),)),
    "second step": Scenario(
        functools.partial(save, number=2, name="b"),
        saved((1, "a")),
        ((at(1), A),),
        ((at(1), "a"), (at(2), "b")),
    ),
    "overwrite": Scenario(
        functools.partial(save, number=1, name="b", overwrite=True),
        saved((1, "a")),
        ((at(1), AB),),
        ((at(1), "b"),),
    ),
    "retention": Scenario(
        functools.partial(save_and_prune, number=3, name="b"),
        saved((1, "c"), (2, "a")),
        (),
        ((at(3), "b"),),
        ((at(2), "a"), (at(3), "b")),
    ),
    "cp": Scenario(copied, saved((1, "a")), ((at(1), A),), ((at(1), "a"), (f"copies/{step(1)}", "a"))),
    "convert to a checkpoint": Scenario(
        functools.partial(converted, to="whole"),
        saved((1, "a")),
        ((at(1), A),),
        (("out/whole", "a"),),
    ),
    "convert to a file": Scenario(
        functools.partial(converted, to="whole.pt"),
        saved((1, "a")),
        ((at(1), A),),
        (("out/whole.pt", "a"),),
        load=load_file,
        listed=files_and_steps,
    ),
}
STOCK = {
    "first save": Scenario(
        functools.partial(stock_save, number=1, name="a"), done=((at(1), "a"),), load=stock_load
    ),
    "second step": Scenario(
        functools.partial(stock_save, number=2, name="b"),
        stock_saved((1, "a")),
        ((at(1), A),),
        ((at(1), "a"), (at(2), "b")),
        load=stock_load,
    ),
    "overwrite": Scenario(
        functools.partial(stock_save, number=1, name="b"),
        stock_saved((1, "a")),
        ((at(1), AB),),
        ((at(1), "b"),),
        load=stock_load,
    ),
    "first save, two threads": Scenario(
        functools.partial(stock_save, number=1, name="a", threads=2), done=((at(1), "a"),), load=stock_load
    ),
}


def judge(
    case: Scenario, tmp_path: Path, most: tuple[int, int], full_at: int | None = None
) -> tuple[Verdict, bool]:
    """Do it, and look at every folder after a cut; also return whether the disk became full."""
    verdict, root, trial = Verdict(), tmp_path / "disk", tmp_path / "trial"
    root.mkdir()
    case.before(root)
    with power_cuts.recorded(root, full_at) as (recording, full):
        try:
            case.act(root)
        except (CheckpointError, OSError):
            done = None
            assert full_at is not None
        else:
            recording.look()
            done = recording.length
    known: dict[tuple[tuple[str, bytes | None], ...], dict[str, Name | None]] = {}
    for count, tree in power_cuts.after_cuts(recording, *most):
        key = tuple(sorted(tree.items()))
        if key not in known:
            known[key] = _held(case, tree, trial)
        _count(verdict, case, known[key], done=done is not None and count >= done)
    return verdict, full_at is not None and full.writes > full_at


def _held(case: Scenario, tree: power_cuts.Tree, trial: Path) -> dict[str, Name | None]:
    """Return what each listed step holds, None for one that does not load."""
    power_cuts.build(tree, trial)
    held: dict[str, Name | None] = {}
    for one in case.listed(trial):
        try:
            loaded = case.load(trial, one)
        except (Exception, CheckpointException):  # noqa: BLE001 - of whatever class: it does not load
            held[one] = None
            continue
        same = [name for name in "abc" if _is_state_of(loaded, name)]
        held[one] = same[0] if same else None
    return held


def _is_state_of(loaded: dict[str, torch.Tensor], name: Name) -> bool:
    return all(torch.equal(loaded[key], value) for key, value in roles.state_of(name).items())


def _count(verdict: Verdict, case: Scenario, held: dict[str, Name | None], *, done: bool) -> None:
    verdict.folders += 1
    unloadable = [one for one, name in held.items() if name is None]
    vanished = [one for one, names in case.always if one not in held or held[one] not in {*names, None}]
    if done:
        vanished += [one for one, name in case.done if one not in held or held[one] not in (name, None)]
    if case.either and not any(held.get(one) == name for one, name in case.either):
        vanished.append(f"{case.either}")
    verdict.unloadable += bool(unloadable)
    verdict.vanished += bool(vanished)
    if (unloadable or vanished) and not verdict.worst:
        verdict.worst = f"unloadable {unloadable}, vanished {vanished}, of {held}, done {done}"


def report(what: str, verdict: Verdict, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"[{what}: {verdict}] ", end="", flush=True)  # noqa: T201 - for the table of the guide


@pytest.mark.parametrize("most", [SHORT, pytest.param(LONG, marks=pytest.mark.soak)], ids=["short", "long"])
@pytest.mark.parametrize("what", OURS)
def test_whatever_a_power_cut_leaves_every_listed_step_loads_and_no_committed_one_is_gone(
    what: str, most: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict, _ = judge(OURS[what], tmp_path, most)
    report(what, verdict, capsys)
    assert verdict.folders > 20
    assert (verdict.unloadable, verdict.vanished) == (0, 0), verdict.worst


@pytest.mark.parametrize("most", [SHORT, pytest.param(LONG, marks=pytest.mark.soak)], ids=["short", "long"])
@pytest.mark.parametrize("what", STOCK)
def test_the_model_finds_what_stock_dcp_loses(
    what: str, most: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict, _ = judge(STOCK[what], tmp_path, most)
    report(f"stock, {what}", verdict, capsys)
    assert verdict.vanished > 0


FULL = (
    "first save",
    "second step",
    "overwrite",
    "retention",
    "cp",
    "convert to a checkpoint",
    "convert to a file",
)


@pytest.mark.parametrize(
    "most", [(64, 2), pytest.param((4096, 4), marks=pytest.mark.soak)], ids=["short", "long"]
)
@pytest.mark.parametrize("what", FULL)
def test_a_disk_that_is_full_from_any_write_on_and_a_power_cut_lose_nothing(
    what: str, most: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total, room = Verdict(), 0
    for room in itertools.count():
        (tmp_path / f"{room}").mkdir()
        verdict, was_full = judge(OURS[what], tmp_path / f"{room}", most, full_at=room)
        total.folders += verdict.folders
        total.unloadable += verdict.unloadable
        total.vanished += verdict.vanished
        total.worst = total.worst or (verdict.worst and f"with room for {room} writes: {verdict.worst}")
        if not was_full:
            break
    report(f"full disk, {what}", total, capsys)
    assert total.folders > 20 and room > 1
    assert (total.unloadable, total.vanished) == (0, 0), total.worst


# What follows breaks the store on purpose: a model that finds nothing there would prove nothing.


def broken(what: str, tmp_path: Path) -> Verdict:
    return judge(OURS[what], tmp_path, SHORT)[0]


def test_folders_that_are_not_synced_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable_io, "sync_folder", lambda _: None)
    assert broken("second step", tmp_path).vanished > 0


def test_a_folder_of_somebody_else_that_is_not_synced_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable_io, "sync_above", lambda _: None)
    assert broken("first save, folders just made", tmp_path).vanished > 0


class _Unsynced:
    """The module ``os``, but for the calls that make the bytes of a file durable."""

    def __getattr__(self, name: str) -> object:
        return (lambda _: None) if name in ("fsync", "fdatasync") else getattr(os, name)


def test_bytes_that_are_not_synced_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "os", _Unsynced())
    assert broken("overwrite", tmp_path).unloadable > 0


def test_a_deletion_in_one_step_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata that is deleted with its objects may stay without them."""

    def at_once(target: Target) -> bool:
        with open_store(target) as store:
            store.delete([info.name for info in store.list().objects])
        return True

    monkeypatch.setattr(retention, "delete_unread", at_once)
    assert broken("retention", tmp_path).unloadable > 0
