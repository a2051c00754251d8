"""Many deletions in one request: a batch is requests, and its answer answers, in parts of a MIME document."""

from __future__ import annotations

import email.parser
import email.policy
import uuid
from collections.abc import Sequence

AT_ONCE = 100
"""Requests that one batch may have."""


def deletions(paths: Sequence[str]) -> tuple[str, bytes]:
    """The content type and the body of a batch that deletes what lies at some paths."""
    border = f"batch_{uuid.uuid4().hex}"
    parts = [
        f"--{border}\r\nContent-Type: application/http\r\nContent-Transfer-Encoding: binary\r\n"
        f"Content-ID: <{number}>\r\n\r\nDELETE {path} HTTP/1.1\r\n"
        "Content-Type: application/json\r\nAccept: application/json\r\nContent-Length: 0\r\n\r\n\r\n"
        for number, path in enumerate(paths)
    ]
    return f'multipart/mixed; boundary="{border}"', ("".join(parts) + f"--{border}--\r\n").encode()


def answers(content_type: str, body: bytes) -> dict[int, tuple[int, bytes]]:
    """Status and body of each answer in a batch's, by the number of the request.

    Raises:
        ValueError: it is not the answer to a batch.
    """
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    document = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
    if not document.is_multipart():
        raise ValueError(f"it is {content_type}")
    found: dict[int, tuple[int, bytes]] = {}
    for part in document.iter_parts():
        number = int(part["Content-ID"].strip("<> ").rpartition("-")[2])
        said = bytes(part.get_payload(decode=True) or b"")
        status, _, rest = said.partition(b"\r\n")
        found[number] = (int(status.split()[1]), rest.partition(b"\r\n\r\n")[2])
    return found
