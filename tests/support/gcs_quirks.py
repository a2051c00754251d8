"""Manners of other servers that the GCS server of the tests can take on, where Google's are not wanted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from support.gcs_objects import Json, Refusal, unmet
from support.gcs_wire import Answer, Request

_KNOWN: Mapping[str, type] = {
    "batches": int,
    "lacks": str,
    "numbers_batches": bool,
    "refuses_conditions": bool,
}


class Quirks:
    """The manners of the moment.

    - `batches`: the status with which a batch is answered, for there is no such endpoint.
    - `numbers_batches`: False for a batch whose answers come without a Content-ID.
    - `lacks`: a field that is missing in every resource.
    - `refuses_conditions`: True for 412 to every put with a condition, also to one that holds.
    """

    def __init__(self) -> None:
        self._set: Json = {}
        self.json_only: set[str] = set()
        """Buckets without the XML API."""

    def set(self, quirks: Json) -> None:
        """Take the place of those before."""
        for name, value in quirks.items():
            if not isinstance(value, _KNOWN.get(name, type(None))):
                raise Refusal(400, "invalid", f"Not a quirk: {name}={value!r}")
        self._set = quirks

    def check(self, request: Request) -> None:
        """Refuse a request."""
        status = self._set.get("batches")
        if isinstance(status, int) and request.segments[:1] == ["batch"]:
            raise Refusal(status, "notFound", "There are no batches here")
        if self._set.get("refuses_conditions") and "ifGenerationMatch" in request.query:
            raise unmet()

    def changed(self, answer: Answer) -> Answer:
        """Return an answer as the other server would give it."""
        kind, body = answer.headers.get("Content-Type", ""), b"".join(answer.body) if self._set else b""
        if kind.startswith("multipart/mixed") and self._set.get("numbers_batches") is False:
            return Answer(
                answer.status, answer.headers, [memoryview(re.sub(rb"Content-ID: .*\r\n", b"", body))]
            )
        lacks = self._set.get("lacks")
        if lacks and kind.startswith("application/json") and body:
            kept = _without(json.loads(body), str(lacks))
            return Answer(answer.status, answer.headers, [memoryview(json.dumps(kept).encode())])
        return answer


def _without(value: object, name: str) -> object:
    if isinstance(value, list):
        return [_without(one, name) for one in value]
    if isinstance(value, dict):
        return {key: _without(one, name) for key, one in value.items() if key != name}
    return value
