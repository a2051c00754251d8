"""A conversion that is killed leaves nothing partial to be seen, and gc or the next one removes the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.convert import convert_lease, safetensors
from cloudckpt.backends.stores import open_store
from support.commands import options_of, run, save
from support.places import FOLDER, GCS, Place

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STATE = {f"t{number}": torch.full((40_000,), float(number)) for number in range(3)}
SHARDS = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}


@pytest.fixture
def source(tmp_path: Path) -> str:
    return save(Place.in_folder(tmp_path / "source"), STATE).uri


def conversions(source: str, place: Place, to: str, name: str) -> list[dict[str, Any]]:
    """Kill conversions at each call until one comes through; return what is known of each."""
    program = [sys.executable, "-W", "ignore", "-m", "support.killed_conversions"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    arguments = [source, to, place.uri, name, json.dumps(place.options)]
    ran = subprocess.run([*program, *arguments], capture_output=True, text=True, check=True, env=environment)
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert found[-1]["status"] == 0
    return found


def check_every_call(source: str, place: Place, to: str) -> None:
    name, index = ("", safetensors.INDEX) if to == "safetensors" else ("m.pt", None)
    files = {"m.pt"} if index is None else SHARDS | {index}
    for moment, one in enumerate(conversions(source, place, to, name), 1):
        assert one["status"] in (0, -signal.SIGKILL), moment
        visible = {found for found in one["found"]["visible"] if not convert_lease.LEASE.fullmatch(found)}
        assert visible <= files, moment
        assert index not in visible or visible == files, moment
        after, pending = set(one["after"]["visible"]), one["after"]["pending"]
        whole = visible == files
        if one["collected"]:
            assert one["again"][0] == 0 and after == (files if whole else set()), moment
        elif whole:
            assert "this is there already" in one["again"][1], moment
            assert after == files, moment
        else:
            assert one["again"][0] == 0 and after == files, (moment, one)
        assert pending == [] or place.name == GCS, moment
        if place.name == FOLDER:
            folder = Path(place.uri.removeprefix("file://")) / f"killed-{moment}"
            there = {path.name for path in folder.iterdir()} if folder.exists() else set()
            assert there == after, moment


def test_one_killed_at_any_call_leaves_nothing_partial_and_is_cleaned_up(source: str, folder: Place) -> None:
    check_every_call(source, folder, "safetensors")


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("to", ["torch", "safetensors"])
def test_one_killed_at_any_call_on_any_store_is_cleaned_up(source: str, place: Place, to: str) -> None:
    check_every_call(source, place, to)


def test_a_conversion_of_the_same_folder_leaves_a_living_one_alone(source: str, place: Place) -> None:
    target = Target.parse(place.uri, **place.options)
    with open_store(target) as store:
        upload = store.begin_upload("m.pt")
        lease = convert_lease.take(store, convert_lease.Plan(("m.pt",)))
        cloudckpt.convert(source, target.child("other.pt"))
        cloudckpt.collect_garbage(target, older_than=-86400)
        assert lease.is_there()
        part = store.upload_part(upload, 1, 0, [memoryview(b"x")])
        assert store.complete_upload(upload, [part]).size == 1
        lease.end()
    assert place.visible() == {"m.pt", "other.pt"}


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"files": ["../x"]}', b"\xff"])
def test_a_lease_that_can_not_be_read_takes_nothing_away(folder: Place, content: bytes) -> None:
    name = f"{convert_lease._PREFIX}{'a' * 32}"
    folder.write(name, content)
    folder.write("m.pt", b"of the user")
    with open_store(Target.parse(folder.uri)) as store:
        upload = store.begin_upload("m.bin")
        found = cloudckpt.collect_garbage(folder.uri, older_than=0, silent_for=0)
        assert (found.uploads, found.objects, found.traces) == ((), (), (name,))
        store.abort_upload(upload)
    assert folder.visible() == {"m.pt"}


def test_the_lease_of_a_conversion_does_not_hide_a_run(folder: Place) -> None:
    save(folder, STATE, step=1)
    folder.write(f"{convert_lease._PREFIX}{'a' * 32}", b"{}")
    assert [one["step"] for one in run("ls", folder.uri, "--json").json["checkpoints"]] == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("to", ["torch", "checkpoint"])
def test_a_command_that_is_told_to_end_removes_what_it_began(
    source: str, place: Place, number: signal.Signals, to: str
) -> None:
    if place.name != FOLDER and (number != signal.SIGTERM or to != "torch"):
        pytest.skip("every store cleans up alike")
    target = place.child("m.pt" if to == "torch" else "checkpoint")
    slow = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # which nohup has ignored
        "from cloudckpt.backends.save import uploader\n"
        "send = uploader.Uploader._transfer\n"
        "def slowly(*args):\n"
        "    print('sending\\n', end='', flush=True)\n"
        "    time.sleep(1)\n"
        "    return send(*args)\n"
        "uploader.Uploader._transfer = slowly\n"
        "from cloudckpt.cli import main\n"
        "main()\n"
    )
    arguments = ["convert", source, target.uri, *(f"--to-option={one}" for one in options_of(place)[1::2])]
    command = [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", slow, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sending\n"
        began = time.monotonic()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (128 + number, 1) and time.monotonic() - began < 30, errors
    assert place.visible() == place.pending() == set()
    assert not target.visible() and not target.pending()
