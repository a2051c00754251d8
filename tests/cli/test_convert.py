"""``cloudckpt convert``: torch.load, safetensors and dcp.load read what was saved, from any store to any."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

import cloudckpt
from cloudckpt.backends.convert import convert
from cloudckpt.backends.format import metadata as md
from cloudckpt.cli import progress
from support.commands import at, in_a_pipe, options_of, run, save
from support.conversions import by_name, from_checkpoint
from support.places import GCS, Place, new_place
from support.servers import S3Server
from support.states import assert_bit_exact

BIG = 700_000


def state() -> dict[str, Any]:
    """Several parts on any store, small tensors, and values."""
    generator = torch.Generator().manual_seed(3)
    return {
        "model": {
            "layers": {str(n): torch.randn(30, 20, generator=generator).bfloat16() for n in (2, 10)},
            "big": torch.randn(BIG, 2, generator=generator),
            "turned": torch.randn(60, 40, generator=generator).t(),
        },
        "optimizer": {
            "groups": [{"lr": 0.1, "steps": torch.arange(5)}, {"lr": 0.2, "steps": torch.arange(3)}]
        },
        "none": torch.empty(0, 3),
        "loss": torch.tensor(0.5),
        "epoch": 4,
        "pair": (1, torch.ones(3)),
    }


def weights() -> dict[str, torch.Tensor]:
    """Of the model alone, flat, by name, each row-major."""
    model = state()["model"]
    layers = {f"layers.{name}": tensor for name, tensor in model["layers"].items()}
    whole = {**layers, "big": model["big"], "turned": model["turned"]}
    return {name: whole[name].contiguous() for name in sorted(whole)}


def loaded(data: bytes) -> Any:
    """What torch.load makes of a file, and none of its checksums is wrong."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
    return torch.load(io.BytesIO(data), weights_only=True)


def test_there_and_back_between_a_checkpoint_and_a_torch_file(place: Place) -> None:
    save(place.child("run"), state(), step=7)
    ran = run("convert", f"{place.uri}/run", f"{place.uri}/model.pt", "--json", place=place)
    assert (ran.status, ran.err) == (0, "")
    data = place.read("model.pt")
    assert ran.json == {
        "source": f"{place.uri}/run/step-0000000007",
        "uri": f"{place.uri}/model.pt",
        "kind": "torch",
        "files": [f"{place.uri}/model.pt"],
        "tensors": 8,
        "values": 4,
        "size": len(data),
        "left_out": [],
    }
    assert_bit_exact(loaded(data), state())
    assert run("convert", f"{place.uri}/model.pt", f"{place.uri}/again", place=place).status == 0
    assert_bit_exact(from_checkpoint(place.child("again").stock_reader()), state())
    assert run("verify", f"{place.uri}/again", place=place).status == 0
    assert not place.pending()


