"""Bodies of requests and answers that the event loop moves."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from botocore.config import Config
from botocore.session import Session

from cloudckpt.backends.stores.http import body_loop
from cloudckpt.backends.stores.http.botocore_session import use_connections
from cloudckpt.backends.stores.http.connections import AWS_POOLS, BrokenOffError, fill
from cloudckpt.backends.stores.http.rates import Rates, SlowConnectionError
from cloudckpt.backends.stores.http.request_body import BuffersBody
from support.certificate import self_signed

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
_BODY = random.Random(0).randbytes(3 << 20)


class _Answer:
    """urllib3's answer as far as ``fill`` knows it."""

    def __init__(self, response: HTTPResponse) -> None:
        self._fp = response
        self.released = False

    def release_conn(self) -> None:
        self.released = True


class _Pair:
    """Both ends of a connection, and an answer whose head has been sent."""

    def __init__(self, timeout: float | None, tls: Path | None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.client: socket.socket = socket.create_connection(listening.getsockname())
            self.server, _ = listening.accept()
        if tls is not None:
            context, trusted = self_signed(tls)
            ours = ssl.create_default_context(cafile=str(trusted))
            with ThreadPoolExecutor(1) as pool:
                accepted = pool.submit(context.wrap_socket, self.server, server_side=True)
                self.client = ours.wrap_socket(self.client, server_hostname="127.0.0.1")
                self.server = accepted.result()
        self.client.settimeout(timeout)
        self._responses: list[HTTPResponse] = []

    def answer(self, start: bytes) -> _Answer:
        self.server.sendall(start)
        response = HTTPResponse(self.client)
        response.begin()
        self._responses.append(response)
        return _Answer(response)

    def close(self) -> None:
        for response in self._responses:
            response.close()
        self.client.close()
        self.server.close()


@pytest.fixture(params=["plain", "tls"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., _Pair]]:
    with contextlib.ExitStack() as stack:

        def made(timeout: float | None = 30) -> _Pair:
            one = _Pair(timeout, tmp_path if request.param == "tls" else None)
            stack.callback(one.close)
            return one

        yield made


def _buffers(sizes: list[int]) -> tuple[bytearray, list[memoryview]]:
    data = bytearray(sum(sizes))
    views, at = [], 0
    for size in sizes:
        views.append(memoryview(data)[at : at + size])
        at += size
    return data, views


_SIZES = {
    "one buffer": [len(_BODY)],
    "two": [1, len(_BODY) - 1],
    "many small ones": [1000] * 3145 + [728],
    "small ones between large ones": [100, 1 << 20, 7, 1 << 20, 0, (1 << 20) - 107],
}


@pytest.mark.parametrize("ahead", [0, 1, 5000, 100_000])
@pytest.mark.parametrize("sizes", _SIZES.values(), ids=_SIZES)
def test_a_body_fills_its_buffers_in_order(pair: Callable[..., _Pair], sizes: list[int], ahead: int) -> None:
    both, arrived = pair(), list[int]()
    data, views = _buffers(sizes)
    answer = both.answer(_HEAD % len(_BODY) + _BODY[:ahead])
    sending = threading.Thread(target=both.server.sendall, args=(_BODY[ahead:],))
    sending.start()
    fill(answer, views, arrived.append)
    sending.join()
    assert data == _BODY
    assert arrived == sorted(arrived) and arrived[-1] == len(_BODY)
    assert answer.released and both.client.gettimeout() == 30
    assert both.client.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1


def test_a_connection_serves_one_body_after_another(pair: Callable[..., _Pair]) -> None:
    both = pair()
    for _ in range(3):
        data, views = _buffers([len(_BODY)])
        sending = threading.Thread(target=both.server.sendall, args=(_HEAD % len(_BODY) + _BODY,))
        sending.start()
        fill(both.answer(b""), views, None)
        sending.join()
        assert data == _BODY


@pytest.mark.parametrize("last", [1, 1000, 600_000])
def test_the_last_bytes_of_a_body_are_received_when_they_come(pair: Callable[..., _Pair], last: int) -> None:
    both = pair()
    data, views = _buffers([len(_BODY)])
    answer = both.answer(_HEAD % len(_BODY))
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(fill, answer, views, None)
        both.server.sendall(_BODY[:-last])
        time.sleep(0.1)
        both.server.sendall(_BODY[-last:])
        done.result(20)
    assert data == _BODY


def test_a_body_that_ends_early_is_an_error_that_says_where(pair: Callable[..., _Pair]) -> None:
    both = pair()
    answer = both.answer(_HEAD % len(_BODY) + _BODY[: 1 << 20])
    both.server.shutdown(socket.SHUT_WR)
    with pytest.raises(BrokenOffError, match=r"ended after .*bytes"):
        fill(answer, _buffers([len(_BODY)])[1], None)


def test_the_timeout_is_for_a_connection_without_a_byte(pair: Callable[..., _Pair]) -> None:
    """It holds although the kernel waits for many bytes."""
    both = pair(0.6)
    data, views = _buffers([1 << 19])
    answer = both.answer(_HEAD % (1 << 19))
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(fill, answer, views, None)
        for at in range(6):  # takes longer than the timeout
            both.server.sendall(_BODY[at << 16 : at + 1 << 16])
            time.sleep(0.25)
        assert not done.done()
        with pytest.raises(BrokenOffError, match="timed out"):
            done.result(20)
    assert data[: 6 << 16] == _BODY[: 6 << 16]
    assert both.client.gettimeout() == pytest.approx(0.6)


_TRICKLES = 200
"""Bytes that a peer sends or takes one by one, for longer than any timeout here."""


def test_a_body_that_trickles_in_is_given_up(pair: Callable[..., _Pair]) -> None:
    """A byte now and then is no progress."""
    both = pair(0.6)
    answer = both.answer(_HEAD % (1 << 19))
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(fill, answer, _buffers([1 << 19])[1], None)
        trickled = _trickle(done, lambda: both.server.sendall(b"x"))
        with pytest.raises(BrokenOffError, match="bytes in"):
            done.result(20)
    assert trickled < _TRICKLES


def test_a_body_that_trickles_out_is_given_up(pair: Callable[..., _Pair]) -> None:
    both = pair(0.6)
    body = BuffersBody([memoryview(bytes(32 << 20))])
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(body_loop.send, both.client, body.read, len(body))
        trickled = _trickle(done, lambda: both.server.recv(1))
        with pytest.raises(TimeoutError):
            done.result(20)
    assert trickled < _TRICKLES


def _trickle(done: Future[None], once: Callable[[], object]) -> int:
    """Send or take bytes one by one until the other end has given up; return how many."""
    for count in range(_TRICKLES):
        if done.done():
            return count
        once()
        time.sleep(0.05)
    return _TRICKLES


def test_bodies_that_share_a_slow_link_are_not_given_up(pair: Callable[..., _Pair]) -> None:
    """Each of them has its share of the least rate alone."""
    pairs = [pair(1.0) for _ in range(16)]
    answers = [both.answer(_HEAD % (1 << 19)) for both in pairs]
    with ThreadPoolExecutor(16) as pool:
        filled = [pool.submit(fill, answer, _buffers([1 << 19])[1], None) for answer in answers]
        for at in range(
            12
        ):  # 12 KiB in a quarter of a second: less than the least rate, and more than a share
            for both in pairs:
                both.server.sendall(_BODY[at * 6144 : (at + 1) * 6144])
            time.sleep(0.25)
        assert not any(one.done() for one in filled)
        for both in pairs:
            both.server.sendall(_BODY[12 * 6144 : 1 << 19])
        for one in filled:
            one.result(20)


def test_an_error_of_a_checksum_ends_its_own_body_alone(pair: Callable[..., _Pair]) -> None:
    bad, good = pair(), pair()

    def fail(_: int) -> None:
        raise ZeroDivisionError

    data, views = _buffers([len(_BODY)])
    with ThreadPoolExecutor(4) as pool:
        answers = [one.answer(_HEAD % len(_BODY)) for one in (bad, good)]
        sent = [pool.submit(one.server.sendall, _BODY) for one in (bad, good)]
        wrong = pool.submit(fill, answers[0], _buffers([len(_BODY)])[1], fail)
        right = pool.submit(fill, answers[1], views, None)
        with pytest.raises(ZeroDivisionError):
            wrong.result(20)
        right.result(20)
        bad.client.close()
        with contextlib.suppress(OSError):
            sent[0].result(20)
    assert data == _BODY


def test_many_bodies_are_moved_by_two_threads_at_most(pair: Callable[..., _Pair]) -> None:
    pairs = [pair() for _ in range(24)]
    filled = [_buffers([1 << 20]) for _ in pairs]
    with ThreadPoolExecutor(len(pairs)) as pool:
        answers = [one.answer(_HEAD % (1 << 20)) for one in pairs]
        done = [
            pool.submit(fill, answer, views, None) for answer, (_, views) in zip(answers, filled, strict=True)
        ]
        for one in pairs:
            one.server.sendall(_BODY[: 1 << 19])
        moving = [thread for thread in threading.enumerate() if thread.name.startswith("cloudckpt-bodies")]
        assert 1 <= len(moving) <= 2
        for one in pairs:
            one.server.sendall(_BODY[1 << 19 : 1 << 20])
        for future in done:
            future.result(20)
    assert all(data == _BODY[: 1 << 20] for data, _ in filled)


def test_a_body_is_sent_in_order_and_its_bytes_are_reported_once_they_are_sent(
    pair: Callable[..., _Pair],
) -> None:
    both, departed = pair(), list[int]()
    body = BuffersBody([memoryview(_BODY)[:100], memoryview(_BODY)[100:]], departed.append)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(_received, both.server, len(_BODY))
        body_loop.send(both.client, body.read, len(body))
        assert received.result(20) == _BODY
    assert departed[0] == 0 and departed[-1] == len(_BODY)


def _received(end: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (piece := end.recv(1 << 16)):
        data += piece
    return bytes(data)


def test_a_peer_that_takes_nothing_more_is_a_timeout(pair: Callable[..., _Pair]) -> None:
    both = pair(0.3)
    body = BuffersBody([memoryview(bytes(64 << 20))])
    with pytest.raises(TimeoutError):
        body_loop.send(both.client, body.read, len(body))


def test_an_interrupt_ends_a_body_and_gives_its_memory_back(pair: Callable[..., _Pair]) -> None:
    both = pair()
    data, views = _buffers([1 << 20])
    answer = both.answer(_HEAD % (1 << 20))
    interrupting = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, _interrupt)
    try:
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            fill(answer, views, None)
    finally:
        signal.signal(signal.SIGUSR1, before)
    both.server.sendall(_BODY[: 1 << 20])
    time.sleep(0.1)
    assert not any(data), "nothing writes into the memory any more"


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_forked_child_moves_bodies_by_a_loop_of_its_own(pair: Callable[..., _Pair]) -> None:
    both = pair()
    views = _buffers([len(_BODY)])[1]
    with ThreadPoolExecutor(1) as pool:
        answer = both.answer(_HEAD % len(_BODY))
        sent = pool.submit(both.server.sendall, _BODY)
        fill(answer, views, None)
        sent.result()
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            left, right = socket.socketpair()
            left.settimeout(10)
            right.sendall(_BODY[:1000])
            mine = bytearray(1000)
            body_loop.receive(left, iter([memoryview(mine)]), 1000)
            code = int(bytes(mine) != _BODY[:1000])
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


class TestSlowConnections:
    """A connection is cut when it is far slower than others, and not because all of them are slow."""

    class _Body:
        direction: Any = "down"
        unsent = seen = 0

        def __init__(self, nbytes: int, moved: int, seconds: float) -> None:
            self.nbytes, self.moved, self.began = nbytes, moved, time.monotonic() - seconds
            self.rate = moved / seconds if seconds else 0.0

    def _rates(self, *usual: float, busy: float = 0.1, latency: float = 0.03) -> Rates:
        held = Rates()
        held.answered(latency)
        for rate in usual:
            held.ended(self._Body(32 << 20, 32 << 20, (32 << 20) / rate))
        held.tick([self._Body(1 << 25, 1, 0.0)], 1.0, busy / 0.15)
        return held

    def test_one_in_twenty_that_is_ten_times_slower_is_cut_early(self) -> None:
        assert self._rates(*[90e6] * 19).is_slow(self._Body(32 << 20, int(9e6 * 0.6), 0.6))

    def test_nothing_is_cut_near_a_server(self) -> None:
        held = self._rates(*[90e6] * 19, latency=0.001)
        assert not held.is_slow(self._Body(32 << 20, int(9e6 * 0.6), 0.6))

    def test_a_pause_makes_no_slow_connection(self) -> None:
        body = self._Body(32 << 20, int(80e6 * 0.3), 0.6)
        body.rate = 1.0
        assert not self._rates(*[90e6] * 19).is_slow(body)

    def test_one_as_fast_as_others_is_not(self) -> None:
        assert not self._rates(*[90e6] * 19).is_slow(self._Body(32 << 20, int(60e6 * 0.5), 0.51))

    def test_nothing_is_cut_before_anything_is_known_to_be_usual(self) -> None:
        assert not self._rates(90e6).is_slow(self._Body(32 << 20, 1, 5.0))

    def test_one_that_is_nearly_done_is_not(self) -> None:
        assert not self._rates(*[90e6] * 8).is_slow(self._Body(32 << 20, (32 << 20) - (1 << 18), 8.0))

    def test_where_rates_differ_widely_by_themselves_none_stands_out(self) -> None:
        widely = [5e6, 6e6, 7e6, 8e6, 90e6, 90e6, 90e6, 90e6]
        assert not self._rates(*widely).is_slow(self._Body(32 << 20, int(4e6), 1.0))

    def test_where_the_processor_is_the_limit_none_is_cut(self) -> None:
        assert not self._rates(*[90e6] * 8, busy=0.95).is_slow(self._Body(32 << 20, 1 << 20, 1.0))

    def test_few_are_cut_where_nearly_all_have_become_slow(self) -> None:
        held = self._rates(*[90e6] * 19)
        slow = [self._Body(32 << 20, 1 << 20, 1.0) for _ in range(20)]
        assert sum(map(held.is_slow, slow)) == 3

    def test_the_body_of_a_cut_connection_is_an_error_for_a_retry(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        both, held = _Pair(30, None), Rates()
        held.answered(0.03)
        monkeypatch.setattr(body_loop, "rates", lambda: held)
        for _ in range(8):
            held.ended(self._Body(32 << 20, 32 << 20, 0.3))
        with contextlib.closing(both):
            answer = both.answer(_HEAD % (32 << 20) + bytes(1 << 16))
            with pytest.raises(BrokenOffError) as raised:
                fill(answer, [memoryview(bytearray(32 << 20))], None)
        assert isinstance(raised.value.__cause__, SlowConnectionError)


def test_botocore_still_has_the_private_names_that_its_connections_are_replaced_by() -> None:
    client: Any = Session().create_client(
        "s3", region_name="us-east-1", config=Config(signature_version="s3v4")
    )
    use_connections(client)
    session = client._endpoint.http_session
    assert session._manager.pool_classes_by_scheme == AWS_POOLS == session._pool_classes_by_scheme


def test_a_small_body_is_moved_by_the_thread_that_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_loop, "receive", None)
    both = _Pair(30, None)
    with contextlib.closing(both):
        data, views = _buffers([1000])
        fill(both.answer(_HEAD % 1000 + _BODY[:1000]), views, None)
        assert data == _BODY[:1000]
