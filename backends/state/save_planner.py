"""The planner of a described state: DCP's own, with records of what DCP's names lose."""

from __future__ import annotations

import collections
import io
from collections.abc import Iterable, Sequence
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from cloudckpt.backends.state import placements, values
from cloudckpt.backends.state.flatten import Flat
from cloudckpt.backends.state.proof_cache import ProofCache
from cloudckpt.backends.state.records import Path, Records


class PlannerData(dict[str, Path]):
    """The paths that DCP sends to the coordinator with a plan, and the records beside them."""

    records: Records


class CheckpointSavePlanner(DefaultSavePlanner):
    """Plans what `flatten` made of a described state.

    Args:
        flat: the state of this rank.
        proofs: of values that are known to load, which it adds to.
        trust: the state may hold what loads with ``trust=True`` alone.
        allowed: classes that the trainer lets torch load beyond its own.
        enable_plan_caching: as in DCP.
        dedup_save_to_lowest_rank: as in DCP.
    """

    def __init__(
        self,
        flat: Flat,
        proofs: ProofCache,
        *,
        trust: bool = False,
        allowed: Sequence[Any] = (),
        enable_plan_caching: bool = False,
        dedup_save_to_lowest_rank: bool = False,
    ) -> None:
        super().__init__(
            enable_plan_caching=enable_plan_caching, dedup_save_to_lowest_rank=dedup_save_to_lowest_rank
        )
        self._flat = flat
        self._proofs = proofs
        self._trust = trust
        self._allowed = allowed

    def set_up_planner(
        self,
        state_dict: dict[str, Any],  # noqa: ARG002 - what it was flattened of
        storage_meta: StorageMeta | None = None,  # noqa: ARG002 - DCP's interface
        is_coordinator: bool = False,
    ) -> None:
        """Take this rank's part of the flattened state."""
        flat = self._flat
        leaves = {name: leaf for name, leaf in flat.leaves.items() if name not in flat.foreign}
        self.state_dict = placements.unnested(leaves)
        data = PlannerData(flat.paths)
        data.records = Records(flat.containers, flat.placements, flat.own)
        self.mappings = data
        self.is_coordinator = is_coordinator

    def _create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super()._create_global_plan(all_plans)
        merged([plan.planner_data.records for plan in all_plans]).attach(metadata)
        return plans, metadata

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002 - DCP's name
        """Serialize a value, and prove that it loads."""
        if write_item.type != WriteItemType.BYTE_IO:
            return super().transform_object(write_item, object)
        data: io.BytesIO = values.dumps(object)
        if not self._trust:
            self._proofs.prove(data.getbuffer(), write_item.index.fqn, self._allowed)
        return data


def merged(records: Iterable[Records]) -> Records:
    """Return the records of all ranks as one."""
    whole = Records()
    own: collections.defaultdict[str, list[list[str]]] = collections.defaultdict(list)
    for one in records:
        whole.containers.update(one.containers)
        whole.placements.update(one.placements)
        for name, names in one.own.items():
            own[name].append(names)
    for name, lists in own.items():
        if any(names != lists[0] for names in lists):
            whole.own[name] = [*dict.fromkeys(one for names in lists for one in names)]
    return whole
