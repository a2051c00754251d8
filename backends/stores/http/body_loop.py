"""An event loop that moves the bodies of HTTP requests and answers over any number of connections.

The thread that makes a request sends its head and reads the head of its answer. It hands the socket over for
the body, and sleeps until the body has been moved. A few threads, one in most processes, serve the sockets of
all bodies by a selector. So a process can have as many connections as a distant server needs, and no more
than a few threads compete for the interpreter's lock. With TLS each call into OpenSSL moves at most 16 KiB,
and a thread for each connection would take the lock 65,536 times a GiB, each time from the others.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Final

from cloudckpt.backends.stores.http.bodies import Body, Receiving, Sending, Source
from cloudckpt.backends.stores.http.rates import LEAST, SlowConnectionError, rates
from cloudckpt.backends.system import descriptors, system_limits

_TICK: Final = 0.05
"""Seconds between two looks at the clock: for timeouts and slow connections."""
_LATE: Final = 1.0
"""Seconds between two looks from which the thread was kept from running."""
_IDLE: Final = 2.0
"""Seconds without a body after which the thread of a loop ends."""
_CPUS_FOR_TWO: Final = 2
"""Processors a rank from which two threads send."""
_CPUS_TO_RECEIVE: Final = 4
"""Processors a rank from which two threads receive. On fewer, that takes a tenth more of them."""


def movable(connection: object) -> bool:
    """Return True for a socket that a loop can serve: the operating system's, plain or with TLS."""
    return type(connection) is socket.socket or isinstance(connection, ssl.SSLSocket)


def receive(connection: socket.socket, views: Iterator[memoryview], nbytes: int) -> None:
    """Fill views from a socket.

    Args:
        connection: a socket that :func:`movable` accepts. Its timeout limits the seconds without a byte.
        views: yields the memory to fill, in order; a view is full when the next one is taken. It runs on the
            thread of a loop.
        nbytes: the size of all views.

    Raises:
        EOFError: the peer closed the connection.
        SlowConnectionError: the connection is much slower than others.
        OSError: the connection failed, or its timeout passed.
        Exception: an exception that ``views`` raised.
    """
    _loop(_CPUS_TO_RECEIVE).move(Receiving(connection, views, nbytes))


def send(connection: socket.socket, source: Source, nbytes: int) -> None:
    """Send bytes to a socket.

    Args:
        connection: a socket that :func:`movable` accepts. Its timeout limits the seconds without a byte.
        source: returns the bytes, view by view; a view has been sent when the next one is asked for. It runs
            on the thread of a loop.
        nbytes: how many there are.

    Raises:
        SlowConnectionError: the connection is much slower than others.
        OSError: the connection failed, or its timeout passed.
        Exception: an exception that ``source`` raised.
    """
    _loop(_CPUS_FOR_TWO).move(Sending(connection, source, nbytes))


