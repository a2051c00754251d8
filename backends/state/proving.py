"""Prove that the values of a checkpoint can be loaded, without running what they say."""

from __future__ import annotations

import functools
import threading
from collections import defaultdict
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from cloudckpt.backends.errors import CheckpointError, UnsafeCheckpointError
from cloudckpt.backends.state.values import needs
from cloudckpt.backends.transfer.byte_ranges import Extent, nothing
from cloudckpt.backends.transfer.downloader import Downloader

_SHARE = 8
"""Parts of ``memory_limit``, of which a value may have one: a load takes its bytes, a copy and objects."""


@dataclass(frozen=True, slots=True)
class Unloadable:
    """A value that a load without ``trust`` refuses."""

    name: str
    """Its fully qualified name."""
    classes: tuple[str, ...]
    """The classes that could run code, with their modules; none where something else is wrong."""
    problem: str

    def __str__(self) -> str:
        return f"item {self.name!r}: {self.problem}"


class Proof:
    """Findings on a checkpoint's values."""

    def __init__(self) -> None:
        self.unproven = 0
        """Values too large to be loaded."""
        self._unloadable: dict[str, Unloadable] = {}
        self._imports: set[str] = set()
        self._lock = threading.Lock()

    @property
    def unloadable(self) -> tuple[Unloadable, ...]:
        """Return the values that a load refuses, by name."""
        return tuple(value for _, value in sorted(self._unloadable.items()))

    @property
    def imports(self) -> tuple[str, ...]:
        """Return the classes whose modules a load needs imported."""
        return tuple(sorted(self._imports))

    def look_at(self, fqn: str, data: memoryview) -> None:
        """Load a value, one at a time."""
        with self._lock:
            try:
                self._imports |= needs(data, fqn)
            except UnsafeCheckpointError as error:
                self._unloadable[fqn] = Unloadable(fqn, error.classes, error.message)
            except CheckpointError as error:
                self._unloadable[fqn] = Unloadable(fqn, (), error.message)


def prove(
    metadata: Metadata,
    downloader: Downloader,
    memory_limit: int,
    damaged: AbstractSet[str | None],
    unreadable: AbstractSet[str],
) -> Proof:
    """Read a checkpoint's values, and load each.

    Args:
        metadata: that of the checkpoint.
        downloader: reads its objects.
        memory_limit: bytes that the downloader holds. Of larger values than a part of that only the number is
            returned.
        damaged: items that are left out.
        unreadable: objects that are left out.

    Raises:
        StorageError: the store could not be read.
    """
    proof = Proof()
    wanted: defaultdict[str, list[Extent]] = defaultdict(list)
    entries = metadata.state_dict_metadata
    for index, info in metadata.storage_data.items():
        is_value = isinstance(entries.get(index.fqn), BytesStorageMetadata)
        if not is_value or index.fqn in damaged or info.relative_path in unreadable:
            continue
        if info.length > memory_limit // _SHARE:
            proof.unproven += 1
            continue
        look = functools.partial(proof.look_at, index.fqn)
        wanted[info.relative_path].append(Extent(info.offset, info.length, nothing, deliver=look))
    downloader.read(wanted)
    return proof
