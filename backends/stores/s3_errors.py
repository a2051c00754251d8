"""What an S3 client's exceptions mean: each becomes one error of ours, by code and status, never by text.

IAM action names are those of the S3 service authorisation reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from cloudckpt.backends.errors import (
    AccessDeniedError,
    CheckpointError,
    ConfigurationError,
    IntegrityError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    UnansweredError,
)
from cloudckpt.backends.options import where_credentials_belong
from cloudckpt.backends.target import Target

_ACTIONS: Mapping[str, str] = {
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject, and s3:ListBucket to tell a missing object from a forbidden one",
    "ListObjectsV2": "s3:ListBucket",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
    "GetBucketLifecycleConfiguration": "s3:GetLifecycleConfiguration",
    "GetBucketVersioning": "s3:GetBucketVersioning",
}
EXPIRED: Final = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "RequestExpired"}
)
"""Codes of credentials that were good once."""
_BAD_CREDENTIALS = EXPIRED | {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "AuthFailure",
}
WRONG_REGION = frozenset(
    {
        "PermanentRedirect",
        "TemporaryRedirect",
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
    }
)
_OF_CLIENTS = (boto.ClientError, boto.BotoCoreError, ResponseParserError)
_BAD_BYTES = frozenset({"BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch"})
_LOGIN_HINT = where_credentials_belong("s3")
_NOT_S3_HINT = (
    "Check the option endpoint_url and the environment variable AWS_ENDPOINT_URL: not every port speaks S3"
)


class BrokenBodyError(StorageError):
    """A body ended before its length, or stalled."""


class NotDeletedError(StorageError):
    """A deletion was answered, and left objects behind."""

    code = ""
    """S3's code of the first failure."""


@contextlib.contextmanager
def explained(target: Target, endpoint: str, name: str | None = None) -> Iterator[None]:
    """Turn what a client raises within the block into one error of ours that has ``uri`` and object."""
    try:
        yield
    except CheckpointError as error:
        raise error.located(uri=target.uri, object_name=name) from error.__cause__
    except (boto.ClientError, boto.BotoCoreError, ResponseParserError, OSError) as error:
        raise _error_for(error, target, endpoint).located(uri=target.uri, object_name=name) from error


def not_s3(endpoint: str) -> StorageError:
    """Return the error for an answer that no S3 server would give."""
    return StorageError(f"the endpoint {endpoint} answered, but not as an S3 server does", hint=_NOT_S3_HINT)


def without_etag(endpoint: str, operation: str, answer: Mapping[str, Any]) -> StorageError:
    """Return the error for an answer to ``operation`` that lacks the ETag, which names the version."""
    if _is_page(answer):
        return not_s3(endpoint)
    return StorageError(
        f"{endpoint} answered {operation} without an ETag header",
        hint="A commit needs it. Check the option endpoint_url, and whether a proxy or gateway removes it",
    )


def plain(error: BaseException) -> BaseException:
    """Return the client's own exception, which s3fs and fsspec hide behind an OSError or two of theirs."""
    bare: BaseException | None = error
    while bare is not None and not isinstance(bare, (CheckpointError, *_OF_CLIENTS)):
        bare = bare.__cause__
    return error if bare is None else bare


def code_of(error: boto.ClientError) -> str:
    """Return the S3 error code, such as ``NoSuchUpload``; the status in digits where there was none."""
    return str(error.response.get("Error", {}).get("Code") or status_of(error))


