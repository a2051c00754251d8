"""The supervisor: a thread of the trainer that serves saves in order, and outlives its checkpoint process."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from cloudckpt.backends.errors import CheckpointError, ExecutorError
from cloudckpt.backends.system import background_log, system_limits
from cloudckpt.backends.system.printable import one_line
from cloudckpt.executor.coordination import remote_errors
from cloudckpt.executor.coordination.consensus import AttemptResult, Consensus, RankStatus, SaveAttempt
from cloudckpt.executor.job import Job, Terms
from cloudckpt.executor.messages import Answer, Hello, ProofRequest, Ready, SaveRequest, Sealed
from cloudckpt.executor.process_monitor import Alarm, Decided, ProcessMonitor
from cloudckpt.executor.progress import MAY_BE_COMMITTED, Progress, ProgressBoard
from cloudckpt.executor.snapshot import snapshot
from cloudckpt.executor.snapshot.arena_pool import ArenaPool
from cloudckpt.executor.snapshot.memory_limits import PROCESS_BYTES
from cloudckpt.executor.worker.main_unpickler import MainScript
from cloudckpt.executor.worker_process import CheckpointProcess

_log = background_log.logger(__name__)

_GRACE = 5.0
"""Seconds left for the other ranks' word, and for a process to end by itself."""


