"""Many deletions in one request: a batch is requests, and its answer answers, in parts of a MIME document."""

from __future__ import annotations

import email.parser
import email.policy
import re
import uuid
from collections.abc import Sequence
from typing import Final

AT_ONCE: Final = 100
"""Requests that one batch may have."""
_HEAD: Final = 4096
"""Bytes of the head of a part."""
_STATUS: Final = re.compile(rb"^HTTP/[0-9.]+ ([0-9]{3})[^\r\n]*\r?$", re.MULTILINE)


def deletions(paths: Sequence[str]) -> tuple[str, bytes]:
    """Return the content type and the body of a batch that deletes the objects at some paths."""
    border = f"batch_{uuid.uuid4().hex}"
    parts = [
        f"--{border}\r\nContent-Type: application/http\r\nContent-Transfer-Encoding: binary\r\n"
        f"Content-ID: <{number}>\r\n\r\nDELETE {path} HTTP/1.1\r\n"
        "Content-Type: application/json\r\nAccept: application/json\r\nContent-Length: 0\r\n\r\n\r\n"
        for number, path in enumerate(paths)
    ]
    return f'multipart/mixed; boundary="{border}"', ("".join(parts) + f"--{border}--\r\n").encode()


def answers(content_type: str, body: bytes, count: int) -> dict[int, tuple[int, bytes]]:
    """Return status and body of each answer in a batch's, by the number of the request.

    Where no part has a Content-ID and there is one for each of ``count`` requests, each answers the request
    at its own place. gcp-storage-emulator sends none, and no blank line before the status line either.

    Raises:
        ValueError: it is not the answer to a batch.
    """
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    document = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    boundary = document.get_boundary()
    if document.get_content_maintype() != "multipart" or not boundary:
        raise ValueError(f"it is {content_type}")
    found: dict[int, tuple[int, bytes]] = {}
    numbered = 0
    for place, part in enumerate(_parts(body, boundary.encode("latin-1"))):
        status = _STATUS.search(part)
        if status is None:
            raise ValueError(f"a part of it has no status: {part[:100]!r}")
        rest = part[status.end() :]
        end = re.search(rb"\r?\n\r?\n", rest)
        number = _number(part[: min(status.start(), _HEAD)])
        numbered += number is not None
        number = place if number is None else number
        if number in found or number >= count:
            raise ValueError(f"it has a part for request {number} of {count}, or two")
        found[number] = (int(status[1]), rest[end.end() :] if end else b"")
    if numbered != len(found) and (numbered or len(found) != count):
        raise ValueError("it has parts without a Content-ID, which answer an unknown request")
    return found


def _parts(body: bytes, boundary: bytes) -> list[bytes]:
    """Return the parts of a MIME document, without the line breaks around them."""
    pieces = re.split(rb"(?:^|\r?\n)--" + re.escape(boundary), body)
    return [piece.strip(b"\r\n") for piece in pieces[1:] if not piece.startswith(b"--")]


def _number(head: bytes) -> int | None:
    """Return the number in the Content-ID of a part, as in ``<response-batch+3>`` or ``response-3``."""
    identity = re.search(rb"^Content-ID:[^\r\n]*?([0-9]+)>?[ \t]*\r?$", head, re.MULTILINE | re.IGNORECASE)
    return int(identity[1]) if identity else None
