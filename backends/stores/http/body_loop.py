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
from collections.abc import Callable, Iterator
from typing import Final

from cloudckpt.backends import system_limits
from cloudckpt.backends.stores.http.rates import Direction, SlowConnectionError, rates, unsent_bytes

_TURN: Final = 4 << 20
"""Bytes that one connection moves before the next one has its turn."""
_TICK: Final = 0.05
"""Seconds between two looks at the clock: for timeouts and slow connections."""
_IDLE: Final = 2.0
"""Seconds without a body after which the thread of a loop ends."""
_WAKE_AT: Final = 512 << 10
"""Bytes that have arrived when the kernel reports a socket as readable, unless fewer are left of the body."""
_RECORD: Final = 17 << 10
"""Bytes of a TLS record. OpenSSL can hold as many that the kernel does not count any more."""
_CPUS_FOR_TWO: Final = 2
"""Processors a rank from which a process has two loops."""

Source = Callable[[], memoryview]
"""Returns the next bytes to send, or an empty view at the end."""


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
    _loop().move(_Receiving(connection, views, nbytes))


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
    _loop().move(_Sending(connection, source, nbytes))


class _Body:
    """A body that a loop moves for a thread that waits."""

    direction: Direction
    events: int

    def __init__(self, connection: socket.socket, nbytes: int) -> None:
        self.connection = connection
        self.nbytes = nbytes
        self.moved = 0
        self.error: BaseException | None = None
        self.has_ended = False
        self.is_cancelled = False
        self.timeout = connection.gettimeout()
        self.began = self.progressed = time.monotonic()
        self._ended = threading.Lock()
        self._ended.acquire()

    def pump(self) -> bool:
        """Move bytes until the socket has none or the turn is over; True once the body has been moved."""
        raise NotImplementedError

    @property
    def unsent(self) -> int:
        """Bytes of ``moved`` that the kernel has not sent yet."""
        return 0

    def end(self, error: BaseException | None = None) -> None:
        """Wake the thread that waits. Nothing touches the socket or the memory from here on."""
        self.error = error
        self.has_ended = True
        self._ended.release()

    def wait(self) -> None:
        """Wait for the end. Interruptible by a signal's handler, on the main thread."""
        self._ended.acquire()
        self._ended.release()


class _Receiving(_Body):
    direction: Direction = "down"
    events = selectors.EVENT_READ

    def __init__(self, connection: socket.socket, views: Iterator[memoryview], nbytes: int) -> None:
        super().__init__(connection, nbytes)
        self._views = views
        self._view = memoryview(b"")
        self._at = 0
        self._woken_at = 1

    def pump(self) -> bool:
        receive_into, end = self.connection.recv_into, self.moved + _TURN
        while self.moved < end:
            if self._at == self._view.nbytes:
                following = next(self._views, None)
                if following is None:
                    return True
                self._view, self._at = following, 0
                continue
            count = receive_into(self._view[self._at :] if self._at else self._view)
            if not count:
                raise EOFError(f"the connection ended after {self.moved:,} bytes of {self.nbytes:,}")
            self._at += count
            self.moved += count
        return False

    def wake_late(self) -> None:
        """Have the kernel report the socket once many bytes have arrived."""
        self._wake_at(max(1, min(_WAKE_AT, self.nbytes - self.moved - _RECORD)))

    def end(self, error: BaseException | None = None) -> None:
        with contextlib.suppress(OSError):  # of a socket that failed
            self._wake_at(1)
        self._view, self._views = memoryview(b""), iter(())  # the loop may hold this body for a while
        super().end(error)

    def _wake_at(self, wanted: int) -> None:
        if wanted != self._woken_at:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
            self._woken_at = wanted


class _Sending(_Body):
    direction: Direction = "up"
    events = selectors.EVENT_WRITE

    def __init__(self, connection: socket.socket, source: Source, nbytes: int) -> None:
        super().__init__(connection, nbytes)
        self._source = source
        self._view = memoryview(b"")
        self._at = 0

    def pump(self) -> bool:
        send, end = self.connection.send, self.moved + _TURN
        while self.moved < end:
            if self._at == self._view.nbytes:
                self._view, self._at = self._source(), 0
                if not self._view.nbytes:
                    return True
            count = send(self._view[self._at :] if self._at else self._view)
            self._at += count
            self.moved += count
        return False

    @property
    def unsent(self) -> int:
        return unsent_bytes(self.connection.fileno())

    def end(self, error: BaseException | None = None) -> None:
        self._view, self._source = memoryview(b""), _nothing  # the loop may hold this body for a while
        super().end(error)


