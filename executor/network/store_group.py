"""A process group whose collectives go through a store.

It serves where checkpoint processes can't reach each other, and where they may listen only on given ports,
which gloo does not support. A save exchanges plans and results, not tensors: megabytes at most. Every
collective that DCP uses is here, for CPU tensors, and all-reduce for planners and writers of other libraries.

`_create_work_from_future` is torch's private name, in every version since 2.0, for a `Work` that has ended.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, ReduceOp, Store, Work
from torch.futures import Future

from cloudckpt.backends.torch_private import completed_work

BACKEND: Final = "cloudckpt_store"
"""Name of the backend, as `dist.get_backend` returns it."""

_CHUNK: Final = 4 << 20
"""Bytes of one value: torch's TCP store refuses more than 8 MiB."""

_REDUCTIONS: Final[dict[Any, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.BAND: torch.bitwise_and,
    ReduceOp.BOR: torch.bitwise_or,
    ReduceOp.BXOR: torch.bitwise_xor,
}


def become_default(store: Store, rank: int, world_size: int, timeout: float) -> None:
    """Make a group over `store` the default group of this process; ``timeout`` in seconds is a collective's.

    Raises:
        RuntimeError: the store can't be reached.
    """
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu"])
    dist.init_process_group(
        BACKEND, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )


class StoreGroup(ProcessGroup):
    """A process group over a store. Its collectives have ended when they return.

    Args:
        store: where the ranks exchange values, through a connection of their own.
        rank: of this process.
        world_size: number of ranks.
        timeout: longest time that a collective waits for another rank.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: timedelta) -> None:
        super().__init__(rank, world_size)  # type: ignore[call-arg]  # torch's stub lacks this overload
        self._store: Any = store  # torch's stub takes text for values, and a store takes bytes
        self._own = rank
        self._count = world_size
        self._timeout = timeout
        self._numbers = itertools.count()

    def getBackendName(self) -> str:  # noqa: N802 - torch's interface
        return BACKEND

    @property
    def pg_name(self) -> str:
        """Name of the group."""
        return self.group_name

    def barrier(self, *_: Any, **__: Any) -> Work:
        key = self._key()
        if self._store.add(f"{key}/arrived", 1) == self._count:
            self._store.set(f"{key}/all", "1")
        self._store.wait([f"{key}/all"], self._timeout)
        if self._store.add(f"{key}/left", 1) == self._count:
            self._delete(f"{key}/{name}" for name in ("arrived", "all", "left"))
        return _done(None)

    def broadcast(  # type: ignore[override]  # torch's own code calls this overload alone
        self, tensors: list[torch.Tensor], opts: Any = None
    ) -> Work:
        key, root = self._key(), _root(opts)
        if self._own == root:
            self._put(f"{key}/{root}", tensors)
        else:
            self._get(f"{key}/{root}", tensors, readers=self._count - 1)
        return _done(tensors)

    def gather(  # type: ignore[override]  # see `broadcast`
        self, output_tensors: list[list[torch.Tensor]], input_tensors: list[torch.Tensor], opts: Any = None
    ) -> Work:
        key, root = self._key(), _root(opts)
        if self._own != root:
            self._put(f"{key}/{self._own}", input_tensors)
        else:
            for rank, target in enumerate(output_tensors[0]):
                self._receive(f"{key}/{rank}", rank, target, input_tensors[0])
        return _done(output_tensors)

    def scatter(  # type: ignore[override]  # see `broadcast`
        self, output_tensors: list[torch.Tensor], input_tensors: list[list[torch.Tensor]], opts: Any = None
    ) -> Work:
        key, root = self._key(), _root(opts)
        if self._own == root:
            for rank, tensor in enumerate(input_tensors[0]):
                if rank != root:
                    self._put(f"{key}/{rank}", [tensor])
            output_tensors[0].copy_(input_tensors[0][root])
        else:
            self._get(f"{key}/{self._own}", output_tensors, readers=1)
        return _done(output_tensors)

    def allgather(  # type: ignore[override]  # see `broadcast`
        self, output_tensors: list[list[torch.Tensor]], input_tensors: list[torch.Tensor], opts: Any = None
    ) -> Work:
        del opts
        self._gather_all(output_tensors[0], input_tensors[0])
        return _done(output_tensors)

    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Work:  # noqa: A002
        del opts
        self._gather_all(list(output.view(self._count, *input.shape).unbind(0)), input)
        return _done(output)

    all_gather_single = _allgather_base  # its name since torch 2.13

    def allreduce(  # type: ignore[override]  # see `broadcast`
        self, tensors: list[torch.Tensor], opts: Any = None
    ) -> Work:
        reduction = ReduceOp.SUM if opts is None else opts.reduceOp.op
        if reduction not in _REDUCTIONS:
            raise NotImplementedError(f"{BACKEND} can't reduce with {reduction}")
        for tensor in tensors:
            every = [torch.empty_like(tensor) for _ in range(self._count)]
            self._gather_all(every, tensor)
            tensor.copy_(functools.reduce(_REDUCTIONS[reduction], every))
        return _done(tensors)

    def _gather_all(self, outputs: Sequence[torch.Tensor], own: torch.Tensor) -> None:
        key = self._key()
        self._put(f"{key}/{self._own}", [own])
        for rank, target in enumerate(outputs):
            self._receive(f"{key}/{rank}", rank, target, own, readers=self._count - 1)

    def _receive(
        self, key: str, rank: int, target: torch.Tensor, own: torch.Tensor, readers: int = 1
    ) -> None:
        if rank == self._own:
            target.copy_(own)
        else:
            self._get(key, [target], readers)

    def _put(self, key: str, tensors: Sequence[torch.Tensor]) -> None:
        data = b"".join(
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors
        )
        for name, start in zip(_parts(key, len(data)), range(0, max(1, len(data)), _CHUNK), strict=True):
            self._store.set(name, data[start : start + _CHUNK])

    def _get(self, key: str, tensors: Sequence[torch.Tensor], readers: int) -> None:
        names = list(_parts(key, sum(tensor.nbytes for tensor in tensors)))
        self._store.wait(names, self._timeout)
        data = bytearray().join(self._store.get(name) for name in names)
        start = 0
        for tensor in tensors:
            if tensor.nbytes:
                part = torch.frombuffer(data, dtype=torch.uint8, count=tensor.nbytes, offset=start)
                tensor.copy_(part.view(tensor.dtype).reshape(tensor.shape))
                start += tensor.nbytes
        if readers == 1:
            self._delete(names)
        elif self._store.add(f"{key}/read", 1) == readers:
            self._delete([*names, f"{key}/read"])

    def _delete(self, names: Sequence[str] | Iterator[str]) -> None:
        for name in names:
            self._store.delete_key(name)

    def _key(self) -> str:
        return f"collective/{next(self._numbers)}"


def _create(store: Store, rank: int, world_size: int, timeout: timedelta) -> StoreGroup:
    return StoreGroup(store, rank, world_size, timeout)


def _parts(key: str, nbytes: int) -> Iterator[str]:
    """Name the values that hold `nbytes` bytes: one at least."""
    return (f"{key}/part/{number}" for number in range(max(1, -(-nbytes // _CHUNK))))


def _root(opts: Any) -> int:
    return 0 if opts is None else int(opts.rootRank)


def _done(result: Any) -> Work:
    future: Future[Any] = Future()
    future.set_result(result)
    return completed_work(future)
