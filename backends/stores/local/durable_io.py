"""Durable steps on a file system: whole writes, exact reads, folders and locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cloudckpt.backends.system import descriptors

_BUFFERS_PER_CALL = min(os.sysconf("SC_IOV_MAX"), 1024)
_NOT_REMOVED = frozenset(
    {errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS}
)
_NOT_COPIED = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
_AS_IT_IS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Flags to open a file that another process made: follow no link, and wait for no writer of a FIFO."""
_LOCKS_UNSUPPORTED = frozenset({errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


def write_fully(fd: int, offset: int, buffers: Sequence[memoryview]) -> int:
    """Write all buffers one after another from ``offset``; return their length in bytes.

    Raises:
        OSError: a write failed, or took nothing.
    """
    return _transfer(os.pwritev, fd, offset, buffers, stop_at_end=False)


def read_fully(fd: int, offset: int, buffers: Sequence[memoryview]) -> int:
    """Fill the buffers one after another from ``offset``; return the bytes read, fewer if the file ends."""
    return _transfer(os.preadv, fd, offset, buffers, stop_at_end=True)


def copy_whole(source: int, target: int, size: int) -> bool:
    """Have the kernel copy a file of ``size`` bytes, sharing its blocks where it can; False if it can't."""
    done = 0
    while done < size:
        try:
            moved = os.copy_file_range(source, target, size - done, done, done)
        except OSError as error:
            if error.errno in _NOT_COPIED:
                return False
            raise
        if not moved:  # it has become shorter, or is of a kind that tells its size wrongly
            return False
        done += moved
    return True


def _transfer(
    call: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    offset: int,
    buffers: Sequence[memoryview],
    *,
    stop_at_end: bool,
) -> int:
    """Call until all is moved: one call takes so many buffers and may move fewer bytes than it was given."""
    left = [buffer for buffer in buffers if buffer.nbytes]
    first, skip, done = 0, 0, 0
    while first < len(left):
        batch = left[first : first + _BUFFERS_PER_CALL]
        batch[0] = batch[0][skip:]
        moved = call(fd, batch, offset + done)
        if moved == 0:
            if stop_at_end:
                break
            raise OSError(errno.EIO, "the file system took no bytes and gave no reason")
        done += moved
        for buffer in batch:
            if moved < buffer.nbytes:
                break
            moved -= buffer.nbytes
            first, skip = first + 1, 0
        skip += moved
    return done


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable."""
    with opened(folder, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def sync_folders(folder: Path, top: Path) -> None:
    """Make the entries of a folder durable, and of those above it up to and with ``top``."""
    sync_folder(folder)
    while folder != top:
        folder = folder.parent
        sync_folder(folder)


def sync_above(folder: Path) -> None:
    """Make a folder durable in its parent, and each folder above it on its file system.

    The process that made them may have died before it did so. A folder that this process may not open is
    passed over.
    """
    device = folder.stat().st_dev
    for parent in folder.parents:
        with contextlib.suppress(OSError):
            if parent.stat().st_dev != device:
                return
            sync_folder(parent)


def make_folders(folder: Path) -> None:
    """Make a folder and what is missing above it, each durable in its parent."""
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        # What is there by now is the folder of another process, or a file, which opening will find.
        with contextlib.suppress(FileExistsError):
            new.mkdir()
        sync_folder(new.parent)


def remove_empty_folders(folder: Path, below: Path) -> None:
    """Remove ``folder`` and its parents while they are empty, may be removed, and lie below ``below``."""
    while below in folder.parents:
        try:
            folder.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _NOT_REMOVED:
                return
            raise
        folder = folder.parent


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a descriptor and close it; an error in closing is raised, as a late write error may come so."""
    fd = descriptors.opened(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(folder: Path, *, needed: bool) -> Iterator[None]:
    """Hold the lock of a folder against every thread and process that asks for it, without a lock file.

    Where the file system has no locks on folders (some network ones), raise if the lock is ``needed``, else
    go on.
    """
    with opened(folder, os.O_RDONLY | os.O_DIRECTORY) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            if needed or error.errno not in _LOCKS_UNSUPPORTED:
                raise
        yield


def lock(fd: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file until its descriptor is closed, which the kernel does for a process that dies.

    Returns:
        False if another descriptor holds the lock and ``wait`` is False. A file system without locks grants
        every lock.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(fd, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _LOCKS_UNSUPPORTED:
            raise
    return True


def is_locked(path: Path) -> bool:
    """Return True if another descriptor holds the lock of a file; False if the file can't be opened."""
    try:
        fd = descriptors.opened(path, os.O_RDONLY | _AS_IT_IS)
    except OSError:
        return False
    try:
        return not lock(fd, shared=True, wait=False)
    finally:
        os.close(fd)


@contextlib.contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Hold the lock of a file for the block; yield False if another descriptor holds it."""
    fd = None
    for access in (os.O_RDWR, os.O_RDONLY):  # over NFS an exclusive lock takes the right to write
        with contextlib.suppress(OSError):
            fd = descriptors.opened(path, access | _AS_IT_IS)
            break
    if fd is None:  # gone, or without the right to open it, which removing it does not take
        yield True
        return
    try:
        yield lock(fd, wait=False)
    finally:
        os.close(fd)