class _Loop:
    """One thread and its selector. The thread ends when it has had nothing to do for a while."""

    def __init__(self, number: int) -> None:
        self._name = f"cloudckpt-bodies-{number}"
        self._lock = threading.Lock()
        self._coming: deque[Body] = deque()
        self._thread: threading.Thread | None = None
        self._bodies: dict[Body, int] = {}
        """The bodies that are being moved, and the events that each one's socket is registered for."""
        self._hot: set[Body] = set()
        """Bodies whose turn was over before their sockets were empty."""
        self._selector: selectors.BaseSelector
        self._waker: socket.socket
        self.load = 0
        """Bodies that it has."""

    def move(self, body: Body) -> None:
        """Move a body, while the calling thread waits."""
        body.connection.settimeout(0)
        try:
            self._submit(body)
            try:
                body.wait()
            except BaseException:  # an interrupt: the memory is the caller's again, once the loop knows
                body.is_cancelled = True
                self._wake()
                while not body.has_ended:
                    with contextlib.suppress(KeyboardInterrupt):  # the one that is being raised will do
                        body.wait()
                raise
        finally:
            if body.connection.fileno() >= 0:
                body.connection.settimeout(body.timeout)
        if body.error is not None:
            raise body.error

    def _submit(self, body: Body) -> None:
        with self._lock:
            if self._thread is None:
                self._begin()
            self.load += 1
            self._coming.append(body)
        self._wake()

    def _begin(self) -> None:
        """Start the thread, which has nothing to do yet.

        Raises:
            OSError: there is no descriptor left.
            ExecutorError: no thread can be started.
        """
        woken, self._waker = descriptors.socket_pair()
        try:
            for end in (woken, self._waker):
                end.setblocking(False)
            self._selector = selectors.DefaultSelector()
        except BaseException:
            woken.close()
            self._waker.close()
            raise
        try:
            self._selector.register(woken, selectors.EVENT_READ)
            self._thread = threading.Thread(target=self._run, args=(woken,), name=self._name, daemon=True)
            system_limits.start(self._thread)
        except BaseException:
            self._close(woken)
            raise

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake; or closed: it has ended with all its bodies
            self._waker.send(b"\0")

    def _close(self, woken: socket.socket) -> None:
        self._thread = None
        self._selector.close()
        woken.close()
        self._waker.close()

    def _run(self, woken: socket.socket) -> None:
        try:
            self._serve(woken)
        except BaseException as error:
            with self._lock:
                self._close(woken)
                left = [*self._bodies, *self._coming]
                self._bodies.clear()
                self._coming.clear()
                self._hot.clear()
                self.load = 0
            for body in left:  # no thread must wait for ever
                body.end(error)
            raise

    def _serve(self, woken: socket.socket) -> None:
        idle_since = looked = time.monotonic()
        cpu = time.thread_time()
        while True:
            self._take_in()
            wait = 0.0 if self._hot else (_TICK if self._bodies else _IDLE)
            ready = self._selector.select(wait)
            hot, self._hot = self._hot, set()
            for key, _ in ready:
                if key.data is None:
                    _drain(woken)
                else:
                    hot.add(key.data)
            for body in hot:
                self._pump(body)
            now = time.monotonic()
            if now - looked >= _TICK:
                used, cpu = time.thread_time() - cpu, time.thread_time()
                rates().tick(self._bodies, now - looked, used)
                late, looked = now - looked, now
                self._look_at_the_clock(now, late if late > _LATE else 0.0)
            if self._bodies:
                idle_since = now
            elif now - idle_since >= _IDLE and self._ends(woken):
                return

    def _ends(self, woken: socket.socket) -> bool:
        with self._lock:
            if self._coming:
                return False
            self._close(woken)
            return True

    def _take_in(self) -> None:
        while self._coming:
            body = self._coming.popleft()
            self._bodies[body] = 0
            body.began = body.progressed = body.period = time.monotonic()
            # OpenSSL may hold bytes of the body already, and a socket has mostly room to send.
            self._hot.add(body)

    def _pump(self, body: Body) -> None:
        if body.has_ended:
            return
        before = body.moved
        try:
            if body.is_cancelled:
                raise InterruptedError("the transfer was cancelled")  # the thread that waits raises its own
            if body.pump():
                self._end(body, None)
                return
            self._hot.add(body)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            try:
                self._await(body, error)
            except OSError as failed:
                self._end(body, failed)
        except BaseException as error:  # noqa: BLE001 - the thread that waits raises it
            self._end(body, error)
            return
        if body.moved != before:
            body.progressed = time.monotonic()

    def _await(self, body: Body, error: BaseException) -> None:
        """Have the selector report the socket once the body can go on."""
        events = body.events
        if isinstance(error, ssl.SSLWantReadError):
            events = selectors.EVENT_READ
        elif isinstance(error, ssl.SSLWantWriteError):
            events = selectors.EVENT_WRITE
        if isinstance(body, Receiving):
            body.wake_late()
        if not self._bodies[body]:
            self._selector.register(body.connection, events, body)
        elif self._bodies[body] != events:
            self._selector.modify(body.connection, events, body)
        self._bodies[body] = events

    def _end(self, body: Body, error: BaseException | None) -> None:
        is_registered = bool(self._bodies.pop(body, 0))
        self._hot.discard(body)
        try:
            if is_registered:
                with contextlib.suppress(KeyError, ValueError, OSError):  # of a socket that was closed
                    self._selector.unregister(body.connection)
            with self._lock:
                self.load -= 1
            if error is None:
                rates().ended(body)
        finally:
            body.end(error)

    def _look_at_the_clock(self, now: float, late: float) -> None:
        """Look for bodies that have stalled, trickle, or are slow.

        Args:
            now: the time.
            late: seconds for which this thread did not run, as in a process that was stopped.
        """
        count = len(self._bodies)
        for body in list(self._bodies):
            body.sharing = max(body.sharing, count)
            body.period += late
            if body.is_cancelled:
                self._pump(body)
            elif body.timeout is not None and now - body.progressed > body.timeout:
                self._pump(body)  # fewer bytes may have come than the kernel reports the socket for
                if not body.has_ended and now - body.progressed > body.timeout:
                    self._end(body, TimeoutError("timed out"))
            elif body.timeout is not None and now - body.period > body.timeout:
                self._pump(body)
                if not body.has_ended:
                    self._end_period(body, now, body.timeout)
            elif rates().is_slow(body):
                self._end(body, SlowConnectionError(f"{body.moved:,} bytes in {now - body.began:.1f} s"))

    def _end_period(self, body: Body, now: float, seconds: float) -> None:
        """Begin another period of a body, or end a body that trickles."""
        moved = body.moved - body.before
        if moved * body.sharing < seconds * LEAST:
            self._end(body, TimeoutError(f"{moved:,} bytes in {now - body.period:.0f} s"))
        else:
            body.period, body.before, body.sharing = now, body.moved, 1


def _drain(woken: socket.socket) -> None:
    try:
        while woken.recv(4096):
            pass
    except BlockingIOError:
        pass


_loops: dict[int, tuple[_Loop, _Loop]] = {}
_lock = threading.Lock()


def _loop(processors: int) -> _Loop:
    """Return a loop of this process: the one that has fewer bodies, where a rank has so many processors.

    A forked child has loops of its own.
    """
    process = os.getpid()
    loops = _loops.get(process)
    if loops is None:
        with _lock:
            _loops.clear()
            loops = _loops.setdefault(process, (_Loop(0), _Loop(1)))
    if system_limits.processors_a_rank() < processors:
        return loops[0]
    return min(loops, key=lambda loop: loop.load)


def _forget() -> None:
    """Drop what a forked child has of its parent's: the locks may have been held as it was forked."""
    global _lock  # noqa: PLW0603
    _loops.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