def _nothing() -> memoryview:
    return memoryview(b"")


class _Loop:
    """One thread and its selector. The thread ends when it has had nothing to do for a while."""

    def __init__(self, number: int) -> None:
        self._name = f"cloudckpt-bodies-{number}"
        self._lock = threading.Lock()
        self._coming: deque[_Body] = deque()
        self._thread: threading.Thread | None = None
        self._bodies: dict[_Body, int] = {}
        """The bodies that are being moved, and the events that each one's socket is registered for."""
        self._hot: set[_Body] = set()
        """Bodies whose turn was over before their sockets were empty."""
        self._selector: selectors.BaseSelector
        self._waker: socket.socket
        self.load = 0
        """Bodies that it has."""

    def move(self, body: _Body) -> None:
        """Move a body, while the calling thread waits."""
        body.connection.settimeout(0)
        try:
            self._submit(body)
            try:
                body.wait()
            except BaseException:  # an interrupt: the memory is the caller's again, once the loop knows
                body.is_cancelled = True
                self._wake()
                body.wait()
                raise
        finally:
            if body.connection.fileno() >= 0:
                body.connection.settimeout(body.timeout)
        if body.error is not None:
            raise body.error

    def _submit(self, body: _Body) -> None:
        with self._lock:
            self.load += 1
            self._coming.append(body)
            if self._thread is None:
                self._selector = selectors.DefaultSelector()
                woken, self._waker = socket.socketpair()
                for end in (woken, self._waker):
                    end.setblocking(False)
                self._selector.register(woken, selectors.EVENT_READ)
                self._thread = threading.Thread(target=self._run, args=(woken,), name=self._name, daemon=True)
                try:
                    system_limits.start(self._thread)
                except BaseException:
                    self._close(woken)
                    self._coming.remove(body)
                    self.load -= 1
                    raise
                return
        self._wake()

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
                looked = now
                self._look_at_the_clock(now)
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
            body.began = body.progressed = time.monotonic()
            # OpenSSL may hold bytes of the body already, and a socket has mostly room to send.
            self._hot.add(body)

    def _pump(self, body: _Body) -> None:
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

    def _await(self, body: _Body, error: BaseException) -> None:
        """Have the selector report the socket once the body can go on."""
        events = body.events
        if isinstance(error, ssl.SSLWantReadError):
            events = selectors.EVENT_READ
        elif isinstance(error, ssl.SSLWantWriteError):
            events = selectors.EVENT_WRITE
        if isinstance(body, _Receiving):
            body.wake_late()
        if not self._bodies[body]:
            self._selector.register(body.connection, events, body)
        elif self._bodies[body] != events:
            self._selector.modify(body.connection, events, body)
        self._bodies[body] = events

    def _end(self, body: _Body, error: BaseException | None) -> None:
        if self._bodies.pop(body):
            self._selector.unregister(body.connection)
        self._hot.discard(body)
        with self._lock:
            self.load -= 1
        if error is None:
            rates().ended(body.direction, body.moved, time.monotonic() - body.began)
        body.end(error)

    def _look_at_the_clock(self, now: float) -> None:
        for body in list(self._bodies):
            if body.is_cancelled:
                self._pump(body)
            elif body.timeout is not None and now - body.progressed > body.timeout:
                self._pump(body)  # fewer bytes may have come than the kernel reports the socket for
                if not body.has_ended and now - body.progressed > body.timeout:
                    self._end(body, TimeoutError("timed out"))
            elif rates().is_slow(body):
                self._end(body, SlowConnectionError(f"{body.moved:,} bytes in {now - body.began:.1f} s"))


def _drain(woken: socket.socket) -> None:
    try:
        while woken.recv(4096):
            pass
    except BlockingIOError:
        pass


_loops: dict[int, list[_Loop]] = {}
_lock = threading.Lock()


def _loop() -> _Loop:
    """Return the loop of this process that has the fewest bodies; a forked child has loops of its own."""
    process = os.getpid()
    loops = _loops.get(process)
    if loops is None:
        with _lock:
            _loops.clear()
            count = 2 if system_limits.processors_a_rank() >= _CPUS_FOR_TWO else 1
            loops = _loops.setdefault(process, [_Loop(number) for number in range(count)])
    return min(loops, key=lambda loop: loop.load)
