"""The object store interface: stateless operations on named objects below one root.

A store is narrow on purpose. It knows conditions, ranges and multipart uploads, and nothing of
checkpoints. Names are relative to the store's root and use ``/``; the root is a URI.

Every operation may raise :class:`~cloudckpt.backends.errors.StorageError` (with the subclasses
``ObjectNotFoundError``, ``AccessDeniedError`` and ``PreconditionFailedError`` where they say more), always
with ``uri`` and, where there is one, ``object_name`` filled in.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from cloudckpt.backends.errors import ObjectNotFoundError


@dataclass(frozen=True, slots=True)
class Overwrite:
    """Put an object, replacing any that is there."""


@dataclass(frozen=True, slots=True)
class Create:
    """Put only where nothing is."""


@dataclass(frozen=True, slots=True)
class Update:
    """Put only over this version, as a ``stat`` or ``put`` reported it."""

    version: str


Condition = Overwrite | Create | Update


@dataclass(frozen=True, slots=True)
class PartLimits:
    """Limits of a store for the parts of an upload."""

    min_size: int = 1
    """Bytes that every part but the last must have at least."""
    max_size: int = 1 << 62
    """Bytes that a part may have at most."""
    max_count: int = 1 << 31
    """Parts that one upload may have at most."""
    multiple: int = 1
    """Every part but the last has a multiple of so many bytes."""
    in_order: bool = False
    """Parts of one upload go one after another, in order; uploads may be as many as one likes."""
    in_place: bool = False
    """Parts go out from the very buffers, side by side: long ones need no more memory than short ones."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Features that a store supports. A feature that it lacks is False here, and never ignored."""

    conditional_create: bool
    """``put`` with :class:`Create` is atomic: of many racing writers one wins."""
    conditional_update: bool
    """``put`` with :class:`Update` is atomic."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One visible object."""

    name: str
    size: int
    """Bytes."""
    version: str | None = None
    """Changes with every put: an entity tag, a generation, or the like. None where a listing lacks it."""
    modified: datetime | None = None
    """Time of the last put, with a time zone."""
    checksum: str | None = None
    """``<algorithm>:<base64>`` of its bytes, where the sender computed it."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Objects, and with a delimiter the common prefixes (each ending in ``/``), in name order."""

    objects: tuple[ObjectInfo, ...]
    prefixes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload started and not ended. Plain data: any process with the same store may go on with it."""

    name: str
    upload_id: str


@dataclass(frozen=True, slots=True)
class Part:
    """A part that the store holds. Plain data, like :class:`Upload`."""

    number: int
    """From 1, in the order of the object's bytes."""
    size: int
    """Bytes."""
    etag: str = ""
    checksum: str | None = None
    """``<algorithm>:<base64>`` as sent to the store, or None."""


@dataclass(frozen=True, slots=True)
class PendingUpload:
    """An upload that has not ended yet, as listed by the store."""

    upload: Upload
    started: datetime | None = None


Arrived = Callable[[int], None]
"""Called with the number of bytes of a range that have arrived, every now and then.

The number only grows, but a read that starts over calls with 0 first. The call is made on the thread that
reads, while those bytes are in its cache.
"""


Departed = Callable[[int], None]
"""Called with the number of bytes of a part that have been sent, every now and then.

It is called with fewer again when the part is sent again. The call is made on the thread that sends, while
those bytes are in its cache.
"""


@dataclass(frozen=True, slots=True)
class EmptyFolder:
    """A folder in which no object, upload or other file is."""

    name: str
    """Relative to the store's root, without a slash at its end."""
    modified: datetime
    """When it was made, or its last entry removed."""


