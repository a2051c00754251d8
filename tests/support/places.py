"""Places that a checkpoint can go to, for cloudckpt and for stock DCP, and what an outsider sees in them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

import cloudckpt
from support.servers import S3Server

FOLDER = "folder"
PLACES = (FOLDER, "moto", "ministack", "rclone")
S3_PART_SIZE = 5 << 20
"""Bytes; the least that S3 allows, so that small states make several parts."""
FOLDER_PART_SIZE = 256 << 10
"""Bytes."""


@dataclass(frozen=True, slots=True)
class Place:
    """A URI that nothing was written to yet, with all that reaching it takes. Travels to ranks."""

    name: str
    uri: str
    server: S3Server | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Keywords for cloudckpt."""

    @classmethod
    def in_folder(cls, folder: Path) -> Self:
        return cls(FOLDER, f"file://{folder}", options={"part_size": FOLDER_PART_SIZE})

    @classmethod
    def on_server(cls, server: S3Server, bucket: str) -> Self:
        options: dict[str, Any] = {
            "endpoint_url": server.endpoint,
            "region": "us-east-1",
            "storage_options": server.storage_options,
            "part_size": S3_PART_SIZE,
        }
        return cls(server.name, f"s3://{bucket}", server, options)

    def child(self, name: str) -> Self:
        """The same place, one level down."""
        return replace(self, uri=f"{self.uri}/{name}")

    def writer(self, **options: Any) -> cloudckpt.StorageWriter:
        return cloudckpt.StorageWriter(self.uri, **{**self.options, **options})

    def reader(self, **options: Any) -> cloudckpt.StorageReader:
        return cloudckpt.StorageReader(self.uri, **{**self.options, **options})

    def stock_writer(self, **arguments: Any) -> FileSystemWriter:
        """DCP's own writer: of files for a folder, of fsspec for a bucket."""
        if self.server is None:
            return FileSystemWriter(self._folder, **arguments)
        return FsspecWriter(self.uri, **arguments, **self._fsspec_options)

    def stock_reader(self) -> FileSystemReader:
        """DCP's own reader: of files for a folder, of fsspec for a bucket."""
        if self.server is None:
            return FileSystemReader(self._folder)
        return FsspecReader(self.uri, **self._fsspec_options)

    def visible(self) -> set[str]:
        """Names below the URI of all that a reader could meet, hidden files included."""
        if self.server is None:
            root = self._folder
            return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
        bucket, prefix = self._bucket_and_prefix
        pages = self.server.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry.get("Key", "") for page in pages for entry in page.get("Contents", [])]
        return {key.removeprefix(prefix) for key in keys}

    def pending(self) -> set[str]:
        """Names of uploads begun and neither completed nor aborted. A folder's are visible files."""
        if self.server is None:
            return set()
        bucket, prefix = self._bucket_and_prefix
        pages = self.server.client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket)
        uploads = [upload for page in pages for upload in page.get("Uploads", [])]
        keys = [upload.get("Key", "") for upload in uploads]
        return {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}

    def read(self, name: str) -> bytes:
        if self.server is None:
            return (self._folder / name).read_bytes()
        bucket, prefix = self._bucket_and_prefix
        return self.server.client().get_object(Bucket=bucket, Key=prefix + name)["Body"].read()

    def write(self, name: str, data: bytes) -> None:
        if self.server is None:
            (self._folder / name).write_bytes(data)
        else:
            bucket, prefix = self._bucket_and_prefix
            self.server.client().put_object(Bucket=bucket, Key=prefix + name, Body=data)

    def remove(self, name: str) -> None:
        if self.server is None:
            (self._folder / name).unlink()
        else:
            bucket, prefix = self._bucket_and_prefix
            self.server.client().delete_object(Bucket=bucket, Key=prefix + name)

    @property
    def _folder(self) -> Path:
        return Path(self.uri.removeprefix("file://"))

    @property
    def _bucket_and_prefix(self) -> tuple[str, str]:
        bucket, _, prefix = self.uri.removeprefix("s3://").partition("/")
        return bucket, f"{prefix}/" if prefix else ""

    @property
    def _fsspec_options(self) -> dict[str, Any]:
        assert self.server is not None
        return {
            **self.server.storage_options,
            "endpoint_url": self.server.endpoint,
            "use_listings_cache": False,
            # rclone answers a range with the checksum of the whole object, which botocore would check.
            "config_kwargs": {
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
        }


Places = Callable[[str], Place]


def new_place(name: str, folder: Path, server_named: Callable[[str], S3Server]) -> Place:
    """Return an untouched URI of the kind ``name``, one of ``PLACES``; ``folder`` is for the first."""
    unique = f"run-{uuid.uuid4().hex[:8]}"
    if name == FOLDER:
        return Place.in_folder(folder / unique)
    server = server_named(name)
    return Place.on_server(server, server.new_bucket()).child(unique)
