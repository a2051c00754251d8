"""Messages between the trainer and its checkpoint process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cloudckpt.executor.coordination.rendezvous import MeetingPlace, ProcessGroupInfo
from cloudckpt.executor.network.network_options import NetworkOptions
from cloudckpt.executor.snapshot.snapshot import Snapshot
from cloudckpt.executor.worker.rank_conflicts import RankConflicts


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message: who the process is, and where it meets the others.

    ``info`` was read when the process was started. Without a place the process saves alone. ``deadline`` is
    that of the start, by `time.monotonic`, which all processes of a host share. ``group_timeout`` is in
    seconds.
    """

    info: ProcessGroupInfo
    generation: int
    parent_pid: int
    log_level: int
    main_script: dict[str, Any]
    place: MeetingPlace | None
    network: NetworkOptions
    deadline: float
    group_timeout: float


@dataclass(frozen=True, slots=True)
class Ready:
    """The process has met the others and serves, or tells the pickled error that keeps it from that.

    ``network`` describes its network, ``warning`` what is wrong with it.
    """

    generation: int
    failure: bytes | None = None
    network: str | None = None
    warning: str | None = None


@dataclass(frozen=True, slots=True)
class ArenaNews:
    """An arena as it is now; when ``described``, its descriptor comes right behind the message."""

    index: int
    nbytes: int
    described: bool


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """One save. ``storage`` is the pickled pair of writer and planner.

    ``rank_conflicts`` says what becomes of values that differ between ranks; None compares none.
    """

    number: int
    arena: ArenaNews
    snapshot: Snapshot
    storage: bytes
    checkpoint_id: str | None
    no_dist: bool
    use_collectives: bool
    rank_conflicts: RankConflicts | None = None


@dataclass(frozen=True, slots=True)
class ProofRequest:
    """Show that the group works: a barrier, and nothing saved."""

    number: int


@dataclass(frozen=True, slots=True)
class Sealed:
    """The result of a save: a pickled ``Metadata``, and the bytes of the checkpoint where that has them."""

    metadata: bytes
    size: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request.

    ``failure`` is a pickled exception. A failure is ``sound`` when every rank has met it in the same place,
    so that the group can go on.
    """

    number: int
    result: Sealed | None = None
    failure: bytes | None = None
    sound: bool = True
