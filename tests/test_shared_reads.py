"""Ranks of one host read together what they need in common; whatever fails in that, each still has it all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from cloudckpt.backends.download import Downloader
from cloudckpt.backends.peers import Door, Lobby
from cloudckpt.backends.ranges import Extent
from cloudckpt.backends.shared_reads import Circle, SharedReads, circles
from cloudckpt.backends.store import Arrived
from cloudckpt.backends.stores.local import LocalStore
from cloudckpt.backends.target import Target
from support.executors import within

_NAME = "data"
_PIECE = 100_000
_PIECES = 40
_CONTENT = b"".join(os.urandom(_PIECE) for _ in range(_PIECES))

Hook = Callable[[int], None]


class _Store(LocalStore):
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


class _Rank:
    """One rank of a load: its own memory, its own way to the object, and the door to the others."""

    def __init__(self, folder: Path, pieces: Sequence[int], hook: Hook = lambda _: None) -> None:
        self.store = _Store(folder, hook)
        self.lobby = Lobby(str(folder))
        self.pieces = pieces
        self.memory = {piece: bytearray(_PIECE) for piece in pieces}
        self.done: list[int] = []

    def extents(self, *, straight: bool) -> list[Extent]:
        return [self._extent(piece, straight=straight) for piece in self.pieces]

    def _extent(self, piece: int, *, straight: bool) -> Extent:
        def deliver(data: memoryview) -> None:
            self.memory[piece][:] = data

        def done() -> None:
            self.done.append(piece)

        if straight:
            return Extent(piece * _PIECE, _PIECE, done, into=memoryview(self.memory[piece]))
        return Extent(piece * _PIECE, _PIECE, done, deliver=deliver)

    def load(self, circle: Circle | None, patience: float = 30.0, *, straight: bool = True) -> None:
        assert circle is not None
        try:
            shared = SharedReads(circle, self.lobby, 2 << 20, patience)
            sizes = {_NAME: len(_CONTENT)}
            downloader = Downloader(self.store, 4, shared.memory_limit, sizes)
            shared.read(downloader, {_NAME: self.extents(straight=straight)})
        finally:
            self.lobby.close()

    def assert_loaded(self) -> None:
        for piece, memory in self.memory.items():
            assert memory == _CONTENT[piece * _PIECE : (piece + 1) * _PIECE], piece
        assert sorted(self.done) == sorted(self.pieces), "each is delivered once"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / _NAME).write_bytes(_CONTENT)
    return tmp_path


def load_all(ranks: Sequence[_Rank], patience: float = 30.0, *, straight: bool = True) -> None:
    with ThreadPoolExecutor(len(ranks)) as pool:
        loads = [
            pool.submit(rank.load, circle, patience, straight=straight)
            for rank, circle in zip(ranks, circles([rank.lobby.door for rank in ranks]), strict=True)
        ]
    for load in loads:
        load.result()


@pytest.mark.parametrize("straight", [True, False], ids=["into memory", "through a buffer"])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_what_all_need_is_read_once(folder: Path, world_size: int, *, straight: bool) -> None:
    ranks = [_Rank(folder, range(_PIECES)) for _ in range(world_size)]
    load_all(ranks, straight=straight)
    for rank in ranks:
        rank.assert_loaded()
    assert sum(rank.store.read for rank in ranks) == len(_CONTENT)
    assert all(rank.store.read for rank in ranks), "reading is shared out"


def test_what_one_alone_needs_is_read_by_itself(folder: Path) -> None:
    ranks = [_Rank(folder, range(first, 30 + first)) for first in (0, 10)]
    load_all(ranks)
    for rank in ranks:
        rank.assert_loaded()
    assert sum(rank.store.read for rank in ranks) == len(_CONTENT)


def test_nothing_in_common_is_read_as_ever(folder: Path) -> None:
    ranks = [_Rank(folder, range(20)), _Rank(folder, range(20, 40)), _Rank(folder, [])]
    load_all(ranks)
    for rank in ranks:
        rank.assert_loaded()
    assert [rank.store.read for rank in ranks] == [20 * _PIECE, 20 * _PIECE, 0]


def test_what_does_not_fit_beside_the_others_is_read_alone(folder: Path) -> None:
    ranks = [_Rank(folder, range(_PIECES)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        loads = []
        for rank, circle in zip(ranks, circles([rank.lobby.door for rank in ranks]), strict=True):
            assert circle is not None
            shared = SharedReads(circle, rank.lobby, _PIECE, 30.0)  # less than two pieces
            downloader = Downloader(rank.store, 4, 4 << 20, {_NAME: len(_CONTENT)})
            wanted = {_NAME: rank.extents(straight=False)}
            loads.append(pool.submit(shared.read, downloader, wanted))
    for rank, load in zip(ranks, loads, strict=True):
        load.result()
        rank.assert_loaded()
        rank.lobby.close()
        assert rank.store.read == len(_CONTENT)


@pytest.mark.parametrize("late", [0, 1], ids=["the first", "another"])
def test_a_rank_that_does_not_come_is_gone_without(folder: Path, late: int) -> None:
    ranks = [_Rank(folder, range(_PIECES)) for _ in range(3)]
    members = circles([rank.lobby.door for rank in ranks])
    with ThreadPoolExecutor(3) as pool, within(60):
        loads = [pool.submit(ranks[at].load, members[at], 1.0) for at in range(3) if at != late]
    for load in loads:
        load.result()
    ranks[late].load(members[late], 1.0)
    for rank in ranks:
        rank.assert_loaded()


@pytest.mark.parametrize("straight", [True, False], ids=["into memory", "through a buffer"])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_fails_alone(folder: Path, failing: int, *, straight: bool) -> None:
    def fail(read: int) -> None:
        if read > 5 * _PIECE:
            raise OSError("the network is gone")

    ranks = [_Rank(folder, range(_PIECES), fail if at == failing else lambda _: None) for at in range(3)]
    members = circles([rank.lobby.door for rank in ranks])
    with ThreadPoolExecutor(3) as pool, within(60):
        loads = [
            pool.submit(rank.load, circle, straight=straight)
            for rank, circle in zip(ranks, members, strict=True)
        ]
    for at, load in enumerate(loads):
        if at == failing:
            assert load.exception() is not None
        else:
            load.result()
            ranks[at].assert_loaded()


def test_a_rank_that_stalls_is_gone_without(folder: Path) -> None:
    go_on = threading.Event()

    def stall(_: int) -> None:
        go_on.wait(60)

    ranks = [_Rank(folder, range(_PIECES), stall), _Rank(folder, range(_PIECES))]
    members = circles([rank.lobby.door for rank in ranks])
    with ThreadPoolExecutor(2) as pool:
        stalled = pool.submit(ranks[0].load, members[0], 1.0)
        with within(60):
            ranks[1].load(members[1], 1.0)
        go_on.set()
        stalled.result()
    for rank in ranks:
        rank.assert_loaded()


def test_who_can_no_longer_take_what_is_passed_on_costs_nobody_else_anything(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planner that fails on one rank fails that rank's load, and no other's."""

    def refuse() -> None:
        raise ValueError("not mine")

    ranks = [_Rank(folder, range(_PIECES)) for _ in range(3)]
    refusing = Extent(0, _PIECE, refuse, into=memoryview(ranks[2].memory[0]))
    rest = ranks[2].extents(straight=True)[1:]
    monkeypatch.setattr(ranks[2], "extents", lambda **_: [refusing, *rest])
    members = circles([rank.lobby.door for rank in ranks])
    with ThreadPoolExecutor(3) as pool, within(60):
        loads = [pool.submit(rank.load, circle) for rank, circle in zip(ranks, members, strict=True)]
    with pytest.raises(ValueError, match="not mine"):
        loads[2].result()
    for at in (0, 1):
        loads[at].result()
        ranks[at].assert_loaded()


