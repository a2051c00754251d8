"""What the tests of all stores share."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

import pytest

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.stores.gcs.store import GCSStore
from support import live
from support.buckets import Bucket, Stores, open_in
from support.gcs import GCSServer
from support.gcs_emulator import gcs_emulator
from support.proxy import Proxy, proxied
from support.servers import S3Server

# Without a place that a user has named there is nothing to collect.
collect_ignore = [] if live.uri() else ["test_live.py"]


@pytest.fixture(scope="session")
def other_process() -> Iterator[Executor]:
    """A second process, spawned once: starting one imports PyTorch, which costs more than most tests."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        yield other


@pytest.fixture(scope="module")
def moto_proxy(moto: S3Server) -> Iterator[Proxy]:
    with proxied(moto.endpoint) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def bucket(moto: S3Server) -> Bucket:
    return Bucket.new(moto)


@pytest.fixture
def proxy(moto_proxy: Proxy, bucket: Bucket) -> Proxy:
    """The proxy with nothing seen or spoilt, before a bucket with nothing in it."""
    bucket.clear()
    moto_proxy.forget()
    return moto_proxy


@pytest.fixture(scope="module")
def stores(moto_proxy: Proxy, bucket: Bucket) -> Iterator[Stores]:
    """Open stores, and those with the same options once: making clients takes most of a test's time."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda **options: stack.enter_context(open_in(moto_proxy, bucket, **options)))


@pytest.fixture(scope="session")
def emulator() -> Iterator[GCSServer]:
    """gcp-storage-emulator, which ignores every condition."""
    with gcs_emulator() as endpoint:
        yield GCSServer("emulator", endpoint, 0)


@pytest.fixture
def open_gcs() -> Iterator[Callable[..., GCSStore]]:
    """Open stores on servers of GCS, and close them at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda endpoint, bucket, prefix="run", **options: stack.enter_context(
            GCSStore(Target.parse(f"gs://{bucket}/{prefix}", endpoint_url=endpoint, **options))
        )
