"""The checkpoint process's own program: meet the others, then save what is asked for, one after another."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any, cast

import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from cloudckpt.backends.errors import CheckpointError, ConfigurationError, ExecutorError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.save.writer import StorageWriter as OurWriter
from cloudckpt.backends.stores.base import ObjectStore
from cloudckpt.backends.system import background_log, descriptors, system_limits
from cloudckpt.backends.system.printable import one_line
from cloudckpt.executor.coordination import collectives, remote_errors, wire_format
from cloudckpt.executor.messages import Answer, ArenaNews, Hello, ProofRequest, Ready, SaveRequest, Sealed
from cloudckpt.executor.network.formation import Formation, Network
from cloudckpt.executor.progress import MAY_BE_COMMITTED, ProgressBoard
from cloudckpt.executor.snapshot import snapshot
from cloudckpt.executor.snapshot.arena import Arena
from cloudckpt.executor.worker import main_unpickler, process_setup
from cloudckpt.executor.worker.instrument import watched
from cloudckpt.executor.worker.plan_cache import PlanCache, Prepared
from cloudckpt.executor.worker.rank_conflicts import RankCheck, Summary

_log = background_log.logger(__name__)

_BEAT = 1.0
"""Seconds between signs of life."""

_LAST_WORDS = 0.5
"""Seconds for messages to be written at the end."""

_MARGIN = 2.0
"""Seconds before the trainer's deadline at which forming a group ends, to say what failed."""

_NO_FRAMES = traceback.StackSummary()
"""Frames of an error of another process."""


def main(connection_fd: int, board_fd: int) -> None:
    """Serve the trainer at the other end of the connection until it is gone, or has had enough."""
    descriptors.fill_standard()
    connection = Connection(connection_fd)
    hello: Hello = main_unpickler.loads(connection.recv_bytes())
    main_unpickler.MainScript.expect(hello.main_script)
    board = ProgressBoard.attach(board_fd)
    worker = Worker(hello, connection, board)
    try:
        _begin("cloudckpt-end", _end_when_told, worker, hello.parent_pid)
        process_setup.settle(hello.info.global_rank, hello.generation, hello.parent_pid, hello.log_level)
        network = _meet(hello)
        _begin("cloudckpt-beat", _beat, board, hello.parent_pid)
    except Exception as error:  # noqa: BLE001 - the trainer raises it
        connection.send(
            Ready(hello.generation, remote_errors.dumps(remote_errors.noted(_start_error(error, hello))))
        )
        return
    if hello.info.disable_automatic_gc:
        gc.disable()
    ready = Ready(hello.generation)
    if network is not None:
        ready = Ready(hello.generation, network=str(network), warning=network.warning)
    connection.send(ready)
    worker.serve()
    # No farewell to the group: a rank that has to be waited for may be gone.
    background_log.flush()
    os._exit(0)


def _begin(name: str, run: Callable[..., None], *arguments: object) -> None:
    system_limits.start(threading.Thread(target=run, args=arguments, name=name, daemon=True))


def _start_error(error: Exception, hello: Hello) -> Exception:
    if isinstance(error, (ExecutorError, ConfigurationError)):
        return error
    return ExecutorError(
        f"the checkpoint process of rank {hello.info.global_rank} could not meet the others: "
        f"{type(error).__name__}: {error}",
        rank=hello.info.global_rank,
        hint="Look whether every host can reach every other; interface= or CLOUDCKPT_INTERFACE names the "
        "interface or address",
    )


def _meet(hello: Hello) -> Network | None:
    """Form the group of this generation, and prove it; None for a process that saves alone."""
    if hello.place is None:
        return None
    network = Formation(
        hello.place,
        name=f"group/{hello.generation}",
        options=hello.network,
        deadline=hello.deadline - _MARGIN,
        collective_timeout=hello.group_timeout,
    ).form()
    dist.barrier()
    return network


def _beat(board: ProgressBoard, parent_pid: int) -> None:
    pause = threading.Event()
    while not pause.wait(_BEAT):
        board.beat()
        if os.getppid() != parent_pid:
            os._exit(1)  # no trainer is left for this save


def _end_when_told(worker: Worker, trainer: int) -> None:
    """On the trainer's SIGTERM, which every thread has blocked, abort open uploads and exit.

    A SIGTERM of another process is meant for the job, which may have a last step to save. macOS does not
    tell the sender: there every SIGTERM is taken for the trainer's.
    """
    if hasattr(signal, "sigwaitinfo"):
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
            _log.debug("ignored a SIGTERM that the trainer did not send")
    else:
        signal.sigwait({signal.SIGTERM})
    worker.give_up()
    background_log.flush(_LAST_WORDS)
    os._exit(128 + signal.SIGTERM)


