"""What somebody sees in a place who goes round cloudckpt: by the file system, by boto3, by plain HTTP."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from support.gcs import GCSServer
from support.servers import S3Server

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class Outsider(abc.ABC):
    """One place, seen from outside. Names are relative to it."""

    @abc.abstractmethod
    def visible(self) -> set[str]:
        """Names of all that a reader could meet, hidden files included."""

    @abc.abstractmethod
    def pending(self) -> set[str]:
        """Names of uploads begun and neither completed nor aborted."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of an object."""

    @abc.abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Put an object."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Delete an object."""


@dataclass(frozen=True, slots=True)
class InFolder(Outsider):
    """A folder, whose pending uploads are visible files."""

    folder: Path

    def visible(self) -> set[str]:
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}

    def pending(self) -> set[str]:
        return set()

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()


def pending_on_s3(client: S3Client, bucket: str, prefix: str) -> list[tuple[str, str]]:
    """Uploads begun and neither completed nor aborted: their names below a prefix, and their ids."""
    pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
    found = [upload for page in pages for upload in page.get("Uploads", [])]
    return [(one.get("Key", "").removeprefix(prefix), one.get("UploadId", "")) for one in found]


@dataclass(frozen=True, slots=True)
class OnS3(Outsider):
    """A prefix in a bucket of S3."""

    server: S3Server
    bucket: str
    prefix: str

    def visible(self) -> set[str]:
        paginator = self.server.client().get_paginator("list_objects_v2")
        pages = paginator.paginate(Bucket=self.bucket, Prefix=self.prefix)
        keys = [entry.get("Key", "") for page in pages for entry in page.get("Contents", [])]
        return {key.removeprefix(self.prefix) for key in keys}

    def pending(self) -> set[str]:
        return {name for name, _ in pending_on_s3(self.server.client(), self.bucket, self.prefix)}

    def read(self, name: str) -> bytes:
        return self.server.client().get_object(Bucket=self.bucket, Key=self.prefix + name)["Body"].read()

    def write(self, name: str, data: bytes) -> None:
        self.server.client().put_object(Bucket=self.bucket, Key=self.prefix + name, Body=data)

    def remove(self, name: str) -> None:
        self.server.client().delete_object(Bucket=self.bucket, Key=self.prefix + name)


@dataclass(frozen=True, slots=True)
class OnGCS(Outsider):
    """A prefix in a bucket of GCS."""

    server: GCSServer
    bucket: str
    prefix: str

    def visible(self) -> set[str]:
        return {name.removeprefix(self.prefix) for name in self.server.names(self.bucket, self.prefix)}

    def pending(self) -> set[str]:
        names = [one["name"] for one in self.server.sessions() if one["bucket"] == self.bucket]
        return {name.removeprefix(self.prefix) for name in names if name.startswith(self.prefix)}

    def read(self, name: str) -> bytes:
        data = self.server.read(self.bucket, self.prefix + name)
        assert data is not None, f"there is no {name}"
        return data

    def write(self, name: str, data: bytes) -> None:
        self.server.write(self.bucket, self.prefix + name, data)

    def remove(self, name: str) -> None:
        self.server.remove(self.bucket, self.prefix + name)
