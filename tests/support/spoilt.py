"""Stores of S3 and GCS behind a proxy, to whose requests it gives any answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.stores.gcs import capabilities as gcs_capabilities
from cloudckpt.backends.stores.gcs.store import GCSStore
from cloudckpt.backends.stores.s3 import capabilities as s3_capabilities
from cloudckpt.backends.stores.s3.store import S3Store
from support.foreign import Stage, stage
from support.gcs import GCSServer
from support.proxy import Proxy, RawAnswer, Request, Spoiling, proxied
from support.servers import S3Server

STORES = ("s3", "gcs", "gcs sessions")
TRIED = ("s3", "gcs", pytest.param("gcs sessions", marks=pytest.mark.soak))
"""Parameters of a fixture: `make test` leaves the sessions out, which an upload to GCS is no more."""
TOKEN = "s3cr3t-t0ken"  # noqa: S105 - of no account
"""The session token of the store of S3."""


@dataclass(frozen=True)
class Spoilt:
    """A store behind a proxy."""

    kind: str
    """One of ``STORES``."""
    proxy: Proxy
    store: ObjectStore
    source: ObjectStore
    found: Callable[[str], bytes | None]

    def stage(self) -> Stage:
        """Prepare the operations; nothing is spoilt."""
        self.proxy.forget()
        s3_capabilities.forget_servers()
        gcs_capabilities.forget_servers()
        return stage(self.store, self.source, self.found)

    def spoil(self, operation: str, spoiling: bytes | Spoiling) -> None:
        """Give an answer to every request of an operation."""
        answer = RawAnswer(spoiling) if isinstance(spoiling, bytes) else spoiling

        def rule(request: Request) -> Spoiling:
            return answer if is_of(self.kind, request, operation) else None

        self.proxy.rule(rule)


def is_of(kind: str, request: Request, operation: str) -> bool:
    """Return True for a request of an operation of ``support.foreign``."""
    asked = request.operation
    if operation == "GetRange":
        return asked == "GetObject" and "range" in request.headers
    if kind == "s3":
        is_copy = "x-amz-copy-source" in request.headers
        return ("CopyObject" if is_copy and asked == "PutObject" else asked) == operation
    if operation in ("HeadObject", "GetObject") and asked == "GetObject":
        return ("alt=media" in request.target) == (operation == "GetObject")
    if operation == "CompleteMultipartUpload" and kind != "gcs":
        range_ = request.headers.get("content-range", "/*")
        return asked == "UploadPart" and not range_.endswith("/*")
    return asked == operation


@contextmanager
def spoilt(kind: str, moto: S3Server, gcs: GCSServer, **options: Any) -> Iterator[Spoilt]:
    """Open a store of a kind behind a proxy."""
    options = {"retries": 0, "timeout": 20.0, **options}
    with ExitStack() as stack:
        upstream = moto.endpoint if kind == "s3" else gcs.endpoint
        proxy = stack.enter_context(proxied(upstream))
        if kind == "s3":
            bucket, client = moto.new_bucket(), moto.client()
            keys = {"key": "test", "secret": "testtest", "token": TOKEN}

            def s3(path: str) -> S3Store:
                own = {"endpoint_url": proxy.endpoint, "region": "us-east-1", "storage_options": keys}
                return stack.enter_context(S3Store(Target.parse(f"s3://{bucket}/{path}", **own, **options)))

            def in_bucket(name: str) -> bytes | None:
                listed = client.list_objects_v2(Bucket=bucket, Prefix=f"run/{name}")
                if f"run/{name}" not in [one.get("Key") for one in listed.get("Contents", ())]:
                    return None
                return client.get_object(Bucket=bucket, Key=f"run/{name}")["Body"].read()

            yield Spoilt(kind, proxy, s3("run"), s3("source"), in_bucket)
        else:
            name = gcs.new_bucket(xml=kind == "gcs")

            def store(path: str) -> GCSStore:
                own = {"endpoint_url": proxy.endpoint}
                return stack.enter_context(GCSStore(Target.parse(f"gs://{name}/{path}", **own, **options)))

            yield Spoilt(kind, proxy, store("run"), store("source"), lambda one: gcs.read(name, f"run/{one}"))
