"""``cloudckpt show``: what a checkpoint holds, from its metadata alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import cloudckpt
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.manage.contents import contents
from cloudckpt.cli.tree import branches
from support.commands import at, run, save
from support.places import Place
from support.ranks import RankPools

STATE = {
    "model": {
        f"layer.{n}.weight": torch.zeros(30, 20, dtype=torch.bfloat16) for n in (2, 10)
    },
    "seen": 1000,
    "loss": torch.tensor(0.5),
}  # fmt: skip


def test_tensors_and_values_are_shown_with_what_they_are(place: Place) -> None:
    there = save(place, STATE, step=7)
    ran = run("show", place.uri, "--json", place=place)
    assert (ran.status, ran.err) == (0, "")
    assert (ran.json["uri"], ran.json["version"]) == (there.uri, cloudckpt.__version__)
    assert len(ran.json["save_id"]) == 32
    tensors = {one.pop("key"): one for one in ran.json["tensors"]}
    box = {"offsets": [0, 0], "sizes": [30, 20]}
    weight = {"dtype": "bfloat16", "shape": [30, 20], "size": 1200, "shards": [box]}
    assert tensors == {
        "loss": {"dtype": "float32", "shape": [], "size": 4, "shards": [{"offsets": [], "sizes": []}]},
        "model.layer.10.weight": weight,
        "model.layer.2.weight": weight,
    }
    assert [one["key"] for one in ran.json["values"]] == ["seen"]
    assert {one["name"] for one in ran.json["objects"]} == there.visible() - {md.METADATA_NAME}
    assert all(one["size"] == len(there.read(one["name"])) for one in ran.json["objects"])

    said = run("show", there.uri, place=place).out
    assert said.splitlines()[0] == there.uri
    assert "3 tensors of 2.3 KiB, 1 value, 1 object" in said
    assert f"by cloudckpt {cloudckpt.__version__}\nsave {ran.json['save_id']}\n" in said
    assert said.index("2.weight  bfloat16 [30, 20], 1.2 KiB") < said.index("10.weight  bfloat16")


def test_the_newest_step_is_shown_or_the_one_asked_for(folder: Place) -> None:
    for step in (9, 10):
        save(folder, {f"t{step}": torch.zeros(10)}, step)
    assert [one["key"] for one in run("show", folder.uri, "--json").json["tensors"]] == ["t10"]
    assert [one["key"] for one in run("show", folder.uri, "--step", "9", "--json").json["tensors"]] == ["t9"]
    missing = run("show", folder.uri, "--step", "11")
    assert missing.status == 1 and at(folder, 11).uri in missing.err


def save_split(rank: int, place: Place) -> None:
    mesh = init_device_mesh("cpu", (2,))
    tensor = distribute_tensor(torch.arange(40.0), mesh, [Shard(0)])
    dcp.save({"t": tensor, "same": torch.ones(3)}, storage_writer=place.writer())


def test_shards_are_counted(folder: Place, rank_pool: RankPools) -> None:
    rank_pool(2)(save_split, folder)
    (same, split) = run("show", folder.uri, "--json").json["tensors"]
    assert (same["key"], len(same["shards"])) == ("same", 1)
    assert split["shards"] == [{"offsets": [0], "sizes": [20]}, {"offsets": [20], "sizes": [20]}]
    assert split["shape"] == [40] and split["size"] == 160
    assert "t  float32 [40], 160 B, 2 shards" in run("show", folder.uri).out


def test_what_a_stock_writer_wrote_is_shown_as_another_writers(tmp_path: Path) -> None:
    dcp.save({"t": torch.zeros(10)}, checkpoint_id=tmp_path / "stock")
    ran = run("show", str(tmp_path / "stock"))
    assert ran.status == 0
    assert "by another writer than cloudckpt" in ran.out
    assert run("show", str(tmp_path / "stock"), "--json").json["version"] is None


def test_names_that_would_steer_the_terminal_are_spelt_out(folder: Place) -> None:
    save(folder, {"a\x1b[2Jb\nc": torch.zeros(1), "ü.\u202e": 1})
    ran = run("show", folder.uri)
    assert r"a\x1b[2Jb\nc" in ran.out and r"ü.\u202e" in ran.out
    assert "\x1b" not in ran.out and "\u202e" not in ran.out
    assert {one["key"] for one in run("show", folder.uri, "--json").json["tensors"]} == {"a\x1b[2Jb\nc"}


def test_a_tree_is_no_deeper_than_a_terminal_is_wide(folder: Place) -> None:
    deep = ["a" + ".a" * n for n in range(200)]
    there = save(folder, dict.fromkeys(deep, 1))
    data = there.read(md.METADATA_NAME)
    at_root = branches(contents(md.load(data, uri=there.uri), there.uri))
    levels = 0
    while at_root.branches:
        at_root = max(at_root.branches.values(), key=lambda one: len(one.branches))
        levels += 1
    assert levels == 10
    assert run("show", folder.uri).out.count("value") == 200 + 1


@pytest.mark.parametrize("command", ["show", "verify"])
def test_a_place_without_a_checkpoint_is_found_wanting(place: Place, command: str) -> None:
    ran = run(command, place.uri, "--json", place=place)
    assert (ran.status, ran.out) == (1, "")
    assert "there is no committed checkpoint here" in ran.err


def test_metadata_that_is_damaged_is_an_error_of_one_block(folder: Place) -> None:
    there = save(folder, STATE)
    data = bytearray(there.read(md.METADATA_NAME))
    data[50] ^= 1
    there.write(md.METADATA_NAME, bytes(data))
    ran = run("show", folder.uri)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("error: the checkpoint's metadata is damaged") and ran.err.count("\n") == 1