def test_there_and_back_between_a_checkpoint_and_a_folder_of_safetensors(place: Place) -> None:
    save(place.child("run"), state(), step=7)
    only = ["--key", "model.", "--strip", "model.", "--shard-size", "3MB"]
    ran = run(
        "convert", f"{place.uri}/run", f"{place.uri}/hf", "--to", "safetensors", *only, "--json", place=place
    )
    assert (ran.status, ran.err) == (0, "")
    names = [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    assert ran.json["files"] == [
        f"{place.uri}/hf/{name}" for name in [*names, "model.safetensors.index.json"]
    ]
    there = place.child("hf")
    assert there.visible() == {*names, "model.safetensors.index.json"}
    index = json.loads(there.read("model.safetensors.index.json"))
    assert index["metadata"] == {"total_size": sum(one.nbytes for one in weights().values())}
    found: dict[str, torch.Tensor] = {}
    for name in names:
        shard = safetensors.torch.load(there.read(name))
        assert {key for key, its in index["weight_map"].items() if its == name} == shard.keys()
        found |= shard
    assert_bit_exact(by_name(found), weights())
    assert run("convert", there.uri, f"{place.uri}/again", place=place).status == 0
    assert_bit_exact(by_name(from_checkpoint(place.child("again").stock_reader())), weights())
    assert not place.pending()


def test_from_one_store_to_another(
    moto: S3Server, tmp_path: Path, s3_server_named: Callable[[str], S3Server]
) -> None:
    there, elsewhere = (new_place(name, tmp_path, s3_server_named) for name in ("moto", GCS))
    save(there, state(), step=1)
    reached = [*_only("--from-option", there), *_only("--to-option", elsewhere)]
    ran = run("convert", there.uri, f"{elsewhere.uri}/m.safetensors", *reached)
    assert ran.status == 0
    assert safetensors.torch.load(elsewhere.read("m.safetensors")).keys() >= {"model.big", "loss", "none"}
    reached = [*_only("--to-option", there), *_only("--from-option", elsewhere)]
    assert run("convert", f"{elsewhere.uri}/m.safetensors", f"{there.uri}/m.bin", *reached).status == 0
    assert_bit_exact(loaded(there.read("m.bin"))["model.big"], state()["model"]["big"])


def _only(flag: str, place: Place) -> list[str]:
    return [flag if one == "-o" else one for one in options_of(place)]


def test_what_torch_makes_of_a_checkpoint_is_made_of_it(folder: Place, tmp_path: Path) -> None:
    save(folder, state())
    dcp_to_torch_save(tmp_path / "run", tmp_path / "stock.pt")
    assert run("convert", folder.uri, str(tmp_path / "ours.pt")).status == 0
    ours = torch.load(tmp_path / "ours.pt", weights_only=True, mmap=True)
    assert_bit_exact(ours, torch.load(tmp_path / "stock.pt", weights_only=True))
    sizes = [(tmp_path / name).stat().st_size for name in ("ours.pt", "stock.pt")]
    assert abs(sizes[0] - sizes[1]) < 2_000


def test_what_torch_makes_of_a_file_is_made_of_it(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "model.pt")
    torch_save_to_dcp(tmp_path / "model.pt", tmp_path / "stock")
    assert run("convert", str(tmp_path / "model.pt"), str(tmp_path / "ours")).status == 0
    ours, stock = (dcp.FileSystemReader(tmp_path / name).read_metadata() for name in ("ours", "stock"))
    assert ours.planner_data == stock.planner_data
    assert ours.state_dict_metadata.keys() == stock.state_dict_metadata.keys()
    assert_bit_exact(
        from_checkpoint(dcp.FileSystemReader(tmp_path / "ours")),
        from_checkpoint(dcp.FileSystemReader(tmp_path / "stock")),
    )
    blank = {"model": {"big": torch.zeros(BIG, 2)}, "epoch": 0}
    dcp.load(blank, storage_reader=cloudckpt.StorageReader(str(tmp_path / "ours")))
    assert_bit_exact(blank, {"model": {"big": state()["model"]["big"]}, "epoch": 4})


def test_a_whole_state_fits_in_one_file_beside_what_is_no_tensor(folder: Place) -> None:
    save(folder, state())
    ran = run("convert", folder.uri, f"{folder.uri}/out", "--to", "safetensors")
    assert ran.status == 0
    assert ran.out.splitlines()[0] == f"{folder.uri}/out"
    assert ran.out.splitlines()[1].startswith("8 tensors of file://")
    assert ran.out.splitlines()[2:] == [
        "  model.safetensors",
        "left out, for safetensors hold tensors alone: 4",
        *(f"  {key}" for key in ("optimizer.groups.0.lr", "optimizer.groups.1.lr", "epoch", "pair")),
    ]
    with safetensors.safe_open(folder._folder / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert_bit_exact(opened.get_tensor("model.turned"), state()["model"]["turned"].contiguous())


def test_a_file_is_converted_into_a_file_of_the_other_kind(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "m.pth")
    assert run("convert", str(tmp_path / "m.pth"), str(tmp_path / "m.safetensors")).status == 0
    assert_bit_exact(by_name(safetensors.torch.load_file(tmp_path / "m.safetensors")), weights())
    assert run("convert", str(tmp_path / "m.safetensors"), str(tmp_path / "n.ckpt")).status == 0
    found = torch.load(tmp_path / "n.ckpt", weights_only=True)
    assert_bit_exact(by_name(found), weights())


def test_prefixes_select_and_are_stripped_in_nested_states_too(folder: Place) -> None:
    save(folder, state())
    assert (
        run("convert", folder.uri, f"{folder.uri}/a.pt", "--key", "model.layers", "--strip", "model.").status
        == 0
    )
    assert_bit_exact(loaded(folder.read("a.pt")), {"layers": state()["model"]["layers"]})
    assert (
        run(
            "convert", folder.uri, f"{folder.uri}/b.pt", "--key", "optimizer", "--strip", "optimizer.gr"
        ).status
        == 0
    )
    assert_bit_exact(loaded(folder.read("b.pt")), {"oups": state()["optimizer"]["groups"]})
    wrong = run("convert", folder.uri, f"{folder.uri}/c.pt", "--key", "modell")
    assert wrong.status == 2 and "no key begins with 'modell'" in wrong.err
    wrong = run("convert", folder.uri, f"{folder.uri}/c.pt", "--strip", "loss")
    assert wrong.status == 2 and "nothing is left" in wrong.err


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors", "hf", "again"])
def test_what_is_there_is_left_alone_unless_it_may_go(place: Place, name: str) -> None:
    save(place.child("run"), {"x": torch.arange(9.0)})
    more = ["--to", "safetensors", "--shard-size", "20B"] if name == "hf" else []
    arguments = ["convert", f"{place.uri}/run", f"{place.uri}/{name}", *more]
    assert run(*arguments, place=place).status == 0
    before = {one: place.read(one) for one in place.visible()}
    refused = run(*arguments, place=place)
    assert refused.status == 1 and " already" in refused.err
    assert {one: place.read(one) for one in place.visible()} == before
    save(place.child("other"), {"x": torch.zeros(9), "y": torch.ones(9)})
    ran = run("convert", f"{place.uri}/other", f"{place.uri}/{name}", *more, "--overwrite", place=place)
    assert ran.status == 0
    assert not place.pending()
    if name == "hf":
        expected = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)} | {"model.safetensors.index.json"}
        assert place.child(name).visible() == expected
    if name == "m.pt":
        assert_bit_exact(loaded(place.read(name)), {"x": torch.zeros(9), "y": torch.ones(9)})


