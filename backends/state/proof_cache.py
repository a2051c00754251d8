"""Proof that values load again, taken when they are saved."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from cloudckpt.backends.errors import CheckpointError, ConfigurationError
from cloudckpt.backends.state import values

_REMEMBERED = 100_000
"""Digests kept: 16 bytes each."""


class ProofCache:
    """Serialized values that are known to load, so that each is loaded once and not at every save."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def prove(self, data: memoryview, fqn: str, allowed: Sequence[Any] = ()) -> None:
        """Load a value as a load without trust would.

        Args:
            data: the serialized value.
            fqn: its name.
            allowed: classes that the trainer lets torch load beyond its own.

        Raises:
            ConfigurationError: it would not load.
        """
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest in self._digests:
            return
        try:
            with torch.serialization.safe_globals([*allowed]):
                values.loads(data, fqn)
        except CheckpointError as error:
            raise ConfigurationError(
                f"the value at {fqn!r} would not load again: {error.message}", hint=error.hint
            ) from error
        if len(self._digests) >= _REMEMBERED:
            self._digests.clear()
        self._digests.add(digest)
