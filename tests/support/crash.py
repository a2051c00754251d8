"""Saves that are killed at a call of their store: two real ranks, forked for every save.

A process that imports torch takes seconds, so one that has imported it, the zygote, forks the ranks of every
save. It opens no connection, holds no lock and runs no thread of ours, so that what it forks is whole.
"""

from __future__ import annotations

import contextlib
import enum
import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import CheckpointNotFoundError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import Capabilities, Condition, ObjectInfo, ObjectStore, Update
from cloudckpt.backends.stores.s3 import client as s3_client
from support import states
from support.faults import SEAM, FaultyStore, Journal
from support.places import Place

T = TypeVar("T")

RANKS = 2
DEADLINE = 60.0
"""Seconds that a save may take, and a rank that lost the other one may take to end."""
_IMPORTS = 120.0
"""Seconds that the zygote may take to import torch."""
_LATE_IMPORTS = (
    "torch._dynamo",
    "cloudckpt.backends.stores.local.store",
    "cloudckpt.backends.stores.s3.store",
)
"""What every rank would import anew: the first, for DTensors, takes seconds."""


class Fate(enum.Enum):
    """What becomes of a save at a call."""

    RANK_DIES = "the rank is killed, and the other one ends by itself"
    JOB_DIES = "every rank is killed"
    STOPS = "the rank is stopped, until it is woken"


@dataclass(frozen=True, slots=True)
class Moment:
    """A place in a save: before or after a call, counted from 1 in the order in which the rank makes them."""

    rank: int
    call: int
    after: bool
    """The call was carried out, and its answer is not seen."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call, or a step inside one, that a rank made."""

    operation: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A save by two ranks. Its content follows from ``content`` alone."""

    place: Place
    content: str
    overwrite: bool = False
    concurrency: int = 1
    tensors: int = 1
    """Four of them make two objects a rank, if there is the concurrency for it."""
    moment: Moment | None = None
    fate: Fate = Fate.RANK_DIES
    inside: bool = False
    """Count the steps that the store of a folder takes inside its calls, instead of its calls."""
    hasty: bool = False
    """Delete what is overwritten before the commit: a mistake that a test must find."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a rank ended: by a signal, or by itself, having made calls and perhaps failed."""

    exit_code: int
    """Of a signal, its number below zero."""
    calls: tuple[Call, ...] = ()
    failures: tuple[BaseException, ...] = ()


def some_state(content: str, place: Place, mesh: DeviceMesh | None, tensors: int = 1) -> states.State:
    """Tensors of a part on each of two ranks, one that both ranks have, and a value."""
    quarter = place.options["part_size"] // 4 // torch.float32.itemsize
    return {
        "sharded": {
            str(number): states.distributed(
                f"{content} {number}", (4 * RANKS, quarter), torch.float32, mesh, Shard(0)
            )
            for number in range(tensors)
        },
        "both": states.content(content, (3, 5), torch.bfloat16),
        "value": content,
    }


class _Watch:
    """Counts what a rank does, and has something happen to its process at a moment."""

    def __init__(self, job: Job, rank: int) -> None:
        self.calls: list[Call] = []
        self._lock = threading.Lock()
        self._moment = job.moment if job.moment is not None and job.moment.rank == rank else None
        self._fate = job.fate

    @contextlib.contextmanager
    def passing(self, call: Call) -> Iterator[None]:
        with self._lock:
            self.calls.append(call)
            hit = self._moment if self._moment is not None and self._moment.call == len(self.calls) else None
        if hit is not None and not hit.after:
            self._meet()
        try:
            yield
        finally:  # an error is an answer too
            if hit is not None and hit.after:
                self._meet()

    def watch_folder(self, folder: Path) -> None:
        """Count the steps in a folder that change what is there, as this process is about to take them."""

        def audit(event: str, args: tuple[Any, ...]) -> None:
            if event not in _STEPS or (event == "open" and not args[2] & os.O_CREAT):
                return
            path = str(args[_STEPS[event]])
            if path.startswith(str(folder)):
                with self.passing(Call(event, Path(path).name)):
                    pass

        sys.addaudithook(audit)

    def _meet(self) -> None:
        if self._fate is Fate.JOB_DIES:
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGSTOP if self._fate is Fate.STOPS else signal.SIGKILL)


