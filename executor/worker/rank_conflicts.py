"""Values that differ between ranks under one name, of which a checkpoint would keep one.

DCP writes a name that several ranks have once, and takes the value of any of them. Where that is meant, as
for the parameters of data-parallel ranks, all values are the same. Where it is not, all but one are lost.

Each rank makes a *summary* of what it would write, a few bytes that join an exchange that saves make anyway.
Equal structures with equal contents have equal summaries. Other structures, as those of pipeline stages, have
their digests compared by rank 0 once, which tells each rank which of its entries others have as well. From
then on a rank adds up those entries' digests with weights that sum to zero over the ranks that have one, so
that summaries which don't sum to zero show a conflict. Large tensors are sampled then, at other places in
each save.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Replicate

from cloudckpt.backends.errors import CheckpointError, ConfigurationError
from cloudckpt.backends.state import placements
from cloudckpt.backends.system import background_log
from cloudckpt.backends.torch_private import (
    ShardedTensor,
    compute_local_shape_and_global_offset,
    local_tensor,
)
from cloudckpt.executor.coordination import collectives, remote_errors, wire_format
from cloudckpt.executor.coordination.call_comparison import named
from cloudckpt.executor.worker import digests

_log = background_log.logger(__name__)

RankConflicts = Literal["error", "warn"] | tuple[str, ...]
"""Policy for conflicts: a tuple has the patterns of names that may differ."""

_MODULUS: Final = 1 << 128
_NAMED: Final = 5
"""Names that a message has."""

Key = tuple[str, tuple[int, ...] | None]
"""A name, and the offsets of a shard."""


def checked(rank_conflicts: object) -> RankConflicts:
    """Return the argument of this name as it is used.

    Raises:
        ConfigurationError: it is neither ``"error"`` nor ``"warn"`` nor a list of patterns.
    """
    if isinstance(rank_conflicts, str) and rank_conflicts in ("error", "warn"):
        return "error" if rank_conflicts == "error" else "warn"
    if isinstance(rank_conflicts, list | tuple):
        given = cast("Sequence[object]", rank_conflicts)
        patterns = tuple(one for one in given if isinstance(one, str))
        if len(patterns) == len(given):
            return patterns
    raise ConfigurationError(
        f"rank_conflicts is {rank_conflicts!r}",
        hint="Give 'error', 'warn', or a list of patterns of names that may differ, as ['*.running_mean']",
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """Summary of one rank for the others. ``sampled`` is None where tensors were read whole."""

    structure: int
    content: int
    sampled: int | None


@dataclass(frozen=True, slots=True)
class _Digests:
    """Entries of one rank: name, offsets and digest in hexadecimal digits of each."""

    entries: list[tuple[str, tuple[int, ...] | None, str]]


@dataclass(frozen=True, slots=True)
class _Judgement:
    """Rank 0's message to one rank, after it has compared all digests."""

    weights: list[tuple[str, tuple[int, ...] | None, int]]
    conflicts: tuple[str, ...]
    """Names that differ, though not whole values: what the lowest rank has is to be written."""
    failure: bytes | None
    """Record of a ConfigurationError."""


