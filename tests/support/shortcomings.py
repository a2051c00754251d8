"""Faults of S3 servers: the tests that show them, and the reasons.

Servers that tests start are known by their names. A server that somebody names for `make live` is probed by a
few plain requests for the faults that it has.
"""

from __future__ import annotations

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from support.live import LiveStore
from support.places import Place

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_AGAIN = "test_a_part_may_be_sent_again"
_DATED = "test_pending_uploads_are_listed_until_they_end"
_CARRIED_ON = "test_an_upload_begun_here_is_carried_on_and_completed_by_another_process"
_READER = "test_a_reader_sees_the_old_object_or_the_new_never_a_mixture"

FAULTS: Mapping[str, Mapping[str, str]] = {
    "moto": {_DATED: "dates every upload to 2010"},
    "ministack": {},
    "rclone": {_AGAIN: "answers 501 to a part number that it has"},
    "juicefs": {},
}
"""Tests of `support.conformance` that must fail on a server."""

RACES: Mapping[str, Mapping[str, str]] = {
    "rclone": {
        _READER: "empties an object, then writes it",
        _CARRIED_ON: "loses a pending upload with the last object of its folder",
    },
    "juicefs": {_READER: "may answer a read during an overwrite without an ETag"},
}
"""Tests of `support.conformance` that may fail on a server."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Plain requests that show a fault."""

    test: str
    reason: str
    shows: Callable[[S3Client, str, str], bool]
    """Return whether a server has the fault, given a client, a bucket and a key that no object has."""


@contextlib.contextmanager
def _upload(client: S3Client, bucket: str, key: str) -> Iterator[str]:
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    try:
        yield upload
    finally:
        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload)


def _refuses_a_part_that_is_sent_again(client: S3Client, bucket: str, key: str) -> bool:
    with _upload(client, bucket, key) as upload:
        for body in (b"old", b"new"):
            try:
                client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=body)
            except ClientError:
                return True
    return False


def _loses_uploads_with_their_folder(client: S3Client, bucket: str, key: str) -> bool:
    with _upload(client, bucket, f"{key}/name") as upload:
        client.put_object(Bucket=bucket, Key=f"{key}/other", Body=b"")
        client.delete_object(Bucket=bucket, Key=f"{key}/other")
        for number in (2, 1):
            try:
                client.upload_part(
                    Bucket=bucket, Key=f"{key}/name", UploadId=upload, PartNumber=number, Body=b"part"
                )
            except ClientError:
                return True
    return False


def _dates_uploads_wrongly(client: S3Client, bucket: str, key: str) -> bool:
    with _upload(client, bucket, key):
        listed = client.list_multipart_uploads(Bucket=bucket, Prefix=key).get("Uploads", [])
    now = datetime.now(UTC)
    return any(abs(now - one.get("Initiated", now)) > timedelta(hours=1) for one in listed)


def _does_not_support_conditions(client: S3Client, bucket: str, key: str) -> bool:
    client.put_object(Bucket=bucket, Key=key, Body=b"")
    try:
        client.put_object(Bucket=bucket, Key=key, Body=b"", IfNoneMatch="*")
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status != HTTPStatus.PRECONDITION_FAILED
    finally:
        client.delete_object(Bucket=bucket, Key=key)
    return True


def _refuses_deletions_of_botocore(client: S3Client, bucket: str, key: str) -> bool:
    client.put_object(Bucket=bucket, Key=key, Body=b"")
    try:
        client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key}]})
    except ClientError:
        client.delete_object(Bucket=bucket, Key=key)
        return True
    return False


_FAULTS = (
    Probe(_DATED, "dates every upload wrongly", _dates_uploads_wrongly),
    Probe(_AGAIN, "refuses a part number that it has", _refuses_a_part_that_is_sent_again),
)
_RACES = (
    # A race cannot be probed: rclone, which has this one, is known by another fault.
    Probe(_READER, "empties an object, then writes it", _refuses_a_part_that_is_sent_again),
    # JuiceFS, which has this one, is known by its deletions.
    Probe(_READER, "may answer a read during an overwrite without an ETag", _refuses_deletions_of_botocore),
    # Only where the other process starts so late that its own probe is deleted beside the upload.
    Probe(
        _CARRIED_ON,
        "loses a pending upload with the last object of its folder",
        _loses_uploads_with_their_folder,
    ),
)
_RIVAL = Probe("rival", "does not support conditions on PUT", _does_not_support_conditions)
_STOCK = Probe("stock", "s3fs sends DeleteObjects without Content-MD5", _refuses_deletions_of_botocore)


def faults_of(place: Place) -> Mapping[str, str]:
    """Return the tests of `support.conformance` that must fail at a place of the user, and why."""
    return _shown(_FAULTS, place)


def races_of(place: Place) -> Mapping[str, str]:
    """Return the tests of `support.conformance` that may fail at a place of the user, and why."""
    return _shown(_RACES, place)


def why_stock_cannot_write_to(place: Place) -> str:
    """Return why stock DCP cannot save to a place of the user; empty if it can.

    Its writer renames an object, which s3fs does by a copy and DeleteObjects.
    """
    return _shown((_STOCK,), place).get(_STOCK.test, "")


def why_a_rival_is_not_noticed_at(place: Place) -> str:
    """Return why two jobs can commit one step at a place of the user; empty if they cannot."""
    return _shown((_RIVAL,), place).get(_RIVAL.test, "")


def _shown(probes: tuple[Probe, ...], place: Place) -> Mapping[str, str]:
    if not (isinstance(place.server, LiveStore) and place.server.is_s3):
        return {}
    bucket, _, prefix = place.uri.removeprefix("s3://").partition("/")
    return {probe.test: probe.reason for probe in probes if _shows(probe, place.server, bucket, prefix)}


@functools.cache
def _shows(probe: Probe, store: LiveStore, bucket: str, prefix: str) -> bool:
    return probe.shows(store.client(), bucket, f"{prefix}/probe-{uuid.uuid4().hex}".lstrip("/"))
