"""An examination of Google Cloud Storage: the way there, who asks, and how the bucket is set up."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from datetime import UTC
from typing import Any, Final
from urllib.parse import quote

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import AccessDeniedError, CheckpointError, ConfigurationError
from cloudckpt.backends.finding import Finding
from cloudckpt.backends.stores import endpoint
from cloudckpt.backends.stores.failure_causes import Route
from cloudckpt.backends.stores.gcs.answers import document
from cloudckpt.backends.stores.gcs.capabilities import GCSCapabilities, server_of
from cloudckpt.backends.stores.gcs.client import Client
from cloudckpt.backends.stores.gcs.errors import SETTINGS, RefusedError, explained, judge
from cloudckpt.backends.stores.gcs.requests import Requests
from cloudckpt.backends.stores.retry import Outcome, Retries

_PERMISSIONS: Final = {
    "put": "storage.objects.create",
    "replace": "storage.objects.delete",
    "get": "storage.objects.get",
    "list": "storage.objects.list",
    "upload": "storage.objects.create",
    "pending": "storage.objects.list",
    "abort": "storage.objects.create",
    "delete": "storage.objects.delete",
}
_OF_MULTIPART: Final = {
    "upload": "storage.multipartUploads.create and storage.objects.create",
    "pending": "storage.multipartUploads.list",
    "abort": "storage.multipartUploads.abort",
}
"""Permissions where uploads are multipart uploads."""
_SECONDS: Final = 30.0
_DAY: Final = 86400
_DENIED: Final = 403
_ABORTS: Final = "AbortIncompleteMultipartUpload"
"""Action of a rule that aborts multipart uploads of an age."""


class GCSExam:
    """Asks GCS what a store's operations don't show."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._held: Client | None = None
        self._requests = Requests(target)

    def reach(self) -> Generator[Finding, None, bool]:
        try:
            with explained(self._target, Route(self._target.options.endpoint_url or "GCS", SETTINGS)):
                client = self._held = Client(self._target)
        except ConfigurationError:
            raise
        except CheckpointError as error:
            yield Finding("credentials", "failed", error.message, error.hint or "")
            return False
        there = yield from endpoint.reached(client.route)
        if not there:
            return False
        findings, goes_on = self._bucket(client)
        if not any(finding.check == "credentials" for finding in findings):
            yield _credentials(client)
        yield from findings
        return goes_on

    def settings(self, example: str | None, *, gc_aborts: bool = True) -> Iterator[Finding]:
        del example, gc_aborts
        yield from self._bucket_settings()
        yield from self._features()

    def _bucket_settings(self) -> Iterator[Finding]:
        assert self._held is not None  # noqa: S101 - the place was reached before
        where = f"/storage/v1/b/{quote(self._target.bucket, safe='')}"
        outcome = self._outcome(self._held, "look at the bucket", where, {})
        if isinstance(outcome.error, RefusedError) and outcome.error.status == _DENIED:
            yield Finding(
                "settings",
                "unknown",
                "soft delete, retention and encryption of the bucket may not be looked at",
                "Only this examination needs it: a save does without",
                f"storage.buckets.get on the bucket {self._target.bucket}",
            )
            return
        if outcome.error is not None:
            yield self._failure(outcome.error, "settings")
            return
        bucket = outcome.result()[0]
        yield from settings_of(bucket, self._target.options.kms_key_name)
        yield from self._lifecycle(bucket)

    def _lifecycle(self, bucket: Mapping[str, Any]) -> Iterator[Finding]:
        """Report when the bucket aborts the uploads that a killed job leaves."""
        assert self._held is not None  # noqa: S101 - the place was reached before
        try:
            with explained(self._target, self._held.route):
                multipart = server_of(self._requests).multipart(self._requests)
                yield lifecycle_of(bucket, multipart=multipart)
        except CheckpointError as error:
            yield Finding("lifecycle", "unknown", error.message, error.hint or "")

    def _features(self) -> Iterator[Finding]:
        """Report the features of a server other than Google's own."""
        assert self._held is not None  # noqa: S101 - the place was reached before
        if self._held.is_google:
            return
        try:
            with explained(self._target, self._held.route):
                yield reported(server_of(self._requests).all(self._requests))
        except CheckpointError as error:
            yield Finding("features", "unknown", error.message, error.hint or "")

    def action(self, operation: str, error: Exception | None = None) -> str:
        del error
        client = self._held
        in_parts = client is not None and (client.serves_xml or server_of(self._requests).known_multipart)
        known = {**_PERMISSIONS, **_OF_MULTIPART} if in_parts else _PERMISSIONS
        return f"{known.get(operation, operation)} on the bucket {self._target.bucket}"

    def close(self) -> None:
        self._requests.close()
        if self._held is not None:
            self._held.close()

    def _bucket(self, client: Client) -> tuple[list[Finding], bool]:
        asked = time.time()
        outcome = self._outcome(client, "list", client.objects(self._target.bucket), {"maxResults": "1"})
        answered, error = time.time(), outcome.error
        date = error.date if isinstance(error, RefusedError) else outcome.value and outcome.value[1]
        findings = [endpoint.clock(date or None, asked, answered)]
        if isinstance(error, RefusedError) and error.status == _DENIED:
            findings.append(Finding("bucket", "ok", f"{self._target.bucket} is there"))
        elif error is not None:
            return [*findings, self._failure(error, "bucket")], False
        else:
            findings.append(Finding("bucket", "ok", f"{self._target.bucket} answers"))
        return findings, True

    def _failure(self, error: Exception, check: str) -> Finding:
        if isinstance(error, RefusedError) and error.status == 404:  # noqa: PLR2004 - HTTP's
            what = f"the bucket {self._target.bucket!r} does not exist"
            return Finding(check, "failed", what, "Create it, or check its name and the endpoint")
        try:
            assert self._held is not None  # noqa: S101 - it was asked
            with explained(self._target, self._held.route):
                raise error
        except CheckpointError as explanation:
            check = "credentials" if isinstance(explanation, AccessDeniedError) else check
            return Finding(check, "failed", explanation.message, explanation.hint or "")

    def _outcome(
        self, client: Client, doing: str, where: str, parameters: Mapping[str, str]
    ) -> Outcome[tuple[dict[str, Any], str]]:
        def ask() -> tuple[dict[str, Any], str]:
            answer = client.request(doing, "GET", where, parameters=parameters)
            return document(answer, client.endpoint), answer.headers.get("Date", "")

        options = self._target.options
        place = f"{client.endpoint}/{self._target.bucket}"
        retries = Retries(judge, client.paces.transfers, place, retries=options.retries, seconds=_SECONDS)
        return retries.outcome(ask, renew=client.renew)


