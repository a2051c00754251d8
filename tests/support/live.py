"""A place that somebody names for tests of a real bucket, or of a server of their own: `make live`."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

import boto3
import fsspec

from support.outsiders import Outsider, pending_on_s3

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem
    from mypy_boto3_s3 import S3Client

URI = "CLOUDCKPT_LIVE_URI"
"""The variable that names it. Where it is set, tests that go over several stores go to this one instead."""


def uri() -> str | None:
    """The URI that was named, which may have options in its query."""
    return os.environ.get(URI)


@dataclass(frozen=True, slots=True)
class LiveStore:
    """The store of a URI, reached with the user's own credentials."""

    protocol: str
    options: tuple[tuple[str, str], ...] = ()
    """Those of the URI's query."""

    @classmethod
    def of(cls, uri: str) -> tuple[LiveStore, str]:
        """The store, and the URI without its query."""
        plain, _, query = uri.partition("?")
        return cls(plain.partition("://")[0], tuple(parse_qsl(query, strict_parsing=bool(query)))), plain

    @property
    def fsspec_options(self) -> dict[str, Any]:
        """What reaches it through fsspec, of the options that go there."""
        given = dict(self.options)
        found: dict[str, Any] = {"use_listings_cache": False}
        if self.endpoint:
            found["endpoint_url"] = self.endpoint
        if given.get("anon", "").lower() in {"1", "true", "yes"}:
            found |= {"token": "anon"} if self.is_gcs else {"anon": True}
        if self.is_s3 and self.region is not None:
            found["client_kwargs"] = {"region_name": self.region}
        return found

    @property
    def endpoint(self) -> str:
        """URL, or nothing where it is the store's usual one."""
        return dict(self.options).get("endpoint_url", "")

    @property
    def region(self) -> str | None:
        """As the URI says, or the environment as the Terraform modules' outputs have it."""
        return dict(self.options).get("region") or os.environ.get("CLOUDCKPT_REGION")

    @property
    def is_gcs(self) -> bool:
        return self.protocol in {"gs", "gcs"}

    @property
    def is_s3(self) -> bool:
        return self.protocol == "s3"

    def filesystem(self) -> AbstractFileSystem:
        """fsspec's, shared by all callers in this process."""
        return _filesystem(self)

    def client(self) -> S3Client:
        """A client of S3, shared by all callers in this process."""
        return _client(self)


@functools.cache
def _filesystem(store: LiveStore) -> AbstractFileSystem:
    return fsspec.filesystem(store.protocol, skip_instance_cache=True, **store.fsspec_options)


@functools.cache
def _client(store: LiveStore) -> S3Client:
    return boto3.session.Session().client("s3", endpoint_url=store.endpoint or None, region_name=store.region)


@dataclass(frozen=True, slots=True)
class Live(Outsider):
    """What is below a URI of such a store, seen by fsspec; pending uploads by boto3, on S3 alone."""

    store: LiveStore
    uri: str

    @property
    def _path(self) -> str:
        return self.uri.partition("://")[2]

    def visible(self) -> set[str]:
        # A key that ends in a slash is an empty folder of a server over a file system, such as JuiceFS.
        return {name for name in self._names() if not name.endswith("/")}

    def _names(self) -> set[str]:
        if self.store.is_s3:
            bucket, _, prefix = self._path.partition("/")
            pages = (
                self.store.client()
                .get_paginator("list_objects_v2")
                .paginate(Bucket=bucket, Prefix=f"{prefix}/")
            )
            keys = [item.get("Key", "") for page in pages for item in page.get("Contents", [])]
            return {key.removeprefix(f"{prefix}/") for key in keys}
        files = self.store.filesystem()
        files.invalidate_cache()
        return {str(name)[len(self._path) + 1 :] for name in files.find(self._path)}

    def pending(self) -> set[str]:
        return {name for name, _ in self._uploads()}

    def read(self, name: str) -> bytes:
        data = self.store.filesystem().cat_file(f"{self._path}/{name}")
        assert isinstance(data, bytes)
        return data

    def write(self, name: str, data: bytes) -> None:
        self.store.filesystem().pipe_file(f"{self._path}/{name}", data)

    def remove(self, name: str) -> None:
        if self.store.is_s3:
            bucket, _, prefix = self._path.partition("/")
            self.store.client().delete_object(Bucket=bucket, Key=f"{prefix}/{name}")
            return
        self.store.filesystem().rm_file(f"{self._path}/{name}")

    def clear(self) -> None:
        """Remove all of it, pending uploads as well."""
        bucket, _, prefix = self._path.partition("/")
        if self.store.is_s3:
            # One by one: some servers refuse DeleteObjects as s3fs sends it, without Content-MD5.
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(self.remove, self._names()))
        else:
            files = self.store.filesystem()
            files.invalidate_cache()
            if files.exists(self._path):
                files.rm(self._path, recursive=True)
        for name, upload in self._uploads():
            self.store.client().abort_multipart_upload(Bucket=bucket, Key=f"{prefix}/{name}", UploadId=upload)

    def _uploads(self) -> list[tuple[str, str]]:
        if not self.store.is_s3:
            return []  # a folder's are visible files, and GCS lists no sessions
        bucket, _, prefix = self._path.partition("/")
        return pending_on_s3(self.store.client(), bucket, f"{prefix}/")
