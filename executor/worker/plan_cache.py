"""Save plans that are kept while the structure of the state stands.

DCP's planner can keep its plans, and then neither sends nor makes them again. It finds out whether they
still hold by comparing names, sizes and offsets, which overlooks a changed dtype, and it goes wrong when
ranks disagree on what is kept. So the kept plans go by a fingerprint of the structure on all ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter
from torch.distributed.tensor import DTensor

from cloudckpt.backends.save.writer import StorageWriter as OurWriter
from cloudckpt.backends.state import placements
from cloudckpt.backends.state.flatten import Flat, flatten
from cloudckpt.backends.state.markers import CheckpointState
from cloudckpt.backends.state.proof_cache import ProofCache
from cloudckpt.backends.state.save_planner import CheckpointSavePlanner
from cloudckpt.backends.torch_private import (
    ShardedTensor,
    flatten_state_dict,
    local_tensor,
    plan_caches,
    set_plan_cache_key,
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A state as it is planned: flattened, if it was described, and with a fingerprint."""

    fingerprint: bytes
    flat: Flat | None = None
    trust: bool = False
    allowed: tuple[Any, ...] = ()

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        """Prepare a state.

        Raises:
            ConfigurationError: it can't be flattened.
        """
        if not isinstance(state, CheckpointState):
            leaves, paths = flatten_state_dict(state)
            return cls(fingerprint(leaves, paths))
        flat = flatten(state)
        return cls(fingerprint(flat.leaves, flat.paths, flat.structure()), flat, state.trust, state.allowed)


def fingerprint(leaves: Mapping[str, Any], paths: Mapping[str, Any], beside: object = None) -> bytes:
    """Return a digest of a plan's inputs: names, kinds, dtypes, shapes, strides, placements, meshes.

    Args:
        leaves: tensors and values by name.
        paths: the path of each.
        beside: what else the plan depends on, as its ``repr`` tells.
    """
    digest = hashlib.sha256(repr(beside).encode())
    meshes: dict[int, str] = {}
    for name, value in leaves.items():
        digest.update(repr((name, paths[name], _structure(value, meshes))).encode())
    return digest.digest()


def _structure(value: object, meshes: dict[int, str]) -> object:
    if isinstance(value, DTensor):
        mesh = value.device_mesh
        if id(mesh) not in meshes:
            meshes[id(mesh)] = repr((mesh.mesh.tolist(), mesh.mesh_dim_names, mesh.get_coordinate()))
        local = local_tensor(value)
        return ("dtensor", meshes[id(mesh)], value.placements, tuple(value.shape), _structure(local, meshes))
    if isinstance(value, ShardedTensor):
        shards = [(shard.metadata, _structure(shard.tensor, meshes)) for shard in value.local_shards()]
        return ("sharded", value.metadata(), shards)
    if isinstance(value, torch.Tensor):
        return (
            type(value),
            value.dtype,
            value.requires_grad,
            tuple(value.shape),
            value.stride() if value.layout is torch.strided else None,
            placements.shard_attributes(value),
        )
    return "value"


class PlanCache:
    """The plans that the planners of one checkpoint process keep, of one structure at a time."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._proofs = ProofCache()

    def planner_for(
        self,
        writer: StorageWriter,
        fingerprints: Iterable[bytes],
        prepared: Prepared,
        *,
        to_lowest_rank: bool = False,
    ) -> SavePlanner:
        """Return a planner that uses the plans kept under these fingerprints of all ranks, by rank.

        Every rank must call it with the same. Another library's writer may put into a plan what is good for
        one save only, so that its plans aren't kept. With ``to_lowest_rank``, what several ranks have is
        written by the lowest of them.
        """
        if not isinstance(writer, OurWriter):
            self.forget()
            return self._planner(prepared, caching=False, to_lowest_rank=to_lowest_rank)
        which = "lowest" if to_lowest_rank else "any"
        key = f"cloudckpt/{which}/{hashlib.sha256(b''.join(fingerprints)).hexdigest()}"
        if key != self._key:
            self.forget()
            self._key = key
        planner = self._planner(prepared, caching=True, to_lowest_rank=to_lowest_rank)
        set_plan_cache_key(planner, key)
        return planner

    def _planner(self, prepared: Prepared, *, caching: bool, to_lowest_rank: bool) -> DefaultSavePlanner:
        if prepared.flat is None:
            return DefaultSavePlanner(enable_plan_caching=caching, dedup_save_to_lowest_rank=to_lowest_rank)
        return CheckpointSavePlanner(
            prepared.flat,
            self._proofs,
            trust=prepared.trust,
            allowed=prepared.allowed,
            enable_plan_caching=caching,
            dedup_save_to_lowest_rank=to_lowest_rank,
        )

    def forget(self) -> None:
        """Keep no plan."""
        if self._key is not None:
            for kept in plan_caches():
                kept.pop(self._key, None)
        self._key = None
