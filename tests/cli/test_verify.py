"""``cloudckpt verify``: the status says whether, the lines say where."""

from __future__ import annotations

import datetime as dt
import functools
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt.backends.format import metadata as md
from cloudckpt.cli import output, progress
from support import value_classes as users
from support.commands import at, in_a_pipe, run, save
from support.places import Place

STATE = {"x": torch.arange(400_000.0), "y": torch.ones(10), "epoch": 3}


def damage(place: Place, key: str, byte: int) -> tuple[str, int]:
    """Flip a byte of an item; the object that it is in, and where."""
    stored = md.load(place.read(md.METADATA_NAME), uri=place.uri).storage_data
    (info,) = (info for index, info in stored.items() if index.fqn == key)
    data = bytearray(place.read(info.relative_path))
    data[info.offset + byte] ^= 1
    place.write(info.relative_path, bytes(data))
    return info.relative_path, info.offset + byte


def test_a_sound_checkpoint_is_said_to_be_not_damaged(place: Place) -> None:
    there = save(place, STATE, step=7)
    ran = run("verify", place.uri, place=place)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.splitlines()[0] == there.uri
    assert ran.out.splitlines()[1].startswith("not damaged: ")
    assert ran.out.splitlines()[1].endswith(", 3 items, 1.5 MiB compared")
    told = run("verify", place.uri, "--json", place=place).json
    assert (told["uri"], told["ok"], told["items"], told["damages"]) == (there.uri, True, 3, [])


def test_every_damage_is_listed_with_object_item_and_bytes(place: Place) -> None:
    there = save(place, STATE, step=7)
    name, first = damage(there, "x", 10_000)
    _, second = damage(there, "x", 1_000_000)
    _, third = damage(there, "epoch", 20)
    ran = run("verify", place.uri, "--json", place=place)
    assert (ran.status, ran.json["ok"]) == (1, False)
    found = {(one["object_name"], one["item"]) for one in ran.json["damages"]}
    assert found == {(name, "x"), (name, "epoch")}
    for byte in (first, second, third):
        assert sum(one["offset"] <= byte < one["stop"] for one in ran.json["damages"]) == 1
    assert all(one["stop"] - one["offset"] <= 512 << 10 for one in ran.json["damages"])
    ran = run("verify", there.uri, place=place)
    assert ran.status == 1
    lines = ran.out.splitlines()
    assert lines[1].startswith("damaged in 3 places")
    assert lines[2] == name
    assert sum("item 'x', bytes " in line for line in lines[3:]) == 2
    assert all(line.endswith(": these are not the bytes that were saved") for line in lines[3:])


def test_a_missing_object_and_one_that_is_short_are_damages(folder: Place) -> None:
    there = save(folder, STATE)
    (name,) = there.visible() - {md.METADATA_NAME}
    there.write(name, there.read(name)[:1000])
    short = run("verify", folder.uri)
    assert short.status == 1 and "from byte 1,000: the object has 1,000 bytes and should have" in short.out
    there.remove(name)
    missing = run("verify", folder.uri)
    assert missing.status == 1 and f"{name}\n  the object is missing" in missing.out


def test_damaged_metadata_is_a_damage(folder: Place) -> None:
    there = save(folder, STATE, step=1)
    there.write(md.METADATA_NAME, there.read(md.METADATA_NAME)[:-1])
    ran = run("verify", folder.uri, "--step", "1")
    assert ran.status == 1 and ".metadata\n  the checkpoint's metadata" in ran.out


def test_the_step_asked_for_is_verified(folder: Place) -> None:
    for step in (1, 2):
        save(folder, STATE, step)
    damage(at(folder, 1), "y", 20)
    assert run("verify", folder.uri).status == 0
    assert run("verify", folder.uri, "--step", "1").status == 1
    assert run("verify", folder.uri, "--step", "3").status == 1


