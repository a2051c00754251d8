"""Objects of Google Cloud Storage as values: their bytes, resources and names, and conditions on them."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import crc32c

_NAME_BYTES = 1024
_WRITABLE = frozenset(
    {"cacheControl", "contentDisposition", "contentEncoding", "contentLanguage", "contentType"}
    | {"customTime", "storageClass"}
)

Json = Mapping[str, object]
Sums = Sequence[tuple[str, str]]
"""Pairs of `crc32c` or `md5` and the base64 that the bytes must have."""


class Refusal(Exception):
    """An answer that isn't the one asked for, as Google's errors say it; without a reason, as plain text."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message


def invalid(message: str) -> Refusal:
    return Refusal(400, "invalid", message)


class Content:
    """Bytes in the pieces that they came in, with checksums for whoever asks."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self.pieces = tuple(pieces)
        self.size = sum(map(len, self.pieces))

    @functools.cached_property
    def crc32c(self) -> str:
        value = functools.reduce(lambda so_far, piece: crc32c.crc32c(piece, so_far), self.pieces, 0)
        return base64.b64encode(value.to_bytes(4, "big")).decode()

    @functools.cached_property
    def md5(self) -> str:
        digest = hashlib.md5(usedforsecurity=False)
        for piece in self.pieces:
            digest.update(piece)
        return base64.b64encode(digest.digest()).decode()

    def verify(self, sums: Sums) -> None:
        for kind, expected in sums:
            found = self.crc32c if kind == "crc32c" else self.md5
            if found != expected:
                title = kind.upper()
                raise invalid(f'Provided {title} "{expected}" doesn\'t match calculated {title} "{found}".')

    def cut(self, start: int, stop: int) -> Iterator[memoryview]:
        offset = 0
        for piece in self.pieces:
            part = piece[max(start - offset, 0) : max(stop - offset, 0)]
            if len(part):
                yield part
            offset += len(piece)


@dataclass(frozen=True, slots=True)
class Stored:
    """One generation of an object."""

    bucket: str
    name: str
    generation: int
    content: Content
    fields: Json
    created: str
    components: int
    """How many uploads a composed object is made of, or 0."""
    has_md5: bool

    @property
    def etag(self) -> str:
        return base64.b64encode(f"{self.generation}/1".encode()).decode()

    @property
    def resource(self) -> Json:
        sums = {"md5Hash": self.content.md5} if self.has_md5 else {}
        return {
            "kind": "storage#object",
            "id": f"{self.bucket}/{self.name}/{self.generation}",
            "bucket": self.bucket,
            "name": self.name,
            "size": str(self.content.size),
            "generation": str(self.generation),
            "metageneration": "1",
            "crc32c": self.content.crc32c,
            **sums,
            "etag": self.etag,
            "timeCreated": self.created,
            "updated": self.created,
            "storageClass": "STANDARD",
            **({"componentCount": self.components} if self.components else {}),
            **self.fields,
        }


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a request wants to be true of the object that it is about."""

    generation: int | None = None
    match: int | None = None
    not_match: int | None = None

    @classmethod
    def parse(cls, query: Mapping[str, str], infix: str = "") -> Conditions:
        """Take them from a query; `infix` is `Source` where a request is about two objects."""
        for unknown in (f"if{infix}MetagenerationMatch", f"if{infix}MetagenerationNotMatch"):
            if unknown in query:
                raise Refusal(501, "notImplemented", f"{unknown} is not served here")
        names = ("sourceGeneration" if infix else "generation", f"if{infix}GenerationMatch")
        return cls(*(integer(query, name) for name in (*names, f"if{infix}GenerationNotMatch")))

    def check_write(self, current: int) -> None:
        """Refuse unless they hold for the live generation; 0 says that there is none."""
        if self.match not in (None, current) or self.not_match == current:
            raise unmet()

    def check_read(self, stored: Stored) -> None:
        if self.match not in (None, stored.generation):
            raise unmet()
        if self.not_match == stored.generation:
            raise Refusal(304, "notModified", "Not Modified")


def check_name(name: str) -> None:
    size = len(name.encode())
    if not 0 < size <= _NAME_BYTES or name in (".", "..") or set(name) & {"\r", "\n"}:
        raise invalid(f"Invalid object name: {name!r}")


def written_fields(resource: Json) -> Json:
    """Return what of an uploader's resource is kept with the object."""
    metadata = resource.get("metadata", {})
    fields = {key: resource[key] for key in _WRITABLE if key in resource}
    if not isinstance(metadata, Mapping) or not all(isinstance(value, str) for value in metadata.values()):
        raise invalid("Custom metadata must be strings")
    if not all(isinstance(value, str) for value in fields.values()):
        raise invalid(f"Not strings: {fields}")
    return {**fields, "metadata": dict(metadata)} if metadata else fields


def unmet() -> Refusal:
    message = "At least one of the pre-conditions you specified did not hold."
    return Refusal(412, "conditionNotMet", message)


def integer(query: Mapping[str, str], name: str) -> int | None:
    if name not in query:
        return None
    if not re.fullmatch(r"[0-9]{1,19}", query[name]):
        raise invalid(f"Invalid value for {name}: {query[name]!r}")
    return int(query[name])