_STEPS = {"open": 0, "os.link": 1, "os.mkdir": 0, "os.remove": 0, "os.rename": 1, "os.rmdir": 0}
"""Audit events of steps that change a folder, and which argument is the path that changes."""


class _WatchedStore(FaultyStore):
    """A store whose every call is counted."""

    def __init__(self, store: ObjectStore, watch: _Watch) -> None:
        super().__init__(store, None, Journal())
        self._watch = watch

    @property
    def capabilities(self) -> Capabilities:
        return self._through("capabilities", lambda: self._store.capabilities)

    def _through(
        self,
        operation: str,
        act: Callable[[], T],
        name: str | None = None,
        rival: Callable[[], None] | None = None,
    ) -> T:
        with self._watch.passing(Call(operation, name)):
            return act()


class _HastyStore(_WatchedStore):
    """A store over which even a good writer deletes what it overwrites too early."""

    def put(self, name: str, data: bytes, condition: Condition) -> ObjectInfo:
        if isinstance(condition, Update) and name == md.METADATA_NAME:
            before = md.load(self._store.get(name)[0], uri=self.uri)
            self.delete(sorted(md.objects_of(before)))
        return super().put(name, data, condition)


class Running:
    """A save under way."""

    def __init__(self, zygote: Connection, pids: list[int]) -> None:
        self._zygote = zygote
        self._pids = pids

    def await_stop(self, rank: int) -> None:
        """Return once the rank has stopped."""
        process, until = psutil.Process(self._pids[rank]), time.monotonic() + DEADLINE
        while process.status() != psutil.STATUS_STOPPED:
            assert process.status() != psutil.STATUS_ZOMBIE, "the rank ended before it stopped"
            assert time.monotonic() < until, "the rank did not stop"
            time.sleep(0.001)

    def wake(self, rank: int) -> None:
        os.kill(self._pids[rank], signal.SIGCONT)

    def ended(self) -> list[Ended]:
        """Return how every rank ended, once all have."""
        assert self._zygote.poll(2 * DEADLINE), "the zygote does not answer"
        ended: list[Ended] | None = self._zygote.recv()
        assert ended is not None, "a rank did not end in time; it was killed, and its stack is on stderr"
        return ended

    def kill(self) -> None:
        """Kill every rank that is left."""
        with contextlib.suppress(ProcessLookupError):  # they have ended
            os.killpg(self._pids[0], signal.SIGKILL)


class Zygote:
    """A process that has imported torch, and from which ranks are forked."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @contextlib.contextmanager
    def started(self, job: Job) -> Iterator[Running]:
        """Start a save. The block has it end, and it is killed if the block fails."""
        self._connection.send(job)
        assert self._connection.poll(_IMPORTS), "the zygote does not answer"
        running = Running(self._connection, self._connection.recv())
        try:
            yield running
        except BaseException:
            running.kill()
            with contextlib.suppress(AssertionError, EOFError):
                running.ended()
            raise

    def save(self, job: Job) -> list[Ended]:
        """Run a save to its end, whichever that is."""
        with self.started(job) as running:
            return running.ended()

    def save_well(self, job: Job) -> list[Ended]:
        """Run a save that succeeds."""
        ended = self.save(job)
        for one in ended:
            for failure in one.failures:
                raise failure
            assert one.exit_code == 0
        return ended


@contextlib.contextmanager
def new_zygote() -> Iterator[Zygote]:
    """Start a zygote, and end it with the block."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    with ours, tempfile.TemporaryDirectory(prefix="crash-") as folder:
        process = spawn.Process(target=_serve, args=(theirs, Path(folder)), name="zygote", daemon=False)
        process.start()
        theirs.close()
        try:
            yield Zygote(ours)
        finally:
            ours.close()
            process.join(DEADLINE)
            process.kill()
            process.join()