class Supervisor:
    """Serves jobs one after another with a checkpoint process, and starts a new one when that is gone.

    Args:
        terms: what holds for every process.
        arenas: where the snapshots are.
        unmet: gets the error of each job that failed: the ranks may not have met.
    """

    def __init__(self, terms: Terms, arenas: ArenaPool, unmet: Callable[[BaseException], object]) -> None:
        self._terms = terms
        self._arenas = arenas
        self._unmet = unmet
        self._consensus: Consensus | None = None
        """The consensus of the last job. A checkpoint process belongs to one consensus."""
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._pending: list[Job] = []
        self._process: CheckpointProcess | None = None
        self._monitor: ProcessMonitor | None = None
        self._abandoned = False
        self._unkillable = False
        self._thread: threading.Thread | None = None
        with contextlib.suppress(ExecutorError):  # a job tries again, and notifies every rank
            self._equip()

    def _equip(self) -> None:
        """Have what serving takes: a board, an alarm and a thread.

        Raises:
            ExecutorError: the system lets this process have no more descriptors or threads.
        """
        if self._thread is not None:
            return
        with contextlib.ExitStack() as undo:
            with system_limits.explained("prepare to save in the background"):
                self._board = ProgressBoard()
                undo.callback(self._board.close)
                self._alarm = Alarm()
                undo.callback(self._alarm.close)
            # A daemon, or the interpreter could not end before an exit handler has called close().
            thread = threading.Thread(target=self._run, name="cloudckpt-supervisor", daemon=True)
            system_limits.start(thread)
            self._thread = thread
            undo.pop_all()

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self._terms.rank

    @property
    def pid(self) -> int | None:
        """The checkpoint process's id, while one serves."""
        process = self._process
        return process.pid if process is not None else None

    @property
    def generation(self) -> int | None:
        """The generation of the group that its process is in."""
        process = self._process
        return process.generation if process is not None else None

    def submit(self, job: Job) -> None:
        """Serve a job after those before it."""
        self._pending.append(job)
        job.delivery.follow(lambda: self._progress(job.number))
        try:
            self._equip()
        except ExecutorError as error:
            job.failure = job.failure or error
            self._serve(job)  # here, where it can only fail: the other ranks are not left waiting
        else:
            self._jobs.put(job)

    def close(self, timeout: float | None) -> bool:
        """Serve what was submitted, end the process, and tell whether all that ended in time.

        What has not ended after ``timeout`` seconds, or by a Ctrl-C, is given up.
        """
        thread = self._thread
        if thread is None:
            return True
        self._jobs.put(None)
        try:
            thread.join(timeout)
        finally:
            if thread.is_alive():
                self._abandon(thread)
        background_log.flush()
        return not self._abandoned

    def _abandon(self, thread: threading.Thread) -> None:
        self._abandoned = True
        monitor, process = self._monitor, self._process
        if monitor is not None:
            monitor.abandoned = True
        self._alarm.ring()
        thread.join(_GRACE)
        if thread.is_alive() and process is not None:
            process.end(0)  # the thread waits for a store that is cut off: nothing else can be left behind
        error = ExecutorError("the executor was closed before the save ended", rank=self._terms.rank)
        for job in list(self._pending):
            job.delivery.failed(error, Progress(0, 0, "failed"))

    def _run(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                try:
                    self._serve(job)
                except remote_errors.ANY as error:  # a bug of ours must not leave the others waiting
                    self._end_process()
                    self._finish(job, None, error)
                    _log.exception("the supervisor failed")
                del job  # an unreferenced handle is collected now, not at the next save
            if self._consensus is not None:
                self._consensus.leave(_GRACE)
        finally:
            self._end_process()
            self._alarm.close()
            self._board.close()

    def _serve(self, job: Job) -> None:
        if self._abandoned:
            self._finish(job, None, ExecutorError("the executor was closed before the save began"))
            return
        self._stage(job)
        if job.consensus is not self._consensus:  # the ranks meet elsewhere now, and number their groups anew
            self._end_process()
            self._consensus = job.consensus
        if job.failure is not None and self._terms.grouped:
            job.failure = remote_errors.shared(job.failure, self._terms.rank)
        status = RankStatus(
            call=job.number,
            subject=job.subject,
            generation=self._living_generation(),
            failure=remote_errors.dumps(job.failure) if job.failure is not None else None,
            together=job.use_collectives,
        )
        try:
            attempt = job.consensus.convene(status, self._terms.start_timeout)
        except remote_errors.ANY as error:  # what kept a rank from saving is raised by the handle
            common = (
                job.failure
                if not self._terms.grouped and job.failure is not None
                else remote_errors.with_traceback_of(job.failure, error)
            )
            self._finish(job, None, common)
            return
        try:
            attempt.watch(self._alarm.ring, self._terms.start_timeout + self._terms.save_timeout + 4 * _GRACE)
        except ExecutorError as error:  # no thread for it
            attempt.report(remote_errors.dumps(error), sound=False)
            self._end_process()
            self._finish(job, None, error)
            return
        sealed, failure = self._attempt(job, attempt)
        self._finish(job, sealed, failure)

    def _stage(self, job: Job) -> None:
        """Take the snapshot of a state that came as a future."""
        if job.state is None or job.arena is None or job.failure is not None:
            return
        try:
            state = job.state.result(self._terms.save_timeout)
            job.taken = snapshot.take(state, self._arenas[job.arena])
            job.delivery.staged()
        except remote_errors.ANY as error:  # staging is the caller's code; every rank is notified
            job.failure = error
        finally:
            job.state = None

    def _attempt(self, job: Job, attempt: SaveAttempt) -> tuple[Sealed | None, BaseException | None]:
        """Have the job done, and see what all ranks make of it: a result, or what failed."""
        answer: Answer | None = None
        own: bytes | None = None
        deadline = time.monotonic() + self._terms.start_timeout
        try:
            process = self._ensure(attempt, job)
            deadline = time.monotonic() + self._terms.save_timeout
            answer = self._ask(process, job, attempt)
            own = answer.failure
        except Decided:
            pass
        except remote_errors.ANY as error:  # sent to every rank, raised by the handle
            own = remote_errors.dumps(error)
            attempt.report(own, sound=False)
        if answer is not None:
            if not answer.sound:
                # The process met a broken group: the rank that broke it has a better error than this one.
                self._result(attempt, time.monotonic() + _GRACE)
            attempt.report(own, sound=answer.sound)
        result = self._result(attempt, max(deadline, time.monotonic()) + _GRACE)
        return self._judge(answer, own, result, attempt)

    def _judge(
        self, answer: Answer | None, own: bytes | None, result: AttemptResult | None, attempt: SaveAttempt
    ) -> tuple[Sealed | None, BaseException | None]:
        if result is None or not result.sound or answer is None:
            self._end_process()
        failure = result.failure if result is not None and result.failure is not None else own
        if failure is not None:
            return None, remote_errors.own_or_common(own, failure)
        if answer is None:
            return None, ExecutorError(
                f"the outcome of the save is unknown: {attempt.lost or 'no rank has reported it'}",
                rank=self._terms.rank,
                hint=f"The next save starts a new process{MAY_BE_COMMITTED}",
            )
        # Without a result too: DCP answers well on one rank only after the commit that is everybody's.
        return answer.result, None

    def _result(self, attempt: SaveAttempt, deadline: float) -> AttemptResult | None:
        while attempt.result is None and attempt.lost is None and not self._abandoned:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            self._alarm.wait(remaining)
            self._alarm.hush()
        return attempt.result

    def _ensure(self, attempt: SaveAttempt, job: Job) -> CheckpointProcess:
        """Return the process of the generation agreed on, started when need be."""
        process = self._process
        if process is not None and (process.generation != attempt.generation or not process.alive):
            self._end_process()
            process = None
        if process is not None:
            return process
        terms = self._terms
        info, place = job.consensus.group(attempt.generation, terms.start_timeout)
        hello = Hello(
            info=info,
            generation=attempt.generation,
            parent_pid=os.getpid(),
            log_level=_log.getEffectiveLevel(),
            main_script=MainScript.describe(),
            place=place,
            network=terms.network,
            deadline=time.monotonic() + terms.start_timeout,
            group_timeout=terms.start_timeout + terms.save_timeout + 60,
        )
        process = self._process = CheckpointProcess(hello, self._board)
        ready = self._watch(process, attempt, job).expect(Ready, terms.start_timeout)
        if ready.failure is not None:
            raise remote_errors.loads(ready.failure)
        if ready.network is not None:
            _log.info("%s", ready.network)  # each rank has an address of its own
        if ready.warning is not None and terms.rank == 0:  # the same on every rank
            _log.warning("%s", ready.warning)
        process.serves = True
        self._arenas.beside = 0  # what it takes, it has taken
        return process

    def _watch(self, process: CheckpointProcess, attempt: SaveAttempt, job: Job) -> ProcessMonitor:
        self._monitor = ProcessMonitor(
            process, attempt, self._board, self._alarm, rank=self._terms.rank, save=job.number, uri=job.uri
        )
        self._monitor.abandoned = self._abandoned
        return self._monitor

    def _ask(self, process: CheckpointProcess, job: Job, attempt: SaveAttempt) -> Answer:
        monitor = self._watch(process, attempt, job)
        try:
            if job.taken is None or job.arena is None or job.storage is None:
                process.send(ProofRequest(job.number))
            else:
                arena = self._arenas[job.arena]
                process.send_save(
                    SaveRequest(
                        number=job.number,
                        arena=process.news_of(job.arena, arena),
                        snapshot=job.taken,
                        storage=job.storage,
                        checkpoint_id=job.checkpoint_id,
                        no_dist=job.no_dist,
                        use_collectives=job.use_collectives,
                        rank_conflicts=job.rank_conflicts,
                    ),
                    arena,
                )
        except OSError as error:
            if not process.alive:
                raise monitor.died() from error
            # It does not read what is sent to it: it is frozen, which the monitor will find.
        while True:
            answer = monitor.expect(Answer, self._terms.save_timeout)
            if answer.number == job.number:
                return answer

    def _finish(self, job: Job, sealed: Sealed | None, failure: BaseException | None) -> None:
        """Give the arena back, then tell."""
        last = self._progress(job.number)
        self._monitor = None
        if job.arena is not None:
            give_back = self._arenas.replace if self._unkillable else self._arenas.release
            give_back(job.arena)
            self._unkillable = False
        self._pending.remove(job)
        if failure is None:
            job.delivery.done(sealed, replace(last, bytes_done=last.bytes_total, phase="done"))
            return
        self._unmet(failure)
        if isinstance(failure, CheckpointError):
            failure.located(uri=job.uri)
        job.delivery.failed(failure, replace(last, phase="failed"), self._unobserved(job, failure))

    def _unobserved(self, job: Job, failure: BaseException) -> str | None:
        """Return what rank 0 logs where the failure is never observed; the error is raised otherwise."""
        if self._terms.rank != 0:
            return None
        return f"{job.subject or 'a save'} failed: {type(failure).__name__}: {one_line(failure)}"

    def _progress(self, number: int) -> Progress:
        if self._thread is None:
            return Progress(0, 0, "waiting")
        reading = self._board.read()
        return reading.progress if reading.save == number else Progress(0, 0, "waiting")

    def _living_generation(self) -> int | None:
        process = self._process
        return process.generation if process is not None and process.alive else None

    def _end_process(self) -> None:
        process, self._process = self._process, None
        self._arenas.beside = PROCESS_BYTES
        if process is not None and not process.end(_GRACE):
            self._unkillable = True
            _log.error(
                "the checkpoint process %d can't be killed; its snapshot's memory is left to it", process.pid
            )
