"""Metadata that is committed in a folder: its names and its bytes."""

from __future__ import annotations

from cloudckpt.backends.config.uri_hints import advice
from cloudckpt.backends.errors import CheckpointNotFoundError, ObjectNotFoundError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.stores.base import ObjectStore


def listed_metadata(store: ObjectStore) -> list[str]:
    """Return the metadata objects that a listing shows: the one of all ranks, or those of single ranks."""
    return [info.name for info in store.list("", delimiter=True).objects if md.is_metadata(info.name)]


def chosen_metadata(store: ObjectStore) -> list[str]:
    """Return the names of the metadata to read: that of all ranks, or without it those of single ranks."""
    names = listed_metadata(store)
    # A listing may lag behind; and a rank's own metadata only counts where there is none for all.
    return [md.METADATA_NAME] if md.METADATA_NAME in names else names or [md.METADATA_NAME]


def committed(store: ObjectStore, name: str, missing: str, hint: str = "Check the URI") -> bytes:
    """Return the bytes of a metadata object.

    Raises:
        CheckpointNotFoundError: it is not there, with ``missing`` as its message.
    """
    try:
        return store.get(name)[0]
    except ObjectNotFoundError as error:
        raise CheckpointNotFoundError(
            missing, uri=store.uri, object_name=name, hint=advice(store.uri, hint)
        ) from error
