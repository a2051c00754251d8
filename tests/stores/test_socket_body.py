"""Answers that are read from their socket with the kernel's own timeout."""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPResponse

import pytest

from cloudckpt.backends.stores.socket_body import read_blocking

_HEADERS = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
_BODY = random.Random(0).randbytes(3 << 20)


class _Exchange:
    """An answer whose headers have been read, and the server's end of its connection."""

    def __init__(self, timeout: float | None, start: bytes) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.client = socket.create_connection(listening.getsockname())
            self.server, _ = listening.accept()
        self.client.settimeout(timeout)
        self.server.sendall(start)
        self.response = HTTPResponse(self.client)
        self.response.begin()

    def close(self) -> None:
        self.response.close()
        self.client.close()
        self.server.close()


@contextlib.contextmanager
def _exchanged(timeout: float | None, start: bytes) -> Iterator[_Exchange]:
    with contextlib.closing(_Exchange(timeout, start)) as exchange:
        yield exchange


def _read(response: HTTPResponse, size: int) -> bytes:
    data, filled = bytearray(size), 0
    while filled < size and (got := response.readinto(memoryview(data)[filled:])):
        filled += got
    return bytes(data[:filled])


@pytest.mark.parametrize("ahead", [0, 1, 5000, 100_000])
@pytest.mark.parametrize("first", [1, 100, 9000, 1 << 20])
def test_what_was_read_ahead_and_what_follows_are_one_body(ahead: int, first: int) -> None:
    with _exchanged(30, _HEADERS % len(_BODY) + _BODY[:ahead]) as exchange:
        assert read_blocking(exchange.response)
        sending = threading.Thread(target=exchange.server.sendall, args=(_BODY[ahead:],))
        sending.start()
        assert _read(exchange.response, first) == _BODY[:first]
        assert _read(exchange.response, len(_BODY) - first) == _BODY[first:]
        sending.join()
        assert exchange.response.isclosed()


def test_a_large_buffer_is_filled_by_one_call_however_often_data_come() -> None:
    with _exchanged(30, _HEADERS % len(_BODY) + _BODY[:10]) as exchange:
        assert read_blocking(exchange.response)

        def trickle() -> None:
            for at in range(10, len(_BODY), 1 << 18):
                exchange.server.sendall(_BODY[at : at + (1 << 18)])
                time.sleep(0.01)

        sending = threading.Thread(target=trickle)
        sending.start()
        data = bytearray(len(_BODY))
        assert exchange.response.readinto(data) == len(_BODY)
        assert data == _BODY
        sending.join()


def test_a_reader_sleeps_until_much_has_come() -> None:
    sent = 1 << 14
    with _exchanged(30, _HEADERS % len(_BODY)) as exchange:
        assert read_blocking(exchange.response)

        def trickle() -> None:
            for at in range(0, len(_BODY), sent):
                exchange.server.sendall(_BODY[at : at + sent])
                time.sleep(0.001)  # enough for a reader to wake, and sleep again

        sending = threading.Thread(target=trickle)
        data = bytearray(len(_BODY))
        sending.start()
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        assert exchange.response.readinto(data) == len(_BODY)
        woken = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - before
        sending.join()
        assert data == _BODY
        assert woken < len(_BODY) // sent / 2


@pytest.mark.parametrize("last", [1, 1000, 600_000])
def test_the_last_bytes_of_a_body_are_not_waited_for_in_vain(last: int) -> None:
    data = bytearray(len(_BODY))
    with _exchanged(None, _HEADERS % len(_BODY)) as exchange:
        assert read_blocking(exchange.response)
        reading = threading.Thread(target=exchange.response.readinto, args=(data,))
        reading.start()
        exchange.server.sendall(_BODY[:-last])
        time.sleep(0.1)  # the reader has taken what there was
        exchange.server.sendall(_BODY[-last:])
        reading.join(10)
        waits = reading.is_alive()
        exchange.server.shutdown(socket.SHUT_WR)
        reading.join()
        assert not waits
        assert data == _BODY


@pytest.mark.parametrize("read", [1 << 20, len(_BODY)])
def test_a_connection_is_given_back_as_it_was(read: int) -> None:
    with _exchanged(30, _HEADERS % len(_BODY)) as exchange:
        assert read_blocking(exchange.response)
        sending = threading.Thread(target=exchange.server.sendall, args=(_BODY[:read],))
        sending.start()
        assert exchange.response.readinto(bytearray(read)) == read
        sending.join()
        exchange.response.close()
        assert exchange.client.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1
        assert exchange.client.gettimeout() == pytest.approx(30)


def test_the_timeout_holds_and_comes_back_with_the_connection() -> None:
    with _exchanged(0.05, _HEADERS % 100 + b"x" * 60) as exchange:
        assert read_blocking(exchange.response)
        assert exchange.client.gettimeout() is None
        assert _read(exchange.response, 60) == b"x" * 60
        with pytest.raises(TimeoutError):
            exchange.response.readinto(bytearray(40))
        exchange.server.sendall(b"y" * 40)
        assert _read(exchange.response, 40) == b"y" * 40
        assert exchange.response.isclosed()
        assert exchange.client.gettimeout() == pytest.approx(0.05)


def test_what_has_come_when_the_time_is_up_is_not_lost() -> None:
    with _exchanged(0.05, _HEADERS % 100_000 + b"x" * 60_000) as exchange:
        assert read_blocking(exchange.response)
        data = bytearray(100_000)
        assert exchange.response.readinto(data) == 60_000
        exchange.server.sendall(b"y" * 40_000)
        assert _read(exchange.response, 40_000) == b"y" * 40_000


def test_the_end_of_a_body_that_breaks_off_is_an_end() -> None:
    with _exchanged(None, _HEADERS % 100 + b"x" * 60) as exchange:
        assert read_blocking(exchange.response)
        exchange.server.close()
        assert _read(exchange.response, 100) == b"x" * 60


def test_an_answer_in_chunks_is_left_alone() -> None:
    start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    with _exchanged(30, start) as exchange:
        assert not read_blocking(exchange.response)
        assert exchange.client.gettimeout() == pytest.approx(30)
        assert exchange.response.read() == b"abc"
