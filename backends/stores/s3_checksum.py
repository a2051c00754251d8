"""The checksum that S3 checks each part against on arrival.

``auto`` is CRC64NVME where awscrt is installed (it comes with the extra ``s3``), else none. AWS and MiniStack
check it; moto and rclone take the header and don't look. It travels in a header, never in a trailer: so no
server can take it for a part of the object. An upload has to be declared with its algorithm. With ``auto``, a
server that refuses the declaration is asked again without, after which the store goes without.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from cloudckpt.backends.errors import ConfigurationError

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
