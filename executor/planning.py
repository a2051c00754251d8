"""Save plans that are kept while the structure of the state stands.

DCP's planner can keep its plans, and then neither sends nor makes them again. It finds out whether they
still hold by comparing names, sizes and offsets, which overlooks a changed dtype, and it goes wrong when
ranks disagree on what is kept. So the kept plans go by a fingerprint of the structure on all ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter
from torch.distributed.tensor import DTensor

from cloudckpt.backends.state import placements
from cloudckpt.backends.writer import StorageWriter as OurWriter


def fingerprint(state: dict[str, Any]) -> bytes:
    """A digest of all that a plan depends on: names, kinds, dtypes, shapes, strides, shards, placements."""
    flat, mappings = flatten_state_dict(state)
    digest = hashlib.sha256()
    meshes: dict[int, str] = {}
    for name, value in flat.items():
        digest.update(repr((name, mappings[name], _structure(value, meshes))).encode())
    return digest.digest()


def _structure(value: object, meshes: dict[int, str]) -> object:
    if isinstance(value, DTensor):
        mesh = value.device_mesh
        if id(mesh) not in meshes:
            meshes[id(mesh)] = repr((mesh.mesh.tolist(), mesh.mesh_dim_names, mesh.get_coordinate()))
        local = value._local_tensor  # noqa: SLF001 - to_local() would make a view of it
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

    def planner_for(self, writer: StorageWriter, fingerprints: Iterable[bytes]) -> SavePlanner:
        """A planner that uses the plans kept under these fingerprints of all ranks, by rank.

        Every rank must call it with the same. Another library's writer may put into a plan what is good for
        one save only, so that its plans aren't kept.
        """
        if not isinstance(writer, OurWriter):
            self.forget()
            return DefaultSavePlanner()
        key = f"cloudckpt/{hashlib.sha256(b''.join(fingerprints)).hexdigest()}"
        if key != self._key:
            self.forget()
            self._key = key
        planner = DefaultSavePlanner(enable_plan_caching=True)
        planner._cached_plans_key = key  # noqa: SLF001 - its own key is its class's name
        return planner

    def forget(self) -> None:
        """Keep no plan."""
        if self._key is not None:
            for kept in _KEPT:
                kept.pop(self._key, None)
        self._key = None


_KEPT: tuple[dict[str, Any], ...] = (
    SavePlanner._cached_save_plan,  # noqa: SLF001 - DCP keeps them on the class, and has no way to drop one
    SavePlanner._cached_final_save_plan,  # noqa: SLF001
    SavePlanner._cached_all_plans,  # noqa: SLF001
    SavePlanner._cached_global_plan,  # noqa: SLF001
    SavePlanner._cached_metadata,  # noqa: SLF001
)