def _serve(connection: Connection, folder: Path) -> None:
    """Fork the ranks of one save after another, until the other side hangs up."""
    torch.set_num_threads(1)  # a pool of threads for tensors would be gone in a fork, and waited for
    for late in _LATE_IMPORTS:
        importlib.import_module(late)
    s3_client._loader(None).load_service_model("s3", "service-2")
    number = 0
    with contextlib.suppress(EOFError):
        while True:
            job: Job = connection.recv()
            number += 1
            some_state(job.content, job.place, None, job.tensors)  # made once, and kept for every fork
            _run(job, folder / f"meeting-{number}", connection)


def _run(job: Job, meeting: Path, connection: Connection) -> None:
    assert threading.active_count() == 1, "a fork would leave threads behind"
    fork = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = []
    reports: list[Connection] = []
    for rank in range(RANKS):
        ours, theirs = fork.Pipe(duplex=False)
        leader = processes[0].pid if processes else None
        process = fork.Process(target=_be_rank, args=(rank, leader, job, meeting, theirs), daemon=True)
        process.start()
        theirs.close()
        if leader is None and process.pid is not None:
            os.setpgid(process.pid, process.pid)  # here, for the other rank must find the group
        processes.append(process)
        reports.append(ours)
    connection.send([process.pid for process in processes])
    connection.send(_ended(processes, reports))
    meeting.unlink(missing_ok=True)


def _ended(processes: list[BaseProcess], reports: list[Connection]) -> list[Ended] | None:
    """Wait for every rank; None where one didn't end."""
    ended: list[Ended] = []
    until = time.monotonic() + DEADLINE
    for process, report in zip(processes, reports, strict=True):
        if not wait([report], max(0.0, until - time.monotonic())):
            break
        try:
            calls, failures = report.recv()
        except EOFError:
            calls, failures = (), ()
        process.join(max(0.0, until - time.monotonic()))
        if process.exitcode is None:
            break
        ended.append(Ended(process.exitcode, calls, failures))
    for process, report in zip(processes, reports, strict=True):
        process.kill()
        process.join()
        process.close()
        report.close()
    return ended if len(ended) == len(processes) else None


def _be_rank(rank: int, leader: int | None, job: Job, meeting: Path, report: Connection) -> None:
    if leader is not None:
        os.setpgid(0, leader)
    faulthandler.dump_traceback_later(0.9 * DEADLINE)
    watch = _Watch(job, rank)
    if job.inside:
        watch.watch_folder(job.place._folder)
    kind = _HastyStore if job.hasty else _WatchedStore

    def open_watched(target: Target) -> ObjectStore:
        return open_store(target) if job.inside else kind(open_store(target), watch)

    dist.init_process_group("gloo", store=dist.FileStore(str(meeting), RANKS), rank=rank, world_size=RANKS)
    failures: tuple[BaseException, ...] = ()
    with mock.patch(SEAM, open_watched):
        writer = job.place.writer(overwrite=job.overwrite, concurrency=job.concurrency)
        state = some_state(job.content, job.place, states.world_mesh(), job.tensors)
        try:
            dcp.save(state, storage_writer=writer)
        except CheckpointException as error:
            failures = tuple(failure for failure, _ in error.failures.values())
        except Exception as error:  # noqa: BLE001 - the collective's own, of which the test decides
            failures = (error,)
    report.send((tuple(watch.calls), failures))


def content_of(place: Place, tensors: int = 1) -> str | None:
    """Return which content a reader finds, having checked every bit; None where there is no checkpoint."""
    found = states.erase(some_state("", place, None, tensors))
    try:
        dcp.load(found, storage_reader=place.reader())
    except CheckpointException as error:
        if all(type(failure) is CheckpointNotFoundError for failure, _ in error.failures.values()):
            return None
        raise
    content: str = found["value"]
    states.assert_bit_exact(found, some_state(content, place, None, tensors))
    return content


def committed(place: Place) -> set[str]:
    """Return the names of all objects that the checkpoint consists of."""
    metadata = md.load(place.read(md.METADATA_NAME), uri=place.uri)
    return {md.METADATA_NAME, *md.objects_of(metadata)}
