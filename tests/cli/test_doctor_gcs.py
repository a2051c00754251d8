"""``cloudckpt doctor`` names what is wrong with a bucket of GCS."""

from __future__ import annotations

from typing import Any

import pytest

from support.findings import HOUR, assert_only, doctor
from support.gcs import GCSServer
from support.places import Place
from support.proxy import proxied


@pytest.fixture
def on_gcs(gcs: GCSServer) -> Place:
    return Place.on_gcs(gcs, gcs.new_bucket()).child("run")


def test_a_missing_bucket_of_gcs(gcs: GCSServer) -> None:
    status, found = doctor(Place.on_gcs(gcs, "no-such-bucket").child("run"))
    assert status == 1
    assert_only(found, "bucket")
    assert "put" not in found


@pytest.mark.parametrize(
    ("permission", "checks"),
    [
        ("storage.objects.create", ("put", "multipart")),
        ("storage.objects.get", ("get",)),
        ("storage.objects.list", ("list",)),
    ],
)
def test_a_permission_of_gcs_that_is_missing(on_gcs: Place, permission: str, checks: tuple[str, ...]) -> None:
    bucket = on_gcs.uri.split("/")[2]
    assert isinstance(on_gcs.server, GCSServer)
    on_gcs.server.deny(bucket, permission)
    status, found = doctor(on_gcs)
    on_gcs.server.deny(bucket)
    assert status == 1
    assert_only(found, *checks)
    assert {found[check]["action"] for check in checks} == {f"{permission} on the bucket {bucket}"}
    assert on_gcs.visible() == on_gcs.pending() == set()


def test_what_gcs_denies_to_delete_is_not_replaced_either(on_gcs: Place) -> None:
    bucket = on_gcs.uri.split("/")[2]
    assert isinstance(on_gcs.server, GCSServer)
    on_gcs.server.deny(bucket, "storage.objects.delete", "storage.buckets.get")
    status, found = doctor(on_gcs)
    on_gcs.server.deny(bucket)
    assert status == 1
    assert_only(found, "conditions", "delete", "clean-up")
    assert found["conditions"]["action"] == f"storage.objects.delete on the bucket {bucket}"
    assert found["settings"]["action"] == f"storage.buckets.get on the bucket {bucket}"
    left = on_gcs.visible()
    assert left and all(name in found["clean-up"]["what"] for name in left)


def test_settings_of_a_bucket_of_gcs_that_cost_or_forbid(gcs: GCSServer) -> None:
    kept: dict[str, Any] = {
        "softDeletePolicy": {"retentionDurationSeconds": "604800"},
        "versioning": {"enabled": True},
    }
    kept["retentionPolicy"] = {"retentionPeriod": "86400"}
    status, found = doctor(Place.on_gcs(gcs, gcs.new_bucket(**kept)).child("run"))
    assert status == 1
    assert_only(found, "retention")
    assert found["soft delete"]["state"] == found["versions"]["state"] == "warning"
    assert "7 d" in found["soft delete"]["what"]


def test_a_clock_that_is_off_from_googles(on_gcs: Place, gcs: GCSServer) -> None:
    with proxied(gcs.endpoint) as proxy:
        proxy.clock = HOUR
        status, found = doctor(on_gcs.behind(proxy.endpoint))
    assert status == 1
    assert_only(found, "clock")
    assert "60 min behind" in found["clock"]["what"] and found["put"]["state"] == "ok"
