"""One save as it was asked for, and what holds for all saves of an executor."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from cloudckpt.executor.coordination.consensus import Consensus
from cloudckpt.executor.network.network_options import NetworkOptions
from cloudckpt.executor.save_handle import Delivery
from cloudckpt.executor.snapshot import snapshot
from cloudckpt.executor.worker.rank_conflicts import RankConflicts


@dataclass(slots=True)
class Job:
    """One save as it was asked for, or the proof that saves will work when there is nothing to ``storage``.

    The state is in ``taken`` already, or comes with a future. A ``failure`` here keeps all ranks from saving.
    ``consensus`` is that of the ranks at the call.
    """

    consensus: Consensus
    number: int
    subject: str
    delivery: Delivery
    uri: str | None = None
    storage: bytes | None = None
    checkpoint_id: str | None = None
    no_dist: bool = False
    use_collectives: bool = True
    rank_conflicts: RankConflicts | None = None
    state: Future[dict[str, Any]] | None = None
    arena: int | None = None
    taken: snapshot.Snapshot | None = None
    failure: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """Settings of every process that the supervisor starts. Times are in seconds."""

    rank: int
    grouped: bool
    network: NetworkOptions
    save_timeout: float
    start_timeout: float
