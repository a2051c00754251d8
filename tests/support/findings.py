"""What ``cloudckpt doctor`` finds of a place, by check."""

from __future__ import annotations

from typing import Any

from support.commands import Ran, run
from support.places import Place
from support.servers import S3Server

HOUR = 3600.0
ABORTED = {
    "ID": "abort",
    "Status": "Enabled",
    "Filter": {"Prefix": "run/"},
    "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
}
"""A lifecycle rule as there should be one."""


def ruled(place: Place, *rules: dict[str, Any]) -> Place:
    """Give a bucket lifecycle rules."""
    assert isinstance(place.server, S3Server)
    bucket = place.uri.removeprefix("s3://").partition("/")[0]
    configuration: Any = {"Rules": list(rules)}
    place.server.client().put_bucket_lifecycle_configuration(
        Bucket=bucket, LifecycleConfiguration=configuration
    )
    return place


def doctor(place: Place, *more: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Examine a place: the status, and what was found, by check."""
    ran = run("doctor", place.uri, "--json", *more, place=place)
    assert ran.json["uri"] == place.uri and ran.json["ok"] == (ran.status == 0)
    return ran.status, by_check(ran)


def by_check(ran: Ran) -> dict[str, dict[str, str]]:
    found = {finding["check"]: finding for finding in ran.json["findings"]}
    assert len(found) == len(ran.json["findings"])
    return found


def failed(found: dict[str, dict[str, str]]) -> list[str]:
    return [check for check, finding in found.items() if finding["state"] == "failed"]


def assert_only(found: dict[str, dict[str, str]], *checks: str) -> None:
    """These failed, each with something to do about it."""
    assert failed(found) == list(checks)
    assert all(found[check]["advice"] for check in checks)
