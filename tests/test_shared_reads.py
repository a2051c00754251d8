"""Ranks of one host read together what they need in common; whatever fails in that, each still has it all."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloudckpt.backends.errors import IntegrityError
from cloudckpt.backends.load import shared_reader
from cloudckpt.backends.load.peer_transport import PeerAddress
from cloudckpt.backends.load.shared_reader import PeerGroup, SharedReads, circles
from cloudckpt.backends.transfer.byte_ranges import Arrival, Extent
from cloudckpt.backends.transfer.downloader import Downloader
from support.executors import within
from support.sharers import CONTENT, NAME, PIECE, PIECES, Rank, expected_of, killed_after_passing_on


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / NAME).write_bytes(CONTENT)
    return tmp_path


def load_all(ranks: Sequence[Rank], patience: float = 30.0, *, straight: bool = True) -> None:
    with ThreadPoolExecutor(len(ranks)) as pool:
        loads = [
            pool.submit(rank.load, circle, patience, straight=straight)
            for rank, circle in zip(ranks, circles([rank.listener.door for rank in ranks]), strict=True)
        ]
    for load in loads:
        load.result()


@pytest.mark.parametrize("straight", [True, False], ids=["into memory", "through a buffer"])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_what_all_need_is_read_once(folder: Path, world_size: int, *, straight: bool) -> None:
    ranks = [Rank(folder, range(PIECES)) for _ in range(world_size)]
    load_all(ranks, straight=straight)
    for rank in ranks:
        rank.assert_loaded()
    assert sum(rank.store.read for rank in ranks) == len(CONTENT)
    assert all(rank.store.read for rank in ranks), "reading is shared out"


def test_what_one_alone_needs_is_read_by_itself(folder: Path) -> None:
    ranks = [Rank(folder, range(first, 30 + first)) for first in (0, 10)]
    load_all(ranks)
    for rank in ranks:
        rank.assert_loaded()
    assert sum(rank.store.read for rank in ranks) == len(CONTENT)


def test_nothing_in_common_is_read_as_ever(folder: Path) -> None:
    ranks = [Rank(folder, range(20)), Rank(folder, range(20, 40)), Rank(folder, [])]
    load_all(ranks)
    for rank in ranks:
        rank.assert_loaded()
    assert [rank.store.read for rank in ranks] == [20 * PIECE, 20 * PIECE, 0]


def test_what_does_not_fit_beside_the_others_is_read_alone(folder: Path) -> None:
    ranks = [Rank(folder, range(PIECES)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        loads = []
        for rank, circle in zip(ranks, circles([rank.listener.door for rank in ranks]), strict=True):
            assert circle is not None
            shared = SharedReads(circle, rank.listener, PIECE, 30.0)  # room for half a piece
            downloader = Downloader(rank.store, 4, 4 << 20, {NAME: len(CONTENT)})
            wanted = {NAME: rank.extents(straight=False)}
            loads.append(pool.submit(shared.read, downloader, wanted))
    for rank, load in zip(ranks, loads, strict=True):
        load.result()
        rank.assert_loaded()
        rank.listener.close()
        assert rank.store.read == len(CONTENT)


@pytest.mark.parametrize("late", [0, 1], ids=["the first", "another"])
def test_a_rank_that_does_not_come_is_gone_without(folder: Path, late: int) -> None:
    ranks = [Rank(folder, range(PIECES)) for _ in range(3)]
    members = circles([rank.listener.door for rank in ranks])
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
        if read > 5 * PIECE:
            raise OSError("the network is gone")

    ranks = [Rank(folder, range(PIECES), fail if at == failing else lambda _: None) for at in range(3)]
    members = circles([rank.listener.door for rank in ranks])
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

    ranks = [Rank(folder, range(PIECES), stall), Rank(folder, range(PIECES))]
    members = circles([rank.listener.door for rank in ranks])
    with ThreadPoolExecutor(2) as pool:
        stalled = pool.submit(ranks[0].load, members[0], 1.0)
        with within(60):
            ranks[1].load(members[1], 1.0)
        go_on.set()
        stalled.result()
    for rank in ranks:
        rank.assert_loaded()


def test_what_is_overwritten_before_it_is_passed_on_harms_no_other_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank passes on from its own state, where another entry may share the memory and be loaded, too."""
    pass_on = SharedReads._pass_on

    def overwritten(self: Any, number: int, ranks: Sequence[int], arrivals: Sequence[Arrival]) -> None:
        if self._circle.own == 0:
            arrivals[-1].body[:100] = bytes(100)
        pass_on(self, number, ranks, arrivals)

    monkeypatch.setattr(SharedReads, "_pass_on", overwritten)
    ranks = [Rank(folder, range(PIECES)) for _ in range(3)]
    load_all(ranks)
    for rank in ranks[1:]:
        rank.assert_loaded()


