"""Turn an S3 client's exceptions into errors of cloudckpt, by code and status, never by text.

IAM action names are those of the S3 service authorisation reference.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from cloudckpt.backends.config.options import where_credentials_belong
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import (
    AccessDeniedError,
    CheckpointError,
    ConfigurationError,
    ObjectNotFoundError,
    StorageError,
    UnansweredError,
)
from cloudckpt.backends.stores.endpoint import duration, seconds_off
from cloudckpt.backends.stores.failure_causes import USER_OF_PROXY, Route, cause_of, ended_cure, origin, words
from cloudckpt.backends.stores.s3.codes import is_about_caller, is_known, meaning_of, quoted
from cloudckpt.backends.system.system_limits import open_files_cure

_ACTIONS: Mapping[str, str] = {
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
    "AssumeRole": "sts:AssumeRole",
    "AssumeRoleWithWebIdentity": "sts:AssumeRoleWithWebIdentity",
    "GetBucketLifecycleConfiguration": "s3:GetLifecycleConfiguration",
    "GetBucketVersioning": "s3:GetBucketVersioning",
}
_READS: Final = frozenset({"GetObject", "HeadObject", "ListObjectsV2", "ListMultipartUploads"})
_OF_CLIENTS = (boto.ClientError, boto.BotoCoreError, ResponseParserError)
_CONNECTING = (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)
_LOGIN_HINT = where_credentials_belong("s3")
_NOT_S3_HINT = (
    "Check the option endpoint_url and the environment variable AWS_ENDPOINT_URL: not every port speaks S3, "
    "and a proxy or a network's login page may have answered"
)


class BrokenBodyError(StorageError):
    """A body ended before its length, or stalled."""


class NotDeletedError(StorageError):
    """A deletion was answered, and left objects behind."""

    code = ""
    """S3's code of the first failure."""


@contextlib.contextmanager
def explained(target: Target, route: Route, name: str | None = None) -> Iterator[None]:
    """Turn what a client raises within the block into one error of ours that has ``uri`` and object."""
    try:
        yield
    except CheckpointError as error:
        raise error.located(uri=target.uri, object_name=name) from error.__cause__
    except (boto.ClientError, boto.BotoCoreError, ResponseParserError, OSError) as error:
        raise _error_for(error, target, route).located(uri=target.uri, object_name=name) from error


def not_s3(route: Route, answer: Mapping[str, Any] | None = None, what: str = "") -> StorageError:
    """Return the error for an answer that no S3 server would give.

    Args:
        route: to the server.
        answer: that as botocore has it, for its status.
        what: what is wrong with the answer.
    """
    meta = (answer or {}).get("ResponseMetadata", {})
    status, location = meta.get("HTTPStatusCode"), meta.get("HTTPHeaders", {}).get("location")
    redirection = f", a redirection to {origin(location)}" if location else ""
    shown = f" (status {status}{redirection})" if status else ""
    hint = _NOT_S3_HINT
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        hint = f"{USER_OF_PROXY}. {hint}"
    if route.proxy is not None:
        hint = f"{hint}. {route.proxy.cure(route.host)}"
    why = f": {what}" if what else ""
    return StorageError(f"the endpoint {route} answered, but not as an S3 server does{shown}{why}", hint=hint)


def without_etag(route: Route, operation: str, answer: Mapping[str, Any]) -> StorageError:
    """Return the error for an answer to ``operation`` that lacks the ETag, which names the version."""
    if is_page(answer):
        return not_s3(route, answer)
    return StorageError(
        f"{route} answered {operation} without an ETag header",
        hint="A commit needs it. Check the option endpoint_url, and whether a proxy or gateway removes it",
    )


def unanswered(what: str, attempts: int, error: Exception, target: Target, route: Route) -> UnansweredError:
    """Return the error for a request that may have been carried out, by the error of its last attempt."""
    tries = "its one try" if attempts == 1 else f"one of {attempts} tries"
    last = error if isinstance(error, CheckpointError) else _error_for(error, target, route)
    message = f"the {what} went out, and the answer to {tries} was lost: {last.message}"
    return UnansweredError(message, hint=last.hint)


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
    """Return True if the answer is about the credentials, the account or the clock, for any request."""
    return is_about_caller(code_of(error))


def is_denial(error: boto.ClientError) -> bool:
    """Return True if a permission is missing, or S3 does not tell whether the object is there."""
    denied = status_of(error) in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
    return denied and not is_known(code_of(error)) and not _is_not_s3(error)


def denial(error: boto.ClientError, target: Target, *more: str) -> AccessDeniedError:
    """Return the error for a denial, whose hint names the permission needed, and ``more`` beside it."""
    operation = error.operation_name
    actions = " and ".join([_ACTIONS.get(operation, operation), *more])
    return AccessDeniedError(
        f"{operation} was denied ({_said(error)})",
        hint=f"The credentials need {actions} here{_kms(target, operation)}, "
        "and no policy of the bucket, the organization or the VPC endpoint may deny it",
    )


