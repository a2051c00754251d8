"""What answers of GCS and failures to get one mean: each becomes one error of ours, by status and reason.

Permissions are those of the Cloud Storage IAM reference.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final

import google.auth.exceptions as google
import urllib3.exceptions as http
from gcsfs.retry import HttpError

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
from cloudckpt.backends.stores.response_body import BrokenOffError
from cloudckpt.backends.stores.retry import Judgement, Reply, Verdict, seconds_after
from cloudckpt.backends.system_limits import open_files_cure
from cloudckpt.backends.target import Target

CANCELLED: Final = 499
"""What GCS answers to a session that is cancelled."""
_PERMISSIONS: Mapping[str, str] = {
    "put": "storage.objects.create, and storage.objects.delete to replace an object",
    "begin an upload": "storage.objects.create",
    "upload": "storage.objects.create",
    "complete an upload": "storage.objects.create",
    "abort an upload": "storage.objects.create",
    "get": "storage.objects.get",
    "copy": "storage.objects.create, and storage.objects.get on the source",
    "list": "storage.objects.list",
    "delete": "storage.objects.delete",
    "look at the bucket": "storage.buckets.get",
}
_BAD_BYTES = ("crc32c", "md5", "checksum", "hash")
_LOGIN_HINT = where_credentials_belong("gs")
_LOST = (HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT)
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_FAILURES = (http.HTTPError, google.GoogleAuthError, HttpError, OSError, BrokenOffError)


class RefusedError(Exception):
    """An answer with an error status."""

    def __init__(
        self, doing: str, status: int, body: bytes, after: str | None = None, date: str | None = None
    ) -> None:
        super().__init__(f"{doing}: status {status}")
        self.doing = doing
        """What the request was to do."""
        self.status = status
        self.after = after
        """Its ``Retry-After``."""
        self.date = date
        self.reason, self.message = _reason_of(body)


def _reason_of(body: bytes) -> tuple[str, str]:
    """The reason and the text of Google's JSON error document, as far as there is one."""
    try:
        error: Any = json.loads(body)["error"]
        reasons = [one.get("reason", "") for one in error.get("errors", ())]
        return next(iter(reasons), ""), str(error.get("message", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", body[:200].decode(errors="replace").strip()


def status_of(error: Exception | None) -> int:
    """Return the status of an answer, 0 where there was none."""
    return error.status if isinstance(error, RefusedError) else 0


def judge(error: Exception) -> Judgement:
    """Say what an exception of one attempt means; what is not known is final."""
    match error:
        case RefusedError():
            return _of_answer(error)
        case HttpError(code=code) if str(code) == str(int(HTTPStatus.UNAUTHORIZED)):
            return Judgement(Verdict.RENEW, Reply.NEVER_ASKED)
        case google.TransportError():  # of the server that gives out tokens
            return Judgement(Verdict.TRANSIENT, Reply.NEVER_ASKED)
        case BrokenOffError():
            return Judgement(Verdict.TRANSIENT)  # its headers had come
        case http.NewConnectionError() | http.ConnectTimeoutError() | http.ProxyError():
            return Judgement(Verdict.UNREACHABLE, Reply.NEVER_ASKED)
        case http.SSLError():
            return Judgement(Verdict.UNREACHABLE, Reply.LOST)
        case http.HTTPError() | TimeoutError() | ConnectionError():
            return Judgement(Verdict.TRANSIENT, Reply.LOST)
        case _:
            return Judgement(Verdict.FINAL, Reply.NEVER_ASKED)


def _of_answer(answer: RefusedError) -> Judgement:
    after = seconds_after(answer.after)
    if answer.status == HTTPStatus.UNAUTHORIZED:
        return Judgement(Verdict.RENEW)
    if answer.status in _LOST:  # behind which the server may still be at work
        return Judgement(Verdict.TRANSIENT, Reply.LOST, after)
    if answer.status in _BUSY:
        return Judgement(Verdict.SLOW_DOWN, after=after)
    if answer.status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.INTERNAL_SERVER_ERROR):
        return Judgement(Verdict.TRANSIENT, after=after)
    return Judgement(Verdict.FINAL)


@contextlib.contextmanager
def explained(target: Target, endpoint: str, name: str | None = None) -> Iterator[None]:
    """Turn what a request raises within the block into one error of ours that has ``uri`` and object."""
    try:
        yield
    except CheckpointError as error:
        raise error.located(uri=target.uri, object_name=name) from error.__cause__
    except RefusedError as error:
        raise _error_of(error, target, endpoint).located(uri=target.uri, object_name=name) from error
    except _FAILURES as error:
        raise _error_without_answer(error, endpoint).located(uri=target.uri, object_name=name) from error


def _error_of(answer: RefusedError, target: Target, endpoint: str) -> CheckpointError:
    said = f"{answer.doing} failed with status {answer.status} ({answer.reason or 'no reason'})"
    match answer.status:
        case HTTPStatus.UNAUTHORIZED:
            return AccessDeniedError(f"{endpoint} refused the credentials", hint=_LOGIN_HINT)
        case HTTPStatus.FORBIDDEN:
            needed = _PERMISSIONS.get(answer.doing, answer.doing)
            hint = f"The account needs {needed} on the bucket {target.bucket!r}"
            return AccessDeniedError(f"GCS denied to {answer.doing}: {answer.message}", hint=hint)
        case HTTPStatus.NOT_FOUND:
            return ObjectNotFoundError(f"no such object, or no bucket {target.bucket!r}")
        case HTTPStatus.PRECONDITION_FAILED:
            return PreconditionFailedError("the object is there already, or is not the version expected")
        case HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return IntegrityError("the object ends before the bytes asked for")
        case HTTPStatus.BAD_REQUEST if answer.reason in ("required", "UserProjectMissing"):
            hint = "Give storage_options={'requester_pays': 'PROJECT'}, the project that is to pay"
            return ConfigurationError(f"the bucket {target.bucket!r} is requester-pays", hint=hint)
        case HTTPStatus.BAD_REQUEST if any(word in answer.message.lower() for word in _BAD_BYTES):
            return IntegrityError(f"the bytes that arrived are not those that were sent: {answer.message}")
        case _:
            return StorageError(f"{said}: {answer.message}")


def _error_without_answer(error: Exception, endpoint: str) -> CheckpointError:
    if (cure := open_files_cure(error)) is not None:
        return StorageError(f"no connection to {endpoint}: too many files are open", hint=cure)
    match error:
        case google.DefaultCredentialsError():
            return AccessDeniedError("no usable Google credentials were found", hint=_LOGIN_HINT)
        case google.GoogleAuthError() | HttpError():
            return AccessDeniedError(f"the Google credentials can't be renewed: {error}", hint=_LOGIN_HINT)
        case http.NewConnectionError() | http.ConnectTimeoutError() | http.ProxyError() | http.SSLError():
            hint = "Check the option endpoint_url, the network and STORAGE_EMULATOR_HOST"
            return StorageError(f"{endpoint} can't be reached: {error}", hint=hint)
        case http.HTTPError() | TimeoutError() | ConnectionError() | BrokenOffError():
            return UnansweredError(f"{endpoint} did not answer to the end: {type(error).__name__} {error}")
        case _:
            return StorageError(f"the request to {endpoint} failed: {error}")
