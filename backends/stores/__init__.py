"""One module per store, imported when a target needs it."""

from __future__ import annotations

import importlib
from typing import cast

from cloudckpt.backends.config.libraries import install_hint
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import ConfigurationError, StorageError
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.system import descriptors
from cloudckpt.backends.system.system_limits import open_files_cure

__all__ = ["open_store"]

_STORES = {
    "file": ("local.store", "LocalStore"),
    "gs": ("gcs.store", "GCSStore"),
    "memory": ("memory", "MemoryStore"),
    "s3": ("s3.store", "S3Store"),
}
_ANY_OTHER = ("fsspec", "FsspecStore")
_EXTRAS = {"s3": "s3", "gs": "gcs"}


def open_store(target: Target) -> ObjectStore:
    """Return the store whose root is the target. No request is made.

    Raises:
        ConfigurationError: the libraries for the target's protocol are not installed.
        StorageError: they could not be read.
    """
    descriptors.fill_standard()
    module, name = _STORES.get(target.protocol, _ANY_OTHER)
    try:
        store = getattr(importlib.import_module(f"cloudckpt.backends.stores.{module}"), name)
    except ImportError as error:
        if (error.name or "").startswith("cloudckpt"):
            raise
        extra = _EXTRAS.get(target.protocol)
        raise ConfigurationError(
            f"{error.name or 'a library'}, which {target.protocol}:// needs, is not installed",
            uri=target.uri,
            hint=install_hint(extra, error.name) if extra else str(error),
        ) from error
    except OSError as error:
        raise StorageError(
            f"the modules for {target.protocol}:// could not be read: {error.strerror or error}",
            uri=target.uri,
            hint=open_files_cure(error),
        ) from error
    return cast(ObjectStore, store(target))