def _sealed(metadata: Metadata) -> Sealed:
    size = sum(md.sizes_of(metadata).values())  # 0 where another writer notes none
    return Sealed(pickle.dumps(metadata, pickle.HIGHEST_PROTOCOL), size or None)


@dataclass(frozen=True, slots=True)
class _Report:
    """One rank's message to the others before a save: an error, or what it is about to save."""

    failure: bytes | None
    fingerprint: str = ""
    """Of the structure, in hexadecimal digits."""
    summary: Summary | None = None


@dataclass(frozen=True, slots=True)
class _Prepared:
    state: dict[str, Any]
    writer: StorageWriter
    planner: SavePlanner | None
    plan: Prepared
    common: dict[str, Any]
    """Values by name that are compared with the other ranks', if any are."""
    summary: Summary | None

    def report(self) -> _Report:
        return _Report(None, self.plan.fingerprint.hex(), self.summary)


class Worker:
    """Serves one trainer."""

    def __init__(self, hello: Hello, connection: Connection, board: ProgressBoard) -> None:
        self._hello = hello
        self._connection = connection
        self._board = board
        self._arenas: dict[int, Arena] = {}
        self._plans = PlanCache()
        self._check: RankCheck | None = None
        self._writer: StorageWriter | None = None
        self._held: ObjectStore | None = None
        """Keeps the connections of the last save open for the next one."""
        self._giving_up = threading.Lock()

    def serve(self) -> None:
        """Answer requests in order until the trainer is gone."""
        while True:
            try:
                request = pickle.loads(self._connection.recv_bytes())  # noqa: S301 - from our trainer
                answer = self._save(request) if isinstance(request, SaveRequest) else self._prove(request)
                self._connection.send(answer)
            except (EOFError, OSError):
                return
            del request, answer
            if not self._hello.info.disable_manual_gc:
                gc.collect()
                if not gc.get_freeze_count():  # modules and what they hold, which no later save has to walk
                    gc.freeze()

    def give_up(self) -> None:
        """Take back what a save under way has left pending: DCP does not always tell a writer."""
        with self._giving_up:  # the thread that ends the process may come to it at the same moment
            writer, self._writer = self._writer, None
            if isinstance(writer, OurWriter):
                try:
                    writer.abort()
                except Exception as error:  # noqa: BLE001 - the save has its error already
                    what = "uploads of a failed save could not be aborted, and stay pending: %s"
                    _log.warning(what, one_line(error))

    def _prove(self, request: ProofRequest) -> Answer:
        try:
            if self._grouped:
                dist.barrier()
        except RuntimeError as error:
            return Answer(request.number, failure=remote_errors.dumps(self._lost(error)), sound=False)
        return Answer(request.number)

    def _save(self, request: SaveRequest) -> Answer:
        self._board.begin(request.number, request.snapshot.tensor_bytes)
        try:
            prepared = self._prepared(request)
            fingerprints = self._together(prepared, request)
            metadata = self._saved(request, cast("_Prepared", prepared), fingerprints)
            return Answer(request.number, result=_sealed(metadata))
        except remote_errors.ANY as error:  # the trainer raises it
            self._plans.forget()
            if self._check is not None:
                self._check.forget()
            self.give_up()
            _log.debug("the save failed in the checkpoint process", exc_info=error)
            alike = isinstance(error, CheckpointException) or not self._grouped
            lost = not alike and request.use_collectives and not isinstance(error, CheckpointError)
            shown = self._lost(error) if lost else remote_errors.original(error, self._hello.info.global_rank)
            return Answer(request.number, failure=remote_errors.dumps(shown), sound=alike)
        finally:
            self._writer = None

    def _saved(self, request: SaveRequest, prepared: _Prepared, fingerprints: list[bytes]) -> Metadata:
        self._writer = prepared.writer
        if isinstance(prepared.writer, OurWriter):
            with contextlib.suppress(Exception):  # the save itself says what is wrong
                self._held = prepared.writer.held()
        planner = prepared.planner or self._plans.planner_for(
            prepared.writer,
            fingerprints,
            prepared.plan,
            to_lowest_rank=self._check is not None and bool(self._check.lowest),
        )
        watched(prepared.writer, planner, self._board)
        with warnings.catch_warnings():
            # A single process is meant when there is one.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            metadata: Metadata = dcp.save(
                prepared.state,
                checkpoint_id=request.checkpoint_id,
                storage_writer=prepared.writer,
                planner=planner,
                no_dist=request.no_dist or not self._grouped,
                use_collectives=request.use_collectives,
            )
            return metadata

    def _prepared(self, request: SaveRequest) -> _Prepared | Exception:
        """Return the state and the way to save it, or the error of reading it here."""
        try:
            arena = self._arena(request.arena)
            writer, planner = main_unpickler.loads(request.storage)
            state = snapshot.restore(request.snapshot, arena)
            plan = Prepared(b"") if planner is not None else Prepared.of(state)
            common, summary = self._summarized(request, plan)
            return _Prepared(state, writer, planner, plan, common, summary)
        except Exception as error:  # noqa: BLE001 - every rank is notified before any begins to save
            return error

    def _summarized(self, request: SaveRequest, plan: Prepared) -> tuple[dict[str, Any], Summary | None]:
        """Summarize this rank's part of a save, where it is compared with the others'."""
        policy = request.rank_conflicts
        if not self._grouped or policy is None or plan.flat is None or not request.use_collectives:
            return {}, None
        if self._check is None:
            self._check = RankCheck(dist.get_rank(), dist.get_world_size())
        common = plan.flat.common()
        return common, self._check.summary(common, policy)

    def _together(self, prepared: _Prepared | Exception, request: SaveRequest) -> list[bytes]:
        """Go on only when every rank can: one that stayed away would leave the others in a collective."""
        if not self._grouped:
            if isinstance(prepared, Exception):
                raise prepared
            return [prepared.plan.fingerprint.hex().encode()]
        own = _Report(remote_errors.dumps(prepared)) if isinstance(prepared, Exception) else prepared.report()
        gathered = collectives.all_gather(wire_format.packed(own))
        reports = [wire_format.sent(data, _Report, rank) for rank, data in enumerate(gathered)]
        problems = {
            rank: (remote_errors.loads(report.failure), _NO_FRAMES)
            for rank, report in enumerate(reports)
            if report.failure is not None
        }
        if isinstance(prepared, Exception):
            problems[dist.get_rank()] = prepared, traceback.extract_tb(prepared.__traceback__)
        summaries = [report.summary for report in reports if report.summary is not None]
        if not problems and 0 < len(summaries) < len(reports):
            without = next(rank for rank, report in enumerate(reports) if report.summary is None)
            problems[without] = _unlike(without), _NO_FRAMES
        if problems:
            raise CheckpointException("prepare", problems)
        self._compare(prepared, summaries, request)
        return [report.fingerprint.encode() for report in reports]

    def _compare(
        self, prepared: _Prepared | Exception, summaries: list[Summary], request: SaveRequest
    ) -> None:
        """Find what ranks have different values of under one name."""
        if self._check is None or request.rank_conflicts is None or not isinstance(prepared, _Prepared):
            return
        if summaries:
            self._check.settle(summaries, prepared.common, request.rank_conflicts)

    def _lost(self, error: BaseException) -> BaseException:
        """Return the error of a collective that failed, which names sockets instead of a rank."""
        return ExecutorError(
            f"the checkpoint process of rank {self._hello.info.global_rank} lost touch with another rank's: "
            f"{type(error).__name__}: {error}",
            rank=self._hello.info.global_rank,
            hint=f"Look at the other ranks' errors; the next save starts new processes{MAY_BE_COMMITTED}",
        )

    def _arena(self, news: ArenaNews) -> Arena:
        if news.described:
            if news.index in self._arenas:
                self._arenas.pop(news.index).close()
            self._arenas[news.index] = Arena.attach(reduction.recv_handle(self._connection), news.nbytes)
        if news.index not in self._arenas:
            raise ExecutorError(f"arena {news.index} was never described", rank=self._hello.info.global_rank)
        arena = self._arenas[news.index]
        arena.follow(news.nbytes)
        return arena

    @property
    def _grouped(self) -> bool:
        return self._hello.place is not None


def _unlike(rank: int) -> ConfigurationError:
    return ConfigurationError(
        f"rank {rank} has nothing to compare with what other ranks are about to save",
        rank=rank,
        hint="Give every rank the same planner and the same rank_conflicts",
    )
