"""What other processes do to a store: a spawned child can import it from here, and not from a test."""

from __future__ import annotations

import resource
from collections.abc import Callable

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import PreconditionFailedError, StorageError
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Create, ObjectStore, Update


def write_beyond_the_limit(root: str) -> list[StorageError]:
    """Put, and send a part, in a process whose files may not grow beyond 100,000 bytes."""
    store = open_store(Target.parse(root))
    errors = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        upload = store.begin_upload("name")
        writes: list[Callable[[], object]] = [
            lambda: store.put("name", bytes(200_000), Create()),
            lambda: store.upload_part(upload, 1, 0, [memoryview(bytes(70_000))] * 2),
        ]
        for write in writes:
            try:
                write()
            except StorageError as error:
                errors.append(error)
        store.abort_upload(upload)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return errors


def try_to_create(store: ObjectStore, name: str, data: bytes) -> bool:
    try:
        store.put(name, data, Create())
    except PreconditionFailedError:
        return False
    return True


def count_to(store: ObjectStore, times: int) -> None:
    done = 0
    while done < times:
        data, info = store.get("counter")
        assert info.version is not None
        try:
            store.put("counter", b"%d" % (int(data) + 1), Update(info.version))
        except PreconditionFailedError:
            continue
        done += 1
