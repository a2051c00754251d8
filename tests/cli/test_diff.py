"""``cloudckpt diff``: what two checkpoints don't share, told without reading their data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from support.commands import Ran, at, run, save
from support.places import Place
from support.ranks import RankPools


def state(**more: Any) -> dict[str, Any]:
    return {"x": torch.arange(100_000.0), "y": torch.ones(10), "epoch": 3, **more}


def compared(first: Place, second: Place) -> Ran:
    return run("diff", first.uri, second.uri, "--json", place=first)


def test_checkpoints_of_the_same_state_do_not_differ(place: Place) -> None:
    one, other = save(place, state(), step=1), save(place, state(), step=2)
    ran = compared(one, other)
    assert (ran.status, ran.err) == (0, "")
    assert not ran.json["different"] and ran.json["same"] == 3
    assert run("diff", one.uri, other.uri, place=place).out.splitlines()[2:] == ["the same: 3 keys"]


def test_keys_forms_and_contents_that_differ_are_told_apart(place: Place) -> None:
    altered = torch.arange(100_000.0)
    altered[50_000] += 1
    one = save(place, state(a=1, shape=torch.ones(3), kind=1, dtype=torch.ones(3)), step=1)
    other = save(
        place,
        {
            **state(b=2, shape=torch.ones(1, 3), kind=torch.ones(1), dtype=torch.ones(3).half()),
            "x": altered,
            "epoch": 4,
        },
        step=2,
    )
    ran = compared(one, other)
    assert ran.status == 1
    assert (ran.json["first"], ran.json["second"]) == (one.uri, other.uri)
    assert (ran.json["only_first"], ran.json["only_second"]) == (["a"], ["b"])
    assert ran.json["changed"] == [
        {"key": "dtype", "what": "dtype", "first": "float32", "second": "float16"},
        {"key": "kind", "what": "kind", "first": "value", "second": "tensor"},
        {"key": "shape", "what": "shape", "first": "[3]", "second": "[1, 3]"},
    ]
    assert ran.json["content"] == ["epoch", "x"]
    assert (ran.json["unknown"], ran.json["same"]) == ([], 1)
    said = run("diff", one.uri, other.uri, place=place).out
    assert "only in the first: 1\n  a\n" in said
    assert "other dtype: 1\n  dtype: float32, float16\n" in said
    assert "other content, by the checksums: 2\n  epoch\n  x\n" in said
    assert said.endswith("the same: 1 key\n")


def test_a_run_stands_for_its_newest_step(folder: Place) -> None:
    run_one, run_other = folder.child("one"), folder.child("other")
    for step, epoch in ((1, 3), (2, 4)):
        save(run_one, state(epoch=epoch), step)
    save(run_other, state(epoch=4), step=9)
    assert compared(run_one, run_other).status == 0
    assert compared(at(run_one, 1), run_other).json["content"] == ["epoch"]


def save_split(rank: int, place: Place) -> None:
    tensor = distribute_tensor(torch.arange(100_000.0), init_device_mesh("cpu", (2,)), [Shard(0)])
    dcp.save(state(x=tensor), storage_writer=place.writer())


def test_other_shards_can_not_be_told_apart_without_reading(folder: Place, rank_pool: RankPools) -> None:
    whole, split, again = folder.child("whole"), folder.child("split"), folder.child("again")
    save(whole, state())
    for place in (split, again):
        rank_pool(2)(save_split, place)
    assert compared(split, again).status == 0
    ran = compared(whole, split)
    assert (ran.status, ran.json["unknown"], ran.json["same"]) == (1, ["x"], 2)
    assert "can't tell without reading: 1\n  x\n" in run("diff", whole.uri, split.uri).out


def test_another_order_in_memory_or_no_checksums_can_not_be_told_apart(folder: Place, tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    one, other = folder.child("one"), folder.child("other")
    save(one, {"m": matrix, "n": matrix})
    save(other, {"m": matrix.t().contiguous().t(), "n": matrix})
    assert compared(one, other).json["unknown"] == ["m"]
    dcp.save({"m": matrix, "n": matrix}, checkpoint_id=tmp_path / "stock")
    ran = run("diff", one.uri, str(tmp_path / "stock"), "--json")
    assert (ran.status, ran.json["unknown"]) == (1, ["m", "n"])


def test_a_missing_one_is_found_wanting(folder: Place) -> None:
    there = save(folder, state(), step=1)
    ran = run("diff", there.uri, folder.child("nothing").uri, "--json")
    assert (ran.status, ran.out) == (1, "") and "nothing" in ran.err
