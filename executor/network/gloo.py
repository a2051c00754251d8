"""gloo on a chosen address.

torch takes gloo's address from ``GLOO_SOCKET_IFNAME`` or from the host's own name, and offers no public way
to give another. This module replaces the name `ProcessGroupGloo` by which
`torch.distributed.distributed_c10d` makes the backend. Should that name go,
`tests/executor/test_network_options.py` fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch.distributed as dist
from torch.distributed import ProcessGroupGloo, Store, distributed_c10d

from cloudckpt.backends.system import system_limits
from cloudckpt.backends.torch_private import gloo_options, set_gloo_timeout


class GivenUp(Exception):
    """The caller no longer waits for the connections."""


@dataclass(slots=True)
class Mesh:
    """The connections of one rank to all others.

    Args:
        address: of this host, to listen on and to connect from.
        store: where the ranks exchange their addresses, through a connection of their own.
        rank: of this process.
        world_size: number of ranks.
    """

    address: str
    store: Store
    rank: int
    world_size: int
    _backend: ProcessGroupGloo | None = None

    def connect(self, timeout: float, given_up: Callable[[], bool]) -> None:
        """Connect to all other ranks.

        Native code connects, and can't be interrupted. Its thread is left behind with it when `given_up`,
        which is called every second, returns True.

        Raises:
            GivenUp: `given_up` returned True.
            RuntimeError: a rank can't be reached, or not within `timeout` seconds.
        """
        made: Future[ProcessGroupGloo] = Future()

        def make() -> None:
            try:
                options = gloo_options(self.address, timeout)
                made.set_result(_Gloo(self.store, self.rank, self.world_size, options))
            except BaseException as error:  # noqa: BLE001 - the caller raises it
                made.set_exception(error)

        system_limits.start(threading.Thread(target=make, name="cloudckpt-gloo", daemon=True))
        while not given_up():
            if wait([made], 1.0).done:
                self._backend = made.result()
                return
        raise GivenUp

    def become_default(self, timeout: float) -> None:
        """Make the group the default one of this process; ``timeout`` in seconds is that of collectives.

        Groups that are made later, as by `dist.new_group`, use the same address.
        """
        if self._backend is None:
            raise RuntimeError("the mesh is not connected")
        set_gloo_timeout(self._backend, timeout)
        _Gloo.address, _Gloo.connected = self.address, self._backend
        distributed_c10d.ProcessGroupGloo = _Gloo  # type: ignore[misc, assignment]
        dist.init_process_group(
            "gloo",
            store=self.store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=timeout),
        )


class _Gloo(ProcessGroupGloo):
    """gloo on the address of this process, in place of the class that torch calls."""

    address: ClassVar[str] = ""
    connected: ClassVar[ProcessGroupGloo | None] = None
    """The backend that torch gets when it makes the next one."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
        return super().__new__(cls, *arguments, **keywords) if cls.connected is None else cls.connected

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        options: Any = None,
        *,
        timeout: timedelta | None = None,
        **newer: Any,  # since torch 2.14 enable_reconfigure, which is an attribute of the options as well
    ) -> None:
        if _Gloo.connected is self:
            _Gloo.connected = None
            return
        if timeout is not None:
            options = gloo_options(self.address, timeout.total_seconds())
            for name, value in newer.items():
                setattr(options, name, value)
        super().__init__(store, rank, size, options)
