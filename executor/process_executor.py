"""The ProcessExecutor: DCP saves in a background process, which training neither waits for nor depends on."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import util
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar, get_args

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from cloudckpt.backends.config import units
from cloudckpt.backends.errors import ConfigurationError, ExecutorError
from cloudckpt.backends.save.writer import StorageWriter as OurWriter
from cloudckpt.backends.system import background_log, descriptors
from cloudckpt.backends.system.printable import one_line
from cloudckpt.executor import forks
from cloudckpt.executor.coordination import rank_outcomes
from cloudckpt.executor.coordination.call_comparison import Call
from cloudckpt.executor.coordination.rank_group import RankGroup
from cloudckpt.executor.job import Job, Terms
from cloudckpt.executor.network.network_options import NetworkOptions, PortRange
from cloudckpt.executor.save_handle import Delivery, SaveHandle, skipped
from cloudckpt.executor.snapshot import host_memory, snapshot
from cloudckpt.executor.snapshot.arena_pool import ArenaPool
from cloudckpt.executor.supervisor import Supervisor
from cloudckpt.executor.unobserved_failures import log_pending
from cloudckpt.executor.worker import main_unpickler, process_setup
from cloudckpt.executor.worker.main_unpickler import MainScript
from cloudckpt.executor.worker.rank_conflicts import RankConflicts

_log = background_log.logger(__name__)

_LONG = 1.0
"""Seconds that a call waits for a snapshot before that is worth a warning."""

OnBusy = Literal["wait", "skip", "raise"]
T = TypeVar("T")

_BEFORE_POOLS: Final = 100
"""Exit priority above that of multiprocessing's own objects: pools, managers and queues."""


