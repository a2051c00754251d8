"""Ranks of one host that read together, in threads or in a process of their own."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from cloudckpt.backends.checksums import CRC32C, Checks, Chunk, Expected, chunk_size
from cloudckpt.backends.config.target import Target
from cloudckpt.backends.errors import IntegrityError
from cloudckpt.backends.load.peer_transport import PeerListener
from cloudckpt.backends.load.shared_reader import PeerGroup, SharedReads
from cloudckpt.backends.stores.base import Arrived
from cloudckpt.backends.stores.local.store import LocalStore
from cloudckpt.backends.transfer.byte_ranges import Extent
from cloudckpt.backends.transfer.downloader import Downloader

NAME = "data"
PIECE = 512 << 10
PIECES = 40
CONTENT = random.Random(17).randbytes(PIECE * PIECES)  # the same in every process

MEMORY = 26 << 20
"""Bytes; some pieces make a request."""

Hook = Callable[[int], None]


def expected_of(piece: int) -> Expected:
    data = CONTENT[piece * PIECE : (piece + 1) * PIECE]
    chunk = chunk_size(PIECE)
    sums = [CRC32C.of(data[at : at + chunk]) for at in range(0, PIECE, chunk)]
    checks = Checks(CRC32C, (PIECE,), b"".join(map(CRC32C.packed, sums)))

    def tell(damaged: list[Chunk]) -> None:
        if damaged:
            raise IntegrityError(f"piece {piece} is damaged")

    return Expected(checks, checks.chunks(0, PIECE), tell)


class CountingStore(LocalStore):
    """Counts the bytes that are read, and calls a hook with them before."""

    def __init__(self, folder: Path, hook: Hook = lambda _: None) -> None:
        super().__init__(Target.parse(f"file://{folder}"))
        self.read = 0
        self._hook = hook

    def read_into(
        self, name: str, offset: int, buffers: Sequence[memoryview], *, arrived: Arrived | None = None
    ) -> int:
        self.read += sum(buffer.nbytes for buffer in buffers)
        self._hook(self.read)
        return super().read_into(name, offset, buffers, arrived=arrived)


class Rank:
    """One rank of a load: its own memory, its own way to the object, and the door to the others."""

    def __init__(self, folder: Path, pieces: Sequence[int], hook: Hook = lambda _: None) -> None:
        self.store = CountingStore(folder, hook)
        self.listener = PeerListener(str(folder), MEMORY)
        self.pieces = pieces
        self.memory = {piece: bytearray(PIECE) for piece in pieces}
        self.done: list[int] = []

    def extents(self, *, straight: bool) -> list[Extent]:
        return [self._extent(piece, straight=straight) for piece in self.pieces]

    def _extent(self, piece: int, *, straight: bool) -> Extent:
        def deliver(data: memoryview) -> None:
            self.memory[piece][:] = data

        def done() -> None:
            self.done.append(piece)

        expected, start = expected_of(piece), piece * PIECE
        if straight:
            return Extent(start, PIECE, done, into=memoryview(self.memory[piece]), expected=expected)
        return Extent(start, PIECE, done, deliver=deliver, expected=expected)

    def load(self, circle: PeerGroup | None, patience: float = 30.0, *, straight: bool = True) -> None:
        assert circle is not None
        try:
            shared = SharedReads(circle, self.listener, MEMORY, patience)
            sizes = {NAME: len(CONTENT)}
            downloader = Downloader(self.store, 4, shared.memory_limit, sizes)
            shared.read(downloader, {NAME: self.extents(straight=straight)})
        finally:
            self.listener.close()

    def assert_loaded(self) -> None:
        for piece, memory in self.memory.items():
            assert memory == CONTENT[piece * PIECE : (piece + 1) * PIECE], piece
        assert sorted(self.done) == sorted(self.pieces), "each is delivered once"


def killed_after_passing_on(folder: Path, connection: Connection) -> None:
    passed_on = threading.Event()
    pass_on = SharedReads._pass_on

    def told(*arguments: Any) -> None:
        pass_on(*arguments)
        passed_on.set()

    mock.patch.object(SharedReads, "_pass_on", told).start()

    def kill(read: int) -> None:
        if read > 12 * PIECE:  # the second request of this rank
            passed_on.wait(60)
            os.kill(os.getpid(), signal.SIGKILL)

    rank = Rank(folder, range(PIECES), kill)
    connection.send(rank.listener.door)
    rank.load(connection.recv())
