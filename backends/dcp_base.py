"""The base of StorageWriter and StorageReader: a checkpoint's address, and an open store there."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from cloudckpt.backends.config.target import Target, is_checkpoint_uri
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectStore


class CheckpointStorageMixin:
    """A checkpoint's URI with its options, kept over ``reset`` and pickling."""

    _taker: ClassVar[str]
    """The class whose keywords are suggested for an unknown one."""

    def __init__(self, uri: str | os.PathLike[str] | Target, options: dict[str, Any]) -> None:
        self._target = Target.given(self._taker, uri, options)
        self._store: ObjectStore | None = None

    @property
    def checkpoint_id(self) -> str:
        """The checkpoint's URI, without options."""
        return self._target.uri

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return True for a URI that cloudckpt can save to and load from."""
        return is_checkpoint_uri(checkpoint_id)

    def held(self) -> ObjectStore:
        """Return a store that keeps the connections of this checkpoint's stores open while it lives.

        Raises:
            CheckpointError: the options can't be used.
        """
        store = open_store(self._target)
        store.hold()
        return store

    def _move(self, checkpoint_id: str | os.PathLike[str] | None) -> None:
        """Turn to another checkpoint, where one is given, with the same options."""
        if checkpoint_id is not None:
            self._target = self._target.moved_to(checkpoint_id)
            self._store = None

    def _opened(self) -> ObjectStore:
        if self._store is None:
            self._store = open_store(self._target)
        return self._store