class ProcessExecutor(forks.Unpicklable):
    """Saves DCP checkpoints from a process of its own, one a rank.

    ``execute_save`` copies the state into shared memory and returns; the checkpoint process plans, writes
    and commits it with the other ranks' while training goes on. A process that dies, freezes or loses its
    network fails the save it served, with the same error on every rank; the next save starts a new one.

    Every rank makes an executor and calls it at the same steps. No call uses the training group's
    collectives; where the processes meet is agreed on through its store.

    Args:
        save_timeout: seconds that a save may take, from the moment it is its turn.
        start_timeout: seconds that the ranks wait for each other before a save, and for a process to start.
        snapshots: how many states may be held at once: 2 lets a snapshot be taken while the one before is
            saved, for as much memory again.
        on_busy: what a save does that finds no snapshot free: ``"wait"`` for one, ``"skip"`` (the handle is
            cancelled) or ``"raise"`` an ``ExecutorError``. All ranks do as rank 0 must.
        use_prefix_store: where the processes meet, as in `ProcessGroupInfo`; by default
            ``DCP_USE_PREFIX_STORE`` and, where that says nothing, the store that training has.
        interface: the interface, address or network (``"eth1"``, ``"10.0.3.7"``, ``"10.0.0.0/8"``) by which
            the processes reach each other; by default ``CLOUDCKPT_INTERFACE``, ``GLOO_SOCKET_IFNAME``, or the
            address from which each rank reaches that store.
        port_range: the first and last port on which they may listen, as ``"29600-29699"`` or a pair; by
            default ``CLOUDCKPT_PORT_RANGE``, or ports that the system chooses.

    Raises:
        ConfigurationError: an argument can't be used, or ``CLOUDCKPT_CPUS`` can't.
    """

    def __init__(
        self,
        save_timeout: float = 1800.0,
        start_timeout: float = 300.0,
        *,
        snapshots: int = 1,
        on_busy: OnBusy = "wait",
        use_prefix_store: bool | None = None,
        interface: str | None = None,
        port_range: PortRange | None = None,
    ) -> None:
        for name, seconds in (("save_timeout", save_timeout), ("start_timeout", start_timeout)):
            if not 0 < seconds < threading.TIMEOUT_MAX:
                raise ConfigurationError(f"{name} is {seconds!r}", hint="Give a positive number of seconds")
        if snapshots not in (1, 2):
            raise ConfigurationError(f"snapshots is {snapshots!r}", hint="Give 1 or 2")
        if on_busy not in get_args(OnBusy):
            raise ConfigurationError(f"on_busy is {on_busy!r}", hint="Give 'wait', 'skip' or 'raise'")
        if MainScript.loading:
            raise ExecutorError(
                "the training script was imported by its checkpoint process, for a class that it defines, "
                "and began to train",
                hint='Put what it does under if __name__ == "__main__", or the class into a module',
            )
        process_setup.check()
        descriptors.fill_standard()
        self._network = NetworkOptions.given(interface, port_range)
        self._ranks = RankGroup(start_timeout, use_prefix_store, self._network)
        self._save_timeout = save_timeout
        self._start_timeout = start_timeout
        self._on_busy = on_busy
        self._arenas = ArenaPool(snapshots)
        self._calls = 0
        self._owner = forks.Owner("this Checkpointer or ProcessExecutor")
        self._supervisor: Supervisor | None = None
        atexit.register(self.close)
        # A process of multiprocessing runs these at its end, and some of them no exit handlers.
        self._finalizer = util.Finalize(None, self.close, exitpriority=_BEFORE_POOLS)

    def execute_save(
        self,
        staging_future_or_state_dict: dict[str, Any] | Future[dict[str, Any]],
        *,
        checkpoint_id: str | os.PathLike[str] | None = None,
        storage_writer: StorageWriter | None = None,
        planner: SavePlanner | None = None,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
        use_collectives: bool = True,
    ) -> SaveHandle[Metadata]:
        """Take a snapshot of the state and save it in the background.

        Returns when the state has been copied and may change, or, when it was given as a future, as soon as
        there is room for it.
        The arguments are those of DCP's own executors. Without a writer, cloudckpt's own saves to
        ``checkpoint_id``.

        Raises:
            ConfigurationError: there is nothing to save to, or the arguments contradict an earlier call's.
            ExecutorError: the executor is closed, or busy, and is to raise then.
        """
        return self.submit(
            staging_future_or_state_dict,
            _itself,
            checkpoint_id=checkpoint_id,
            storage_writer=storage_writer,
            planner=planner,
            process_group=process_group,
            no_dist=no_dist,
            use_collectives=use_collectives,
        )

    def submit(
        self,
        state: dict[str, Any] | Future[dict[str, Any]] | Callable[[], dict[str, Any]],
        make: Callable[[Metadata], T],
        *,
        begun: Callable[[SaveHandle[T]], object] | None = None,
        subject: str | None = None,
        rank_conflicts: RankConflicts | None = None,
        checkpoint_id: str | os.PathLike[str] | None = None,
        storage_writer: StorageWriter | None = None,
        planner: SavePlanner | None = None,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
        use_collectives: bool = True,
    ) -> SaveHandle[T]:
        """Save as `execute_save` does, for a handle of what ``make`` makes of the metadata.

        ``make`` is called once, when the result is first asked for. A ``state`` that is a function is
        called when it is its turn. What it raises fails the save on every rank, as all that keeps a rank from
        taking its snapshot does. ``begun`` gets the handle before: an interruption, such as Ctrl-C, fails the
        save on the other ranks and is raised here. ``subject`` is what errors call the save, by default
        ``the save of`` its URI. Where ranks come with different subjects, the save fails on all of them.
        ``rank_conflicts`` says what becomes of values that differ between ranks under one name; None does
        not compare them.
        """
        self.check_owner(subject or "execute_save()")
        writer, uri = _writer(storage_writer, checkpoint_id)
        log_pending()
        self._calls += 1  # before what may fail on this rank alone: the others count this call
        if subject is None:
            subject = f"the save of {uri}" if uri else ""
        supervisor = self._ready(process_group, no_dist, subject or "this save")
        if self._on_busy != "wait" and self._ranks.broadcast_bool(
            Call(subject, uri, "busy"), self._arenas.busy
        ):
            if self._on_busy == "skip":
                return skipped()
            raise ExecutorError(
                "the save before is still going on and no snapshot is free",
                uri=uri,
                hint="Save less often, or give snapshots=2 or on_busy='wait'",
            )
        job = Job(
            self._ranks.consensus,
            number=self._calls,
            subject=subject,
            delivery=Delivery(make),
            uri=uri,
            checkpoint_id=None if checkpoint_id is None else os.fspath(checkpoint_id),
            no_dist=no_dist,
            use_collectives=use_collectives,
            rank_conflicts=rank_conflicts,
        )
        if begun is not None:
            begun(job.delivery.handle)
        with rank_outcomes.joining(job, supervisor):
            job.storage = _pickled(writer, planner)
            # In the order of the calls, also for a state that comes later: the one behind must not take it.
            job.arena = self._acquired(subject or "this save")
            if isinstance(state, Future):
                job.state = state
            else:
                job.taken = snapshot.take(state() if callable(state) else state, self._arenas[job.arena])
                job.delivery.staged()
        return job.delivery.handle

    def warmup(
        self,
        state_dict: dict[str, Any] | Callable[[], dict[str, Any]] | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
    ) -> None:
        """Start the process, meet the other ranks, prove the group, and touch a snapshot's memory.

        Blocks until every rank has: what is wrong with the network is learned before step 0. A state that is
        a function is called for it.

        Raises:
            ExecutorError: a rank is missing, or the processes can't reach each other.
            ExecutorDiedError: a process ended while it started.
            Exception: what a rank's state raised, or there is no memory for it: on every rank.
        """
        self.check_owner("warmup()")
        self._calls += 1
        supervisor = self._ready(process_group, no_dist, "the warm-up")
        proof = Job(
            self._ranks.consensus, number=self._calls, subject="the warm-up", delivery=Delivery(_itself)
        )
        supervisor.submit(proof)
        jobs = [proof]
        if state_dict is not None:
            # Another, for while the process starts the memory is touched, which may fail on one rank alone.
            self._calls += 1
            jobs.append(
                Job(
                    self._ranks.consensus,
                    number=self._calls,
                    subject="the warm-up of a snapshot",
                    delivery=Delivery(_itself),
                )
            )
            with rank_outcomes.joining(jobs[1], supervisor):
                timeout = self._start_timeout
                with host_memory.Comparison(self._ranks.place, self._calls, timeout) as memory:
                    layout = snapshot.layout_of(state_dict() if callable(state_dict) else state_dict)
                    memory.need = host_memory.Need.of(
                        self._arenas.missing(layout.nbytes), self._arenas.beside
                    )
                self._arenas.touch(layout)
        for job in jobs:
            job.delivery.known()  # the first error is raised, and stands for those after it
        for job in jobs:
            error = job.delivery.handle.exception()
            if error is not None:
                raise error

    def ranks(
        self,
        call: str,
        *,
        process_group: dist.ProcessGroup | None = None,
        no_dist: bool = False,
        saves: bool = False,
    ) -> RankGroup:
        """Return the ranks that this executor serves, after they have agreed where to meet.

        Every rank calls it. After `close` they are those that have met before, if any have.

        Args:
            call: made by this rank, as errors name it.
            process_group: the ranks; None for all of them.
            no_dist: this process alone is meant.
            saves: the call takes part in a save, and can't be made after ``destroy_process_group()``.

        Raises:
            ExecutorError: rank 0 did not come to ``call`` within ``start_timeout``, or this process was
                forked from the one that owns the executor.
        """
        self.check_owner(call)
        if not self._ranks.closed:
            self._ranks.gather(process_group, no_dist, call, saves=saves)
        return self._ranks

    @property
    def is_elsewhere(self) -> bool:
        """True in a process that was forked from the one that owns this executor."""
        return self._owner.is_elsewhere

    def check_owner(self, call: str) -> None:
        """Make sure that this process owns the executor, and was not forked from its owner.

        Raises:
            ExecutorError: it was forked.
        """
        self._owner.check(call)

    @property
    def pid(self) -> int | None:
        """The checkpoint process's id, while there is one."""
        return self._supervisor.pid if self._supervisor is not None else None

    @property
    def generation(self) -> int | None:
        """The number of the group of processes that serves; it changes when a new group is formed."""
        return self._supervisor.generation if self._supervisor is not None else None

    def close(self, timeout: float | None = None) -> None:
        """Wait for the saves under way, then end the process. Their handles tell how they ended.

        Each has its deadline, so that this ends too; after ``timeout`` seconds, or at Ctrl-C, what has not
        ended is given up and fails. Leaving a ``with`` block and the interpreter do this as well.
        """
        if self._ranks.closed or self.is_elsewhere:
            return
        self._ranks.close()
        log_pending()
        atexit.unregister(self.close)
        self._finalizer.cancel()
        if self._supervisor is not None and not self._supervisor.close(timeout):
            return  # what could not be ended may still hold the arenas
        self._arenas.close()
        self._ranks.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ready(self, process_group: dist.ProcessGroup | None, no_dist: bool, call: str) -> Supervisor:
        """Return the supervisor, after the ranks have agreed where to meet."""
        self._ranks.gather(process_group, no_dist, call)
        if self._supervisor is None:
            terms = Terms(
                rank=self._ranks.rank,
                grouped=self._ranks.place is not None,
                network=self._network,
                save_timeout=self._save_timeout,
                start_timeout=self._start_timeout,
            )
            self._supervisor = Supervisor(terms, self._arenas, self._ranks.failed)
        return self._supervisor

    def _acquired(self, subject: str) -> int:
        """Return an arena once one is free, and log on rank 0 where that blocked the caller for long."""
        began = time.monotonic()
        index = self._arenas.acquire()
        waited = time.monotonic() - began
        if waited >= _LONG and self._ranks.rank == 0:
            more = "" if len(self._arenas) > 1 else "snapshots=2, which takes as much memory again, or "
            _log.warning(
                "%s was blocked for %s, because the save before was still running. "
                "Give %son_busy='skip', or save less often",
                one_line(subject),
                units.seconds(waited),
                more,
            )
        return index


def _itself(metadata: Metadata) -> Metadata:
    return metadata


def _writer(
    writer: StorageWriter | None, checkpoint_id: str | os.PathLike[str] | None
) -> tuple[StorageWriter, str | None]:
    """Return the writer of a save, and a name for it."""
    if writer is None:
        if checkpoint_id is None:
            raise ConfigurationError(
                "there is nothing to save to", hint="Give storage_writer, checkpoint_id, or both"
            )
        writer = OurWriter(os.fspath(checkpoint_id))
    name = checkpoint_id if checkpoint_id is not None else getattr(writer, "checkpoint_id", None)
    return writer, None if name is None else str(name)


def _pickled(writer: StorageWriter, planner: SavePlanner | None) -> bytes:
    try:
        return main_unpickler.dumps((writer, planner))
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(
            "the storage writer or planner can't be sent to the checkpoint process: "
            f"{type(error).__name__}: {error}",
            hint="Its class must be importable there, and what it holds must pickle",
        ) from error
