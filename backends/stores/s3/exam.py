"""An examination of S3: the way there, who asks, which bucket and region, and what the clock says."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from botocore.exceptions import ClientError

from cloudckpt.backends.config.options import where_credentials_belong
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointError, ConfigurationError
from cloudckpt.backends.finding import Finding
from cloudckpt.backends.stores import endpoint
from cloudckpt.backends.stores.s3.client import Clients
from cloudckpt.backends.stores.s3.codes import WRONG_CLOCK, WRONG_REGION
from cloudckpt.backends.stores.s3.errors import (
    answer_of,
    code_of,
    denied_action,
    is_denial,
    is_of_credentials,
    not_s3,
    status_of,
)
from cloudckpt.backends.stores.s3.requests import Requests
from cloudckpt.backends.stores.s3.settings import settings_of

_ACTIONS: Final = {
    "put": "s3:PutObject",
    "get": "s3:GetObject",
    "list": "s3:ListBucket",
    "upload": "s3:PutObject",
    "pending": "s3:ListBucketMultipartUploads",
    "abort": "s3:AbortMultipartUpload",
    "delete": "s3:DeleteObject",
}
_OF_OBJECTS: Final = frozenset({"s3:PutObject", "s3:GetObject", "s3:DeleteObject", "s3:AbortMultipartUpload"})
_SOON: Final = timedelta(hours=12)
_RENEWED: Final = "Use a role of the instance, pod or profile: botocore renews its credentials by itself"


class S3Exam:
    """Asks S3, or a server that speaks its protocol, what a store's operations don't show."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._requests = Requests(target)

    def reach(self) -> Generator[Finding, None, bool]:
        with self._requests.explained():
            clients = self._requests.clients
        there = yield from endpoint.reached(clients.route)
        if not there:
            return False
        found = self._credentials(clients)
        if found.state == "failed":
            yield found
            return False
        findings, goes_on = self._bucket(clients)
        if not any(finding.check == "credentials" for finding in findings):
            yield found
        yield from findings
        return goes_on

    def settings(self, example: str | None, *, gc_aborts: bool = True) -> Iterator[Finding]:
        yield from settings_of(self._requests, self._target, self, example, gc_aborts=gc_aborts)

    def action(self, operation: str, error: Exception | None = None) -> str:
        answer = answer_of(error)
        if answer is not None and not is_denial(answer):
            return ""  # no permission helps against an expired token or a suspended user
        action, options = denied_action(error) or _ACTIONS.get(operation, operation), self._target.options
        if options.sse == "aws:kms" and action == "s3:PutObject":
            key = options.sse_kms_key_id or "the bucket's KMS key"
            return f"{self._on(action)}, and kms:GenerateDataKey and kms:Decrypt on {key}"
        return self._on(action)

    def close(self) -> None:
        self._requests.close()

    def _on(self, action: str) -> str:
        bucket = self._target.bucket
        if bucket.startswith("arn:"):
            objects = f"{bucket}/object"
        else:
            objects = bucket = f"arn:{self._requests.clients.data.meta.partition}:s3:::{bucket}"
        if action not in _OF_OBJECTS:
            return f"{action} on {bucket}"
        below = f"{objects}/{self._target.path}" if self._target.path else objects
        return f"{action} on {below}/*"

    def _credentials(self, clients: Clients) -> Finding:
        """Return the finding on credentials: their source and expiry, and nothing of themselves."""
        if clients.fs.anon:
            return Finding("credentials", "ok", "none: requests are not signed, as the option anon says")
        try:
            with self._requests.explained():
                return _told(clients)
        except ConfigurationError:
            raise
        except CheckpointError as error:
            return Finding("credentials", "failed", error.message, error.hint or "")

    def _bucket(self, clients: Clients) -> tuple[list[Finding], bool]:
        """Ask for one name in the bucket: the answer, good or bad, tells most; and whether to go on."""
        asked = answered = 0.0

        def ask(clients: Clients) -> Mapping[str, Any]:
            nonlocal asked, answered
            asked = time.time()
            # With the slash: a policy may grant the listing of names below the prefix alone.
            below = f"{self._target.path}/" if self._target.path else ""
            arguments = {"Bucket": self._target.bucket, "Prefix": below, "MaxKeys": 1}
            try:
                answer: Mapping[str, Any] = clients.data.list_objects_v2(
                    **clients.arguments("list_objects_v2", **arguments)
                )
            finally:
                answered = time.time()
            if "Name" not in answer:
                raise not_s3(clients.route, answer)
            return answer

        outcome = self._requests.outcome(ask)
        error = outcome.error
        answer: Mapping[str, Any] = error.response if isinstance(error, ClientError) else outcome.value or {}
        refused = isinstance(error, ClientError) and code_of(error) == WRONG_CLOCK
        findings = [endpoint.clock(_headers(answer).get("date"), asked, answered, refused=refused)]
        if refused:
            return findings, False
        if isinstance(error, ClientError) and is_denial(error):
            # The check "list" reports the denial. A bucket that does not exist has another answer.
            said = f"{self._target.bucket} is there ({code_of(error)} to a listing of it)"
            findings.append(Finding("bucket", "ok", said))
        elif error is not None:
            findings.append(self._failure(error))
            return findings, False
        else:
            findings.append(Finding("bucket", "ok", f"{self._target.bucket} answers"))
        findings += self._region(clients, answer)
        return findings, True

    def _failure(self, error: Exception) -> Finding:
        check = "bucket"
        if isinstance(error, ClientError):
            check = "credentials" if is_of_credentials(error) else check
            check = "region" if code_of(error) in WRONG_REGION or status_of(error) == 301 else check
        try:
            with self._requests.explained():
                raise error
        except CheckpointError as explained:
            return Finding(check, "failed", explained.message, explained.hint or "")

    def _region(self, clients: Clients, answer: Mapping[str, Any]) -> Iterator[Finding]:
        given = str(clients.data.meta.region_name)
        actual = _headers(answer).get("x-amz-bucket-region")
        if actual is None:

            def head(clients: Clients) -> Mapping[str, Any]:
                answer: Mapping[str, Any] = clients.data.head_bucket(Bucket=self._target.bucket)
                return answer

            outcome = self._requests.outcome(head)
            answered = outcome.error.response if isinstance(outcome.error, ClientError) else outcome.value
            actual = _headers(answered or {}).get("x-amz-bucket-region")
        if actual is None:
            yield Finding("region", "unknown", "the server does not tell the bucket's")
        elif actual in (given, {"aws-global": "us-east-1"}.get(given)):
            yield Finding("region", "ok", actual)
        else:
            yield Finding(
                "region",
                "warning",
                f"wrong region: the bucket is in {actual}, and requests go to {given}, which sends them on",
                f"Set the option region={actual}, or AWS_REGION={actual}",
            )