@dataclass(slots=True)
class RankCheck:
    """Compares what the ranks of a group would write under the same names, save after save.

    Attributes:
        lowest: names that differ and may. The lowest rank's value must be written.
    """

    rank: int
    world_size: int
    lowest: frozenset[str] = frozenset()
    _structure: int | None = None
    _weights: dict[Key, int] = field(default_factory=dict)
    _policy: RankConflicts = "error"
    _saves: int = 0
    _keys: tuple[frozenset[Key], int] | None = None
    _offsets: dict[object, tuple[int, ...]] = field(default_factory=dict)

    def forget(self) -> None:
        """Compare everything in the next save."""
        self._structure, self.lowest = None, frozenset()

    def summary(
        self, leaves: Mapping[str, Any], policy: RankConflicts, left_out: Collection[str] = ()
    ) -> Summary:
        """Summarize this rank's part of a save.

        Args:
            leaves: tensors and values by the names that they are saved under.
            policy: for conflicts.
            left_out: names that are not compared.
        """
        entries = dict(self._entries(leaves, left_out))
        structure = self._structured(entries)
        if structure != self._structure or policy != self._policy:
            content = _total(_hashed(key, digests.digest(leaf, None)) for key, leaf in entries.items())
            return Summary(structure, content, None)
        self._saves += 1
        content = sum(
            weight * _hashed(key, digests.digest(entries[key], self._saves))
            for key, weight in self._weights.items()
        )
        return Summary(structure, content % _MODULUS, self._saves)

    def _structured(self, entries: Mapping[Key, Any]) -> int:
        """Return a number that stands for these names and offsets, in any order."""
        keys = frozenset(entries)
        if self._keys is None or self._keys[0] != keys:
            self._keys = keys, _total(_hashed(key, b"") for key in keys)
        return self._keys[1]

    def settle(
        self,
        summaries: Sequence[Summary],
        leaves: Mapping[str, Any],
        policy: RankConflicts,
        left_out: Collection[str] = (),
    ) -> None:
        """Compare the summaries of all ranks, and find what differs. Every rank calls it, with the same.

        Raises:
            CheckpointException: names that may not differ do, on every rank.
        """
        own = summaries[self.rank]
        if len({summary.sampled for summary in summaries}) == 1 and own.sampled is not None:
            if _total(summary.content for summary in summaries) == 0:
                return
        elif len(set(summaries)) == 1:
            keys = [key for key, _ in self._entries(leaves, left_out)]
            weight = self.world_size - 1 if self.rank == 0 else -1
            self._remember(own.structure, dict.fromkeys(keys, weight), policy)
            return
        judgement = self._compared(leaves, policy, left_out)
        if judgement.failure is not None:
            self.forget()
            failure = remote_errors.loads(judgement.failure)
            raise CheckpointException("compare the ranks", {0: (failure, [])})  # type: ignore[dict-item]
        weights = {(name, offsets): weight for name, offsets, weight in judgement.weights}
        self._remember(own.structure, weights, policy)
        self.lowest = frozenset(judgement.conflicts)

    def _remember(self, structure: int, weights: dict[Key, int], policy: RankConflicts) -> None:
        self._structure, self._weights, self._policy, self._saves = structure, weights, policy, 0
        self.lowest = frozenset()

    def _compared(
        self, leaves: Mapping[str, Any], policy: RankConflicts, left_out: Collection[str]
    ) -> _Judgement:
        """Have rank 0 compare the digests of all ranks, and return what it says to this one."""
        own = {key: digests.digest(leaf, None) for key, leaf in self._entries(leaves, left_out)}
        message = _Digests([(*key, digest.hex()) for key, digest in own.items()])
        gathered = collectives.gather(wire_format.packed(message))
        messages: list[bytes] | None = None
        if gathered is not None:
            messages = [wire_format.packed(judgement) for judgement in self._judged(gathered, policy)]
        return wire_format.sent(collectives.scatter(messages), _Judgement, 0)

    def _judged(self, gathered: Sequence[bytes], policy: RankConflicts) -> list[_Judgement]:
        """Compare the digests of all ranks. What fails on rank 0 is for all: they wait for its message."""
        try:
            every = [_digests(data, rank) for rank, data in enumerate(gathered)]
        except CheckpointError as error:
            return [_Judgement([], (), remote_errors.dumps(error)) for _ in gathered]
        words = judged(every, policy)
        if words[0].conflicts and words[0].failure is None and policy == "warn":
            _log.warning("%s", _described(every, words[0].conflicts))
        return words

    def _entries(self, leaves: Mapping[str, Any], left_out: Collection[str]) -> Iterator[tuple[Key, Any]]:
        """Yield what this rank would write and another rank may write as well."""
        for name, leaf in leaves.items():
            if name in left_out:
                continue
            if isinstance(leaf, DTensor):
                if not self._is_elsewhere(leaf):
                    continue
                yield (name, self._offsets_of(leaf)), local_tensor(leaf)
            elif isinstance(leaf, ShardedTensor):
                ranks = {
                    shard.placement.rank() for shard in leaf.metadata().shards_metadata if shard.placement
                }
                if len(ranks) < self.world_size:
                    for shard in leaf.local_shards():
                        yield (name, tuple(shard.metadata.shard_offsets)), shard.tensor
            elif not (isinstance(leaf, torch.Tensor) and placements.shard_attributes(leaf)):
                yield (name, None), leaf

    def _is_elsewhere(self, tensor: DTensor) -> bool:
        """Return True if other ranks may have the same shard; none has without replicas in a mesh of all."""
        mesh = tensor.device_mesh
        if mesh.get_coordinate() is None:
            return False
        replicated = any(isinstance(one, Replicate) for one in tensor.placements)
        return replicated or mesh.size() < self.world_size

    def _offsets_of(self, tensor: DTensor) -> tuple[int, ...]:
        key = (tensor.device_mesh, tensor.placements, tuple(tensor.shape))
        if key not in self._offsets:
            _, offsets = compute_local_shape_and_global_offset(
                tensor.shape, tensor.device_mesh, tensor.placements
            )
            self._offsets[key] = tuple(offsets)
        return self._offsets[key]


