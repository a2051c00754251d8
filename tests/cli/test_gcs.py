"""``cloudckpt cp``, ``convert`` and ``doctor`` on GCS servers other than Google's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.commands import options_of, run, save
from support.fake_gcs import FakeGCS
from support.findings import doctor, failed
from support.gcs import GCSServer
from support.gcs_emulator import gcs_emulator
from support.places import FAKE_GCS, GCS, Place, new_place
from support.servers import S3Server

STATE = {"t": torch.ones(1000), "epoch": 1}
"""Less than the 256 KiB that a chunk has."""


@pytest.fixture(params=[GCS, FAKE_GCS])
def on_gcs(
    request: pytest.FixtureRequest, tmp_path: Path, s3_server_named: Callable[[str], S3Server]
) -> Place:
    return new_place(request.param, tmp_path, s3_server_named)


def reached(place: Place, side: str) -> list[str]:
    return [f"--{side}-option" if one == "-o" else one for one in options_of(place)]


def test_a_checkpoint_smaller_than_a_chunk_is_copied(tmp_path: Path, on_gcs: Place) -> None:
    there = save(Place.in_folder(tmp_path / "source"), STATE, step=7)
    to = on_gcs.child("best")
    assert all(len(there.read(name)) < 256 << 10 for name in there.visible())
    ran = run("cp", there.uri, to.uri, *reached(to, "to"))
    assert (ran.status, ran.err) == (0, "")
    assert to.visible() == there.visible()
    assert all(to.read(name) == there.read(name) for name in there.visible())
    again = on_gcs.child("again")
    assert run("cp", to.uri, again.uri, *reached(to, "from"), *reached(again, "to")).status == 0
    assert all(again.read(name) == there.read(name) for name in there.visible())
    assert run("verify", again.uri, place=again).status == 0


def test_a_checkpoint_smaller_than_a_chunk_is_converted(tmp_path: Path, on_gcs: Place) -> None:
    there = save(Place.in_folder(tmp_path / "source"), STATE, step=7)
    ran = run("convert", there.uri, f"{on_gcs.uri}/model.pt", *reached(on_gcs, "to"))
    assert ran.status == 0, ran.err
    assert on_gcs.visible() == {"model.pt"}
    assert 0 < len(on_gcs.read("model.pt")) < 256 << 10


def test_doctor_reports_the_features_of_a_server(gcs: GCSServer, fake_gcs: FakeGCS) -> None:
    status, found = doctor(Place.on_gcs(gcs, gcs.new_bucket()).child("run"))
    assert (status, found["features"]["state"]) == (0, "ok")
    place = Place.on_gcs(fake_gcs, fake_gcs.new_bucket()).child("run")
    status, found = doctor(place)
    assert (status, failed(found)) == (0, [])
    assert found["conditions"]["state"] == "ok"
    assert found["features"]["state"] == "warning"
    supported, _, lacking = found["features"]["what"].partition(", and not ")
    assert "ifGenerationMatch" in supported and lacking == (
        "ifSourceGenerationMatch, the status of an upload, multipart uploads of the XML API"
    )
    assert "cp compares generations" in found["features"]["advice"]
    assert place.visible() == set()


def test_doctor_reports_an_emulator_that_ignores_every_condition() -> None:
    with gcs_emulator() as endpoint:
        server = GCSServer("emulator", endpoint, 0)
        place = Place.on_gcs(server, server.new_bucket()).child("run")
        found = {
            one["check"]: one for one in run("doctor", place.uri, "--json", place=place).json["findings"]
        }
    assert found["conditions"]["state"] == found["features"]["state"] == "warning"
    assert "it supports no condition" in found["features"]["what"]
    assert json.dumps(found).count("both may win") == 2
