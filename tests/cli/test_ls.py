"""``cloudckpt ls``: each checkpoint with its state, by a single listing."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from cloudckpt.backends.config.target import Target
from cloudckpt.cli import output
from cloudckpt.run import Run
from support.commands import at, run, save
from support.gcs import gcs_server
from support.places import Place

MARKER = f".cloudckpt-save.{'0' * 32}"
DATA = f"__0_0.{'0' * 32}.distcp"


def write(place: Place, name: str, data: bytes = b"data") -> None:
    if place.server is None:
        Path(place.uri.removeprefix("file://"), name).parent.mkdir(parents=True, exist_ok=True)
    place.write(name, data)


def sizes_at(place: Place) -> tuple[int, int]:
    """Bytes and number of the data objects there."""
    sizes = [len(place.read(name)) for name in place.visible() if name.endswith(".distcp")]
    return sum(sizes), len(sizes)


def test_steps_are_listed_with_their_state_size_and_age(place: Place) -> None:
    save(place, {"t": torch.zeros(50_000), "u": torch.zeros(50_000)}, step=1000)
    save(place, {"t": torch.zeros(1000)}, step=20)
    write(at(place, 1001), MARKER)
    write(at(place, 1001), DATA, b"four")
    write(at(place, 999), DATA, b"four")
    ran = run("ls", place.uri, "--json", place=place)
    assert (ran.status, ran.err) == (0, "")
    assert ran.json["uri"] == place.uri
    found = ran.json["checkpoints"]
    assert [(one["step"], one["state"]) for one in found] == [
        (20, "committed"),
        (999, "unfinished"),
        (1000, "committed"),
        (1001, "in progress"),
    ]
    assert [(one["size"], one["objects"]) for one in found] == [
        sizes_at(at(place, 20)),
        (4, 1),
        sizes_at(at(place, 1000)),
        (4, 1),
    ]
    for one in found:
        passed = datetime.now(UTC) - datetime.fromisoformat(one["modified"])
        assert timedelta(minutes=-1) < passed < timedelta(minutes=2)

    lines = run("ls", place.uri, place=place).out.splitlines()
    assert lines[0].split() == ["step", "state", "size", "objects", "age"]
    assert [line.split()[0] for line in lines[1:]] == ["20", "999", "1000", "1001"]
    assert output.size(found[2]["size"]) in lines[3] and "in progress" in lines[4]


def test_a_save_whose_marker_is_silent_is_in_progress_no_more(folder: Place) -> None:
    write(at(folder, 1), MARKER)
    assert run("ls", folder.uri, "--json").json["checkpoints"][0]["state"] == "in progress"
    marker = Path(at(folder, 1).uri.removeprefix("file://"), MARKER)
    an_hour_ago = time.time() - 3600
    os.utime(marker, (an_hour_ago, an_hour_ago))
    (one,) = run("ls", folder.uri, "--json").json["checkpoints"]
    assert one["state"] == "unfinished"
    assert one["size"] == one["objects"] == 0


def test_a_checkpoint_by_its_own_uri_is_the_one_that_is_listed(place: Place) -> None:
    there = save(place, {"t": torch.zeros(10)}, step=7)
    (one,) = run("ls", there.uri, "--json", place=place).json["checkpoints"]
    assert (one["name"], one["step"], one["state"]) == ("", 7, "committed")
    other = save(place.child("mine"), {"t": torch.zeros(10)})
    assert run("ls", other.uri, place=place).out.splitlines()[1].split()[:2] == ["mine", "committed"]


def test_what_is_no_step_of_a_run_is_listed_by_its_folder_and_other_objects_are_not(folder: Place) -> None:
    save(folder, {"t": torch.zeros(10)}, step=7)
    save(folder.child("step-9"), {"t": torch.zeros(10)})
    save(folder.child("deep").child("er"), {"t": torch.zeros(10)})
    write(folder, "notes/readme.txt")
    write(folder, "log.txt")
    ran = run("ls", folder.uri, "--json")
    assert [(one["name"], one["step"]) for one in ran.json["checkpoints"]] == [
        ("step-0000000007", 7),
        ("step-9", None),
    ]


def test_nothing_of_a_checkpoint_is_found_wanting(place: Place) -> None:
    ran = run("ls", place.uri, "--json", place=place)
    assert (ran.status, ran.out) == (1, "")
    assert "there is no checkpoint here" in ran.err and place.uri in ran.err


@pytest.mark.parametrize("steps", [3, 1200])
def test_a_listing_takes_a_request_for_a_thousand_objects(steps: int) -> None:
    with gcs_server() as server:
        place = Place.on_gcs(server, server.new_bucket()).child("run")
        for step in range(steps):
            write(at(place, step), ".metadata")
        server.reset()
        assert len(Run(Target.parse(place.uri, **place.options)).listed()) == steps
        assert len(server.requests()) <= steps // 1000 + 1 + 1  # the last one asks for the count
