"""File descriptors that stay clear of 0, 1 and 2, which other code takes for the standard streams.

A daemon or a container may start a job with its standard descriptors closed. The system gives the lowest free
number to the next file that is opened: a pipe that gets 1 receives what NCCL prints, and a newline is 10,
SIGUSR1. A checkpoint's file that gets 2 receives the interpreter's warnings.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
from typing import Final

_STANDARD: Final = (0, 1, 2)
_FIRST: Final = 3
_filled: list[int] = []


def fill_standard() -> None:
    """Open /dev/null as each of the descriptors 0, 1 and 2 that is closed.

    `kept_clear` protects the descriptors of this project. Those that boto3, gloo and the stores of torch open
    on its behalf can't be moved, so that there must be no low number for them to get.
    """
    for fd in _STANDARD:
        try:
            os.fstat(fd)
        except OSError:
            _fill(fd)
            _filled.append(fd)


def filled() -> tuple[int, ...]:
    """Return the standard descriptors that were closed and are /dev/null since."""
    return tuple(_filled)


def _fill(fd: int) -> None:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        if null == fd:
            os.set_inheritable(fd, True)
            return
        try:
            os.dup2(null, fd)
        finally:
            os.close(null)
    except OSError:  # a sandbox without /dev/null, or no descriptor left: what follows says so better
        return


def kept_clear(fd: int) -> int:
    """Return a descriptor of the same open file that is 3 or higher; one below is closed.

    Raises:
        OSError: there is no descriptor left. The one given is closed.
    """
    if fd >= _FIRST:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST)
    finally:
        os.close(fd)


def pipe() -> tuple[int, int]:
    """Return the read end and the write end of a pipe.

    Raises:
        OSError: there is no descriptor left.
    """
    read, write = os.pipe()
    try:
        read = kept_clear(read)
    except OSError:
        os.close(write)
        raise
    try:
        return read, kept_clear(write)
    except OSError:
        os.close(read)
        raise


def opened(path: str | os.PathLike[str], flags: int, mode: int = 0o666) -> int:
    """Open a file as `os.open` does.

    Raises:
        OSError: it can't be opened.
    """
    return kept_clear(os.open(path, flags | os.O_CLOEXEC, mode))


def unix_socket(made: socket.socket | None = None) -> socket.socket:
    """Return a Unix stream socket, the one given or a new one.

    Raises:
        OSError: there is no descriptor left.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) if made is None else made
    if made.fileno() >= _FIRST:
        return made
    return socket.socket(made.family, made.type, made.proto, fileno=kept_clear(made.detach()))


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return two Unix stream sockets that are connected.

    Raises:
        OSError: there is no descriptor left.
    """
    first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        first = unix_socket(first)
        return first, unix_socket(second)
    except OSError:
        first.close()
        second.close()
        raise


def takes(fd: int, nbytes: int) -> bool:
    """Return True unless writing so many bytes would wait for a reader.

    A pipe, a socket or a terminal without a reader is full sooner or later. Files always take bytes, and so
    does what can't be asked.
    """
    try:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if not poll.poll(0):
            return False
        room = fcntl.fcntl(fd, _F_GETPIPE_SZ)  # fails for what is no pipe
        used = int.from_bytes(fcntl.ioctl(fd, _FIONREAD, bytes(4)), "little")
    except (OSError, ValueError):
        return True
    # A pipe counts pages, which may be filled in part: more than is left for sure is tried when it is empty.
    return used == 0 or nbytes <= max(select.PIPE_BUF, (room - used) // 2)


_F_GETPIPE_SZ: Final = getattr(fcntl, "F_GETPIPE_SZ", 1032)
_FIONREAD: Final = 0x541B
