"""Errors of GCS: each answer and each failure to get one becomes one error of ours, by status and reason.

Permissions are those of the Cloud Storage IAM reference.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final

import google.auth.exceptions as google
import urllib3.exceptions as http
from gcsfs.retry import HttpError

from cloudckpt.backends.config.options import where_credentials_belong
from cloudckpt.backends.config.target import Target
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
from cloudckpt.backends.stores.endpoint import duration, seconds_off
from cloudckpt.backends.stores.failure_causes import (
    USER_OF_PROXY,
    Route,
    UnreadableError,
    cause_of,
    ended_cure,
    is_lasting,
    is_of_certificate,
    origin,
    words,
)
from cloudckpt.backends.stores.gcs import xml as gcs_xml
from cloudckpt.backends.stores.http.connections import BrokenOffError
from cloudckpt.backends.stores.http.proxies import proxy_of
from cloudckpt.backends.stores.retry import Judgement, Reply, Verdict, seconds_after
from cloudckpt.backends.stores.s3.codes import SET_THE_CLOCK, quoted
from cloudckpt.backends.system.system_limits import open_files_cure

SETTINGS: Final = "the option endpoint_url or STORAGE_EMULATOR_HOST"
"""Names of what says where the server is, for errors."""
_TOKENS: Final = "https://oauth2.googleapis.com"
"""The server that gives out most tokens."""
CANCELLED: Final = 499
"""What GCS answers to a session that is cancelled."""
_MULTIPART: Final = "storage.multipartUploads.create"
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
    "begin a multipart upload": f"{_MULTIPART} and storage.objects.create",
    "upload a part": f"{_MULTIPART} and storage.objects.create",
    "complete a multipart upload": (
        f"{_MULTIPART} and storage.objects.create, and storage.objects.delete to replace an object"
    ),
    "abort a multipart upload": "storage.multipartUploads.abort",
    "list multipart uploads": "storage.multipartUploads.list",
}
_OF_BUCKETS: Final = frozenset(
    {"put", "begin an upload", "list", "look at the bucket"}
    | {"begin a multipart upload", "list multipart uploads"}
)
"""Requests that name no object which could be missing."""
_SKEWED: Final = 300.0
"""Seconds by which a clock may be off before Google refuses the tokens that are signed with it."""
_OTHER_BYTES: Final = frozenset({"BadDigest", "CrcMismatch"})
"""Codes of the XML API for bytes that are not those of the checksum that was sent."""
_OTHER_PARTS: Final = frozenset({"InvalidPart", "InvalidPartOrder"})
"""Codes of the XML API for parts that are not those that the upload holds."""
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


class PageError(RefusedError):
    """An answer that GCS does not give: a web page, a redirection, or a proxy's demand for a password."""

    def __init__(self, doing: str, status: int, location: str | None) -> None:
        super().__init__(doing, status, b"")
        self.location = location
        """Its ``Location``."""


class GoneError(StorageError):
    """The upload was completed or aborted, or its session has expired."""