def answer_of(error: BaseException | None) -> boto.ClientError | None:
    """Return the server's answer that an error stands for, None where there is none."""
    bare = error and plain(error.__cause__ or error)
    return bare if isinstance(bare, boto.ClientError) else None


def denied_action(error: BaseException | None) -> str | None:
    """Return the IAM action that a request was denied for, None where the error does not tell."""
    bare = answer_of(error)
    if bare is None:
        return None
    return _ACTIONS.get(bare.operation_name, bare.operation_name)


def _error_for(error: BaseException, target: Target, route: Route) -> CheckpointError:
    bare = plain(error)
    if isinstance(bare, boto.ClientError):
        return _error_by_code(bare, target, route) or _error_by_status(bare, target, route)
    return _error_before_answer(bare, target, route)


def _error_before_answer(error: BaseException, target: Target, route: Route) -> CheckpointError:
    if (hint := open_files_cure(error)) is not None:
        return StorageError(f"no connection to {route}: too many files are open", hint=hint)
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
            hint = "Set the option region, or the environment variable AWS_REGION"
            return ConfigurationError("the AWS region is missing or misspelt", hint=hint)
        case boto.InvalidConfigError() | boto.ConfigParseError() | boto.ConfigNotFound():
            hint = "Check the files ~/.aws/config and ~/.aws/credentials"
            return ConfigurationError(f"the AWS configuration can't be used: {error}", hint=hint)
        case boto.ParamValidationError():
            return ConfigurationError(f"the client refuses the request: {error}")
        case ResponseParserError():
            return not_s3(route)
        case _:
            return _error_of_connection(error, target, route)


def _error_of_connection(error: BaseException, target: Target, route: Route) -> CheckpointError:
    asked = getattr(error, "kwargs", {}).get("endpoint_url")  # of S3 or STS, with the bucket in the host
    if asked:
        parts = urlsplit(str(asked))
        route = replace(route, endpoint=f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")
    cause = cause_of(error, route, connecting=isinstance(error, _CONNECTING))
    if cause is not None and cause.sent:
        return UnansweredError(cause.what, hint=cause.cure)
    if cause is not None:
        return StorageError(f"cannot reach the endpoint {route.endpoint}: {cause.what}", hint=cause.cure)
    if isinstance(error, boto.ReadTimeoutError):
        message = f"no answer from {route} within {target.options.timeout:g} s"
        return UnansweredError(message, hint="Raise the option timeout, or lower part_size")
    return UnansweredError(f"the connection to {route} failed: {words(error)}", hint=ended_cure(route))


def _error_by_code(error: boto.ClientError, target: Target, route: Route) -> CheckpointError | None:
    code, status, operation = code_of(error), status_of(error), error.operation_name
    if not is_known(code) and _is_not_s3(error):
        return not_s3(route, error.response)
    meaning = meaning_of(code, status)
    if meaning is None:
        return None
    fields = {
        "bucket": target.bucket,
        "checksum": ", and not none" if target.options.checksum == "none" else "",
        "clock": _clock(error),
        "endpoint": route.endpoint,
        "operation": operation,
        "region": _actual_region(error),
        "status": status,
        "uri": target.uri,
    }
    writes = operation not in _READS
    cure = meaning.cure.format(**fields) if writes or not meaning.of_writes else None
    return meaning.error(f"{meaning.what.format(**fields)} ({_said(error)})", hint=cure or None)


def _error_by_status(error: boto.ClientError, target: Target, route: Route) -> CheckpointError:
    if is_denial(error):
        return denial(error, target)
    if status_of(error) == HTTPStatus.NOT_FOUND:
        return ObjectNotFoundError(f"no such object, or no bucket {target.bucket!r}")
    message = f"{error.operation_name} failed with status {status_of(error)} ({_said(error)})"
    if route.proxy is not None and code_of(error).isdigit():  # which may be the proxy's answer
        return StorageError(f"{message}, through the proxy {route.proxy}", hint=route.proxy.cure(route.host))
    return StorageError(message)


def _said(error: boto.ClientError) -> str:
    """Return the server's own code and message."""
    return quoted(code_of(error), error.response.get("Error", {}).get("Message"))


def _clock(error: boto.ClientError) -> str:
    """Say by how much this machine's clock differs from the server's, as far as the answer has a ``Date``."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    now = time.time()
    off = seconds_off(headers.get("date"), now, now)
    if not off:
        return "the server refused the time of this machine's clock"
    way = "behind" if off < 0 else "ahead of"
    message = f"this machine's clock is {duration(off)} {way} the server's ({abs(off):,.0f} s)"
    return f"{message}, which refused the request"


def _is_not_s3(error: boto.ClientError) -> bool:
    """Tell an error page from S3's error document. A HEAD has no body: there the headers have to tell."""
    if error.operation_name not in ("HeadObject", "HeadBucket"):
        return code_of(error).isdigit() and status_of(error) < HTTPStatus.INTERNAL_SERVER_ERROR
    return is_page(error.response)


def is_page(answer: Mapping[str, Any]) -> bool:
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
