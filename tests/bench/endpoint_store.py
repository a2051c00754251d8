"""Objects, uploads and the memory under them, of the S3 server in `bench.endpoint`.

Memory is dear here: the first touch of a page may cost more than all else that is done with it. So bodies are
received into the memory they stay in, an object completed from parts is the list of their blocks, and the
memory of what nobody holds any more is kept, in pieces of one size, for whatever comes next.
"""

from __future__ import annotations

import bisect
import itertools
import mmap
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

SMALL = 64 << 10
"""Bytes; a body of this size or less is neither pooled nor discarded."""
PIECE = 256 << 10
"""Bytes of a piece of pooled memory. A body ends within its last piece, whose rest nobody uses."""
_SLAB = 64 << 20
"""Bytes mapped at once. Much larger than a huge page, so that nearly all of it can lie in such."""

VOID = memoryview(mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
"""Where discarded bytes go and zeros come from. While nobody writes to it, it is one page, in the cache."""


class Refusal(Exception):
    """What S3 answers instead of doing it."""

    def __init__(self, status: int, code: str, message: str = "", *, size: int | None = None) -> None:
        super().__init__(message or code)
        self.status = status
        self.code = code
        self.size = size
        """Bytes of the object, where a range asked for lies outside it."""


class Block:
    """Memory of one body; it goes back to its pool when the last that holds the block lets go of it."""

    __slots__ = ("__weakref__", "_memory", "size")

    def __init__(self, memory: Sequence[memoryview] | None, size: int) -> None:
        self._memory = memory
        self.size = size

    @property
    def discards(self) -> bool:
        """Whether only the size is kept."""
        return self._memory is None

    def views(self, start: int, stop: int) -> Iterator[memoryview]:
        """Return these bytes, valid as long as the block is held."""
        if self._memory is None:
            for position in range(start, stop, len(VOID)):
                yield VOID[: stop - position]
            return
        for number in range(start // PIECE, -(-stop // PIECE)):
            begin = number * PIECE
            yield self._memory[number][max(start - begin, 0) : stop - begin]


class _Piece(NamedTuple):
    """A piece of memory, and where in which mapping it lies."""

    memory: memoryview
    slab: mmap.mmap
    start: int


class Pool:
    """Memory for bodies, in pieces; of what is idle no more than ``most`` bytes are kept."""

    def __init__(self, most: int, *, discard: bool = False) -> None:
        self._most = most // PIECE
        self._discard = discard
        self._idle: list[_Piece] = []
        self._cold: list[_Piece] = []
        """Nothing is behind these addresses until somebody writes there."""
        # Not a plain lock: whatever runs under it may end the life of a block, which takes it again.
        self._lock = threading.RLock()

    def block(self, size: int) -> Block:
        """Return a block, whose memory holds what it last held."""
        if size <= SMALL:
            return Block([memoryview(bytearray(size))], size)
        if self._discard:
            return Block(None, size)
        pieces: list[_Piece] = []
        with self._lock:
            while len(pieces) * PIECE < size:
                if not self._idle and not self._cold:
                    self._map()
                pieces.append((self._idle or self._cold).pop())
        memory = [piece.memory for piece in pieces]
        memory[-1] = memory[-1][: size - (len(pieces) - 1) * PIECE]
        block = Block(memory, size)
        weakref.finalize(block, self._take_back, pieces).atexit = False
        return block

    def _map(self) -> None:
        slab = mmap.mmap(-1, _SLAB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        slab.madvise(mmap.MADV_HUGEPAGE)
        memory = memoryview(slab)
        # From the end, because the last is taken first.
        for start in range(_SLAB - PIECE, -1, -PIECE):
            self._cold.append(_Piece(memory[start : start + PIECE], slab, start))

    def _take_back(self, pieces: Sequence[_Piece]) -> None:
        with self._lock:
            kept = max(self._most - len(self._idle), 0)
            self._idle += pieces[:kept]
            for piece in pieces[kept:]:
                piece.slab.madvise(mmap.MADV_DONTNEED, piece.start, PIECE)
                self._cold.append(piece)


@dataclass(frozen=True, slots=True)
class Object:
    """One version of an object. Whoever reads it holds it and its memory, whatever becomes of its name."""

    blocks: Sequence[Block]
    etag: str
    headers: Mapping[str, str]
    """Its content type and metadata."""
    parts: bool = False
    """Whether the blocks are the parts of an upload."""
    modified: float = field(default_factory=time.time)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(block.size for block in self.blocks)

    def views(self, start: int, stop: int) -> Iterator[memoryview]:
        """Return these bytes, valid as long as the object is held."""
        begin = 0
        for block in self.blocks:
            if begin < stop and start < begin + block.size:
                yield from block.views(max(start - begin, 0), min(stop - begin, block.size))
            begin += block.size


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an upload."""

    block: Block
    etag: str


@dataclass(frozen=True, slots=True)
class Upload:
    """A multipart upload that has not ended."""

    key: str
    upload_id: str
    headers: Mapping[str, str]
    parts: dict[int, Part] = field(default_factory=dict[int, Part])
    started: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Condition:
    """What must hold of an object for it to be replaced."""

    none_match: str | None = None
    match: str | None = None

    def check(self, there: Object | None) -> None:
        """Refuse where it doesn't hold."""
        if self.none_match not in (None, "*"):
            raise Refusal(501, "NotImplemented", "If-None-Match of a write must be *")
        if self.match is not None and there is None:
            raise Refusal(404, "NoSuchKey")
        failed = (self.none_match is not None and there is not None) or (
            self.match is not None and there is not None and self.match.strip('"') != there.etag.strip('"')
        )
        if failed:
            raise Refusal(412, "PreconditionFailed")


@dataclass(frozen=True, slots=True)
class _Bucket:
    objects: dict[str, Object] = field(default_factory=dict[str, Object])
    names: list[str] = field(default_factory=list[str])
    """The keys in order."""
    uploads: dict[str, Upload] = field(default_factory=dict[str, Upload])


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a listing; ``last`` is its last key or common prefix, where more follow."""

    objects: Sequence[tuple[str, Object]]
    prefixes: Sequence[str]
    last: str | None


class Objects:
    """Buckets and what is in them. Every method is atomic; keys are whole, without their bucket."""

    def __init__(self) -> None:
        self._buckets: dict[str, _Bucket] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)

    def create_bucket(self, bucket: str) -> None:
        with self._lock:
            self._buckets.setdefault(bucket, _Bucket())

    def delete_bucket(self, bucket: str) -> None:
        with self._lock:
            if self._bucket(bucket).objects:
                raise Refusal(409, "BucketNotEmpty")
            del self._buckets[bucket]

    def buckets(self) -> Sequence[str]:
        with self._lock:
            return sorted(self._buckets)

    def check_bucket(self, bucket: str) -> None:
        """Refuse where there is no such bucket."""
        with self._lock:
            self._bucket(bucket)

    def get(self, bucket: str, key: str) -> Object:
        with self._lock:
            found = self._bucket(bucket).objects.get(key)
        if found is None:
            raise Refusal(404, "NoSuchKey")
        return found

    def put(
        self,
        bucket: str,
        key: str,
        blocks: Sequence[Block],
        headers: Mapping[str, str],
        condition: Condition,
    ) -> Object:
        made = Object(blocks, self._etag(), headers)
        with self._lock:
            return self._replace(self._bucket(bucket), key, made, condition)

    def delete(self, bucket: str, keys: Sequence[str]) -> None:
        with self._lock:
            found = self._bucket(bucket)
            for key in keys:
                if found.objects.pop(key, None) is not None:
                    del found.names[bisect.bisect_left(found.names, key)]

    def list(self, bucket: str, prefix: str, delimiter: str, after: str, most: int) -> Page:
        """List what sorts behind ``after``, which may be a common prefix, in the order of names."""
        objects: list[tuple[str, Object]] = []
        prefixes: list[str] = []
        last = ""
        with self._lock:
            found = self._bucket(bucket)
            start = bisect.bisect_left(found.names, max(prefix, after))
            for name in itertools.islice(found.names, start, None):
                if not name.startswith(prefix):
                    break
                head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                item = prefix + head + cut if cut else name
                if item <= after or (prefixes and item == prefixes[-1]):
                    continue
                if len(objects) + len(prefixes) == most:
                    return Page(objects, prefixes, last or None)
                last = item
                if cut:
                    prefixes.append(item)
                else:
                    objects.append((name, found.objects[name]))
        return Page(objects, prefixes, None)

    # Uploads

    def begin(self, bucket: str, key: str, headers: Mapping[str, str]) -> Upload:
        upload = Upload(key, f"upload-{next(self._numbers):012d}", headers)
        with self._lock:
            self._bucket(bucket).uploads[upload.upload_id] = upload
        return upload

    def uploads(self, bucket: str, prefix: str) -> Sequence[Upload]:
        """Return the uploads that have not ended, in the order of keys and then of their beginning."""
        with self._lock:
            found = self._bucket(bucket).uploads.values()
            return sorted(
                (upload for upload in found if upload.key.startswith(prefix)),
                key=lambda upload: (upload.key, upload.upload_id),
            )

    def parts(self, bucket: str, key: str, upload_id: str) -> Sequence[tuple[int, Part]]:
        with self._lock:
            return sorted(self._upload(bucket, key, upload_id).parts.items())

    def put_part(self, bucket: str, key: str, upload_id: str, number: int, block: Block) -> Part:
        part = Part(block, self._etag())
        with self._lock:
            self._upload(bucket, key, upload_id).parts[number] = part
        return part

    def complete(
        self, bucket: str, key: str, upload_id: str, named: Sequence[tuple[int, str]], condition: Condition
    ) -> Object:
        """Make an object of the parts named by number and ETag."""
        with self._lock:
            upload = self._upload(bucket, key, upload_id)
            if not named:
                raise Refusal(400, "MalformedXML", "an upload is completed with at least one part")
            if any(later[0] <= earlier[0] for earlier, later in itertools.pairwise(named)):
                raise Refusal(400, "InvalidPartOrder")
            parts = [upload.parts.get(number) for number, _ in named]
            blocks: list[Block] = []
            for part, (number, etag) in zip(parts, named, strict=True):
                if part is None or part.etag.strip('"') != etag.strip('"'):
                    raise Refusal(400, "InvalidPart", f"part {number} with ETag {etag} is not there")
                blocks.append(part.block)
            found = self._bucket(bucket)
            made = Object(blocks, self._etag(f"-{len(blocks)}"), upload.headers, parts=True)
            made = self._replace(found, key, made, condition)
            del found.uploads[upload_id]
            return made

    def abort(self, bucket: str, key: str, upload_id: str) -> None:
        with self._lock:
            self._upload(bucket, key, upload_id)
            del self._bucket(bucket).uploads[upload_id]

    def _etag(self, suffix: str = "") -> str:
        return f'"{next(self._numbers):032x}{suffix}"'

    def _bucket(self, bucket: str) -> _Bucket:
        found = self._buckets.get(bucket)
        if found is None:
            raise Refusal(404, "NoSuchBucket")
        return found

    def _upload(self, bucket: str, key: str, upload_id: str) -> Upload:
        found = self._bucket(bucket).uploads.get(upload_id)
        if found is None or found.key != key:
            raise Refusal(404, "NoSuchUpload")
        return found

    @staticmethod
    def _replace(bucket: _Bucket, key: str, made: Object, condition: Condition) -> Object:
        there = bucket.objects.get(key)
        condition.check(there)
        if there is None:
            bisect.insort(bucket.names, key)
        bucket.objects[key] = made
        return made