def settings_of(bucket: Mapping[str, Any], key: str | None) -> Iterator[Finding]:
    """Yield findings on settings of a bucket that concern leftovers, cost and the encryption ``key``."""
    soft = int(bucket.get("softDeletePolicy", {}).get("retentionDurationSeconds", 0))
    if soft:
        what = f"what is deleted is kept, and paid for, for {soft / _DAY:g} d more"
        advice = (
            "Where steps are deleted often, turn it off: gcloud storage buckets update --clear-soft-delete"
        )
        yield Finding("soft delete", "warning", what, advice)
    else:
        yield Finding("soft delete", "ok", "off: what is deleted is gone, and costs nothing")
    if held := int(bucket.get("retentionPolicy", {}).get("retentionPeriod", 0)):
        what = f"nothing can be deleted or replaced before it is {held / _DAY:g} d old"
        yield Finding("retention", "failed", what, "Use a bucket without a retention policy for checkpoints")
    if bucket.get("versioning", {}).get("enabled"):
        what = "kept: steps that are deleted go on costing until a lifecycle rule deletes their versions"
        yield Finding(
            "versions", "warning", what, "Turn versions off, or add a rule with daysSinceNoncurrentTime"
        )
    named = key or bucket.get("encryption", {}).get("defaultKmsKeyName")
    yield Finding("encryption", "ok", f"with the key {named}" if named else "with Google's own keys")


def lifecycle_of(bucket: Mapping[str, Any], *, multipart: bool) -> Finding:
    """Return what becomes of uploads that a killed job leaves, by the resource of a bucket."""
    if not multipart:
        return Finding(
            "lifecycle", "ok", "none is needed: sessions that a killed job leaves expire in a week"
        )
    rules = bucket.get("lifecycle", {}).get("rule", ())
    days = [
        int(rule.get("condition", {}).get("age", 0))
        for rule in rules
        if rule.get("action", {}).get("type") == _ABORTS
    ]
    if days:
        return Finding("lifecycle", "ok", f"uploads that a killed job leaves are aborted after {min(days)} d")
    what = "no lifecycle rule here aborts uploads that a killed job leaves: unseen, they cost money"
    advice = f"Add a lifecycle rule with {_ABORTS}, or run cloudckpt gc now and then"
    return Finding("lifecycle", "warning", what, advice)


def reported(found: GCSCapabilities) -> Finding:
    """Report which conditions and requests of GCS a server supports."""
    supported = {
        "ifGenerationMatch=0": (found.put.create, "of two jobs that save to one place, both may win"),
        "ifGenerationMatch with a generation": (
            found.put.update,
            "of two jobs that save to one place, both may win",
        ),
        "ifSourceGenerationMatch": (found.copy_source, "cp compares generations before and after each copy"),
        "the status of an upload": (
            found.upload_status,
            "a session fails where the answer to a part is lost, and a copy that was cut off begins anew",
        ),
        "multipart uploads of the XML API": (
            found.multipart,
            "the parts of an object are sent one after another, and gc finds no uploads of killed jobs",
        ),
    }
    able = [name for name, (is_able, _) in supported.items() if is_able]
    lacks = [name for name, (is_able, _) in supported.items() if not is_able]
    what = f"it is not Google's own: it supports {', '.join(able) or 'no condition'}"
    if not lacks:
        return Finding("features", "ok", what)
    follows = "; ".join(dict.fromkeys(result for is_able, result in supported.values() if not is_able))
    return Finding("features", "warning", f"{what}, and not {', '.join(lacks)}", f"What follows: {follows}")


def _credentials(client: Client) -> Finding:
    found = client.fs.credentials
    if found.credentials is None:
        return Finding("credentials", "ok", "none: requests are not signed")
    ends = getattr(found.credentials, "expiry", None)
    until = f", which are renewed (these end {ends.replace(tzinfo=UTC):%Y-%m-%d %H:%M} UTC)" if ends else ""
    return Finding("credentials", "ok", f"found by {type(found.credentials).__module__}{until}")
