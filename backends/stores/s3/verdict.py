"""Decide whether to retry a request to S3, by code and status of the answer or by the way it failed to come.

A wrong clock, a wrong signature and a disabled account are final: the next request gets the same answer.
Credentials that are expired or unknown are looked for again where they came from, at most twice.

The codes are those of the S3 API reference ("Error responses") and of botocore's standard retry mode.
"""

from __future__ import annotations

from http import HTTPStatus

from botocore import exceptions as boto

from cloudckpt.backends.stores.failure_causes import UnreadableError, is_lasting, is_of_certificate
from cloudckpt.backends.stores.retry import Judgement, Reply, Verdict, seconds_after
from cloudckpt.backends.stores.s3.codes import EXPIRED, is_about_caller
from cloudckpt.backends.stores.s3.errors import BrokenBodyError, NotDeletedError, code_of, plain, status_of

_SLOW_DOWN = frozenset(
    {"SlowDown", "Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled"}
    | {"RequestThrottledException", "TooManyRequestsException", "RequestLimitExceeded", "ServiceUnavailable"}
    | {"BandwidthLimitExceeded", "KMS.ThrottlingException"}
)
_PASSING = frozenset(
    # Of the status 409 these two alone: another write to the same name is under way.
    {"ConditionalRequestConflict", "OperationAborted"}
    # S3 answers 400 to a body that came too slowly, and 200 before it is done with a completion.
    | {"RequestTimeout", "RequestTimeoutException", "InternalError", "PriorRequestNotComplete"}
)
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE, 509)
_GATEWAY = (HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT)
_NEVER_SUPPORTED = (HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)


def judge(error: Exception) -> Judgement:
    """Say what an exception of one attempt means; what is not known is final."""
    match plain(error):
        case boto.ClientError() as answer:
            return _of_answer(answer)
        case NotDeletedError(code=code):
            return Judgement(_of_code(code) or Verdict.FINAL)
        case BrokenBodyError():
            return Judgement(Verdict.TRANSIENT)  # its headers had come
        case UnreadableError():
            return Judgement(Verdict.MISMATCH, Reply.LOST)
        case bare if is_of_certificate(bare):
            return Judgement(Verdict.MISMATCH, Reply.NEVER_ASKED)
        case bare if is_lasting(bare):
            return Judgement(Verdict.MISMATCH, Reply.LOST)
        case boto.EndpointConnectionError() | boto.ConnectTimeoutError() | boto.ProxyConnectionError():
            return Judgement(Verdict.UNREACHABLE, Reply.NEVER_ASKED)
        case boto.SSLError():
            return Judgement(Verdict.UNREACHABLE, Reply.LOST)  # TLS may also break after the request went out
        case boto.HTTPClientError() | boto.IncompleteReadError() | TimeoutError() | ConnectionError():
            return Judgement(Verdict.TRANSIENT, Reply.LOST)
        case _:
            return Judgement(Verdict.FINAL, Reply.NEVER_ASKED)


def _of_answer(answer: boto.ClientError) -> Judgement:
    status, code = status_of(answer), code_of(answer)
    headers = answer.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    after = seconds_after(headers.get("retry-after"))
    if code in EXPIRED or _may_have_expired(answer):
        return Judgement(Verdict.RENEW)
    if is_about_caller(code):  # regardless of the status
        return Judgement(Verdict.FINAL)
    if status in _GATEWAY:  # behind which the server may still be at work
        return Judgement(Verdict.TRANSIENT, Reply.LOST, after)
    if status in _BUSY:
        return Judgement(Verdict.SLOW_DOWN, after=after)
    if verdict := _of_code(code):
        return Judgement(verdict, after=after)
    broken = status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in _NEVER_SUPPORTED
    if broken or status == HTTPStatus.REQUEST_TIMEOUT:
        return Judgement(Verdict.TRANSIENT, after=after)
    return Judgement(Verdict.FINAL)


def _of_code(code: str) -> Verdict | None:
    if code in _SLOW_DOWN:
        return Verdict.SLOW_DOWN
    return Verdict.TRANSIENT if code in _PASSING else None


def _may_have_expired(answer: boto.ClientError) -> bool:
    """Tell what an expired credential looks like to a HEAD, whose answer has no body to say so."""
    return answer.operation_name == "HeadObject" and status_of(answer) == HTTPStatus.BAD_REQUEST
