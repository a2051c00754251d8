"""Ranks agree through a store that can't be reached for some seconds, as one on a busy host."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from torch.distributed import TCPStore

from cloudckpt.executor.coordination.consensus import RankStatus, SaveAttempt
from cloudckpt.executor.coordination.rendezvous import MeetingPlace
from cloudckpt.executor.coordination.store_consensus import StoreConsensus
from support.executors import until
from support.servers import unused_port

T = TypeVar("T")
RANKS = 2
AWAY = 15.0
"""Seconds; longer than a connection with the time of other answers is tried for."""


class PeerAddress:
    """The way to a store: who comes while it is shut is refused, who is in already is not disturbed."""

    def __init__(self, upstream: int) -> None:
        self.port = unused_port()
        self._upstream = upstream
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server: asyncio.Server | None = None
        self.came = 0
        """How many have come in."""
        self.open()

    def open(self) -> None:
        self._server = self._do(asyncio.start_server(self._pass, "localhost", self.port))

    def shut(self) -> None:
        self._do(self._closed())

    def end(self) -> None:
        self.shut()
        self._do(self._cancelled())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.came += 1
        onward, back = await asyncio.open_connection("localhost", self._upstream)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(_copy(reader, back), _copy(onward, writer))

    async def _closed(self) -> None:
        assert self._server is not None
        self._server.close()

    async def _cancelled(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def _do(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.closing(writer), contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)


@pytest.fixture
def door() -> Iterator[PeerAddress]:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    door = PeerAddress(store.port)
    yield door
    door.end()


@pytest.mark.soak
def test_a_result_is_found_where_the_store_is_away_for_seconds(door: PeerAddress) -> None:
    consensus = [
        StoreConsensus(MeetingPlace.at_store(rank, RANKS, "localhost", door.port, prefix="p"))
        for rank in range(RANKS)
    ]

    def join(consensus: StoreConsensus) -> SaveAttempt:
        return consensus.convene(RankStatus(call=1, subject="step 1", generation=None), 60)

    with ThreadPoolExecutor(RANKS) as pool:
        trials = list(pool.map(join, consensus))
    came = door.came
    for attempt in trials:
        attempt.watch(lambda: None, 120)
    until(lambda: door.came == came + RANKS)
    door.shut()
    for attempt in trials:
        attempt.report(None, sound=True)
    time.sleep(AWAY)  # how long it is away is the fault itself
    door.open()
    until(lambda: all(attempt.result or attempt.lost for attempt in trials))
    assert [attempt.lost for attempt in trials] == [None] * RANKS
    assert all(attempt.result is not None and attempt.result.sound for attempt in trials)