def _killed(folder: Path, connection: Connection) -> None:
    def kill(read: int) -> None:
        if read > 8 * _PIECE:  # the second request of this rank
            time.sleep(0.5)  # what was read before is passed on by then
            os.kill(os.getpid(), signal.SIGKILL)

    rank = _Rank(folder, range(_PIECES), kill)
    connection.send(rank.lobby.door)
    rank.load(connection.recv())


@pytest.mark.parametrize("killed", [0, 1], ids=["the first", "another"])
def test_a_rank_that_is_killed_is_gone_without(folder: Path, killed: int) -> None:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(folder, theirs))
    process.start()
    theirs.close()
    rank = _Rank(folder, range(_PIECES))
    doors = [rank.lobby.door]
    doors.insert(killed, ours.recv())
    members = circles(doors)
    ours.send(members[killed])
    with within(100):
        rank.load(members[1 - killed])
    process.join()
    assert process.exitcode == -signal.SIGKILL
    rank.assert_loaded()
    assert rank.store.read < len(_CONTENT), "what came before it died is kept"
    ours.close()


def test_ranks_are_in_a_circle_with_those_of_their_host_alone() -> None:
    a, b = [Door("a", str(n)) for n in range(3)], [Door("b", str(n)) for n in range(2)]
    assert circles([a[0], b[0], None, a[1], Door("c", "0"), b[1], a[2]]) == [
        Circle(0, tuple(a)),
        Circle(0, tuple(b)),
        None,
        Circle(1, tuple(a)),
        None,
        Circle(1, tuple(b)),
        Circle(2, tuple(a)),
    ]
