"""Check what S3 answers before botocore reads it, and where botocore sends a request.

botocore takes an answer without a body, or with another document than the operation's, for one without any
fields: an empty answer of status 200 to DeleteObjects means to it that every object was deleted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from cloudckpt.backends.errors import StorageError
from cloudckpt.backends.stores.failure_causes import Route, origin
from cloudckpt.backends.stores.http import bounded
from cloudckpt.backends.stores.s3.errors import not_s3

_AWS_HOSTS: Final = (".amazonaws.com", ".amazonaws.com.cn", ".api.aws")
_ROOTS: Final[Mapping[str, str]] = {
    "CompleteMultipartUpload": "CompleteMultipartUploadResult",
    "CopyObject": "CopyObjectResult",
    "CreateMultipartUpload": "InitiateMultipartUploadResult",
    "DeleteObjects": "DeleteResult",
    "ListMultipartUploads": "ListMultipartUploadsResult",
    "ListObjectsV2": "ListBucketResult",
    "ListParts": "ListPartsResult",
    "UploadPartCopy": "CopyPartResult",
}
"""Root elements of answers, as in the S3 API reference."""
_OTHER_ROOTS: Final[Mapping[str, str]] = {"CreateMultipartUpload": "InitiateMultipartUpload"}
"""Root elements of gofakes3, and so of rclone."""
_BARE: Final = frozenset({"AbortMultipartUpload", "DeleteObject", "PutObject", "UploadPart"})
"""Operations whose answers have no body."""
_START: Final = 1024
"""Bytes of a document within which its root begins."""
_REDIRECTIONS: Final = frozenset({301, 302, 303, 307, 308})
_ROOT: Final = re.compile(
    rb"\s*(?:<\?xml[^>]*\?>)?\s*(?:<!--.*?-->\s*)*<(?:[\w.-]+:)?([\w.-]+)[\s/>]", re.DOTALL
)
"""The name of a document's root. A document type declaration comes before it, and does not match."""


def check_answers(client: Any, route: Route, *, follows_regions: bool) -> None:
    """Have a client of botocore check hosts and answers.

    Args:
        client: the client.
        route: to its server, for errors.
        follows_regions: requests may go to any host of S3's, as a bucket in another region needs, and not to
            that of the endpoint alone.
    """
    home = urlsplit(str(client.meta.endpoint_url))

    def check_host(request: Any, event_name: str, **_: Any) -> None:
        bounded.expect(is_object=event_name.endswith(".GetObject"))
        parts = urlsplit(str(request.url))
        host = parts.hostname or ""
        is_home = host == home.hostname or host.endswith(f".{home.hostname}")
        if parts.scheme != home.scheme or not (is_home or (follows_regions and is_host_of_s3(host))):
            raise StorageError(
                f"a request for {route.endpoint} was to go to {origin(str(request.url))}: nothing was sent",
                hint="Set the option region to the bucket's own, and check the option endpoint_url",
            )

    def check_answer(operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
        status, operation = response_dict["status_code"], str(operation_model.name)
        if status < HTTPStatus.MULTIPLE_CHOICES:
            _check(operation, response_dict, route)
        elif status in _REDIRECTIONS and not _names_region(response_dict):
            if operation == "HeadBucket":
                # botocore asks for the region by this request, and so for that of this request, without end.
                response_dict["status_code"] = int(HTTPStatus.BAD_REQUEST)
            elif _root_of(response_dict["body"]) != b"Error":
                raise _foreign(route, response_dict)

    client.meta.events.register_first("before-send.s3", check_host)
    # Before botocore's handler of `before-parse.s3.*`, which makes status 500 of an answer that is no XML.
    client.meta.events.register_first("before-parse.*.*", check_answer)


def check_key(answer: Mapping[str, Any], key: str, route: Route, operation: str) -> None:
    """Check that an answer is about the object that was asked for, where it names one.

    Raises:
        StorageError: it is about another.
    """
    named = answer.get("Key")
    if named and key not in (named, unquote(str(named))):  # some servers quote it
        raise not_s3(route, answer, f"{operation} of another key than was asked for")


def is_aws(host: str) -> bool:
    """Return True for a host of AWS."""
    return host.endswith(_AWS_HOSTS)


def is_host_of_s3(host: str) -> bool:
    """Return True for a host of S3 itself, in any region."""
    return is_aws(host) and any(label.startswith("s3") for label in host.split(".")[:-2])


def _check(operation: str, response: Mapping[str, Any], route: Route) -> None:
    """Raise StorageError for an answer of success that is not that of the operation."""
    root = _ROOTS.get(operation)
    if root is None and operation not in _BARE:
        return
    body: bytes = response["body"]
    if root is None:
        is_right = not body or _root_of(body) == b"Error"
    else:
        # An error may come with status 200, which botocore finds.
        is_right = (_root_of(body) or b"").decode() in (root, "Error", _OTHER_ROOTS.get(operation))
    if not is_right:
        raise _foreign(route, response, _what(operation, root, body))


def _root_of(body: bytes) -> bytes | None:
    found = _ROOT.match(body[:_START].removeprefix(b"\xef\xbb\xbf"))
    return found[1] if found is not None else None


def _names_region(response: Mapping[str, Any]) -> bool:
    """Return True for the answer that sends a request to the region of its bucket, which has this header."""
    return any(str(name).lower() == "x-amz-bucket-region" for name in response["headers"])


def _foreign(route: Route, response: Mapping[str, Any], what: str = "") -> StorageError:
    headers = {str(name).lower(): str(value) for name, value in response["headers"].items()}
    meta = {"HTTPStatusCode": response["status_code"], "HTTPHeaders": headers}
    return not_s3(route, {"ResponseMetadata": meta}, what)


def _what(operation: str, root: str | None, body: bytes) -> str:
    if root is None:
        return f"{operation} with a body"
    return f"{operation} without {root}" if body[:_START].strip() else f"{operation} with no body"
