"""``cloudckpt cp``: one checkpoint or a whole run, and what is there is not sent again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.stores.local.store import LocalStore
from cloudckpt.cli import output, progress
from support import states
from support.commands import Ran, at, run, save
from support.copies import arrived, data_of, flip, owner, shows_nothing
from support.places import FAKE_GCS, FOLDER, GCS, Place, new_place
from support.proxy import Proxy, Request, Spoiling, Stall, proxied
from support.servers import S3Server, unused_port

STATE = {"t": torch.ones(1000), "epoch": 1}
PATIENCE = 120.0
"""Seconds that a condition is waited for."""


def options(place: Place, side: str) -> list[str]:
    """What reaches a place on one side, as it is typed."""
    typed: list[str] = []
    for name, value in place.options.items():
        typed += [f"--{side}-option", f"{name}={json.dumps(value) if isinstance(value, dict) else value}"]
    return typed


def line(source: Place, destination: Place, *more: str) -> list[str]:
    return [
        "cp", source.uri, destination.uri, *options(source, "from"), *options(destination, "to"), *more
    ]  # fmt: skip


def cp(source: Place, destination: Place, *more: str) -> Ran:
    return run(*line(source, destination, *more))


@pytest.fixture
def source(tmp_path: Path) -> Place:
    return Place.in_folder(tmp_path / "source")


def test_one_checkpoint_is_copied_to_where_it_should_be(source: Place, place: Place) -> None:
    there = save(source, STATE, step=7)
    to = place.child("best")
    ran = cp(there, to)
    assert (ran.status, ran.err) == (0, "")
    size = len(there.read(data_of(there)[0]))
    assert ran.out.splitlines()[0].startswith(f"copied {to.uri}: 1 object, ")
    assert run("verify", to.uri, place=place).status == 0
    told = cp(there, to, "--json").json
    assert (told["source"], told["uri"]) == (there.uri, to.uri)
    (one,) = told["copies"]
    assert (one["was_there"], one["size"], one["sent"]) == (True, size, 0)
    assert cp(there, to).out.startswith(f"{to.uri} was there already: 1 object, ")


def test_a_run_is_copied_step_by_step_and_only_what_is_missing(source: Place, place: Place) -> None:
    for step in (3, 1, 2):
        save(source, {**STATE, "epoch": step}, step)
    assert cp(source, place, "--step", "2").status == 0
    assert {name.partition("/")[0] for name in place.visible()} == {"step-0000000002"}
    ran = cp(source, place, "--json")
    assert ran.status == 0
    copies = [(one["uri"], one["was_there"]) for one in ran.json["copies"]]
    assert copies == [(at(place, step).uri, step == 2) for step in (1, 2, 3)]
    assert place.visible() == source.visible()
    said = cp(source, place).out.splitlines()
    assert [words.split(" was there already")[0] for words in said] == [uri for uri, _ in copies]


def test_another_checkpoint_there_is_found_wanting_unless_it_may_be_overwritten(
    source: Place, folder: Place
) -> None:
    save(source, STATE)
    save(folder, {**STATE, "epoch": 2})
    before = folder.visible()
    ran = cp(source, folder)
    assert (ran.status, ran.out) == (1, "")
    assert "another checkpoint is committed here already" in ran.err and "--overwrite" in ran.err
    assert folder.visible() == before
    assert cp(source, folder, "--overwrite").status == 0
    assert folder.visible() == source.visible()


def test_what_is_not_there_is_found_wanting(source: Place, folder: Place) -> None:
    ran = cp(source, folder)
    assert (ran.status, ran.out) == (1, "")
    assert "no committed checkpoint here" in ran.err and source.uri in ran.err
    save(source, STATE, step=1)
    assert cp(source, folder, "--step", "2").status == 1
    closed = {"endpoint_url": f"http://127.0.0.1:{unused_port()}", "retries": 0, "anon": "true"}
    out_of_reach = cp(source, dataclasses.replace(folder, uri="s3://bucket/run", options=closed))
    assert out_of_reach.status == 1 and "cannot reach" in out_of_reach.err


def test_what_can_not_be_meant_is_a_misuse(source: Place, folder: Place) -> None:
    save(source, STATE, step=1)
    save(folder, STATE, step=2)
    alone = save(source.child("alone"), STATE)
    for one, other in (
        (source, source),
        (source, at(source, 1)),
        (at(source, 1), source),
        (alone, folder),  # a checkpoint over a run
        (folder, alone),  # a run over a checkpoint
    ):
        before = (source.visible(), folder.visible())
        ran = cp(one, other)
        assert (ran.status, ran.out) == (2, ""), (one, other)
        assert (source.visible(), folder.visible()) == before


@pytest.mark.parametrize(
    "typed",
    [
        ["-o", "endpoint_url=http://127.0.0.1:1"],
        ["-o", "part_size"],
        ["-o", "stpe=1"],
        ["--from-option", "endpoint_url=http://127.0.0.1:1"],
        ["--to-option", "part_size=64MiB", "--to-option", "part_size=64MiB"],
        ["--step", "-1"],
        ["another"],
    ],
    ids=str,
)
def test_options_that_no_side_honours_are_a_misuse(source: Place, folder: Place, typed: list[str]) -> None:
    save(source, STATE)
    assert run("cp", source.uri, folder.uri, *typed).status == 2
    assert folder.visible() == set()


def test_an_option_of_both_goes_to_whichever_honours_it(
    source: Place, moto: S3Server, tmp_path: Path
) -> None:
    save(source, STATE)
    to = new_place("moto", tmp_path, lambda _: moto)
    typed = [word.replace("--to-option", "-o") for word in options(to, "to")]
    assert run("cp", source.uri, to.uri, *typed).status == 0
    assert run("cp", to.uri, f"{tmp_path}/back", *typed).status == 0
    assert Place.in_folder(tmp_path / "back").visible() == source.visible()


def test_damage_at_the_source_is_named_and_nothing_shows(
    source: Place, folder: Place, moto: S3Server, tmp_path: Path
) -> None:
    there = save(source, STATE, step=1)
    flip(there, data_of(there)[0], 1500)
    to = new_place("moto", tmp_path, lambda _: moto)
    ran = cp(source, to)
    assert (ran.status, ran.out) == (1, "")
    assert "'t' is damaged" in ran.err and data_of(there)[0] in ran.err
    assert "goes on from it" in ran.err
    assert not [name for name in to.visible() if name.endswith(md.METADATA_NAME)]
    listed = run("ls", to.uri, place=to)
    assert listed.status == 1 or "committed" not in listed.out


def test_a_hidden_journal_disturbs_no_other_command(source: Place, folder: Place) -> None:
    save(source, STATE, step=1)
    save(folder, STATE, step=1)
    at(folder, 1).write(".cloudckpt-copy", b"{}")
    for command in ("ls", "show", "verify"):
        assert run(command, folder.uri).status == 0
    assert run("rm", folder.uri, "--step", "1", "--yes").status == 0
    assert run("gc", folder.uri, "--older-than", "0s", "--yes").status == 0
    assert folder.visible() == set()


def test_a_long_copy_says_how_far_it_is(
    source: Place, folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.Lines.__init__, "__defaults__", (0.0,))
    save(source, STATE)
    ran = cp(source, folder, "--json")
    size = output.size(ran.json["copies"][0]["size"])
    assert ran.err.splitlines()[-1] == f"copying: {size} of {size}"


def test_ctrl_c_keeps_what_has_arrived_and_says_so(
    source: Place, folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(source, STATE)
    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "copy_from", lambda *_: None)
        patch.setattr("cloudckpt.backends.copy.copy_workers.wait", interrupt)
        ran = cp(source, folder)
    assert ran.status not in (0, 2)
    assert "goes on from it" in ran.err
    assert shows_nothing(folder)
    assert "unfinished" in run("ls", folder.uri).out
    assert cp(source, folder).status == 0
    assert folder.visible() == source.visible()


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# Killed half way


@contextlib.contextmanager
def through_a_proxy(place: Place) -> Iterator[tuple[Place, Proxy]]:
    """The place behind a proxy that sees and stops its requests."""
    assert place.server is not None
    with proxied(place.server.endpoint) as proxy:
        yield place.behind(proxy.endpoint), proxy


class Valve:
    """Lets so many transfers of data pass, and holds the others."""

    def __init__(self, operation: str, count: int) -> None:
        self._operation = operation
        self._left = count
        self._lock = threading.Lock()

    def __call__(self, request: Request) -> Spoiling:
        data = int(request.headers.get("content-length", 0)) > 1000 or "range" in request.headers
        if request.operation != self._operation or not data:
            return None
        with self._lock:
            self._left -= 1
            return None if self._left >= 0 else Stall()


def killed_half_way(source: Place, to: Place, bytes_there: int, journal: Place) -> int:
    """Kill a copy once its journal says that so many bytes have arrived; how many those are."""
    command, before = [sys.executable, "-m", "cloudckpt.cli", *line(source, to)], owner(journal)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + PATIENCE
        while arrived(journal) < bytes_there or owner(journal) == before:
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < until, "the copy does not get half way"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return arrived(journal)


def state_of(mib: int) -> dict[str, Any]:
    return {
        f"t{number}": torch.arange(number, (1 << 18) * 4 + number, dtype=torch.float32)
        for number in range(mib // 4)
    }


def assert_goes_on(source: Place, to: Place, place: Place, there: int, state: dict[str, Any]) -> None:
    """At the moment nothing shows; the second run sends only what is missing, and all of it loads."""
    assert shows_nothing(place)
    assert run("ls", place.uri, place=place).out.split()[6] == "in"  # progress, by its marker
    size = sum(len(source.read(name)) for name in data_of(source))
    ran = cp(source, to, "--json")
    assert ran.status == 0, ran.err
    (one,) = ran.json["copies"]
    assert one["sent"] == size - there
    assert {*place.visible()} == {*source.visible()}
    assert place.pending() == set()
    found = states.erase(state)
    dcp.load(found, storage_reader=place.reader())
    states.assert_bit_exact(found, state)


@pytest.mark.parametrize("kind", ["moto", pytest.param(GCS, marks=pytest.mark.soak)])
def test_a_copy_to_a_bucket_that_is_killed_goes_on_where_it_was(
    source: Place, kind: str, moto: S3Server, tmp_path: Path
) -> None:
    state = state_of(64)
    save(source, state)
    place = new_place(kind, tmp_path, lambda _: moto)
    place = dataclasses.replace(place, options={**place.options, "part_size": 5 << 20})
    with through_a_proxy(place) as (to, proxy):
        proxy.rule(Valve("UploadPart", 6))
        there = killed_half_way(source, to, 6 * (5 << 20), place)
        assert there == 6 * (5 << 20)
        proxy.forget()
        assert_goes_on(source, to, place, there, state)
        size = len(source.read(data_of(source)[0]))
        sent = sum(len(one.body) for one in proxy.seen("UploadPart"))
        assert size - there <= sent <= size - there + (256 << 10)


def test_a_copy_to_a_folder_that_is_killed_goes_on_where_it_was(
    folder: Place, moto: S3Server, tmp_path: Path
) -> None:
    state = state_of(64)
    source = save(new_place("moto", tmp_path, lambda _: moto), state)
    to = dataclasses.replace(folder, options={"part_size": 4 << 20})
    with through_a_proxy(source) as (there, proxy):
        proxy.rule(Valve("GetObject", 7))
        held = killed_half_way(there, to, 7 * (4 << 20), to)
        proxy.forget()
        assert shows_nothing(to)
        size = len(source.read(data_of(source)[0]))
        ran = cp(there, to, "--json")
        assert ran.status == 0 and ran.json["copies"][0]["sent"] == size - held
        asked = [
            one.headers["range"].removeprefix("bytes=").split("-")
            for one in proxy.seen("GetObject")
            if "range" in one.headers
        ]
        assert sum(int(last) + 1 - int(first) for first, last in asked) == size - held
    assert to.visible() == source.visible()
    found = states.erase(state)
    dcp.load(found, storage_reader=to.reader())
    states.assert_bit_exact(found, state)


@pytest.mark.soak
def test_a_copy_that_is_killed_begins_anew_where_uploads_can_not_be_asked_about(
    source: Place, tmp_path: Path, s3_server_named: Callable[[str], S3Server]
) -> None:
    state = state_of(64)
    save(source, state)
    place = new_place(FAKE_GCS, tmp_path, s3_server_named)
    place = dataclasses.replace(place, options={**place.options, "part_size": 5 << 20})
    with through_a_proxy(place) as (to, proxy):
        proxy.rule(Valve("UploadPart", 6))
        killed_half_way(source, to, 6 * (5 << 20), place)
        proxy.forget()
        assert shows_nothing(place)
        assert cp(source, to).status == 0
    assert place.visible() == source.visible()
    found = states.erase(state)
    dcp.load(found, storage_reader=place.reader())
    states.assert_bit_exact(found, state)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("here", "there"), [(FOLDER, "moto"), ("moto", FOLDER), (FOLDER, GCS), ("moto", GCS)]
)
def test_two_gib_that_are_killed_half_way_again_and_again(
    here: str, there: str, moto: S3Server, tmp_path: Path
) -> None:
    state = state_of(2048)
    source = save(new_place(here, tmp_path / "here", lambda _: moto), state)
    size = sum(len(source.read(name)) for name in data_of(source))
    place = new_place(there, tmp_path / "there", lambda _: moto)
    place = dataclasses.replace(place, options={**place.options, "part_size": 16 << 20})
    for part in (0.2, 0.5, 0.8):
        held = killed_half_way(source, place, int(part * size), place)
        assert shows_nothing(place)
    ran = cp(source, place, "--json")
    assert ran.status == 0, ran.err
    assert ran.json["copies"][0]["sent"] <= size - held
    assert place.visible() == source.visible()
    found = states.erase(state)
    dcp.load(found, storage_reader=place.reader())
    states.assert_bit_exact(found, state)
