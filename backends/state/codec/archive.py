"""The archive that ``torch.save`` writes, opened with what it claims checked."""

from __future__ import annotations

import zipfile
from typing import IO, Any

from cloudckpt.backends.format.pickle_limits import claims_too_much
from cloudckpt.backends.torch_private import archive_reader


def checked_archive(stream: IO[bytes], size: int, *, called: bool = False) -> Any:
    """Open an archive of ``size`` bytes that holds no more, and a pickle that takes no undue time to load.

    It is read as ``torch.load`` reads it. ``torch.save`` compresses nothing, and what is compressed could be
    a thousand times as large. With ``called`` the pickle may call what it has called something for, as one
    of a class within a class does: for a loader that writes out nothing of what it is given.

    Raises:
        Exception: it is damaged, or claims too much.
    """
    archive = archive_reader(stream)  # the only reader that sees what torch sees
    if claimed(archive, stream) > size:
        raise ValueError("its archive claims to hold more than there is")
    if claims_too_much(archive.get_record("data.pkl"), called=called):
        raise ValueError("its pickle claims more than it can need")
    stream.seek(0)
    return archive


def claimed(archive: Any, stream: IO[bytes]) -> int:
    """Return how many bytes an archive says it holds."""
    if hasattr(archive, "get_record_size"):
        return sum(archive.get_record_size(name) for name in archive.get_all_records())
    with zipfile.ZipFile(stream) as directory:  # torch before 2.13 can't be asked
        return sum(entry.file_size for entry in directory.infolist())
