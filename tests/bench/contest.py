"""Peers that save and load the same states by turns on one server, at a distance."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Protocol

from bench.comparison import Result, Sample
from bench.distance import Distance, distant
from bench.endpoint import Counts, Endpoint, served
from bench.peers import Opened, Place
from bench.states import Shape
from bench.worker import What, Worker, WorkerFailed
from support.gcs import GCSServer

_NEAR = Distance()
_WAYS: tuple[What, ...] = ("save", "load")


class Storage(Protocol):
    """A server that the benchmark counts at, near, while its clients may be far away."""

    @property
    def running(self) -> Endpoint | GCSServer: ...

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables for the clients, beside those that name the endpoint."""
        ...

    def reset(self) -> None: ...

    def counts(self) -> Counts: ...

    def empty(self, bucket: str) -> None: ...


class OnS3:
    """The server of `bench.endpoint`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.running = endpoint
        self.environment: Mapping[str, str] = {}

    def reset(self) -> None:
        self.running.reset()

    def counts(self) -> Counts:
        return self.running.counts()

    def empty(self, bucket: str) -> None:
        client = self.running.server.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for found in page.get("Contents", []):
                client.delete_object(Bucket=bucket, Key=found["Key"])  # pyright: ignore[reportTypedDictNotRequiredAccess]


@contextmanager
def on_s3() -> Iterator[Storage]:
    """Run an S3 server."""
    with served() as endpoint:
        yield OnS3(endpoint)


@contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """Make a folder that is gone in the end, if need be because of Ctrl-C or SIGTERM: then what runs ends."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ignore() -> None:
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)

    def end(number: int, _frame: FrameType | None) -> None:
        ignore()  # a second one would interrupt the clearing away
        sys.exit(128 + number)

    folder = (parent or Path(tempfile.gettempdir())) / f"cloudckpt-bench-{uuid.uuid4().hex[:12]}"
    try:
        for number in handlers:
            signal.signal(number, end)
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        ignore()
        for worker in multiprocessing.active_children():  # one that was interrupted as it began
            worker.kill()
            worker.join()
        if folder.exists():
            shutil.rmtree(folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def measured(
    shape: Shape,
    peers: Mapping[str, Opened],
    repeats: int,
    folder: Path,
    *,
    distance: Distance = _NEAR,
    started: Callable[[], AbstractContextManager[Storage]] = on_s3,
) -> list[Result]:
    """Have each peer save the state and load it, turn by turn, on a server of its own that all share.

    Raises:
        NotInstalledError: haproxy is not installed, and the distance needs it.
        PermissionError: the distance needs network namespaces, and this process may not make them.
    """
    with started() as storage, distant(storage.running, distance) as reached, ExitStack() as stack:
        folder.mkdir()
        stack.callback(shutil.rmtree, folder)
        shape.lay(folder)
        contest = _Contest(storage, distance.title)
        near = storage.running.server if isinstance(storage.running, Endpoint) else storage.running
        for name, opened in peers.items():
            place = Place(
                replace(near, endpoint=reached.endpoint),
                near.new_bucket(),
                folder / name.replace(" ", "-"),
                {**storage.environment, **reached.environment},
                reached.namespace,
            )
            contest.enter(name, place, stack.enter_context(Worker(opened, place, shape, folder)))
        for turn in range(1 + repeats):
            contest.take_turns(turn)
        return list(contest.results(shape))


class _Contest:
    """The workers of one state, and what they were measured at."""

    def __init__(self, storage: Storage, setting: str) -> None:
        self._storage = storage
        self._setting = setting
        self._workers: dict[str, tuple[Place, Worker]] = {}
        self._samples: dict[tuple[str, What], list[Sample]] = {}
        self._failures: dict[tuple[str, What], str] = {}
        self._nbytes = 0

    def enter(self, name: str, place: Place, worker: Worker) -> None:
        self._workers[name] = place, worker

    def take_turns(self, turn: int) -> None:
        """Have each that still can save and load once; another one goes first each time."""
        names = list(self._workers)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for what in _WAYS:
                self._take(name, what, turn)
            self._clear(self._workers[name][0])

    def _take(self, name: str, what: What, turn: int) -> None:
        """Measure once, unless it has failed before. What couldn't be saved can't be loaded."""
        if {(name, what), (name, "save")} & self._failures.keys():
            return
        _, worker = self._workers[name]
        try:
            if not turn and what == "save":
                self._nbytes = worker.ready()
            sample = self._sample(worker, what, f"turn-{turn}")
        except WorkerFailed as failed:
            self._failures[name, what] = str(failed)
        else:
            self._samples.setdefault((name, what), []).append(sample)

    def _sample(self, worker: Worker, what: What, name: str) -> Sample:
        self._storage.reset()
        spent = worker.measure(what, name)
        counts = self._storage.counts()
        return Sample(spent, counts.requests, counts.received, counts.sent, counts.cpu_seconds)

    def results(self, shape: Shape) -> Iterator[Result]:
        for what in _WAYS:
            for name in self._workers:
                samples = self._samples.get((name, what), [])[1:]
                failure = self._failures.get((name, what)) or self._failures.get((name, "save"))
                yield Result(
                    *(shape.name, shape.title, self._nbytes, what, name, samples, failure),
                    sound=self._is_sound(name),
                    setting=self._setting,
                )

    def _is_sound(self, name: str) -> bool:
        loads = self._samples.get((name, "load"), [])
        return (name, "load") not in self._failures and not any(sample.spent.wrong for sample in loads)

    def _clear(self, place: Place) -> None:
        """Remove what a peer has saved, so that the next finds as much memory."""
        self._storage.empty(place.bucket)
        for saved in place.folder.iterdir():
            if saved.is_dir():
                shutil.rmtree(saved)
