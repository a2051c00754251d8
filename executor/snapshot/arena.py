"""An arena: memory that a trainer and its checkpoint process both map, through one descriptor."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import itertools
import mmap
import os
import secrets
import sys
from collections.abc import Callable
from typing import Any, Self

import torch

from cloudckpt.backends.errors import ExecutorError
from cloudckpt.backends.system import descriptors
from cloudckpt.backends.system.system_limits import REFUSED, open_files_cure
from cloudckpt.backends.transfer.cuda import lock_pages, unlock_pages
from cloudckpt.executor.snapshot import memory_limits

_GRAIN = 2 << 20
"""Bytes to which sizes are rounded up: a huge page."""

_STEP = 64 << 20
"""Bytes that are taken at once."""

_identities = itertools.count()


class Arena:
    """Shared memory that keeps its pages from one snapshot to the next.

    On Linux it is a ``memfd``: one descriptor however many tensors lie in it, no limit but the machine's
    memory, and it grows and shrinks in place. Where a sandbox refuses that, and elsewhere, it is POSIX shared
    memory. That is as large as /dev/shm or the system lets a segment be. Elsewhere than on Linux it is made
    anew when it has to grow.

    Args:
        beside: tells how many bytes of memory must be left beside it.

    Attributes:
        fd: its descriptor; -1 before there is memory.
        nbytes: its size.
        identity: changes when another descriptor has to be given to the checkpoint process.
    """

    def __init__(self, beside: Callable[[], int] = lambda: 0) -> None:
        self._beside = beside
        self.fd = -1
        self.nbytes = 0
        self.identity = -1
        self._map: mmap.mmap | None = None
        self._pinned: int | None = None

    @classmethod
    def attach(cls, fd: int, nbytes: int) -> Self:
        """Map the arena behind a descriptor, which belongs to it from now on."""
        arena = cls()
        arena.fd = fd
        arena._remap(nbytes)
        return arena

    def reserve(self, nbytes: int) -> None:
        """Be at least ``nbytes`` large, and not more than twice that: what it held before is lost.

        Raises:
            ExecutorError: there is not that much memory, or no descriptor for it.
        """
        wanted = self.size_for(nbytes)
        if wanted <= self.nbytes <= 2 * wanted:
            return
        self._unmap()
        try:
            if self.fd == -1 or (wanted > self.nbytes and not _GROWS_IN_PLACE):
                self._release()
                self.fd, self.identity = new_descriptor(), next(_identities)
            if wanted > self.nbytes:
                self._grow(wanted)
            os.ftruncate(self.fd, wanted)
            self._remap(wanted)
        except OSError as error:
            self._unmap()
            self._release()
            raise ExecutorError(
                f"a snapshot needs {wanted:,} bytes of shared memory, and there is no room: {error.strerror}",
                hint=open_files_cure(error) or _room_cure(),
            ) from error
        except ExecutorError:
            self._release()
            raise

    @staticmethod
    def size_for(nbytes: int) -> int:
        """Return the size of an arena for ``nbytes``."""
        return max(1, -(-nbytes // _GRAIN)) * _GRAIN

    def _grow(self, wanted: int) -> None:
        """Have memory behind it: what is missing shows here as an error, and not later as a bus error.

        Other ranks on the machine may take memory at the same time. So each step looks at what is left.
        """
        if not hasattr(os, "posix_fallocate"):
            return
        for start in range(self.nbytes, wanted, _STEP):
            what = f"a snapshot of {wanted:,} bytes, of which {start:,} are there,"
            memory_limits.require(wanted - start + self._beside(), what)
            os.posix_fallocate(self.fd, start, min(_STEP, wanted - start))

    def follow(self, nbytes: int) -> None:
        """Map it anew, at the size that the other process has given it."""
        if nbytes != self.nbytes:
            self._unmap()
            self._remap(nbytes)

    def touch(self) -> None:
        """Have every page there: the first touch is what makes a first copy slow."""
        if self._map is not None:
            ctypes.memset(self.address, 0, self.nbytes)

    def pin(self) -> None:
        """Lock the pages for copies from a CUDA device that need no stop on the way; once is enough."""
        if self._pinned is None and self._map is not None:
            address = self.address
            if lock_pages(address, self.nbytes):
                self._pinned = address

    @property
    def pinned(self) -> bool:
        """True if the pages are locked for CUDA."""
        return self._pinned is not None

    @property
    def address(self) -> int:
        """The address of the mapping in this process."""
        return torch.frombuffer(self._mapped, dtype=torch.uint8, count=1).data_ptr()

    def bytes_at(self, offset: int, nbytes: int) -> torch.Tensor:
        """Return a tensor of bytes over a stretch of it, with a storage of just that size."""
        return torch.frombuffer(self._mapped, dtype=torch.uint8, count=nbytes, offset=offset)

    def close(self) -> None:
        """Give the memory back, once no tensor over it is left."""
        self._unmap()
        self._release()

    @property
    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            raise ExecutorError("an arena without memory was used")
        return self._map

    def _remap(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._map = mmap.mmap(self.fd, nbytes) if nbytes else None

    def _unmap(self) -> None:
        if self._pinned is not None:
            unlock_pages(self._pinned)
            self._pinned = None
        # Not closed by hand: a tensor that is left keeps its memory mapped, and is valid.
        self._map = None

    def _release(self) -> None:
        if self.fd != -1:
            os.close(self.fd)
        self.fd, self.nbytes = -1, 0


_GROWS_IN_PLACE = sys.platform == "linux"
_MFD_NOEXEC_SEAL = 0x8
"""Linux 6.3 has this flag, and refuses a memfd without it where ``vm.memfd_noexec`` is 2."""


def memory_file() -> int | None:
    """Return a memfd of no size yet; None where the system has none, or a sandbox refuses it.

    Raises:
        OSError: there is no descriptor left.
    """
    for flags in (0, _MFD_NOEXEC_SEAL) if hasattr(os, "memfd_create") else ():
        try:
            return descriptors.kept_clear(os.memfd_create("cloudckpt", os.MFD_CLOEXEC | flags))
        except OSError as error:
            if error.errno not in REFUSED | {errno.EINVAL}:
                raise
    return None


def new_descriptor() -> int:
    """Return a descriptor of shared memory of no size yet.

    Raises:
        OSError: there is no descriptor left, or no shared memory.
    """
    fd = memory_file()
    return _shared_memory_descriptor() if fd is None else fd


def _room_cure() -> str:
    cure = "Give the job more memory, or save a smaller state"
    if not _GROWS_IN_PLACE:
        return f"{cure}. On this system a snapshot can be as large as a segment of POSIX shared memory"
    with contextlib.suppress(OSError):
        if (fd := memory_file()) is not None:
            os.close(fd)
            return cure
    return f"Give the container a larger /dev/shm, or let it call memfd_create, which needs none. {cure}"


def _shared_memory_descriptor() -> int:
    """POSIX shared memory with no name left, as the standard library's `shared_memory` makes it."""
    posix: Any = importlib.import_module("_posixshmem")  # as far as the standard library goes
    name = f"/cloudckpt-{secrets.token_hex(6)}"
    fd = posix.shm_open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode=0o600)
    posix.shm_unlink(name)
    return descriptors.kept_clear(int(fd))