class ObjectStore(abc.ABC):
    """Objects below one root. Safe to use from several threads; pickles into another process.

    A pickle carries the configuration only, and connections are made anew where it is used.
    """

    @property
    @abc.abstractmethod
    def uri(self) -> str:
        """The root, without a trailing slash and without credentials."""

    @property
    def is_remote(self) -> bool:
        """True if a request takes a round trip, so that several at once are worth their threads.

        Known without a request.
        """
        return False

    @property
    def part_limits(self) -> PartLimits:
        """The store's limits for parts, known without a request."""
        return PartLimits()

    @property
    def wants_several_objects(self) -> bool:
        """True if a rank's data should be several objects; known without a request.

        They are where parts of one object can't go up side by side, or where completing an upload takes the
        longer the larger it is.
        """
        return self.part_limits.in_order

    @property
    def part_checksum(self) -> str | None:
        """The algorithm of the checksum that a part comes with, ``crc64nvme`` or ``crc32c``.

        None where the store would not look at one. Finding out may take a few requests, once.
        """
        return None

    @property
    @abc.abstractmethod
    def capabilities(self) -> Capabilities:
        """The features of this store. The first access may take a few requests."""

    @property
    def is_probed(self) -> bool:
        """True if ``capabilities`` are known without a request."""
        return True

    @property
    def lists_at_once(self) -> bool:
        """True if a listing shows each object from the moment that it is put, and none that is deleted.

        Elsewhere nothing young is deleted because its marker is not listed. Known without a request.
        """
        return False

    def features(self) -> str | None:
        """Name the optional features of the server that were probed, for a person to read.

        It may take more requests than a save needs. None where there is nothing to probe.
        """
        return None

    @abc.abstractmethod
    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        """Make ``data`` visible under ``name`` in one step, durably.

        Raises:
            PreconditionFailedError: the condition did not hold; nothing was changed.
            ConfigurationError: the store does not support the condition (see ``capabilities``).
        """

    @abc.abstractmethod
    def get(self, name: str) -> tuple[bytes, ObjectInfo]:
        """Return a small object whole, with the version that the bytes belong to."""

    @abc.abstractmethod
    def read_into(
        self,
        name: str,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        arrived: Arrived | None = None,
    ) -> int | None:
        """Fill the writable ``buffers`` one after another from the object's bytes at ``offset``.

        One request where the store can. Buffers are one-dimensional and of unsigned bytes. Returns the size
        of the whole object in bytes, where the store learns it on the way. ``arrived`` is called on the way
        how far they are filled, by stores that fill them bit by bit.

        Raises:
            IntegrityError: the object ends before the buffers are full.
        """

    @abc.abstractmethod
    def stat(self, name: str) -> ObjectInfo:
        """Return size and version of a visible object, never from a cache."""

    def holds(self, name: str) -> bool:
        """Return True if an object is visible under a name, never from a cache."""
        try:
            self.stat(name)
        except ObjectNotFoundError:
            return False
        return True

    @abc.abstractmethod
    def list(self, prefix: str = "", *, delimiter: bool = False) -> Listing:
        """List what is visible below a name prefix; with ``delimiter``, stop at the next ``/``.

        ``prefix`` is a string prefix of names, as on S3, and need not end at a ``/``.
        """

    @abc.abstractmethod
    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, in batches where the store can. Names that are not there are no error."""

    @abc.abstractmethod
    def begin_upload(self, name: str) -> Upload:
        """Open a multipart upload. Nothing is visible under ``name`` until it is completed."""

    @abc.abstractmethod
    def upload_part(
        self,
        upload: Upload,
        number: int,
        offset: int,
        buffers: Sequence[memoryview],
        *,
        checksum: str | None = None,
        departed: Departed | None = None,
    ) -> Part:
        """Send one part: the concatenation of ``buffers``, without copying where the store can.

        Parts may be sent in any order and side by side, unless ``part_limits`` say otherwise, and again.
        ``offset`` is where the part's first byte lies in the object. ``checksum``, as in :class:`Part`, is of
        these bytes: a store that sends one of this kind along need not compute it. ``departed`` is called on
        the way how much has gone out, by stores that send it bit by bit.
        """

    @abc.abstractmethod
    def complete_upload(self, upload: Upload, parts: Sequence[Part], *, confirm: bool = True) -> ObjectInfo:
        """Make the object visible from all of its parts, durably; its ``size`` is what the store reports.

        A store that reports no size is asked for it, unless its answer proves that the object is made of
        these parts. Without ``confirm`` the size may be what was sent, where asking would take another
        request: for a caller who completes many uploads, and then looks at all sizes by a listing.

        Raises:
            IntegrityError: what the store holds is not what the parts add up to; nothing is visible.
        """

    @abc.abstractmethod
    def abort_upload(self, upload: Upload) -> None:
        """Give an upload up and free its parts. One that is gone already is no error."""

    @abc.abstractmethod
    def pending_uploads(self, prefix: str = "") -> Iterator[PendingUpload]:
        """List uploads below a name prefix that were started and neither completed nor aborted."""

    def is_pending(self, upload: Upload) -> bool:
        """Return True if an upload that was recorded somewhere is one of this store's and still open."""
        return any(pending.upload == upload for pending in self.pending_uploads(upload.name))

    def empty_folders(self) -> Iterator[EmptyFolder]:
        """List empty folders below the root, where the store has folders; an object store has none."""
        return iter(())

    def remove_empty_folder(self, name: str) -> None:  # noqa: B027 - most stores have no folders
        """Remove a folder if it is empty, in one step that fails once a file is in it."""

    def copy_from(self, source: ObjectStore, info: ObjectInfo) -> ObjectInfo | None:
        """Have the store itself copy an object of ``source``, in place of what has its name here.

        It becomes visible in one step, as after ``complete_upload``, under what the options say of objects
        that are written. ``info`` is what ``source.stat`` reported: if the object is another version by now,
        or the store can't reach it or copy at all, nothing is changed and None is returned.
        """
        del source, info
        return None

    def hold(self) -> None:  # noqa: B027 - most stores hold nothing
        """Keep the connections of stores with the same options open while this store lives."""

    def close(self) -> None:  # noqa: B027 - most stores hold nothing
        """Let connections go. The store may be used again afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
