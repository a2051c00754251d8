"""Google Cloud Storage's buckets, objects and upload sessions, in memory.

How they are asked for is the business of `support.gcs_server`. What is refused is refused before anything
changed, and what is stored never changes: a reader keeps the bytes of the generation that it found.
"""

from __future__ import annotations

import base64
import binascii
import bisect
import itertools
import re
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from support.gcs_objects import (
    Conditions,
    Content,
    Json,
    Refusal,
    Stored,
    Sums,
    check_name,
    integer,
    invalid,
    unmet,
)

QUANTUM = 262144
"""Bytes: what a session keeps short of its end is a multiple of this."""
MOST_SOURCES = 32


@dataclass(slots=True)
class Bucket:
    name: str
    fields: Json
    created: str
    requester_pays: bool
    objects: dict[str, Stored] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    """Sorted by code points, which is the order of the names' UTF-8."""

    @property
    def resource(self) -> Json:
        return {
            "kind": "storage#bucket",
            "id": self.name,
            "name": self.name,
            "location": "US",
            "storageClass": "STANDARD",
            "metageneration": "1",
            "timeCreated": self.created,
            "updated": self.created,
            **self.fields,
        }


@dataclass(frozen=True, slots=True)
class Page:
    items: Sequence[Stored]
    prefixes: Sequence[str]
    token: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a session is told: bytes from `start` to before `stop`, or without a `start` that none come."""

    start: int | None
    stop: int
    total: int | None


@dataclass(slots=True)
class Session:
    bucket: str
    name: str
    fields: Json
    sums: Sums
    conditions: Conditions
    total: int | None
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    lock: threading.Lock = field(default_factory=threading.Lock)
    pieces: list[memoryview] = field(default_factory=list)
    held: int = 0
    ended: Stored | None = None
    cancelled: bool = False

    def keep(self, chunk: Chunk, body: memoryview) -> bool:
        """Take what a chunk brings that isn't held yet; return whether the object is to be ended.

        What Google's guide leaves open is here as Google's Java client expects it, in the scenarios S.1 to
        S.5 of its ITJsonResumableSessionPutTaskTest.
        """
        if chunk.start is None:
            # A size that isn't what is held is no error, be it more or less (S.2, S.3).
            return chunk.total == self.held and self.total in (None, self.held)
        total = self.total if chunk.total is None else chunk.total
        if self.total not in (None, total) or (total is not None and max(chunk.stop, self.held) > total):
            raise invalid(f"The upload's size can't be {total}: {self.held} bytes are held of {self.total}")
        length = chunk.stop - chunk.start
        ends = chunk.stop == chunk.total
        if not ends and length % QUANTUM:
            raise invalid(f"{length} bytes: a chunk but the last is a multiple of {QUANTUM} long")
        if chunk.start > self.held:
            # S.5
            raise Refusal(
                503,
                "",
                "Invalid request.  According to the Content-Range header, the upload offset is "
                f"{chunk.start} byte(s), which exceeds already uploaded size of {self.held} byte(s).",
            )
        self.total = total
        whole = len(body) == length
        stop = chunk.start + len(body)
        if not (ends and whole):
            stop -= stop % QUANTUM
        if stop > self.held:
            self.pieces.append(body[self.held - chunk.start : stop - chunk.start])
            self.held = stop
        return ends and whole


class Cloud:
    """All of it, for any number of threads."""

    def __init__(self, page_size: int, *, md5: bool) -> None:
        self._lock = threading.Lock()
        self._buckets: dict[str, Bucket] = {}
        self._sessions: dict[str, Session] = {}
        self._generation = 0
        self.page_size = page_size
        self.md5 = md5
        """True if objects and parts have an MD5 also where the client sent none."""

    def create_bucket(self, resource: Json) -> Bucket:
        name, billing = resource.get("name"), resource.get("billing")
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", name):
            raise invalid(f"Invalid bucket name: {name!r}")
        pays = isinstance(billing, Mapping) and billing.get("requesterPays") is True
        with self._lock:
            if name in self._buckets:
                raise Refusal(409, "conflict", "Your previous request to create the named bucket succeeded.")
            self._buckets[name] = Bucket(name, {**resource}, _now(), pays)
            return self._buckets[name]

    def bucket(self, name: str) -> Bucket:
        if name not in self._buckets:
            raise Refusal(404, "notFound", "The specified bucket does not exist.")
        return self._buckets[name]

    def delete_bucket(self, name: str) -> None:
        with self._lock:
            if self.bucket(name).objects:
                raise Refusal(409, "conflict", "The bucket you tried to delete is not empty.")
            del self._buckets[name]

    def get(self, bucket: str, name: str, conditions: Conditions) -> Stored:
        stored = self.bucket(bucket).objects.get(name)
        if stored is None or conditions.generation not in (None, stored.generation):
            raise Refusal(404, "notFound", f"No such object: {bucket}/{name}")
        conditions.check_read(stored)
        return stored

    def put(
        self,
        bucket: str,
        name: str,
        content: Content,
        fields: Json,
        *,
        sums: Sums = (),
        conditions: Conditions,
        components: int = 0,
        in_parts: bool = False,
    ) -> Stored:
        check_name(name)
        content.verify(sums)
        wanted = self.md5 or any(kind == "md5" for kind, _ in sums)
        has_md5 = wanted and not components and not in_parts
        with self._lock:
            place = self.bucket(bucket)
            conditions.check_write(self._live(place, name))
            self._generation = max(self._generation + 1, time.time_ns() // 1000)
            stored = Stored(
                bucket, name, self._generation, content, fields, _now(), components, has_md5=has_md5
            )
            if name not in place.objects:
                bisect.insort(place.names, name)
            place.objects[name] = stored
            return stored

    def delete(self, bucket: str, name: str, conditions: Conditions) -> None:
        with self._lock:
            try:
                self.get(bucket, name, conditions)
            except Refusal as refusal:
                raise (unmet() if refusal.status == 304 else refusal) from None
            place = self.bucket(bucket)
            del place.objects[name]
            del place.names[bisect.bisect_left(place.names, name)]

    def list(self, bucket: str, query: Mapping[str, str]) -> Page:
        """Return one page, at most `maxResults` long; objects and common prefixes count alike."""
        asked = integer(query, "maxResults")
        limit = self.page_size if asked is None else min(asked, self.page_size)
        if limit < 1:
            raise invalid(f"Invalid value for maxResults: {asked}")
        prefix, delimiter, end = (query.get(name, "") for name in ("prefix", "delimiter", "endOffset"))
        items: list[Stored] = []
        prefixes: list[str] = []
        with self._lock:
            place = self.bucket(bucket)
            at = bisect.bisect_left(place.names, max(prefix, query.get("startOffset", "")))
            at = max(at, _after(place.names, query.get("pageToken", "")))
            last = ""
            while at < len(place.names):
                name = place.names[at]
                if not name.startswith(prefix) or (end and name >= end):
                    break
                if len(items) + len(prefixes) == limit:
                    return Page(items, prefixes, base64.urlsafe_b64encode(last.encode()).decode())
                cut = name.find(delimiter, len(prefix)) if delimiter else -1
                if cut < 0:
                    items.append(place.objects[name])
                    last = f"o{name}"
                    at += 1
                else:
                    prefixes.append(name[: cut + len(delimiter)])
                    last = f"p{prefixes[-1]}"
                    at = _past(place.names, prefixes[-1])
        return Page(items, prefixes, "")

    def compose(
        self,
        bucket: str,
        name: str,
        sources: Sequence[tuple[str, Conditions]],
        fields: Json,
        into: Conditions,
    ) -> Stored:
        if not 1 <= len(sources) <= MOST_SOURCES:
            raise invalid(f"The number of source components must be between 1 and {MOST_SOURCES}.")
        found = [self.get(bucket, source, conditions) for source, conditions in sources]
        content = Content(list(itertools.chain.from_iterable(stored.content.pieces for stored in found)))
        count = sum(stored.components or 1 for stored in found)
        return self.put(bucket, name, content, fields, conditions=into, components=count)

    def start(self, session: Session) -> str:
        """Open a session and return its ID."""
        check_name(session.name)
        with self._lock:
            session.conditions.check_write(self._live(self.bucket(session.bucket), session.name))
            self._sessions[session.identity] = session
        return session.identity

    def upload(self, identity: str, chunk: Chunk, body: memoryview, sums: Sums) -> Stored | int:
        """Return the object when the session has ended, and else how many bytes it holds."""
        session = self._session(identity)
        with session.lock:
            if session.cancelled:
                raise Refusal(410, "gone", "The upload was cancelled")
            # An ended session tells its object whatever it is sent, of another size too (S.1, S.4).
            if session.ended is None and session.keep(chunk, body):
                session.ended = self.put(
                    session.bucket,
                    session.name,
                    Content(session.pieces),
                    session.fields,
                    sums=(*session.sums, *sums),
                    conditions=session.conditions,
                )
                session.pieces.clear()
            return session.held if session.ended is None else session.ended

    def cancel(self, identity: str) -> None:
        session = self._session(identity)
        with session.lock:
            if session.cancelled:
                raise Refusal(410, "gone", "The upload was cancelled")
            session.cancelled = True
            session.pieces.clear()

    def open_sessions(self) -> Sequence[Session]:
        with self._lock:
            return [each for each in self._sessions.values() if not (each.cancelled or each.ended)]

    def _session(self, identity: str) -> Session:
        with self._lock:
            if identity not in self._sessions:
                raise Refusal(404, "notFound", "No such upload session")
            return self._sessions[identity]

    @staticmethod
    def _live(place: Bucket, name: str) -> int:
        return place.objects[name].generation if name in place.objects else 0


def _after(names: Sequence[str], token: str) -> int:
    try:
        last = base64.urlsafe_b64decode(token).decode()
    except (binascii.Error, UnicodeDecodeError):
        last = "?"
    if last[:1] not in ("", "o", "p"):
        raise invalid(f"Invalid page token: {token!r}")
    return _past(names, last[1:]) if last[:1] == "p" else bisect.bisect_right(names, last[1:]) if last else 0


def _past(names: Sequence[str], prefix: str) -> int:
    """Return the index of the first name after those that start with `prefix`."""
    return bisect.bisect_right(names, prefix, key=lambda name: name[: len(prefix)])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
