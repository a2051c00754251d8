"""Outcomes of one rank's part in a call, on their way to the other ranks without a collective."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from cloudckpt.backends.errors import ConfigurationError, ExecutorError
from cloudckpt.executor.coordination import remote_errors
from cloudckpt.executor.coordination.call_comparison import Call, CallComparison
from cloudckpt.executor.job import Job
from cloudckpt.executor.supervisor import Supervisor

_YES = b"yes"
_LAST_WORD = 10.0
"""Seconds that a rank that was interrupted tries to tell the others."""


@contextlib.contextmanager
def joining(job: Job, supervisor: Supervisor) -> Iterator[None]:
    """Submit a job after the block, with the block's failure where it raises: the job's handle raises it.

    The other ranks come to this job and learn of the failure at once. An interruption is raised here, too.
    """
    try:
        yield
    except remote_errors.ANY as error:
        job.failure = error
    except BaseException as error:
        job.failure = remote_errors.shared(error, supervisor.rank)
        job.delivery.known()
        supervisor.submit(job)
        raise
    supervisor.submit(job)


def confer(calls: CallComparison, call: Call, ask: Callable[[], bool], rank: int, timeout: float) -> bool:
    """Ask on every rank, and return rank 0's answer, or raise what ``ask`` raised on any rank, on each.

    A yes of rank 0 and an error end it at once; a no does once all ranks have come.

    Raises:
        ConfigurationError: another rank makes another call.
        ExecutorError: a rank did not come within ``timeout`` seconds, or was interrupted.
        BaseException: what ``ask`` raised, noted with the rank.
    """
    own: BaseException | None = None
    said: bytes | None = None
    try:
        said = _YES if ask() and rank == 0 else None
    except BaseException as error:
        own = remote_errors.shared(error, rank)
        said = remote_errors.dumps(own)
        if not isinstance(error, remote_errors.ANY):
            with contextlib.suppress(ExecutorError, ConfigurationError):  # this rank raises its interruption
                calls.confer(call, said, min(_LAST_WORD, timeout))
            raise
    word = _answered(calls, call, said, rank, timeout)
    if word is None or word == _YES:
        return word is not None
    common = remote_errors.with_traceback_of(own, remote_errors.loads(word))
    raise common from common.__cause__


def meet(calls: CallComparison, call: Call, rank: int, timeout: float) -> None:
    """Wait until every rank makes this call.

    Raises:
        ConfigurationError: another rank makes another call.
        ExecutorError: a rank did not come within ``timeout`` seconds, or was interrupted.
    """
    _answered(calls, call, None, rank, timeout)


def _answered(
    calls: CallComparison, call: Call, said: bytes | None, rank: int, timeout: float
) -> bytes | None:
    try:
        return calls.confer(call, said, timeout)
    except remote_errors.ANY:
        raise
    except BaseException as error:
        with contextlib.suppress(ExecutorError):  # this rank raises its interruption
            calls.refuse(
                call, remote_errors.dumps(remote_errors.shared(error, rank)), min(_LAST_WORD, timeout)
            )
        raise
