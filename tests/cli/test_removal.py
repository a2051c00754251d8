"""``cloudckpt rm``, ``prune`` and ``gc``: nothing goes that was not asked for."""

from __future__ import annotations

import pytest
import torch

from support.commands import Ran, at, on_a_terminal, run, save
from support.places import Place

STATE = {"t": torch.ones(1000), "epoch": 1}
MARKER = f".cloudckpt-save.{'0' * 32}"
LEFT = f"__0_0.{'0' * 32}.distcp"


def steps_of(place: Place) -> set[int]:
    return {int(name.partition("/")[0].removeprefix("step-")) for name in place.visible()}


def fill(place: Place, *steps: int) -> None:
    for step in steps:
        save(place, STATE, step)


def test_rm_deletes_one_checkpoint(place: Place) -> None:
    fill(place, 1, 2)
    names = sorted(at(place, 1).visible())
    dry = run("rm", place.uri, "--step", "1", "--dry-run", "--json", place=place)
    expected = {"uri": at(place, 1).uri, "dry_run": True, "deleted": names}
    assert (dry.status, dry.json) == (0, expected)
    assert steps_of(place) == {1, 2}
    ran = run("rm", place.uri, "--step", "1", "--yes", "--json", place=place)
    assert (ran.status, ran.json) == (0, {**expected, "dry_run": False})
    assert steps_of(place) == {2}
    ran = run("rm", at(place, 2).uri, "--yes", place=place)
    assert (ran.status, ran.out) == (0, f"deleted {at(place, 2).uri}, 2 objects\n")
    assert place.visible() == set()


def test_a_pinned_step_is_neither_pruned_nor_removed(place: Place) -> None:
    fill(place, 1, 2, 3)
    ran = run("pin", place.uri, "--step", "1", "--json", place=place)
    assert (ran.status, ran.json) == (0, {"uri": place.uri, "step": 1, "pinned": True})
    assert "committed, pinned" in run("ls", place.uri, place=place).out
    assert run("prune", place.uri, "--keep-last", "1", "--yes", place=place).status == 0
    assert steps_of(place) == {1, 3}
    ran = run("rm", at(place, 1).uri, "--yes", place=place)
    assert ran.status == 1 and "pinned" in ran.err and "cloudckpt unpin" in ran.err
    assert run("unpin", place.uri, "--step", "1", place=place).out == f"step 1 of {place.uri} is not pinned\n"
    assert run("rm", at(place, 1).uri, "--yes", place=place).status == 0
    assert steps_of(place) == {3}
    assert run("pin", place.uri, "--step", "1", place=place).status == 1


def test_prune_keeps_a_step_for_each_stretch_of_time(folder: Place) -> None:
    fill(folder, 1, 2, 3)
    ran = run("prune", folder.uri, "--keep-last", "1", "--keep-every", "6h", "--yes", "--json")
    assert [one["step"] for one in ran.json["deleted"]] == [2]
    ran = run("prune", folder.uri, "--keep-last", "1", "--keep-every", "often", "--yes")
    assert ran.status == 2 and "neither a number of steps nor a time" in ran.err


def test_rm_of_what_is_not_there_is_found_wanting(place: Place) -> None:
    fill(place, 1)
    ran = run("rm", place.uri, "--step", "2", "--yes", "--json", place=place)
    assert (ran.status, ran.out) == (1, "")
    assert "no committed checkpoint to delete" in ran.err and at(place, 2).uri in ran.err
    assert steps_of(place) == {1}


def test_rm_of_a_whole_run_is_a_misuse(folder: Place) -> None:
    fill(folder, 1, 2)
    ran = run("rm", folder.uri, "--yes")
    assert (ran.status, ran.out) == (2, "")
    assert "Say which with --step; the newest is 2" in ran.err
    assert steps_of(folder) == {1, 2}


def test_prune_keeps_what_it_is_told_to(place: Place) -> None:
    fill(place, *range(1, 7))
    arguments = ("prune", place.uri, "--keep-last", "2", "--keep-every", "3")
    dry = run(*arguments, "--dry-run", "--json", place=place)
    assert dry.status == 0 and dry.json["dry_run"]
    assert [one["step"] for one in dry.json["deleted"]] == [1, 2, 4]
    assert steps_of(place) == set(range(1, 7))
    said = run(*arguments, "--dry-run", place=place).out
    assert [line.split()[0] for line in said.splitlines()[1:-1]] == ["1", "2", "4"]
    assert said.splitlines()[-1].startswith("would delete 3 steps of 6, ")
    ran = run(*arguments, "--yes", place=place)
    assert (ran.status, ran.out.splitlines()[-1].startswith("deleted 3 steps of 6, ")) == (0, True)
    assert steps_of(place) == {3, 5, 6}
    assert run(*arguments, "--yes", "--json", place=place).json["deleted"] == []