def _told(clients: Clients) -> Finding:
    fs = clients.fs
    if not clients.renewable:
        if fs.token or fs.client_kwargs.get("aws_session_token"):
            return _temporary("storage_options", None)
        return Finding("credentials", "ok", "found in storage_options")
    credentials: Any = clients.credentials
    if credentials is None:
        return Finding(
            "credentials", "failed", "no usable AWS credentials were found", where_credentials_belong("s3")
        )
    method = str(credentials.method)
    try:
        frozen = credentials.get_frozen_credentials()
    except RuntimeError:  # botocore's, of those that were found again and have expired
        return Finding("credentials", "failed", f"those found by {method} have expired", _RENEWED)
    # botocore keeps the expiry to itself; those that are not refreshed have none.
    ends = getattr(credentials, "_expiry_time", None)
    if method in ("env", "shared-credentials-file", "config-file") and frozen.token:
        return _temporary(method, ends)
    renewed = f", which are renewed (these end {ends:%Y-%m-%d %H:%M} UTC)" if ends else ""
    return Finding("credentials", "ok", f"found by {method}{renewed}")


def _temporary(where: str, ends: datetime | None) -> Finding:
    """Return the finding on credentials that nothing renews."""
    advice = _RENEWED
    if ends is None:
        what = f"temporary ones, found by {where}: nothing renews them, and they do not tell when they end"
        return Finding("credentials", "warning", what, advice)
    left = ends - datetime.now(UTC)
    what = f"temporary ones, found by {where}, end {ends:%Y-%m-%d %H:%M} UTC, and nothing renews them"
    if left <= timedelta(0):
        return Finding("credentials", "failed", f"temporary ones, found by {where}, have expired", advice)
    return Finding("credentials", "warning" if left < _SOON else "ok", what, advice if left < _SOON else "")


def _headers(answer: Mapping[str, Any]) -> Mapping[str, str]:
    headers: Mapping[str, str] = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return headers
