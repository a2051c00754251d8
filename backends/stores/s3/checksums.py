"""The checksum that S3 checks each part against on arrival.

``auto`` is CRC64NVME where the server checks it, as AWS and MiniStack do, and none where it takes the header
and doesn't look, like moto and rclone: there the bytes would be read once more for nothing. It travels in a
header, never in a trailer: so no server can take it for a part of the object. An upload has to be declared
with its algorithm. With ``auto``, a server that refuses the declaration is asked again without, and from then
on the store goes without.

Where the answer to a completion carries the checksum of the whole object, it is compared with the combination
of the parts' own: the type has to be FULL_OBJECT, and the value without the ``-<parts>`` of composite ones.
AWS answers so, always for CRC64NVME. moto and rclone answer with none, MiniStack with a composite one; moto's
answer to a HEAD names a wrong one FULL_OBJECT (of CRC32C), which is why a HEAD is not asked.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from cloudckpt.backends.checksums import ALGORITHMS, Fragment
from cloudckpt.backends.stores.base import Part


def given_or_of(name: str, checksum: str | None, buffers: Sequence[memoryview]) -> str:
    """Return the caller's checksum of the buffers where it is of the algorithm so named, else a new one."""
    if checksum is not None and checksum.startswith(f"{name}:"):
        return checksum
    algorithm, value = ALGORITHMS[name], 0
    for buffer in buffers:
        value = algorithm.of(buffer, value)
    return algorithm.text(value)


def parameters(checksum: str | None) -> dict[str, str]:
    """Return ``Part.checksum`` as the parameters of UploadPart, or of a part to CompleteMultipartUpload."""
    if checksum is None:
        return {}
    algorithm, _, value = checksum.partition(":")
    return {f"Checksum{algorithm.upper()}": value}


def content_md5(*buffers: bytes | memoryview) -> str:
    """Return the value of a ``Content-MD5`` header (RFC 1864) for buffers laid end to end."""
    digest = hashlib.md5(usedforsecurity=False)
    for buffer in buffers:
        digest.update(buffer)
    return base64.b64encode(digest.digest()).decode()


def combined(parts: Sequence[Part]) -> str | None:
    """Return ``<algorithm>:<base64>`` of the parts laid end to end, None where one has another or none."""
    algorithms = {part.checksum.partition(":")[0] if part.checksum else "" for part in parts}
    algorithm = ALGORITHMS.get(algorithms.pop()) if len(algorithms) == 1 else None
    if algorithm is None:
        return None
    ordered = sorted(parts, key=lambda part: part.number)
    sums = [base64.b64decode((part.checksum or "").partition(":")[2]) for part in ordered]
    fragments = (Fragment(p.size, int.from_bytes(s, "big")) for p, s in zip(ordered, sums, strict=True))
    return algorithm.text(algorithm.combine(fragments))


def contradicted(answer: Mapping[str, Any], parts: Sequence[Part]) -> str | None:
    """Return what an answer to CompleteMultipartUpload says against the parts, None where it says nothing.

    Only a checksum of the whole object and of the parts' algorithm says anything.
    """
    expected = combined(parts)
    if expected is None or answer.get("ChecksumType") != "FULL_OBJECT":
        return None
    algorithm, _, value = expected.partition(":")
    said = answer.get(f"Checksum{algorithm.upper()}")
    if said == value or not _is_plain(said, ALGORITHMS[algorithm].width):
        return None
    return f"the store has {algorithm} {said} of the whole object where its parts make {value}"


def proves(answer: Mapping[str, Any], parts: Sequence[Part]) -> bool:
    """Return True if an answer to CompleteMultipartUpload shows that the object is made of these parts.

    It has the checksum of the whole object, or the entity tag that S3 makes of the parts' own: the MD5 of
    their MD5 digests, and how many there are. Neither is there with encryption by KMS and ``checksum=none``.
    """
    expected = combined(parts)
    if expected is not None and answer.get("ChecksumType") == "FULL_OBJECT":
        algorithm, _, value = expected.partition(":")
        if answer.get(f"Checksum{algorithm.upper()}") == value:
            return True
    try:
        ordered = sorted(parts, key=lambda part: part.number)
        digests = b"".join(bytes.fromhex(part.etag.strip('"')) for part in ordered)
    except ValueError:
        return False
    of_parts = hashlib.md5(digests, usedforsecurity=False).hexdigest()
    return str(answer.get("ETag", "")).strip('"') == f"{of_parts}-{len(parts)}"


def _is_plain(said: object, size: int) -> bool:
    """Say whether this is a checksum of so many bytes, and not one of checksums (``<base64>-<parts>``)."""
    try:
        return isinstance(said, str) and len(base64.b64decode(said, validate=True)) == size
    except binascii.Error:
        return False
