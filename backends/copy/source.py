"""The checkpoint that is to be copied: what is committed, what that names, and what is known of its bytes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import Metadata

from cloudckpt.backends.copy.copy_checksums import ObjectChecks, checks_of
from cloudckpt.backends.errors import (
    ConfigurationError,
    IntegrityError,
    ObjectNotFoundError,
    UnsafeCheckpointError,
)
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.format.committed import chosen_metadata, committed
from cloudckpt.backends.stores.base import ObjectInfo, ObjectStore
from cloudckpt.backends.stores.object_names import check_name
from cloudckpt.backends.system.system_limits import Workers


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The source of a copy."""

    metadata: Mapping[str, bytes]
    """What is committed, by name: that of all ranks, or each rank's own."""
    checks: Mapping[str, ObjectChecks]
    """By object."""
    least: Mapping[str, int]
    exact: Mapping[str, int]

    @property
    def digest(self) -> str:
        """Of the metadata, by which a journal knows what it is of."""
        digest = hashlib.sha256()
        for name, data in sorted(self.metadata.items()):
            digest.update(f"{name} {len(data)}\n".encode() + data)
        return digest.hexdigest()

    def sized(self, store: ObjectStore, concurrency: int) -> dict[str, ObjectInfo]:
        """Every object as it is now.

        Raises:
            IntegrityError: one is missing, or has another size than the metadata says.
        """
        names = sorted(self.least)
        with Workers(concurrency, thread_name_prefix="cloudckpt-copy") as pool:
            found = dict(zip(names, pool.map(functools.partial(_stat, store), names), strict=True))
        for name, info in found.items():
            least, exact = self.least[name], self.exact.get(name)
            if info.size < least or exact not in (None, info.size):
                how = f"it has {info.size:,} bytes and should have {exact or least:,}"
                raise _damaged(store, name, how)
        return found


def read_checkpoint(store: ObjectStore) -> Checkpoint:
    """Read what is committed at the source, and refuse what would do harm at another place.

    Raises:
        CheckpointNotFoundError: nothing is.
        UnsafeCheckpointError: it names what is no object of a checkpoint.
    """
    data: dict[str, bytes] = {}
    loaded: dict[str, Metadata] = {}
    for name in chosen_metadata(store):
        data[name] = committed(store, name, "there is no committed checkpoint to copy")
        loaded[name] = md.load(data[name], uri=store.uri, name=name)
    least: dict[str, int] = {}
    exact: dict[str, int] = {}
    for name, metadata in loaded.items():
        _check_names(md.objects_of(metadata), store.uri, name)
        for one, size in md.least_sizes(metadata).items():
            least[one] = max(least.get(one, 0), size)
        exact |= {one: size for one, size in md.sizes_of(metadata).items() if one in least}
    return Checkpoint(data, checks_of(loaded.values(), store.uri), least, exact)


def _check_names(names: Iterable[str], uri: str, metadata_name: str) -> None:
    """Refuse metadata that has something else for an object than data: it would be put before the commit."""
    for name in names:
        try:
            check_name(name, uri)
            hidden = any(part.startswith(".") for part in name.split("/"))
        except ConfigurationError:
            hidden = True
        if hidden or md.is_metadata(name.rpartition("/")[2]):
            raise UnsafeCheckpointError(
                f"the checkpoint's metadata names {name!r}, which can't be one of its data objects",
                uri=uri,
                object_name=metadata_name,
                hint="It was damaged or tampered with: copy another step",
            )


def _stat(store: ObjectStore, name: str) -> ObjectInfo:
    try:
        return store.stat(name)
    except ObjectNotFoundError as error:
        raise _damaged(store, name, "it is missing") from error


def _damaged(store: ObjectStore, name: str, how: str) -> IntegrityError:
    return IntegrityError(
        f"a data object is damaged: {how}",
        uri=store.uri,
        object_name=name,
        hint="Nothing was copied; copy another step",
    )
