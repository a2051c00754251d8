"""Consensus of the trainers of a job on a save: the group that serves it, and its outcome.

Every save is an *attempt* with a number. Ranks join it, and the last to join says which generation of the
group serves it: the one that all have alive, or a new one with the attempt's number. At the end every rank
reports; the first to write the attempt's *result* decides it for all. Both keys are written once, by
compare-and-set, so that ranks agree regardless of their own view.

Nothing here runs on the trainer's own thread, and no call can block for longer than its time: the store may
be cut off.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from cloudckpt.executor.coordination import remote_errors
from cloudckpt.executor.coordination.rendezvous import MeetingPlace, ProcessGroupInfo


@dataclass(frozen=True, slots=True)
class RankStatus:
    """The status of a rank at the start of an attempt.

    Attributes:
        call: how many saves this rank has been asked for.
        subject: what this rank comes to, such as ``the save of step 5 of s3://bucket/run``.
        generation: of the group that its checkpoint process is alive in.
        failure: the record of an error, when this rank can't take part.
        together: every rank must come to the same.
    """

    call: int
    subject: str
    generation: int | None
    failure: bytes | None = None
    together: bool = True


@dataclass(frozen=True, slots=True)
class Agreement:
    """The start of an attempt: by ``generation``, or not at all when there is a ``refusal``.

    A refusal is the record of an error. Ranks with as many calls as ``rejoin`` aren't refused. They try the
    next attempt.
    """

    generation: int
    call: int = 0
    refusal: bytes | None = None
    rejoin: int | None = None


@dataclass(frozen=True, slots=True)
class Address:
    """Host and port of the store in which a new group meets; None for the same store. Or rank 0's failure."""

    at: tuple[str, int] | None = None
    failure: bytes | None = None


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """The end of an attempt. The group goes on only after a ``sound`` one."""

    sound: bool
    failure: bytes | None = None


class SaveAttempt(ABC):
    """One attempt under way, from the agreement to the result."""

    def __init__(self, attempt: int, generation: int) -> None:
        self.attempt = attempt
        self.generation = generation

    @abstractmethod
    def watch(self, wake: Callable[[], None], timeout: float) -> None:
        """Call ``wake`` when `result` or `lost` has something to tell, for at most ``timeout`` seconds."""

    @property
    @abstractmethod
    def result(self) -> AttemptResult | None:
        """The result, once there is one."""

    @property
    @abstractmethod
    def lost(self) -> str | None:
        """The reason why no result will arrive here."""

    @abstractmethod
    def report(self, failure: bytes | None, *, sound: bool) -> None:
        """Say how it ended on this rank. An unsound failure decides the attempt on its own."""


class Consensus(ABC):
    """The ranks of one executor."""

    @abstractmethod
    def convene(self, status: RankStatus, timeout: float) -> SaveAttempt:
        """Join the next attempt and wait for the others, for at most ``timeout`` seconds.

        Raises:
            ExecutorError: the store can't be reached, or ranks are missing.
            Exception: what keeps a rank from taking part, on every rank.
        """

    @abstractmethod
    def group(self, generation: int, timeout: float) -> tuple[ProcessGroupInfo, MeetingPlace | None]:
        """Read the environment of a new group of processes, and agree where it meets. Every rank calls it.

        Args:
            generation: of the group.
            timeout: seconds for the other ranks.

        Returns:
            The information for this rank's process, and the place; None for a process that saves alone.

        Raises:
            ConfigurationError: rank 0's environment names no store; on every rank.
            ExecutorError: rank 0 did not decide in time.
        """

    @abstractmethod
    def leave(self, timeout: float) -> None:
        """Wait until the others have read the last result: the store may end with this process."""


class SoloConsensus(Consensus):
    """A single process, which agrees with itself."""

    def __init__(self) -> None:
        self._attempt = 0

    def convene(self, status: RankStatus, timeout: float) -> SaveAttempt:  # noqa: ARG002 - the interface
        self._attempt += 1
        if status.failure is not None:
            raise remote_errors.loads(status.failure)
        return _SoloAttempt(self._attempt, status.generation or self._attempt)

    def group(
        self,
        generation: int,  # noqa: ARG002 - the interface
        timeout: float,  # noqa: ARG002
    ) -> tuple[ProcessGroupInfo, MeetingPlace | None]:
        return ProcessGroupInfo.of(0, 1, "", 0), None

    def leave(self, timeout: float) -> None:
        """There are no other ranks."""


class _SoloAttempt(SaveAttempt):
    _result: AttemptResult | None = None

    def watch(self, wake: Callable[[], None], timeout: float) -> None:
        """Take this process's own report as the result."""

    @property
    def result(self) -> AttemptResult | None:
        return self._result

    @property
    def lost(self) -> str | None:
        return None

    def report(self, failure: bytes | None, *, sound: bool) -> None:
        self._result = AttemptResult(sound, failure)