def _reason_of(body: bytes) -> tuple[str, str]:
    """Return reason and text of Google's error document, which is JSON or XML, as far as there is one."""
    if (in_xml := gcs_xml.error_of(body)) is not None:
        return in_xml
    try:
        error: Any = json.loads(body)["error"]
        reasons = [one.get("reason", "") for one in error.get("errors", ())]
        return next(iter(reasons), ""), str(error.get("message", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        is_page = body.lstrip()[:9].lower().startswith((b"<html", b"<!doctype"))
        return "", "a web page" if is_page else body[:200].decode(errors="replace").strip()


def status_of(error: Exception | None) -> int:
    """Return the status of an answer, 0 where there was none."""
    return error.status if isinstance(error, RefusedError) else 0


def judge(error: Exception) -> Judgement:
    """Say what an exception of one attempt means; what is not known is final."""
    match error:
        case PageError():
            return Judgement(Verdict.FINAL)
        case RefusedError():
            return _of_answer(error)
        case UnreadableError():
            return Judgement(Verdict.MISMATCH, Reply.LOST)
        case HttpError(code=code) if str(code) == str(int(HTTPStatus.UNAUTHORIZED)):
            return Judgement(Verdict.RENEW, Reply.NEVER_ASKED)
        case google.TransportError():  # of the server that gives out tokens
            return Judgement(Verdict.TRANSIENT, Reply.NEVER_ASKED)
        case BrokenOffError():
            return Judgement(Verdict.TRANSIENT)  # its headers had come
        case _ if is_of_certificate(error):
            return Judgement(Verdict.MISMATCH, Reply.NEVER_ASKED)
        case http.HTTPError() if is_lasting(error):
            return Judgement(Verdict.MISMATCH, Reply.LOST)
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
def explained(target: Target, route: Route, name: str | None = None) -> Iterator[None]:
    """Turn what a request raises within the block into one error of ours that has ``uri`` and object."""
    try:
        yield
    except CheckpointError as error:
        raise error.located(uri=target.uri, object_name=name) from error.__cause__
    except RefusedError as error:
        raise _error_of(error, target, route).located(uri=target.uri, object_name=name) from error
    except _FAILURES as error:
        raise _error_without_answer(error, route).located(uri=target.uri, object_name=name) from error


def _error_of(answer: RefusedError, target: Target, route: Route) -> CheckpointError:
    if isinstance(answer, PageError):
        return _not_gcs(answer, route)
    said = f"{answer.doing} failed with status {answer.status} ({answer.reason or 'no reason'})"
    match answer.status:
        case HTTPStatus.UNAUTHORIZED:
            return _error_of_credentials(answer, route)
        case HTTPStatus.FORBIDDEN:
            needed = _PERMISSIONS.get(answer.doing, answer.doing)
            hint = f"The account needs {needed} on the bucket {target.bucket!r}"
            hint += foreign(answer, route)
            return AccessDeniedError(f"GCS denied to {answer.doing}: {answer.message}", hint=hint)
        case HTTPStatus.NOT_FOUND if answer.doing in _OF_BUCKETS or answer.reason == "NoSuchBucket":
            message = f"the bucket {target.bucket!r} does not exist"
            return ObjectNotFoundError(message, hint="Create it, or check its name and the endpoint")
        case HTTPStatus.NOT_FOUND:
            return ObjectNotFoundError(f"no such object, or no bucket {target.bucket!r}")
        case HTTPStatus.PRECONDITION_FAILED:
            return PreconditionFailedError("the object is there already, or is not the version expected")
        case HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return IntegrityError("the object ends before the bytes asked for")
        case HTTPStatus.BAD_REQUEST if (error := _error_of_bad_request(answer, target)) is not None:
            return error
        case _:
            if route.proxy is not None and not answer.reason:  # which may be the proxy's answer
                message = f"{said}, through the proxy {route.proxy}"
                return StorageError(message, hint=route.proxy.cure(route.host))
            return StorageError(f"{said}: {answer.message}")


def _error_of_bad_request(answer: RefusedError, target: Target) -> CheckpointError | None:
    """Return the error for an answer of status 400, None where none is of its own."""
    if answer.reason in ("required", "UserProjectMissing"):
        hint = "Give storage_options={'requester_pays': 'PROJECT'}, the project that is to pay"
        return ConfigurationError(f"the bucket {target.bucket!r} is requester-pays", hint=hint)
    if answer.reason in _OTHER_PARTS:
        return IntegrityError(f"the parts are not those that the upload holds: {answer.message}")
    if answer.reason in _OTHER_BYTES or any(word in answer.message.lower() for word in _BAD_BYTES):
        return IntegrityError(f"the bytes that arrived are not those that were sent: {answer.message}")
    return None


def _error_of_credentials(answer: RefusedError, route: Route) -> AccessDeniedError:
    """Return the error for credentials that were refused: by the clock, where the answer has another time."""
    now = time.time()
    off = seconds_off(answer.date, now, now)
    if off is None or abs(off) < _SKEWED:
        message = f"{route.endpoint} refused the credentials: their token is not valid, or has expired"
        return AccessDeniedError(f"{message}{_quoted(answer)}", hint=f"Log in again. {_LOGIN_HINT}")
    way = "behind" if off < 0 else "ahead of"
    message = (
        f"{route.endpoint} refused the credentials, and this machine's clock is {duration(off)} {way} "
        f"the server's ({abs(off):,.0f} s)"
    )
    return AccessDeniedError(f"{message}{_quoted(answer)}", hint=SET_THE_CLOCK)


def _quoted(answer: RefusedError) -> str:
    return f" ({quoted(answer.reason or str(answer.status), answer.message)})"


def foreign(answer: RefusedError, route: Route) -> str:
    """Return what to add to the hint for an answer that may be another's, empty for one in GCS's form."""
    if answer.reason:
        return ""
    who = "a proxy or gateway" if route.proxy is None else f"the proxy {route.proxy}"
    hint = f". The answer is not in GCS's form: {who} may have given it"
    return hint if route.proxy is None else f"{hint}. {route.proxy.cure(route.host)}"


def _not_gcs(answer: PageError, route: Route) -> StorageError:
    redirection = f", a redirection to {origin(answer.location)}" if answer.location else ""
    hint = f"Check {SETTINGS}: a web server, a proxy or a network's login page has answered"
    if answer.status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        hint = f"{USER_OF_PROXY}. {hint}"
    if route.proxy is not None:
        hint = f"{hint}. {route.proxy.cure(route.host)}"
    status = f"status {answer.status}{redirection}"
    message = f"the endpoint {route} answered to {answer.doing}, but not as GCS does ({status})"
    return StorageError(message, hint=hint)


def _error_without_answer(error: Exception, route: Route) -> CheckpointError:
    if (cure := open_files_cure(error)) is not None:
        return StorageError(f"no connection to {route}: too many files are open", hint=cure)
    match error:
        case google.DefaultCredentialsError():
            return AccessDeniedError("no usable Google credentials were found", hint=_LOGIN_HINT)
        case google.TransportError():
            return _error_of_tokens(error)
        case google.GoogleAuthError() | HttpError():
            hint = f"Check that their key or account was not deleted, and the clock. {_LOGIN_HINT}"
            return AccessDeniedError(f"the Google credentials can't be renewed: {error}", hint=hint)
        case _:
            return _error_of_connection(error, route)


def _error_of_connection(error: Exception, route: Route) -> CheckpointError:
    connecting = isinstance(error, (http.NewConnectionError, http.ConnectTimeoutError, http.ProxyError))
    cause = cause_of(error, route, connecting=connecting)
    if cause is not None and cause.sent:
        return UnansweredError(cause.what, hint=cause.cure)
    if cause is not None:
        return StorageError(f"cannot reach the endpoint {route.endpoint}: {cause.what}", hint=cause.cure)
    if isinstance(error, (http.HTTPError, TimeoutError, ConnectionError, BrokenOffError)):
        message = f"{route} did not answer to the end: {words(error)}"
        return UnansweredError(message, hint=ended_cure(route))
    return StorageError(f"the request to {route} failed: {words(error)}")


def _error_of_tokens(error: Exception) -> CheckpointError:
    """Return the error for a server of tokens that can't be reached, or does not answer."""
    proxy = proxy_of(_TOKENS)
    through = f", through the proxy {proxy}" if proxy is not None else ""
    cure = proxy.cure(origin(_TOKENS).removeprefix("https://")) if proxy is not None else ""
    return AccessDeniedError(
        f"the server that renews the Google credentials did not answer{through}: {words(error)}",
        hint=f"{cure}. {_LOGIN_HINT}" if cure else _LOGIN_HINT,
    )