def test_items_without_checksums_are_counted(tmp_path: Path) -> None:
    dcp.save(STATE, checkpoint_id=tmp_path / "stock")
    ran = run("verify", str(tmp_path / "stock"))
    assert ran.status == 0
    assert "3 items without checksums" in ran.out


def test_long_work_says_how_far_it_is(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    monkeypatch.setattr(progress.Lines.__init__, "__defaults__", (0.0,))
    save(folder, STATE)
    ran = run("verify", folder.uri, "--json")
    assert ran.json["ok"]
    lines = ran.err.splitlines()
    whole = output.size(ran.json["size"] - len(folder.read(md.METADATA_NAME)))
    assert lines[-1] == f"verifying: {whole} of {whole}"
    assert all(line.startswith("verifying: ") for line in lines)


def test_a_pipe_gets_plain_lines_and_nothing_beside_them(folder: Place) -> None:
    there = save(folder, STATE, step=3)
    name, _ = damage(there, "y", 20)
    ran = in_a_pipe("verify", folder.uri)
    assert (ran.status, ran.err) == (1, "")
    assert ran.out.splitlines()[0] == there.uri and name in ran.out.splitlines()
    assert "\x1b" not in ran.out


def test_a_value_that_would_not_load_is_named_with_its_classes(place: Place) -> None:
    values = {"x": torch.ones(2), "a": {"day": dt.date(2026, 1, 2)}, "f": re.compile("x"), "p": users.Plain()}
    there = save(place, values, step=7)
    ran = run("verify", place.uri, "--json", place=place)
    assert (ran.status, ran.json["ok"], ran.json["damages"]) == (1, False, [])
    plain = "support.value_classes.Plain"
    assert [(one["name"], one["classes"]) for one in ran.json["unloadable"]] == [
        ("f", ["re._compile"]),
        ("p", [plain]),
    ]
    assert ran.json["imports"] == []
    lines = run("verify", there.uri, place=place).out.splitlines()
    assert lines[1].startswith("not damaged: ")
    assert "not loadable without trust: 2 values" in lines
    assert any("item 'f'" in line and "re._compile" in line for line in lines)


def test_classes_of_modules_that_are_not_imported_are_listed(
    folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = save(folder, {"x": torch.ones(2), "m": users.Mode.TRAIN, "c": [users.Config(users.Mode.TEST)]})
    assert cloudckpt.verify(there.uri).imports == ()
    monkeypatch.delitem(sys.modules, users.__name__)
    ran = run("verify", there.uri)
    assert ran.status == 0
    assert "imported before a load: support.value_classes.Config, support.value_classes.Mode" in ran.out
    assert users.__name__ not in sys.modules


def test_values_of_stock_checkpoints_are_proven_as_well(tmp_path: Path) -> None:
    state = {"x": torch.ones(2), "n": np.arange(3), "g": {"f": functools.partial(int, base=2)}}
    dcp.save(state, checkpoint_id=tmp_path / "ckpt", no_dist=True)
    found = cloudckpt.verify(tmp_path / "ckpt")
    assert not found.ok and not found.damages
    assert [(one.name, one.classes) for one in found.unloadable] == [("g.f", ("functools.partial",))]
    assert "'g.f'" in str(found.unloadable[0])


def test_nothing_of_a_value_is_run_when_it_is_verified(folder: Place, tmp_path: Path) -> None:
    there = save(folder, {"x": torch.ones(2), "h": Harm(tmp_path / "harm")})
    assert [one.classes for one in cloudckpt.verify(there.uri).unloadable] == [("posix.system",)]
    assert not (tmp_path / "harm").exists()


def test_a_value_too_large_to_be_loaded_is_counted(folder: Place) -> None:
    there = save(folder, {"x": torch.ones(2), "t": "x" * (1 << 20), "n": 5})
    found = cloudckpt.verify(there.uri, memory_limit=2 << 20)
    assert found.ok and found.unproven == 1
    assert "1 value too large" in run("verify", there.uri, "-o", "memory_limit=2MiB").out


class Harm:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._path}",)
