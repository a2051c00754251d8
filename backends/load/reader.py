"""The StorageReader: DCP's load, by ranged reads straight into the tensors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import storage as dcp_storage
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from cloudckpt.backends.checksums import CRC64NVME
from cloudckpt.backends.config.options import true_or_false
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.config.uri_hints import advice
from cloudckpt.backends.dcp_base import CheckpointStorageMixin
from cloudckpt.backends.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
    ObjectNotFoundError,
)
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.load.peer_transport import PeerAddress, PeerListener
from cloudckpt.backends.load.read_plan import load
from cloudckpt.backends.load.shared_reader import PeerGroup, SharedReads, circles
from cloudckpt.backends.load.stored_size import StoredSize
from cloudckpt.backends.save.uploader import Observer
from cloudckpt.backends.transfer.downloader import Downloader
from cloudckpt.backends.transfer.request_limit import transfers

_WITHIN_A_HOST = ("file", "memory")
"""Protocols of stores that the ranks of one host reach without a network."""


class StorageReader(CheckpointStorageMixin, dcp_storage.StorageReader):
    """Loads a DCP checkpoint from object storage, ours or stock.

    Bytes go straight into a tensor's memory where it is contiguous and of the stored type, and through a
    buffer within ``memory_limit`` where not. When resharding, only the ranges that a rank needs are read.

    Nothing that a checkpoint says is run: ``.metadata`` may name DCP's own classes only, and values load with
    ``weights_only=True``.

    Args:
        uri: the checkpoint, such as ``s3://bucket/run/step-100``; options may stand in its query. A target
            that was parsed before has its options already.
        trust: let the checkpoint run code of its writer, as stock DCP always does.
        share: read what several ranks of one host need once, and pass it on between them. None does so where
            bytes come over a network, and not from a folder or from memory.
        options: as in the table of options; they win over the query and ``CLOUDCKPT_*`` in the environment.

    Raises:
        ConfigurationError: the URI or an option can't be used.
    """

    _taker = "StorageReader"

    def __init__(
        self,
        uri: str | os.PathLike[str] | Target,
        *,
        trust: bool = False,
        share: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(uri, options)
        self._trust = true_or_false("trust", trust)
        self._share = share if share is None else true_or_false("share", share)
        self._listener: PeerListener | None = None
        self.observe(None)
        self._begin()

    def _begin(self) -> None:
        self._close_listener()
        self._contents = ""
        self._rank = 0
        self._metadata: Metadata | None = None
        self._taken: bytes | None = None
        self._absence: CheckpointError | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the configuration; a load under way and its connections stay behind."""
        return {"target": self._target, "trust": self._trust, "share": self._share}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._target, self._store = state["target"], None
        self._trust, self._share = state["trust"], state["share"]
        self._listener = None
        self.observe(None)
        self._begin()

    def __repr__(self) -> str:
        share = "" if self._share is None else f", share={self._share}"
        return f"{type(self).__name__}({self._target.uri!r}, trust={self._trust}{share})"

    @property
    def size(self) -> int:
        """Bytes of the data objects of the checkpoint that was read last, 0 before."""
        if self._metadata is None:
            return 0
        noted = md.sizes_of(self._metadata)
        return sum(noted.values()) or sum(info.length for info in self._metadata.storage_data.values())

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Make ready for another load, from ``checkpoint_id`` where one is given, with the same options."""
        self._move(checkpoint_id)
        self._begin()

    def observe(self, observer: Observer | None, begun: Callable[[int], None] | None = None) -> None:
        """Call ``begun`` with the number of bytes of a load, and ``observer`` for each range that arrives.

        Both count what this rank reads itself. ``observer`` gets an object's name and how many bytes it
        had more, on the threads that read. Neither goes with a pickle.
        """
        self._observer, self._begun = observer, begun

    def fetch_metadata(self) -> bytes:
        """Return the bytes of ``.metadata``, for a rank that hands them to the others.

        Raises:
            CheckpointNotFoundError: nothing is committed here.
            StorageError: the store could not be read.
        """
        return self._fetched(md.METADATA_NAME)

    def take_metadata(self, data: bytes) -> None:
        """Have the next load go by this ``.metadata``, as ``fetch_metadata`` of some rank got it."""
        self._taken = data

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002 - DCP's interface
        """Read ``.metadata``; with ``rank=``, that rank's own, as saved by ``use_collectives=False``.

        Raises:
            CheckpointNotFoundError: nothing is committed here.
            UnsafeCheckpointError: reading it would run code.
            IntegrityError: it is damaged.
        """
        rank = kwargs.get("rank")
        try:
            metadata = self._read_metadata(md.metadata_name(rank))
        except CheckpointError as error:
            if rank is None:
                self._absence = error
                error.located(uri=self._target.uri)
                raise
            if self._absence is None:
                raise
            # DCP asks for the rank's own metadata after any failure with the global one, and would make an
            # AssertionError of both. It is handed a stand-in that raises what was wrong in the first place.
            self._absence.located(uri=self._target.uri, rank=rank)
            return Metadata(cast(dict[str, Any], _Absent(self._absence)))
        self._absence = None
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        return metadata

    def _read_metadata(self, name: str) -> Metadata:
        data = self._fetched(name) if self._taken is None or name != md.METADATA_NAME else self._taken
        uri = self._opened().uri
        self._contents = f"{uri}/{name} {CRC64NVME.of(data):016x}"
        return md.load(data, uri=uri, name=name, trust=self._trust)

    def _fetched(self, name: str) -> bytes:
        try:
            data, _ = self._opened().get(name)
        except ObjectNotFoundError as error:
            raise CheckpointNotFoundError(
                f"there is no committed checkpoint here: {error.message}",
                uri=self._target.uri,
                object_name=name,
                hint=error.hint
                or advice(self._target.uri, "Check the URI; a save that never committed leaves none"),
            ) from error
        return data

    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,  # noqa: ARG002 - DCP's interface
        *args: Any,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Begin a load on this rank."""
        self._rank = kwargs.get("rank") or 0
        if self._absence is not None:
            raise self._absence.located(uri=self._target.uri, rank=self._rank)
        self._metadata = metadata
        for fqn, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                size = StoredSize(entry.size, fqn, self._target.uri, self._rank)
                entry.size = cast(torch.Size, size)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Say where other ranks of this host find this one, if it may share its reads."""
        self._close_listener()
        share = self._target.protocol not in _WITHIN_A_HOST if self._share is None else self._share
        grouped = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if share and grouped and self._contents:
            self._listener = PeerListener.opened(self._contents, int(self._target.options.memory_limit))
        return plan if self._listener is None else dataclasses.replace(plan, storage_data=self._listener.door)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Tell the ranks of each host of one another."""
        doors = [plan.storage_data if isinstance(plan.storage_data, PeerAddress) else None for plan in plans]
        return [
            plan if door is None else dataclasses.replace(plan, storage_data=circle)
            for plan, door, circle in zip(plans, doors, circles(doors), strict=True)
        ]

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._listener = None

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what this rank's plan asks for.

        Raises:
            IntegrityError: an object is missing or short, or an item is not what the metadata says.
            UnsafeCheckpointError: a value can't be loaded without running code.
            StorageError: the store could not be read.
        """
        options = self._target.options
        try:
            if self._metadata is None:
                raise ConfigurationError("read_data was called before set_up_storage_reader")
            sizes = md.least_sizes(self._metadata)
            shared, memory_limit = None, int(options.memory_limit)
            if self._listener is not None and isinstance(plan.storage_data, PeerGroup):
                shared = SharedReads(plan.storage_data, self._listener, memory_limit, options.timeout)
                memory_limit = shared.memory_limit
            else:
                self._close_listener()  # a rank that would connect must not wait
            with self._opened() as store:
                downloader = Downloader(store, transfers(store, options), memory_limit, sizes)
                downloader.observe(self._observer, self._begun)
                load(plan.items, planner, self._metadata, downloader, shared, trust=self._trust)
        except CheckpointError as error:
            error.located(uri=self._target.uri, rank=self._rank)
            raise
        finally:
            self._close_listener()
        future: Future[None] = Future()
        future.set_result(None)
        return future


class _Absent(Mapping[str, Any]):
    """The entries of a checkpoint that could not be opened: raises why as soon as anyone looks."""

    def __init__(self, error: CheckpointError) -> None:
        self._error = error

    def __getitem__(self, key: str) -> Any:
        raise self._error

    def __iter__(self) -> Iterator[str]:
        raise self._error

    def __len__(self) -> int:
        raise self._error
