"""Buckets with one object in play, for tests of the S3 store behind a proxy."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.stores.base import Overwrite, Upload
from cloudckpt.backends.stores.s3.store import S3Store
from support.proxy import Proxy
from support.servers import S3Server

PART = 5 << 20
"""Bytes; the least that a part of an S3 upload may have."""

Stores = Callable[..., S3Store]
"""Opens a store with the options given as keywords."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket as seen past the store, and its object ``run/name``."""

    server: S3Server
    name: str

    @classmethod
    def new(cls, server: S3Server) -> Self:
        """Make one."""
        return cls(server, server.new_bucket())

    def hold(self, data: bytes) -> bytes:
        """Put the object and return its bytes."""
        self.server.client().put_object(Bucket=self.name, Key="run/name", Body=data)
        return data

    def found(self) -> bytes | None:
        """Return the object's bytes, None where there is none."""
        client = self.server.client()
        try:
            return client.get_object(Bucket=self.name, Key="run/name")["Body"].read()
        except client.exceptions.NoSuchKey:
            return None

    def has_parts(self, upload: Upload) -> bool:
        """Say whether the server holds any part of the upload."""
        client = self.server.client()
        answer = client.list_parts(Bucket=self.name, Key="run/name", UploadId=upload.upload_id)
        return bool(answer.get("Parts"))

    def clear(self) -> None:
        """Delete the object."""
        self.server.client().delete_object(Bucket=self.name, Key="run/name")


def open_in(proxy: Proxy, bucket: Bucket, **options: Any) -> S3Store:
    keywords = {"region": "us-east-1", "retries": 1, "storage_options": {"key": "test", "secret": "testtest"}}
    return S3Store(Target.parse(f"s3://{bucket.name}/run", endpoint_url=proxy.endpoint, **keywords | options))


def random_bytes(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def send(store: S3Store, data: bytes = b"data") -> None:
    upload = store.begin_upload("name")
    store.complete_upload(upload, [store.upload_part(upload, 1, 0, [memoryview(data)])])


def read(store: S3Store, size: int) -> bytes:
    memory = bytearray(size)
    cut = size // 3
    store.read_into("name", 0, [memoryview(memory)[:cut], memoryview(memory)[cut:]])
    return bytes(memory)


OPERATIONS: Mapping[str, Callable[[S3Store], object]] = {
    "PutObject": lambda store: store.put("name", b"data", Overwrite()),
    "GetObject": lambda store: store.get("name"),
    "HeadObject": lambda store: store.stat("name"),
    "ListObjectsV2": lambda store: store.list(),
    "DeleteObjects": lambda store: store.delete(["name"]),
    "CreateMultipartUpload": lambda store: store.begin_upload("name"),
    "UploadPart": send,
    "CompleteMultipartUpload": send,
    "AbortMultipartUpload": lambda store: store.abort_upload(store.begin_upload("name")),
    "ListMultipartUploads": lambda store: list(store.pending_uploads()),
}
every_operation = pytest.mark.parametrize("operation", sorted(OPERATIONS))
