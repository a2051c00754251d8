"""Completing uploads by the thousand, as a coordinator does for all ranks.

botocore puts every request together from rules, schemas and hooks, which takes longer than all that follows.
Completions differ in object, upload and parts alone. So botocore does it once for a bucket, and that is the
pattern for all of them; it signs each, and reads the answers.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final
from xml.sax.saxutils import escape

import botocore.parsers
from botocore.awsrequest import AWSRequest, AWSResponse
from botocore.compat import HTTPHeaders
from botocore.exceptions import ClientError
from botocore.utils import percent_encode

from cloudckpt.backends.stores.s3.codes import WRONG_REGION
from cloudckpt.backends.stores.s3.connections import Answer, Connections
from cloudckpt.backends.stores.s3.errors import code_of, status_of

_OPERATION: Final = "CompleteMultipartUpload"
_KEY: Final = "cloudckpt-key"
_UPLOAD: Final = "cloudckpt-upload"
"""What stands in a pattern for an upload's own."""
_QUERY: Final = "?uploadId="
_NAMESPACE: Final = "http://s3.amazonaws.com/doc/2006-03-01/"


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A request as botocore was about to sign it, up to where its object is named."""

    url: str
    auth_path: str
    headers: Mapping[str, Any]
    context: Mapping[str, Any]
    """The context of botocore's signer, beside the request."""

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> _Pattern | None:
        """Return that of a request for the stand-ins; None if it doesn't look as it should."""
        url, tail = params["url"], f"{_KEY}{_QUERY}{_UPLOAD}"
        auth_path = params.get("auth_path") or ""
        if not (url.endswith(tail) and auth_path.endswith(_KEY) and params["method"] == "POST"):
            return None
        headers, context = dict(params["headers"]), dict(params["context"])
        return cls(url.removesuffix(tail), auth_path.removesuffix(_KEY), headers, context)

    def request(self, key: str, upload_id: str, body: bytes) -> AWSRequest:
        """Return the request to complete one upload, not signed yet."""
        name = percent_encode(key, safe="/~")
        request = AWSRequest(
            method="POST",
            url=f"{self.url}{name}{_QUERY}{percent_encode(upload_id)}",
            headers=self.headers,
            data=body,
            auth_path=f"{self.auth_path}{name}",
        )
        request.context = dict(self.context)
        return request


class Completion:
    """Stands for ``client.complete_multipart_upload``, with the same arguments, answers and errors.

    Safe to use from several threads. What the arguments hold beside object, upload and parts must always be
    the same for a bucket. Where a request can't be made after a pattern, botocore makes it.
    """

    def __init__(self, client: Any, connections: Connections) -> None:
        self._client = client
        self._connections = connections
        self._patterns: dict[str, _Pattern | None] = {}
        self._unsent = threading.local()
        self._model = client.meta.service_model.operation_model(_OPERATION)
        self._parser = botocore.parsers.create_parser("rest-xml")
        client.meta.events.register_last("before-call", self._answer_unsent)

    def __call__(self, **arguments: Any) -> dict[str, Any]:
        """Complete one upload."""
        bucket = arguments["Bucket"]
        try:
            pattern = self._patterns[bucket]
        except KeyError:
            pattern = self._patterns[bucket] = self._pattern(arguments)
        if pattern is None:
            return self._by_botocore(arguments)
        body = _body(arguments["MultipartUpload"]["Parts"])
        request = pattern.request(arguments["Key"], arguments["UploadId"], body)
        event = f"request-created.s3.{_OPERATION}"
        self._client.meta.events.emit(event, request=request, operation_name=_OPERATION)  # which signs it
        url, headers = str(request.url), dict(request.headers.items())
        try:
            return self._read(self._connections.post(url, headers, body))
        except ClientError as error:
            if status_of(error) >= HTTPStatus.BAD_REQUEST and code_of(error) not in WRONG_REGION:
                raise
        self._patterns.pop(bucket, None)
        return self._by_botocore(arguments)  # which goes where it is sent

    def close(self) -> None:
        """Let idle connections go."""
        self._connections.close()

    def _by_botocore(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self._client.complete_multipart_upload(**arguments)
        return answer

    def _read(self, answer: Answer) -> dict[str, Any]:
        """Return or raise what botocore's client would."""
        response: dict[str, Any] = {
            "headers": answer.headers,
            "status_code": answer.status,
            "body": answer.body,
            "context": {"operation_name": _OPERATION},
        }
        # Tells an error that comes with status 200, as S3's do where it took long.
        event, model = f"before-parse.s3.{_OPERATION}", self._model
        given = {"response_dict": response, "customized_response_dict": {}}
        self._client.meta.events.emit(event, operation_model=model, **given)
        parsed: dict[str, Any] = self._parser.parse(response, model.output_shape)
        if response["status_code"] >= HTTPStatus.MULTIPLE_CHOICES:
            raise self._client.exceptions.from_code(parsed.get("Error", {}).get("Code"))(parsed, _OPERATION)
        return parsed

    def _pattern(self, arguments: Mapping[str, Any]) -> _Pattern | None:
        """Have botocore put a request together and not send it."""
        own = {"Key": _KEY, "UploadId": _UPLOAD, "MultipartUpload": {"Parts": []}}
        self._unsent.wanted = True
        try:
            params = self._client.complete_multipart_upload(**{**arguments, **own})
        finally:
            self._unsent.wanted = False
        pattern = _Pattern.of(params)
        return pattern if pattern is not None and self._connections.reach(pattern.url) else None

    def _answer_unsent(self, params: dict[str, Any], **_: Any) -> tuple[AWSResponse, dict[str, Any]] | None:
        """Answer a request before it is sent, by itself, where this thread wants that."""
        if not getattr(self._unsent, "wanted", False):
            return None
        return AWSResponse(params["url"], HTTPStatus.OK, HTTPHeaders(), None), params


def _body(parts: list[dict[str, Any]]) -> bytes:
    listed = (
        "".join(f"<{name}>{escape(str(value))}</{name}>" for name, value in part.items()) for part in parts
    )
    inner = "".join(f"<Part>{part}</Part>" for part in listed)
    return f'<CompleteMultipartUpload xmlns="{_NAMESPACE}">{inner}</CompleteMultipartUpload>'.encode()
