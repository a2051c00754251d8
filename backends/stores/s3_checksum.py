"""The checksum that S3 checks each part against on arrival.

``auto`` is CRC64NVME where awscrt is installed (it comes with the extra ``s3``), else none. AWS and MiniStack
check it; moto and rclone take the header and don't look. It travels in a header, never in a trailer: so no
server can take it for a part of the object. An upload has to be declared with its algorithm. With ``auto``, a
server that refuses the declaration is asked again without, after which the store goes without.

Where the answer to a completion carries the checksum of the whole object, it is compared with the combination
of the parts' own: the type has to be FULL_OBJECT, and the value without the ``-<parts>`` of composite ones.
AWS answers so, always for CRC64NVME. moto and rclone answer with none, MiniStack with a composite one; moto's
answer to a HEAD names a wrong one FULL_OBJECT (of CRC32C), which is why a HEAD is not asked.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.store import Part

try:
    from awscrt import checksums
except ImportError:
    checksums = None

_BYTES = {"crc64nvme": 8, "crc32c": 4}


@dataclass(frozen=True, slots=True)
class PartChecksum:
    """One algorithm, ``crc64nvme`` or ``crc32c``."""

    algorithm: str

    @classmethod
    def chosen(cls, option: str) -> Self | None:
        """Return what the option ``checksum`` asks for, None for no checksum.

        Raises:
            ConfigurationError: it was asked for by name and awscrt is not installed.
        """
        if option == "none" or (option == "auto" and checksums is None):
            return None
        if checksums is None:
            hint = 'Install it with: pip install "cloudckpt[s3]"'
            raise ConfigurationError(f"checksum {option!r} needs awscrt, which is not installed", hint=hint)
        return cls("crc64nvme" if option == "auto" else option)

    @property
    def declaration(self) -> dict[str, str]:
        """The parameters of CreateMultipartUpload."""
        return {"ChecksumAlgorithm": self.algorithm.upper()}

    def given_or_of(self, checksum: str | None, buffers: Sequence[memoryview]) -> str:
        """Return the caller's checksum of the buffers where it is of this algorithm, else a new one."""
        if checksum is not None and checksum.startswith(f"{self.algorithm}:"):
            return checksum
        return self.of(buffers)

    def of(self, buffers: Sequence[memoryview]) -> str:
        """Return ``<algorithm>:<base64>`` of the buffers laid end to end."""
        function: Any = getattr(checksums, self.algorithm)
        value = 0
        for buffer in buffers:
            value = function(buffer, value)
        packed = value.to_bytes(_BYTES[self.algorithm], "big")
        return f"{self.algorithm}:{base64.b64encode(packed).decode()}"


def parameters(checksum: str | None) -> dict[str, str]:
    """Return ``Part.checksum`` as the parameters of UploadPart, or of a part to CompleteMultipartUpload."""
    if checksum is None:
        return {}
    algorithm, _, value = checksum.partition(":")
    return {f"Checksum{algorithm.upper()}": value}


def combined(parts: Sequence[Part]) -> str | None:
    """Return ``<algorithm>:<base64>`` of the parts laid end to end, None where one has another or none."""
    algorithms = {part.checksum.partition(":")[0] if part.checksum else "" for part in parts}
    algorithm = algorithms.pop() if len(algorithms) == 1 else ""
    if checksums is None or algorithm not in _BYTES:
        return None
    combine: Any = getattr(checksums, f"combine_{algorithm}")
    value = 0  # the checksum of nothing, for both
    for part in sorted(parts, key=lambda part: part.number):
        encoded = (part.checksum or "").partition(":")[2]
        value = combine(value, int.from_bytes(base64.b64decode(encoded), "big"), part.size)
    packed = value.to_bytes(_BYTES[algorithm], "big")
    return f"{algorithm}:{base64.b64encode(packed).decode()}"


def contradicted(answer: Mapping[str, Any], parts: Sequence[Part]) -> str | None:
    """Return what an answer to CompleteMultipartUpload says against the parts, None where it says nothing.

    Only a checksum of the whole object and of the parts' algorithm says anything.
    """
    expected = combined(parts)
    if expected is None or answer.get("ChecksumType") != "FULL_OBJECT":
        return None
    algorithm, _, value = expected.partition(":")
    said = answer.get(f"Checksum{algorithm.upper()}")
    if said == value or not _is_plain(said, _BYTES[algorithm]):
        return None
    return f"the store has {algorithm} {said} of the whole object where its parts make {value}"


def _is_plain(said: object, size: int) -> bool:
    """Say whether this is a checksum of so many bytes, and not one of checksums (``<base64>-<parts>``)."""
    try:
        return isinstance(said, str) and len(base64.b64decode(said, validate=True)) == size
    except binascii.Error:
        return False