def judged(every: Sequence[Mapping[Key, bytes]], policy: RankConflicts) -> list[_Judgement]:
    """Compare the digests of all ranks, by rank, and return the judgement for each rank."""
    holders: dict[Key, list[int]] = {}
    for rank, own in enumerate(every):
        for key in own:
            holders.setdefault(key, []).append(rank)
    weights: list[dict[Key, int]] = [{} for _ in every]
    conflicts: dict[str, None] = {}
    kinds: dict[str, set[bytes]] = {}
    for key, ranks in holders.items():
        found = {every[rank][key][:1] for rank in ranks} if key[1] is None else {digests.SHARD}
        kinds.setdefault(key[0], set()).update(found)
        if len(ranks) < 2:  # noqa: PLR2004 - one that no other rank has
            continue
        may_differ = not isinstance(policy, str) and _matches(key[0], policy)
        if may_differ or len({every[rank][key] for rank in ranks}) > 1:
            conflicts[key[0]] = None
            continue
        for rank in ranks:
            weights[rank][key] = -1
        weights[ranks[0]][key] = len(ranks) - 1
    refused = [
        name
        for name in conflicts
        if policy == "error" or (not isinstance(policy, str) and not _matches(name, policy))
    ]
    failure = None
    if unlike := [name for name, found in kinds.items() if len(found) > 1]:
        failure = ConfigurationError(
            _described(every, unlike, "values of different kinds"),
            hint="Save a tensor with as many dimensions, or no tensor, under a name on every rank, or put "
            "what each rank has of its own into cloudckpt.PerRank",
        )
    elif refused:
        failure = ConfigurationError(
            _described(every, refused),
            hint="Put what each rank has of its own into cloudckpt.PerRank, give parameters of different "
            "ranks different names, or let names differ with rank_conflicts=[...], which saves the lowest "
            "rank's value",
        )
    record = remote_errors.dumps(failure) if failure is not None else None
    return [
        _Judgement([(*key, weight) for key, weight in one.items()], tuple(conflicts), record)
        for one in weights
    ]


def _digests(data: bytes, rank: int) -> dict[Key, bytes]:
    """Return the digests of a message.

    Raises:
        ExecutorError: it is none.
    """
    found = wire_format.sent(data, _Digests, rank)
    try:
        return {(name, offsets): bytes.fromhex(digest) for name, offsets, digest in found.entries}
    except ValueError as error:
        raise wire_format.foreign(f"what rank {rank} sent", "has a digest that is no number") from error


def _described(
    every: Sequence[Mapping[Key, bytes]], names: Sequence[str], what: str = "different values"
) -> str:
    """Say which names differ, and on which ranks."""
    wanted, differing = set(names), set[int]()
    lowest: dict[Key, bytes] = {}
    is_shard: dict[str, bool] = {}
    for rank, own in enumerate(every):
        for key, digest in own.items():
            if key[0] not in wanted:
                continue
            shard = key[1] is not None
            if is_shard.setdefault(key[0], shard) != shard or lowest.setdefault(key, digest) != digest:
                differing.add(rank)
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    base = next((rank for rank, own in enumerate(every) if any(key[0] in wanted for key in own)), 0)
    return (
        f"ranks have {what} under the same {'name' if len(names) == 1 else 'names'} {shown}{more}: "
        f"rank {named(sorted(differing))} differs from rank {base}, and a checkpoint has one value a name"
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _total(numbers: Iterable[int]) -> int:
    return sum(numbers) % _MODULUS


def _hashed(key: Key, digest: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(_key_bytes(key) + digest, digest_size=16).digest())


@functools.lru_cache(1 << 16)
def _key_bytes(key: Key) -> bytes:
    return repr(key).encode()
