"""A run on every S3 server: saves, retention, a save over another, garbage collection and doctor."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import cloudckpt
from cloudckpt.backends.manage.gc import collect_garbage
from support.commands import at, run
from support.executors import until
from support.places import S3_PART_SIZE, Place
from support.servers import MORE_SERVERS, SERVERS, S3Server

WEIGHTS = torch.arange(1000.0)
STEPS = range(1, 6)


def all_servers(*, quick: str) -> list[Any]:
    """Return the names of all servers, for a long form but for one."""
    return [
        pytest.param(name, marks=() if name == quick else pytest.mark.soak)
        for name in [*SERVERS, *MORE_SERVERS]
    ]


@pytest.mark.parametrize("name", all_servers(quick="juicefs"))
def test_a_run_is_saved_retained_collected_and_examined(
    s3_server_named: Callable[[str], S3Server], name: str
) -> None:
    server = s3_server_named(name)
    place = Place.on_server(server, server.new_bucket()).child("a run")
    with cloudckpt.Checkpointer(place.uri, keep_last=2, progress=False, **place.options) as checkpointer:
        for step in STEPS:
            checkpointer.save(step, {"weights": WEIGHTS, "step": step})
        assert checkpointer.all_steps() == [4, 5]
        weights = torch.zeros(1000)
        loaded = {"weights": weights, "step": 0}
        assert checkpointer.load(loaded) == loaded["step"] == 5
        assert torch.equal(weights, WEIGHTS)
    assert_exact(place, 4, 5)

    dcp.save({"weights": WEIGHTS, "step": 50}, storage_writer=at(place, 5).writer(overwrite=True))
    assert_exact(place, 4, 5)

    leave_an_upload_and_an_object(server, place)
    collect_garbage(place.uri, older_than=timedelta(0), silent_for=timedelta(0), **place.options)
    assert_exact(place, 4, 5)

    examined = run("doctor", place.uri, "--json", place=place)
    assert examined.status == 0, examined.out + examined.err
    assert_exact(place, 4, 5)

    assert run("rm", place.uri, "--step", "4", "--yes", place=place).status == 0
    assert_exact(place, 5)


def assert_exact(place: Place, *steps: int) -> None:
    """Assert that these steps are there, and nothing but their objects."""
    visible = place.visible()
    if place.name == "juicefs":  # its DeleteObjects leaves empty folders, which it lists as objects
        visible = {name for name in visible if not name.endswith("/")}
    folders = {f"step-{step:010}" for step in steps}
    assert {name.partition("/")[0] for name in visible} == folders, visible
    names = {name.rpartition("/")[2] for name in visible if not name.endswith(".distcp")}
    assert names == {".metadata"}, visible
    assert place.pending() == set()


def leave_an_upload_and_an_object(server: S3Server, place: Place) -> None:
    """Leave what a job leaves that was killed while it saved step 6, and wait until it is in the past."""
    client = server.client()
    bucket, _, prefix = place.uri.removeprefix("s3://").partition("/")
    key = f"{prefix}/step-0000000006/__0_0.{'0' * 32}.distcp"
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=bytes(S3_PART_SIZE))
    place.write(f"step-0000000006/__0_1.{'0' * 32}.distcp", b"left")
    assert place.pending()
    listed = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/step-0000000006/")
    newest = [one.get("LastModified") for one in listed.get("Contents", [])]
    # Swift rounds times up to the next second.
    until(lambda: all(time is not None and time < datetime.now(UTC) for time in newest))
