"""Outcomes of one rank's part in a call, on their way to the other ranks without a collective."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from cloudckpt.backends.errors import ExecutorError
from cloudckpt.executor import failures
from cloudckpt.executor.council import Council
from cloudckpt.executor.supervisor import Job, Supervisor

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
    except failures.ANY as error:
        job.failure = error
    except BaseException as error:
        job.failure = failures.shared(error, supervisor.rank)
        job.delivery.known()
        supervisor.submit(job)
        raise
    supervisor.submit(job)


def confer(council: Council, topic: str, ask: Callable[[], bool], rank: int, timeout: float) -> bool:
    """Ask on every rank, and return rank 0's answer, or raise what ``ask`` raised on any rank, on each.

    A yes of rank 0 and an error end it at once; a no does once all ranks have come.

    Raises:
        ExecutorError: a rank did not come within ``timeout`` seconds, or was interrupted.
        BaseException: what ``ask`` raised, noted with the rank.
    """
    own: BaseException | None = None
    said: bytes | None = None
    try:
        said = _YES if ask() and rank == 0 else None
    except BaseException as error:
        own = failures.shared(error, rank)
        said = failures.dumps(own)
        if not isinstance(error, failures.ANY):
            with contextlib.suppress(ExecutorError):  # this rank raises what interrupted it
                council.confer(topic, said, min(_LAST_WORD, timeout))
            raise
    word = council.confer(topic, said, timeout)
    if word is None or word == _YES:
        return word is not None
    common = failures.with_traceback_of(own, failures.loads(word))
    raise common from common.__cause__
