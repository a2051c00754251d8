"""Places that a checkpoint can go to, for cloudckpt and for stock DCP, and what an outsider sees in them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

import cloudckpt
from support import fake_gcs, live
from support.dcp_fsspec import FsspecReader, FsspecWriter
from support.gcs import GCSServer, shared_gcs_server
from support.live import Live, LiveStore
from support.outsiders import InFolder, OnGCS, OnS3, Outsider
from support.servers import S3Server

FOLDER = "folder"
GCS = "gcs"
FAKE_GCS = fake_gcs.NAME
LIVE = "live"
PLACES = (LIVE,) if live.uri() else (FOLDER, "moto", "ministack", "rclone", GCS)
"""Every kind of place that is always tried."""
USUAL = (LIVE,) if live.uri() else (FOLDER, "moto", GCS)
"""One of each kind of store; where a user has named a place, nothing but that."""
SOAKED = () if live.uri() else (FAKE_GCS,)
"""Kinds of place that `make soak` alone tries beside the others."""
S3_PART_SIZE = 5 << 20
"""Bytes; the least that S3 and GCS allow, so that small states make several parts."""
FOLDER_PART_SIZE = 256 << 10
"""Bytes."""


@dataclass(frozen=True, slots=True)
class Place:
    """A URI that nothing was written to yet, with all that reaching it takes. Travels to ranks."""

    name: str
    uri: str
    server: S3Server | GCSServer | LiveStore | None = None
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

    @classmethod
    def on_gcs(cls, server: GCSServer, bucket: str) -> Self:
        options = {"endpoint_url": server.endpoint, "part_size": S3_PART_SIZE}
        return cls(server.name, f"gs://{bucket}", server, options)

    @classmethod
    def named_by_the_user(cls) -> Self:
        named = live.uri()
        assert named is not None, f"{live.URI} names no place"
        store, uri = LiveStore.of(named)
        if store.protocol == "file":
            return replace(cls.in_folder(Path(uri.removeprefix("file://"))), name=LIVE)
        part_size = FOLDER_PART_SIZE if store.protocol == "file" else S3_PART_SIZE
        return cls(LIVE, uri.rstrip("/"), store, {**dict(store.options), "part_size": part_size})

    @property
    def is_gcs(self) -> bool:
        return self.uri.startswith("gs://")

    def child(self, name: str) -> Self:
        """The same place, one level down."""
        return replace(self, uri=f"{self.uri}/{name}")

    def behind(self, endpoint: str) -> Self:
        """The same place, reached by way of another endpoint, such as a proxy's."""
        return replace(self, options={**self.options, "endpoint_url": endpoint})

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
        return self._outside.visible()

    def pending(self) -> set[str]:
        """Names of uploads begun and neither completed nor aborted. A folder's are visible files."""
        return self._outside.pending()

    def read(self, name: str) -> bytes:
        return self._outside.read(name)

    def write(self, name: str, data: bytes) -> None:
        self._outside.write(name, data)

    def remove(self, name: str) -> None:
        self._outside.remove(name)

    @property
    def _outside(self) -> Outsider:
        if self.server is None:
            return InFolder(self._folder)
        if isinstance(self.server, LiveStore):
            return Live(self.server, self.uri)
        bucket, _, prefix = self.uri.partition("://")[2].partition("/")
        prefix = f"{prefix}/" if prefix else ""
        if isinstance(self.server, GCSServer):
            return OnGCS(self.server, bucket, prefix)
        return OnS3(self.server, bucket, prefix)

    @property
    def _folder(self) -> Path:
        return Path(self.uri.removeprefix("file://"))

    @property
    def _fsspec_options(self) -> dict[str, Any]:
        assert self.server is not None
        if isinstance(self.server, LiveStore):
            return self.server.fsspec_options
        if isinstance(self.server, GCSServer):
            return {"endpoint_url": self.server.endpoint, "token": "anon", "use_listings_cache": False}
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
    if name == LIVE:
        return Place.named_by_the_user().child(unique)
    if name in (GCS, FAKE_GCS):
        gcs = shared_gcs_server() if name == GCS else fake_gcs.shared_fake_gcs_server()
        return Place.on_gcs(gcs, gcs.new_bucket()).child(unique)
    server = server_named(name)
    return Place.on_server(server, server.new_bucket()).child(unique)
