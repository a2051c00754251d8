"""Verifying a checkpoint: every byte that it consists of is read and compared, no tensor is built."""

from __future__ import annotations

import functools
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from cloudckpt.backends.checksums import Chunk, Chunks, Expected
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import IntegrityError, ObjectNotFoundError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.format.committed import chosen_metadata, committed
from cloudckpt.backends.save.uploader import Observer
from cloudckpt.backends.state.proving import Unloadable, prove
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.torch_private import StorageInfo
from cloudckpt.backends.transfer.byte_ranges import Extent, nothing
from cloudckpt.backends.transfer.downloader import Downloader
from cloudckpt.backends.transfer.request_limit import transfers

__all__ = ["Damage", "Unloadable", "Verification", "verify"]

_LARGEST_READ = 8 << 20
"""Bytes. The allocator keeps larger buffers, and takes new ones for the next read."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Something in a checkpoint that is not as it was saved."""

    object_name: str
    problem: str
    item: str | None = None
    """The fully qualified name of the item concerned."""
    offset: int | None = None
    """Where in the object the damaged bytes begin; they end within the chunk, 512 KiB at most."""
    stop: int | None = None
    """Where in the object that chunk ends."""

    def __str__(self) -> str:
        item = f", item {self.item!r}" if self.item is not None else ""
        offset = f", from byte {self.offset}" if self.offset is not None else ""
        return f"{self.object_name}{item}{offset}: {self.problem}"


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of ``verify``."""

    uri: str
    objects: int
    items: int
    size: int
    """Bytes that were read and compared."""
    unverified: int
    """Items without checksums, as stock writers leave them: only their objects' sizes could be looked at."""
    damages: tuple[Damage, ...]
    unloadable: tuple[Unloadable, ...] = ()
    """Values that a load without ``trust`` refuses."""
    imports: tuple[str, ...] = ()
    """Classes in values, of modules that are not imported here: a load needs their modules imported."""
    unproven: int = 0
    """Values too large to be loaded within ``memory_limit``: only their bytes were compared."""

    @property
    def ok(self) -> bool:
        """True if nothing is damaged and every value that was loaded can be."""
        return not self.damages and not self.unloadable


def verify(
    uri: str | os.PathLike[str] | Target,
    *,
    observer: Observer | None = None,
    begun: Callable[[int], None] | None = None,
    **options: Any,
) -> Verification:
    """Read a whole checkpoint and compare it with its checksums, ``concurrency`` ranges at a time.

    Values are loaded as well, and those that a load without ``trust`` refuses are reported. Holds at most
    ``memory_limit`` bytes. Nothing that the checkpoint says is run. Damage is reported, not raised.

    ``begun`` is called with the number of bytes to be compared, for each metadata object that the checkpoint
    has, and ``observer`` of an object's name and how many more of its bytes have been, from the threads that
    read.

    Raises:
        CheckpointNotFoundError: nothing is committed at ``uri``.
        UnsafeCheckpointError: reading its metadata would run code.
        StorageError: the store could not be read.
    """
    with open_store(target := Target.given("verify", uri, options)) as store:
        found = [_verified(store, name, target, observer, begun) for name in chosen_metadata(store)]
    return Verification(
        store.uri,
        sum(one.objects for one in found),
        sum(one.items for one in found),
        sum(one.size for one in found),
        sum(one.unverified for one in found),
        tuple(damage for one in found for damage in one.damages),
        tuple(value for one in found for value in one.unloadable),
        tuple(sorted({name for one in found for name in one.imports})),
        sum(one.unproven for one in found),
    )


