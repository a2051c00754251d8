"""One object on its way to another store, from its first part or from where an earlier copy left it."""

from __future__ import annotations

import base64
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cloudckpt.backends.checksums import ALGORITHMS, Algorithm, Fragment
from cloudckpt.backends.config.options import Options
from cloudckpt.backends.copy.copy_checksums import ObjectChecks
from cloudckpt.backends.copy.journal import Entry, SentPart
from cloudckpt.backends.errors import AccessDeniedError, ConfigurationError, UnsupportedError
from cloudckpt.backends.save import object_layout
from cloudckpt.backends.save.uploader import StagedObject
from cloudckpt.backends.stores.base import ObjectInfo, ObjectStore, PartLimits, Upload

_UNIQUE: Final = re.compile(r"__\d+_\d+\.[0-9a-f]{32}\.distcp")
"""Names that this library gives; those of stock DCP are the same for every save."""


@dataclass(frozen=True, slots=True)
class Original:
    """An object that is to be copied."""

    info: ObjectInfo
    checks: ObjectChecks
    in_the_way: bool = False
    """Whether something else has its name at the destination."""


@dataclass(slots=True, eq=False)
class Moving:
    """An object under way."""

    original: Original
    upload: Upload
    part_size: int
    todo: deque[int]
    """Numbers of parts that no worker has taken."""
    sent: dict[int, SentPart] = field(default_factory=dict)
    in_flight: int = 0
    was_noted: bool = False
    """Whether some of it is there on the word of a journal alone."""

    @property
    def name(self) -> str:
        return self.original.info.name

    @property
    def size(self) -> int:
        return self.original.info.size

    def window(self, number: int) -> tuple[int, int]:
        """Return the first byte of a part, and the byte behind it."""
        start = (number - 1) * self.part_size
        return start, min(self.size, start + self.part_size)

    @property
    def entry(self) -> Entry:
        """Return the journal's entry of this object."""
        info = self.original.info
        return Entry(
            info.size, info.version, self.part_size, self.upload.upload_id, tuple(self.sent.values())
        )

    @property
    def ordered(self) -> list[SentPart]:
        """The parts that are sent, in the order of the object's bytes."""
        return [self.sent[number] for number in sorted(self.sent)]

    @property
    def staged(self) -> StagedObject:
        """All of it, once every part is sent."""
        parts = self.ordered
        return StagedObject(self.upload, tuple(one.part for one in parts), _combined(parts))

    def compare_across(self) -> None:
        """Compare the chunks that lie in several parts, once every part is sent.

        Raises:
            IntegrityError: one is damaged.
        """
        edges = {(first, nbytes): value for one in self.ordered for first, nbytes, value in one.edges}
        borders = [self.window(number)[0] for number in sorted(self.sent)[1:]]
        self.original.checks.compare_across(borders, edges)


def is_unique(name: str) -> bool:
    """Return True if no two objects have this name, so that name and size identify the object."""
    return _UNIQUE.fullmatch(name) is not None


def start_copy(store: ObjectStore, original: Original, options: Options) -> Moving:
    """Open an upload for an object.

    Raises:
        StorageError: the store could not.
    """
    size = original.info.size
    part_size = object_layout.fitting_part_size(
        size, object_layout.usual_part_size(options), store.part_limits
    )
    upload = store.begin_upload(original.info.name)
    return Moving(original, upload, part_size, deque(range(1, _count(size, part_size) + 1)))


def resumed(
    store: ObjectStore, original: Original, entry: Entry | None, options: Options, algorithm: Algorithm
) -> Moving | None:
    """Go on with an upload that a journal names, if the store still has it and its parts can be trusted.

    Raises:
        StorageError: the store did not say whether it has it.
    """
    info = original.info
    if entry is None or entry.upload_id is None:
        return None
    upload = Upload(info.name, entry.upload_id)
    if not _is_pending(store, upload):
        return None
    is_same = (entry.size, entry.version) == (info.size, info.version)
    if not (is_same and _is_usable(entry, options, store.part_limits)):
        store.abort_upload(upload)
        return None
    moving = Moving(original, upload, entry.part_size, deque())
    in_order, count = store.part_limits.in_order, _count(info.size, entry.part_size)
    for one in sorted(entry.parts, key=lambda one: one.part.number):
        number = one.part.number
        follows = number == len(moving.sent) + 1 if in_order else number not in moving.sent
        if follows and 1 <= number <= count and _is_part(moving, one, algorithm):
            moving.sent[number] = one
    moving.was_noted = bool(moving.sent)
    moving.todo.extend(number for number in range(1, count + 1) if number not in moving.sent)
    return moving


def _is_pending(store: ObjectStore, upload: Upload) -> bool:
    try:
        return store.is_pending(upload)
    except (AccessDeniedError, UnsupportedError):  # to list uploads, which to resume one needs no right to
        return True
    except ConfigurationError:  # not a name, or an upload, of this store
        return False


def _is_usable(entry: Entry, options: Options, limits: PartLimits) -> bool:
    """Return True if the parts of an earlier copy can be used; with other options they may be too large."""
    size = entry.part_size
    if not size or min(size, entry.size) > options.memory_limit:
        return False
    count = _count(entry.size, size)
    fits = limits.min_size <= size <= limits.max_size and size % limits.multiple == 0
    return count <= limits.max_count and (count == 1 or fits)


def _is_part(moving: Moving, sent: SentPart, algorithm: Algorithm) -> bool:
    """Return True if a journal's part is a part of this object as it is cut, with checksums of its kind."""
    start, stop = moving.window(sent.part.number)
    name, _, value = sent.checksum.partition(":")
    checks = moving.original.checks
    width = 0 if checks.algorithm is None else checks.algorithm.width
    held = sorted((first, nbytes) for first, nbytes, _ in sent.edges)
    return (
        sent.part.size == stop - start
        and name == algorithm.name
        and len(_decoded(value)) == algorithm.width
        and held == sorted(checks.edges(start, stop))
        and all(0 <= value < 1 << 8 * width for _, _, value in sent.edges)
    )


def _count(size: int, part_size: int) -> int:
    """Parts of an object; one without bytes has one without bytes."""
    return max(1, -(-size // part_size))


def _combined(sent: Sequence[SentPart]) -> str:
    algorithm = ALGORITHMS[sent[0].checksum.partition(":")[0]]
    values = (int.from_bytes(_decoded(one.checksum.partition(":")[2]), "big") for one in sent)
    return algorithm.text(
        algorithm.combine(Fragment(one.part.size, value) for one, value in zip(sent, values, strict=True))
    )


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return b""