def test_prune_leaves_what_is_not_committed_alone(folder: Place) -> None:
    fill(folder, 2, 3)
    at(folder, 2).write(MARKER, b"a save that replaces it")
    save(folder.child("step-1"), STATE)
    fill(folder, 1)
    at(folder, 1).remove(".metadata")
    assert run("prune", folder.uri, "--keep-last", "1", "--yes", "--json").json["deleted"][0]["step"] == 2
    left = {name.partition("/")[0] for name in folder.visible()}
    assert left == {"step-0000000001", "step-0000000002", "step-0000000003", "step-1"}
    assert {name for name in folder.visible() if "0002" in name} == {f"step-0000000002/{MARKER}"}


def test_gc_collects_what_dead_saves_left(place: Place) -> None:
    fill(place, 1)
    there = at(place, 1)
    there.write(LEFT, b"left by a save that was killed")
    assert run("gc", place.uri, "--yes", "--json", place=place).json["objects"] == []  # too young
    dry = run("gc", place.uri, "--older-than", "0s", "--dry-run", "--json", place=place)
    assert dry.status == 0
    assert (dry.json["uri"], dry.json["dry_run"]) == (place.uri, True)
    assert dry.json["objects"] == [f"step-0000000001/{LEFT}"]
    assert LEFT in there.visible()
    said = run("gc", place.uri, "--older-than", "0s", "--dry-run", place=place).out
    assert f"objects\n  step-0000000001/{LEFT}\n" in said
    assert said.endswith("would delete 0 uploads, 1 object of 30 B, 0 traces of saves\n")
    assert run("gc", place.uri, "--older-than", "0s", "--yes", place=place).status == 0
    assert LEFT not in there.visible()
    assert run("verify", there.uri, place=place).status == 0
    again = run("gc", place.uri, "--older-than", "0s", "--yes", place=place)
    assert (again.status, again.out) == (0, "nothing to collect\n")


def test_gc_leaves_a_save_in_progress_alone(folder: Place) -> None:
    fill(folder, 1)
    for name in (MARKER, LEFT):
        at(folder, 1).write(name, b"of a save in progress")
    assert run("gc", folder.uri, "--older-than", "0s", "--yes").out == "nothing to collect\n"
    assert {MARKER, LEFT} < at(folder, 1).visible()


DELETING = {
    "rm": ("rm", "--step", "1"),
    "prune": ("prune", "--keep-last", "1"),
    "gc": ("gc", "--older-than", "0s"),
}


@pytest.mark.parametrize("command", DELETING.values(), ids=DELETING)
def test_without_a_terminal_nothing_is_asked_and_nothing_deleted(
    folder: Place, command: tuple[str, ...]
) -> None:
    fill(folder, 1, 2)
    before = folder.visible()
    ran = run(*command, folder.uri)
    assert (ran.status, ran.out) == (2, "")
    assert "--yes" in ran.err and "--dry-run" in ran.err
    assert folder.visible() == before


def on_terminal(folder: Place, command: tuple[str, ...], typed: str) -> Ran:
    fill(folder, 1, 2)
    at(folder, 2).write(LEFT, b"left by a save that was killed")
    return on_a_terminal(*command, folder.uri, typed=typed)


@pytest.mark.parametrize("command", DELETING.values(), ids=DELETING)
def test_on_a_terminal_a_yes_deletes(folder: Place, command: tuple[str, ...]) -> None:
    ran = on_terminal(folder, command, "maybe\ny\n")
    assert ran.status == 0
    assert "Delete" in ran.out and "[y/n]" in ran.out
    assert ran.out.count("deleted ") == 1
    if command[0] == "gc":
        assert LEFT not in at(folder, 2).visible()
    else:
        assert steps_of(folder) == {2}


@pytest.mark.parametrize("typed", ["n\n", "\n", "\x04"], ids=["no", "nothing", "the end"])
def test_on_a_terminal_anything_else_deletes_nothing(folder: Place, typed: str) -> None:
    ran = on_terminal(folder, DELETING["rm"], typed)
    assert ran.status == 1
    assert ran.out.endswith("nothing was deleted\n")
    assert steps_of(folder) == {1, 2}