def status_of(error: boto.ClientError) -> int:
    """Return the HTTP status of the answer, 0 where it is not known."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)


def is_of_credentials(error: boto.ClientError) -> bool:
    """Say whether the answer is about who asks, whatever its status."""
    return code_of(error) in _BAD_CREDENTIALS


def denied_action(error: BaseException | None) -> str | None:
    """Return the IAM action that a request was denied for, None where the error does not tell."""
    bare = error and plain(error.__cause__ or error)
    if not isinstance(bare, boto.ClientError):
        return None
    return _ACTIONS.get(bare.operation_name, bare.operation_name).partition(",")[0]


def _error_for(error: BaseException, target: Target, endpoint: str) -> CheckpointError:
    bare = plain(error)
    if isinstance(bare, boto.ClientError):
        return _error_by_code(bare, target, endpoint) or _error_by_status(bare, target)
    return _error_before_answer(bare, target, endpoint)


def _error_before_answer(error: BaseException, target: Target, endpoint: str) -> CheckpointError:
    match error:
        case boto.NoCredentialsError() | boto.PartialCredentialsError() | boto.CredentialRetrievalError():
            return AccessDeniedError("no usable AWS credentials were found", hint=_LOGIN_HINT)
        case boto.SSOError() | boto.TokenRetrievalError():
            hint = "Log in again with: aws sso login"
            return AccessDeniedError("the AWS login is missing or has expired", hint=hint)
        case boto.ProfileNotFound():
            hint = "Check the option profile and the files ~/.aws/config and ~/.aws/credentials"
            return ConfigurationError("the AWS profile does not exist", hint=hint)
        case boto.NoRegionError() | boto.InvalidRegionError():
            return ConfigurationError("the AWS region is missing or misspelt", hint="Set the option region")
        case boto.ParamValidationError():
            return ConfigurationError(f"the client refuses the request: {error}")
        case boto.ReadTimeoutError():
            message = f"no answer from {endpoint} within {target.options.timeout:g} s"
            return UnansweredError(message, hint="Raise the option timeout, or lower part_size")
        case boto.EndpointConnectionError() | boto.ConnectTimeoutError() | boto.ProxyConnectionError():
            hint = "Check the option endpoint_url, the network and the proxy settings"
            return StorageError(f"cannot reach the endpoint {endpoint}", hint=hint)
        case boto.SSLError():
            hint = "Check the certificate, or whether the endpoint speaks https at all"
            return UnansweredError(f"no TLS connection to {endpoint}", hint=hint)
        case ResponseParserError():
            return not_s3(endpoint)
        case _:
            return UnansweredError(f"the connection to {endpoint} failed: {type(error).__name__}")


def _error_by_code(error: boto.ClientError, target: Target, endpoint: str) -> CheckpointError | None:
    code = code_of(error)
    if code == "NoSuchBucket":
        hint = "Create it, or check its name, the region and the endpoint"
        return ObjectNotFoundError(f"the bucket {target.bucket!r} does not exist", hint=hint)
    if _is_not_s3(error):
        return not_s3(endpoint)
    if code in _BAD_CREDENTIALS:
        return AccessDeniedError(f"{endpoint} refused the credentials ({code})", hint=_LOGIN_HINT)
    if code in WRONG_REGION or status_of(error) == HTTPStatus.MOVED_PERMANENTLY:
        hint = f"Set the option region{_actual_region(error)}"
        return StorageError(f"the bucket {target.bucket!r} is in another region ({code})", hint=hint)
    if code == "NoSuchUpload":
        return StorageError("the upload does not exist: it was completed, aborted or has expired")
    if code in _BAD_BYTES:
        return IntegrityError(f"the bytes that arrived are not those that were sent ({code})")
    return None


def _error_by_status(error: boto.ClientError, target: Target) -> CheckpointError:
    code, operation = code_of(error), error.operation_name
    match status_of(error):
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
            hint = f"The credentials need {_ACTIONS.get(operation, operation)} here{_kms(target, operation)}"
            return AccessDeniedError(f"{operation} was denied ({code})", hint=hint)
        case HTTPStatus.NOT_FOUND:
            return ObjectNotFoundError(f"no such object, or no bucket {target.bucket!r}")
        case HTTPStatus.PRECONDITION_FAILED:
            return PreconditionFailedError("the object is there already, or is not the version expected")
        case HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return IntegrityError("the object ends before the bytes asked for")
        case status:
            said = str(error.response.get("Error", {}).get("Message") or "").strip().rstrip(".")
            return StorageError(f"{operation} failed with status {status} ({code}){said and f': {said}'}")


def _is_not_s3(error: boto.ClientError) -> bool:
    """Tell an error page from S3's error document. A HEAD has no body: there the headers have to tell."""
    if error.operation_name not in ("HeadObject", "HeadBucket"):
        return code_of(error).isdigit() and status_of(error) < HTTPStatus.INTERNAL_SERVER_ERROR
    return _is_page(error.response)


def _is_page(answer: Mapping[str, Any]) -> bool:
    """Tell a web page from an answer of S3, by the headers."""
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    named = "x-amz-request-id" in headers or "x-amzn-requestid" in headers
    return not named and str(headers.get("content-type", "")).startswith("text/html")


def _actual_region(error: boto.ClientError) -> str:
    response: Mapping[str, Any] = error.response
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = headers.get("x-amz-bucket-region") or response.get("Error", {}).get("Region")
    return f" to {region}" if region else ""


def _kms(target: Target, operation: str) -> str:
    if target.options.sse != "aws:kms" or _ACTIONS.get(operation) != "s3:PutObject":
        return ""
    return ", and kms:GenerateDataKey and kms:Decrypt on the key"