def _verified(
    store: ObjectStore,
    name: str,
    target: Target,
    observer: Observer | None,
    begun: Callable[[int], None] | None,
) -> Verification:
    data = b""
    try:
        data = committed(store, name, "there is no committed checkpoint here")
        metadata = md.load(data, uri=store.uri, name=name)
    except IntegrityError as error:
        return Verification(store.uri, 0, 0, len(data), 0, (Damage(name, error.message),))
    options = target.options
    damages: list[Damage] = []
    if (missing := md.missing_item(metadata, metadata.storage_data)) is not None:
        damages.append(Damage(name, "the metadata does not say where it is stored", missing.fqn))
    least = md.least_sizes(metadata)
    downloader = Downloader(store, transfers(store, options), options.memory_limit, least, _LARGEST_READ)
    sizes = md.sizes_of(metadata)
    for wrong in downloader.each(
        lambda one: _size_damage(store, one, least[one], sizes.get(one)), sorted(least)
    ):
        damages += [wrong] if wrong else []
    unreadable = {damage.object_name for damage in damages}
    reading = _Reading(metadata, damages, observer)
    wanted = {
        one: extents for one, extents in reading.extents(downloader.largest).items() if one not in unreadable
    }
    if begun is not None:
        begun(sum(extent.size for extents in wanted.values() for extent in extents))
    downloader.read(wanted)
    proof = prove(metadata, downloader, options.memory_limit, {one.item for one in damages}, unreadable)
    return Verification(
        store.uri,
        len(least),
        len(metadata.storage_data),
        len(data) + reading.size,
        reading.unverified,
        tuple(damages),
        proof.unloadable,
        proof.imports,
        proof.unproven,
    )


def _size_damage(store: ObjectStore, name: str, least: int, exact: int | None) -> Damage | None:
    try:
        size = store.stat(name).size
    except ObjectNotFoundError:
        return Damage(name, "the object is missing")
    if size < least:
        return Damage(name, f"the object has {size:,} bytes and should have {exact or least:,}", offset=size)
    if exact is not None and size != exact:
        return Damage(name, f"the object has {size:,} bytes and should have {exact:,}", offset=exact)
    return None


class _Reading:
    """A reading of a checkpoint that collects the damage that it finds."""

    def __init__(self, metadata: Metadata, damages: list[Damage], observer: Observer | None) -> None:
        self._metadata = metadata
        self._damages = damages
        self._observer = observer
        self._lock = threading.Lock()
        self.size = 0
        """Bytes compared."""
        self.unverified = 0
        """Items without checksums."""

    def extents(self, most: int) -> dict[str, list[Extent]]:
        """All chunks of all items, in extents of at most ``most`` bytes, by object."""
        wanted: defaultdict[str, list[Extent]] = defaultdict(list)
        algorithms = md.algorithms_of(self._metadata)
        for index, info in self._metadata.storage_data.items():
            checks = md.checks_of(info, algorithms)
            if checks is None:
                self.unverified += 1
                continue
            for chunks in _grouped(checks.chunks(0, info.length), most):
                start, size = info.offset + chunks[0].start, chunks[-1].stop - chunks[0].start
                tell = functools.partial(self._note, index.fqn, info, size)
                expected = Expected(checks, chunks, tell)
                wanted[info.relative_path].append(Extent(start, size, nothing, expected=expected))
        return wanted

    def _note(self, fqn: str, info: StorageInfo, size: int, damaged: Sequence[Chunk]) -> None:
        wrong = [
            Damage(
                info.relative_path,
                "these are not the bytes that were saved",
                fqn,
                info.offset + chunk.start,
                info.offset + chunk.stop,
            )
            for chunk in damaged
        ]
        with self._lock:
            self._damages += wrong
            self.size += size
        if self._observer is not None:
            self._observer(info.relative_path, size)


def _grouped(chunks: Sequence[Chunks], most: int) -> Iterator[list[Chunks]]:
    """Chunks in the same order, in groups of about so many bytes."""
    group: list[Chunks] = []
    for one in chunks:
        left: Chunks | None = one
        while left is not None:
            room = group[0].start + most - left.start if group else max(most, left.size)  # for one at least
            fitting, left = left.parted(room)
            if fitting is not None:
                group.append(fitting)
            if left is not None:
                yield group
                group = []
    if group:
        yield group
