"""The errors of a file system as errors of a store."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Final

from cloudckpt.backends.errors import AccessDeniedError, CheckpointError, ObjectNotFoundError, StorageError
from cloudckpt.backends.system.system_limits import open_files_cure

NOT_THERE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP})
"""Errors that mean that no object has the name."""
_DENIED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_RIGHTS: Final = "Give this user the right to read and write the folder"
_HINTS: Final = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: "The file system is mounted read-only",
    errno.ENOTDIR: "A file stands where a folder is needed: use another URI or move the file away",
    errno.EISDIR: "A folder stands where an object is wanted: use another URI or move the folder away",
    errno.ENOSPC: "Make room on the file system, then save again",
    errno.EDQUOT: "The disk quota is used up: make room, then save again",
    errno.EFBIG: "The file system or a limit of the process allows no file of this size",
    errno.ENAMETOOLONG: "Shorten the name: a hidden file beside it needs 42 bytes more",
    errno.EOPNOTSUPP: "The file system lacks hard links or locks, without which no condition can be kept",
    errno.ENOLCK: "The file system lacks locks on folders, without which an update can't be conditional",
    errno.EIO: "The disk or the network file system fails",
    errno.ESTALE: "The network file system dropped the file: save again",
}


@contextlib.contextmanager
def translated(uri: str, name: str | None, *, writing: bool) -> Iterator[None]:
    """Raise an OSError of the block as the error of a store.

    Args:
        uri: the store's.
        name: the object concerned, if it is one.
        writing: whether the block writes: a missing folder is then a failure, and not a missing object.

    Raises:
        ObjectNotFoundError: the object is not there.
        AccessDeniedError: the user has no right to it.
        StorageError: any other error of the file system.
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        kind, hint = StorageError, _HINTS.get(error.errno or 0) or open_files_cure(error)
        if error.errno in NOT_THERE and not writing:
            kind, hint = ObjectNotFoundError, None
        elif error.errno in _DENIED:
            kind = AccessDeniedError
        reason = error.strerror or str(error)
        what = f"{reason}: {error.filename}" if error.filename else reason
        raise kind(what, uri=uri, object_name=name, hint=hint) from error
