"""Conversions that are killed before any one of their calls of the destination's store.

Run as a program: importing torch takes seconds, so that one process forks each conversion, and each look at
what it left. It prints a line of JSON for each.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import cloudckpt
from cloudckpt.backends import stores
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.convert import convert as conversion
from cloudckpt.backends.manage import gc
from cloudckpt.backends.stores.base import ObjectStore

LATE_IMPORTS = (
    "torch._dynamo",
    "cloudckpt.backends.stores.local.store",
    "cloudckpt.backends.stores.s3.store",
    "cloudckpt.backends.stores.gcs.store",
)
"""What every process would import anew: the first takes seconds."""
MOST = 100
"""Calls that no conversion here makes."""
CALLS = ("put", "list", "stat", "delete", "begin_upload", "upload_part", "complete_upload", "holds")


def killed_at(store: ObjectStore, moment: int, number: int) -> ObjectStore:
    """Send a signal before a call of the store, counted from 1."""
    counted, lock = iter(range(1, 1 << 30)), threading.Lock()

    def spy(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with lock:
            if next(counted) == moment:
                os.kill(os.getpid(), number)
        return call(*args, **kwargs)

    for name in CALLS:
        setattr(store, name, functools.partial(spy, getattr(store, name)))
    return store


def forked(act: Callable[[], Any]) -> tuple[int, Any]:
    """Run in a process of its own; return its status and what it returned."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(reading)
        status = 1
        try:
            os.write(writing, json.dumps(act()).encode())
            status = 0
        except cloudckpt.CheckpointError as error:
            os.write(writing, json.dumps(str(error)).encode())
        finally:
            os._exit(status)
    os.close(writing)
    said = b""
    while piece := os.read(reading, 1 << 16):
        said += piece
    os.close(reading)
    _, ended = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(ended), json.loads(said or b"null")


def main(source: str, to: str, uri: str, name: str, given: str) -> None:
    options = json.loads(given)
    for module in LATE_IMPORTS:
        importlib.import_module(module)

    def convert(folder: str, moment: int = 0) -> Any:
        target = Target.parse(f"{folder}/{name}" if name else folder, **options)
        opened = stores.open_store

        def open_store(of: Target) -> ObjectStore:
            store = opened(of)
            return killed_at(store, moment, signal.SIGKILL) if of.uri.startswith(folder) else store

        with mock.patch.object(conversion, "open_store", open_store):
            done = conversion.convert(Target.parse(source), target, to=to, shard_size=200_000)
        return sorted(uri.rpartition("/")[2] for uri in done.files)

    def look(folder: str) -> Any:
        with stores.open_store(Target.parse(folder, **options)) as store:
            names = [info.name for info in store.list().objects]
            return {"visible": names, "pending": [p.upload.name for p in store.pending_uploads()]}

    def collect(folder: str) -> Any:
        gc.collect_garbage(Target.parse(folder, **options), older_than=-86400, silent_for=-86400)

    for moment in range(1, MOST):
        folder = f"{uri}/killed-{moment}"
        status, _ = forked(lambda: convert(folder, moment))  # noqa: B023 - called at once
        found = forked(lambda: look(folder))[1]  # noqa: B023
        act = collect if moment % 2 else convert
        again = forked(lambda: act(folder))  # noqa: B023
        after = forked(lambda: look(folder))[1]  # noqa: B023
        told = {"status": status, "found": found, "collected": bool(moment % 2), "again": again}
        sys.stdout.write(json.dumps({**told, "after": after}) + "\n")
        sys.stdout.flush()
        if status == 0:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
