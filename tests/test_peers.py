"""Ranks of one host reach each other; what is gone, silent or another user's is lost at once or in time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cloudckpt.backends.load.peer_transport import (
    LostPeerError,
    PeerAddress,
    PeerConnection,
    PeerListener,
    Purpose,
    call,
)
from support.executors import within


@pytest.fixture
def listener() -> Iterator[PeerListener]:
    opened = PeerListener("a checkpoint", 1 << 20)
    yield opened
    opened.close()


@pytest.fixture
def pair() -> Iterator[tuple[PeerConnection, PeerConnection]]:
    first, second = socket.socketpair()
    with PeerConnection(first, 1.0) as one, PeerConnection(second, 1.0) as other:
        yield one, other


def test_callers_are_told_apart_by_rank_and_purpose(listener: PeerListener) -> None:
    calls = [(Purpose.BYTES, 2), (Purpose.PLAN, 1), (Purpose.PLAN, 2)]
    links = [call(listener.door, purpose, rank, 5.0) for purpose, rank in calls]
    for link, told in zip(links, calls, strict=True):
        link.say(told)
    found = listener.expect(Purpose.PLAN, [1, 2], 5.0, 5.0)
    assert {rank: link.hear() for rank, link in found.items()} == {
        1: (Purpose.PLAN, 1),
        2: (Purpose.PLAN, 2),
    }
    late = listener.expect(Purpose.BYTES, [2], 5.0, 5.0)
    assert late[2].hear() == (Purpose.BYTES, 2)
    for link in [*links, *found.values(), *late.values()]:
        link.close()


def test_who_does_not_call_is_not_waited_for_longer_than_said(listener: PeerListener) -> None:
    with call(listener.door, Purpose.PLAN, 1, 5.0), within(30):
        found = listener.expect(Purpose.PLAN, [1, 2], 0.2, 5.0)
    assert list(found) == [1]
    found[1].close()


def test_a_door_that_is_closed_is_noticed_at_once(listener: PeerListener) -> None:
    listener.close()
    with within(30), pytest.raises(LostPeerError):
        call(listener.door, Purpose.PLAN, 1, 600.0)


def test_many_buffers_arrive_in_others_of_other_sizes(pair: tuple[PeerConnection, PeerConnection]) -> None:
    one, other = pair
    data = os.urandom(5_000_000)
    sent = [memoryview(data)[at : at + 1013] for at in range(0, len(data), 1013)]
    room = bytearray(len(data))
    filled = [memoryview(room)[at : at + 700_001] for at in range(0, len(room), 700_001)]
    thread = threading.Thread(target=one.send, args=([memoryview(b""), *sent],))
    thread.start()
    other.fill([filled[0], memoryview(bytearray()), *filled[1:]])
    thread.join()
    assert room == data


def test_one_that_says_nothing_is_lost_after_a_while(pair: tuple[PeerConnection, PeerConnection]) -> None:
    with within(30), pytest.raises(LostPeerError):
        pair[0].hear()


def test_one_that_does_not_listen_is_lost_after_a_while(pair: tuple[PeerConnection, PeerConnection]) -> None:
    with within(30), pytest.raises(LostPeerError):
        pair[0].send([memoryview(bytes(64 << 20))])


def test_one_that_ends_is_lost_at_once() -> None:
    first, second = socket.socketpair()
    with PeerConnection(first, 600.0) as one:
        PeerConnection(second, 600.0).close()
        with within(30), pytest.raises(LostPeerError):
            one.hear()
        with within(30), pytest.raises(LostPeerError):
            one.send([memoryview(bytes(64 << 20))])


def test_a_caller_that_says_nothing_keeps_nobody_waiting(listener: PeerListener) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect("\0" + listener.door.address)
        with within(30):
            assert listener.expect(Purpose.PLAN, [1], 0.2, 600.0) == {}


@pytest.mark.parametrize("said", [b"no pickle", (1 << 62).to_bytes(8, "little")])
def test_what_can_not_be_understood_is_no_word_of_a_peer(
    pair: tuple[PeerConnection, PeerConnection], said: bytes
) -> None:
    one, other = pair
    head = b"" if len(said) == 8 else len(said).to_bytes(8, "little")
    one.send([memoryview(head), memoryview(said)])
    with within(30), pytest.raises(LostPeerError):
        other.hear()


def test_one_that_stops_in_the_middle_is_waited_for_no_longer_than_at_the_start() -> None:
    first, second = socket.socketpair()
    with PeerConnection(first, 600.0) as one, PeerConnection(second, 1.0) as other:
        one.send([memoryview(b"ten of 20.")])
        began = time.monotonic()
        with pytest.raises(LostPeerError, match="stood still"):
            other.fill([memoryview(bytearray(20))])
        assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize("patience", [1e-9, 1e30])
def test_any_patience_will_do(listener: PeerListener, patience: float) -> None:
    link = call(listener.door, Purpose.PLAN, 1, max(patience, 1.0))
    link.bound(patience)
    link.close()


def test_closing_wakes_who_waits() -> None:
    first, second = socket.socketpair()
    lost = threading.Event()

    def wait() -> None:
        with pytest.raises(LostPeerError):
            one.hear()
        lost.set()

    with PeerConnection(first, 600.0) as one, PeerConnection(second, 600.0):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)  # more often than not it waits by then
        one.close()
        assert lost.wait(30)
        thread.join()


INTRUDER = """
import os, socket, struct, sys
os.setuid(65534)
connection = socket.socket(socket.AF_UNIX)
connection.connect(chr(0) + sys.argv[1])
try:
    connection.sendall(struct.pack("@BI", int(sys.argv[2]), 1))
    heard = connection.recv(100)
except ConnectionError:
    heard = b""
sys.exit(f"heard {heard!r}")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_turned_away(listener: PeerListener) -> None:
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(listener.expect, Purpose.BYTES, [1], 30.0, 5.0)
        intruder = subprocess.run(
            [sys.executable, "-c", INTRUDER, listener.door.address, str(Purpose.BYTES.value)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert intruder.stderr == "heard b''\n"
        with call(listener.door, Purpose.BYTES, 1, 5.0) as ours:
            ours.say("the right one")
            with found.result()[1] as link:
                assert link.hear() == "the right one"


def test_a_listener_is_for_one_checkpoint_as_one_host_sees_it(listener: PeerListener) -> None:
    other = PeerListener("another checkpoint", 1 << 20)
    other.close()
    assert isinstance(listener.door, PeerAddress)
    assert listener.door.host != other.door.host
    assert listener.door.address != other.door.address