def test_a_folder_may_be_called_like_a_file(folder: Place) -> None:
    save(folder.child("last.ckpt"), {"x": torch.ones(3)})
    assert run("convert", f"{folder.uri}/last.ckpt", f"{folder.uri}/x.pt").status == 0
    assert_bit_exact(loaded(folder.read("x.pt")), {"x": torch.ones(3)})


def test_the_step_that_is_asked_for_is_converted(folder: Place) -> None:
    for step in (1, 2):
        save(folder, {"x": torch.full((3,), float(step))}, step)
    assert run("convert", folder.uri, f"{folder.uri}/x.pt", "--step", "1").status == 0
    assert_bit_exact(loaded(folder.read("x.pt")), {"x": torch.ones(3)})
    none = run("convert", f"{folder.uri}/x.pt", f"{folder.uri}/y", "--step", "1")
    assert none.status == 2 and "has no steps" in none.err
    missing = run("convert", at(folder, 3).uri, f"{folder.uri}/z.pt")
    assert missing.status == 1 and "no committed checkpoint here" in missing.err
    assert run("convert", f"{folder.uri}/w.pt", f"{folder.uri}/z").status == 1


@pytest.mark.parametrize(
    "more",
    [
        ["--to", "onnx"],
        ["--to", "safetensors", "--shard-size", "big"],
        ["--to", "safetensors", "--shard-size", "0"],
    ],
)
def test_what_can_not_be_meant_is_misused(folder: Place, more: list[str]) -> None:
    save(folder, {"x": torch.ones(3)})
    assert run("convert", folder.uri, f"{folder.uri}/x", *more).status == 2
    assert not folder.child("x").visible()


def test_code_is_run_for_those_only_who_trust_its_writer(folder: Place, tmp_path: Path) -> None:
    torch.save({"pattern": re.compile("x"), "x": torch.arange(4.0)}, tmp_path / "m.pt")
    refused = run("convert", str(tmp_path / "m.pt"), folder.uri)
    assert refused.status == 1 and "could run code" in refused.err and "re._compile" in refused.err
    assert run("convert", str(tmp_path / "m.pt"), folder.uri, "--trust").status == 0
    refused = run("convert", folder.uri, str(tmp_path / "n.pt"))
    assert refused.status == 1 and "could run code" in refused.err and not (tmp_path / "n.pt").exists()
    assert run("convert", folder.uri, str(tmp_path / "n.pt"), "--trust").status == 0
    found = torch.load(tmp_path / "n.pt", weights_only=False)
    assert_bit_exact(found, {"pattern": re.compile("x"), "x": torch.arange(4.0)})
    # What needs no such value needs no trust.
    assert run("convert", folder.uri, str(tmp_path / "x.pt"), "--key", "x").status == 0


def test_a_damaged_checkpoint_is_found_out_and_nothing_is_written(place: Place) -> None:
    save(place.child("run"), state())
    stored = md.load(place.read("run/.metadata"), uri=place.uri).storage_data
    (info,) = (info for index, info in stored.items() if index.fqn == "model.big")
    name = f"run/{info.relative_path}"
    data = bytearray(place.read(name))
    data[info.offset + info.length // 2] ^= 1
    place.write(name, bytes(data))
    before = place.visible()
    for target in ("m.pt", "m.safetensors", "again"):
        ran = run("convert", f"{place.uri}/run", f"{place.uri}/{target}", place=place)
        assert ran.status == 1 and "'model.big' is damaged" in ran.err
    assert place.visible() == before
    assert not place.pending()


KILLED = """
import os, signal, sys, cloudckpt
cloudckpt.convert(*sys.argv[1:], observer=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_one_that_is_killed_leaves_nothing_to_be_seen(folder: Place) -> None:
    save(folder.child("run"), state())
    ends = [f"{folder.uri}/run", f"{folder.uri}/m.pt?part_size=64KiB"]
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, *ends], check=False)
    assert ran.returncode == -signal.SIGKILL
    assert "m.pt" not in folder.visible() and any(".partial" in name for name in folder.visible())
    assert run("convert", *ends).status == 0


def test_long_work_says_how_far_it_is(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.Lines.__init__, "__defaults__", (0.0,))
    save(folder, state())
    ran = run("convert", folder.uri, f"{folder.uri}/m.pt", "--json")
    assert ran.json["kind"] == "torch"
    assert ran.err.splitlines()[-1].startswith("converting: ")


def test_help_needs_no_torch() -> None:
    ran = in_a_pipe("convert", "--help")
    assert ran.status == 0 and "safetensors" in ran.out
    assert convert.SHARD_SIZE in ran.out