def test_what_has_no_checksum_is_read_by_each_rank(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Rank(folder, range(PIECES)) for _ in range(2)]
    for rank in ranks:
        plain = [replace(extent, expected=None) for extent in rank.extents(straight=True)]
        monkeypatch.setattr(rank, "extents", lambda plain=plain, **_: plain)
    load_all(ranks)
    for rank in ranks:
        rank.assert_loaded()
        assert rank.store.read == len(CONTENT)


def test_damage_is_found_by_every_rank(folder: Path) -> None:
    path = folder / NAME
    path.write_bytes(CONTENT[: 5 * PIECE] + b"damage" + CONTENT[5 * PIECE + 6 :])
    ranks = [Rank(folder, range(PIECES)) for _ in range(3)]
    members = circles([rank.listener.door for rank in ranks])
    with ThreadPoolExecutor(3) as pool, within(60):
        loads = [pool.submit(rank.load, circle) for rank, circle in zip(ranks, members, strict=True)]
    for load in loads:
        with pytest.raises(IntegrityError, match="piece 5"):
            load.result()


def test_a_first_rank_that_never_comes_is_not_waited_for_as_long_as_a_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_reader, "_MEETING", 0.5)
    ranks = [Rank(folder, range(PIECES)) for _ in range(2)]
    members = circles([rank.listener.door for rank in ranks])
    with within(60):
        ranks[1].load(members[1], 600.0)
    ranks[1].assert_loaded()
    ranks[0].listener.close()


def test_who_can_no_longer_take_what_is_passed_on_costs_nobody_else_anything(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planner that fails on one rank fails that rank's load, and no other's."""

    def refuse() -> None:
        raise ValueError("not mine")

    ranks = [Rank(folder, range(PIECES)) for _ in range(3)]
    refusing = Extent(0, PIECE, refuse, into=memoryview(ranks[2].memory[0]), expected=expected_of(0))
    rest = ranks[2].extents(straight=True)[1:]
    monkeypatch.setattr(ranks[2], "extents", lambda **_: [refusing, *rest])
    members = circles([rank.listener.door for rank in ranks])
    with ThreadPoolExecutor(3) as pool, within(60):
        loads = [pool.submit(rank.load, circle) for rank, circle in zip(ranks, members, strict=True)]
    with pytest.raises(ValueError, match="not mine"):
        loads[2].result()
    for at in (0, 1):
        loads[at].result()
        ranks[at].assert_loaded()


@pytest.mark.parametrize("killed", [0, 1], ids=["the first", "another"])
def test_a_rank_that_is_killed_is_gone_without(folder: Path, killed: int) -> None:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=killed_after_passing_on, args=(folder, theirs)
    )
    process.start()
    theirs.close()
    rank = Rank(folder, range(PIECES))
    doors = [rank.listener.door]
    doors.insert(killed, ours.recv())
    members = circles(doors)
    ours.send(members[killed])
    with within(100):
        rank.load(members[1 - killed])
    process.join()
    assert process.exitcode == -signal.SIGKILL
    rank.assert_loaded()
    assert rank.store.read < len(CONTENT), "what came before it died is kept"
    ours.close()


def test_ranks_are_in_a_circle_with_those_of_their_host_alone() -> None:
    a = [PeerAddress("a", str(n), 256 << 20) for n in range(3)]
    b = [PeerAddress("b", str(n), 256 << 20) for n in range(2)]
    assert circles([a[0], b[0], None, a[1], PeerAddress("c", "0", 256 << 20), b[1], a[2]]) == [
        PeerGroup(0, tuple(a)),
        PeerGroup(0, tuple(b)),
        None,
        PeerGroup(1, tuple(a)),
        None,
        PeerGroup(1, tuple(b)),
        PeerGroup(2, tuple(a)),
    ]


def test_ranks_with_too_little_memory_for_each_other_read_alone() -> None:
    """Small pieces are widened to whole chunks, so more would be read together than by each rank alone."""

    def met(*memory_limits: int) -> bool:
        return all(circles([PeerAddress("a", str(n), limit) for n, limit in enumerate(memory_limits)]))

    assert met(*[64 << 20] * 8)
    assert not met(*[32 << 20] * 8)
    assert met(16 << 20, 256 << 20)
    assert not met(1 << 20, 256 << 20)
