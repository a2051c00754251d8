"""Codes of S3, STS, KMS and Ceph become errors that name the cause and the cure, not a permission."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from botocore.exceptions import ClientError

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import (
    AccessDeniedError,
    CheckpointError,
    ConfigurationError,
    IntegrityError,
    ObjectNotFoundError,
    StorageError,
)
from cloudckpt.backends.stores.failure_causes import Route
from cloudckpt.backends.stores.retry import Verdict
from cloudckpt.backends.stores.s3.client import SETTINGS
from cloudckpt.backends.stores.s3.codes import quoted
from cloudckpt.backends.stores.s3.errors import explained
from cloudckpt.backends.stores.s3.verdict import judge
from support.buckets import OPERATIONS, Bucket, Stores
from support.proxy import Answer, Proxy

CODES: Sequence[tuple[int, str, type[CheckpointError], Verdict, Sequence[str]]] = [
    (403, "RequestTimeTooSkewed", StorageError, Verdict.FINAL, ["clock", "NTP"]),
    (400, "ExpiredToken", AccessDeniedError, Verdict.RENEW, ["expired", "Log in again"]),
    (403, "RequestExpired", AccessDeniedError, Verdict.RENEW, ["expired"]),
    (400, "InvalidToken", AccessDeniedError, Verdict.RENEW, ["session token", "AWS_SESSION_TOKEN"]),
    (403, "InvalidAccessKeyId", AccessDeniedError, Verdict.RENEW, ["access key", "Credentials"]),
    (403, "SignatureDoesNotMatch", AccessDeniedError, Verdict.FINAL, ["secret access key", "credentials"]),
    (403, "InvalidSecurity", AccessDeniedError, Verdict.FINAL, ["refused the credentials"]),
    (403, "AllAccessDisabled", AccessDeniedError, Verdict.FINAL, ["disabled", "owner"]),
    (403, "AccountProblem", AccessDeniedError, Verdict.FINAL, ["account", "support"]),
    (403, "NotSignedUp", AccessDeniedError, Verdict.FINAL, ["not signed up"]),
    (403, "InvalidObjectState", StorageError, Verdict.FINAL, ["storage class", "Restore it first"]),
    (403, "QuotaExceeded", StorageError, Verdict.FINAL, ["quota", "prune"]),
    (403, "UserSuspended", AccessDeniedError, Verdict.FINAL, ["suspended", "user enable"]),
    (400, "AuthorizationHeaderMalformed", StorageError, Verdict.FINAL, ["another region", "option region"]),
    (400, "IllegalLocationConstraintException", StorageError, Verdict.FINAL, ["option region"]),
    (400, "InvalidBucketName", ConfigurationError, Verdict.FINAL, ["'bucket'", "lower-case"]),
    (400, "KMS.DisabledException", StorageError, Verdict.FINAL, ["KMS key is disabled", "Enable it"]),
    (400, "KMS.NotFoundException", ConfigurationError, Verdict.FINAL, ["does not exist", "sse_kms_key_id"]),
    (400, "KMS.InvalidStateException", StorageError, Verdict.FINAL, ["state", "deletion"]),
    (403, "KMS.AccessDeniedException", AccessDeniedError, Verdict.FINAL, ["kms:Decrypt", "key policy"]),
    (400, "KMS.SomethingNew", StorageError, Verdict.FINAL, ["KMS refused", "sse_kms_key_id"]),
    (400, "KMS.ThrottlingException", StorageError, Verdict.SLOW_DOWN, ["KMS"]),
    (400, "InvalidRequest", StorageError, Verdict.FINAL, ["status 400", "Object Lock", "option checksum"]),
    (400, "MissingContentMD5", StorageError, Verdict.FINAL, ["option checksum"]),
    (400, "EntityTooSmall", StorageError, Verdict.FINAL, ["Raise the option part_size"]),
    (400, "EntityTooLarge", StorageError, Verdict.FINAL, ["Lower the option part_size"]),
    (400, "BadDigest", IntegrityError, Verdict.FINAL, ["not those that were sent"]),
    (405, "MethodNotAllowed", StorageError, Verdict.FINAL, ["does not support", "doctor s3://bucket/run"]),
    (501, "NotImplemented", StorageError, Verdict.FINAL, ["does not support", "doctor"]),
    (503, "ServiceUnavailable", StorageError, Verdict.SLOW_DOWN, ["overloaded", "concurrency"]),
    (404, "NoSuchBucket", ObjectNotFoundError, Verdict.FINAL, ["'bucket' does not exist"]),
    (403, "AccessDenied", AccessDeniedError, Verdict.FINAL, ["need s3:PutObject here", "no policy"]),
]
_SAID = "as the server says"


def refused(status: int, code: str, message: str = _SAID, operation: str = "PutObject") -> ClientError:
    metadata: Any = {"HTTPStatusCode": status, "HTTPHeaders": {}}
    return ClientError({"Error": {"Code": code, "Message": message}, "ResponseMetadata": metadata}, operation)


def explanation(error: ClientError, **options: Any) -> CheckpointError:
    target = Target.parse("s3://bucket/run", **options)
    with (
        pytest.raises(CheckpointError) as caught,
        explained(target, Route("https://server", SETTINGS), "name"),
    ):
        raise error
    return caught.value


@pytest.mark.parametrize(("status", "code", "kind", "verdict", "words"), CODES, ids=str)
def test_a_code_has_its_error_its_cure_and_its_verdict(
    status: int, code: str, kind: type[CheckpointError], verdict: Verdict, words: Sequence[str]
) -> None:
    error = refused(status, code)
    assert judge(error).verdict is verdict
    told = explanation(error)
    assert type(told) is kind
    for word in (*words, f"({code}: {_SAID})"):
        assert word in str(told)
    if code != "AccessDenied":
        assert "s3:PutObject" not in str(told)


@pytest.mark.parametrize("operation", ["GetObject", "PutObject", "ListObjectsV2", "DeleteObjects"])
@pytest.mark.parametrize("code", ["RequestTimeTooSkewed", "UserSuspended", "KMS.DisabledException"])
def test_a_code_from_the_wire_names_no_permission(
    stores: Stores, proxy: Proxy, bucket: Bucket, operation: str, code: str
) -> None:
    bucket.hold(b"data")
    store = stores(retries=1)
    OPERATIONS[operation](store)
    bucket.hold(b"data")
    proxy.forget()
    proxy.rule(lambda _: Answer(403, code))
    with pytest.raises(CheckpointError, match=code) as caught:
        OPERATIONS[operation](store)
    assert "s3:" not in (caught.value.hint or "") and caught.value.hint
    assert len(proxy.seen(operation)) == 1


def test_without_a_checksum_the_demand_for_one_names_the_option() -> None:
    demand = "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests"
    told = explanation(refused(400, "InvalidRequest", demand), checksum="none")
    assert demand in told.message and "checksum" in (told.hint or "") and "not none" in (told.hint or "")
    assert explanation(refused(400, "InvalidRequest", operation="GetObject")).hint is None


def test_an_explicit_deny_is_told_in_the_server_s_words() -> None:
    message = (
        f"User: arn:aws:sts::123456789012:assumed-role/{'r' * 300}/{'s' * 300} is not authorized to perform: "
        "s3:PutObject with an explicit deny in a service control policy"
    )
    told = explanation(refused(403, "AccessDenied", message))
    assert "explicit deny in a service control policy" in told.message and len(told.message) < 600


def test_a_server_s_message_is_one_line_of_bounded_length() -> None:
    assert quoted("Code", "a\nb\x1b[31m\u2028c") == r"Code: a\nb\x1b[31m\u2028c"
    assert len(quoted("C" * 9999, "m" * 9999)) < 800
    assert quoted("403", None) == "403" and quoted("403", "403") == "403"


def test_a_kms_denial_of_a_read_stays_a_denial(stores: Stores, proxy: Proxy, bucket: Bucket) -> None:
    bucket.hold(b"data")
    store = stores(retries=1)
    proxy.spoil("GetObject", [Answer(403, "AccessDenied")] * 9)
    with pytest.raises(AccessDeniedError, match="GetObject was denied"):
        store.get("name")
