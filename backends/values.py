"""Loading serialised values without running what they say."""

from __future__ import annotations

import contextlib
import io
import pickle
import threading
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import torch

from cloudckpt.backends.errors import IntegrityError, UnsafeCheckpointError
from cloudckpt.backends.pickles import weighs_too_much


def _bytes(*given: bytes) -> bytes:
    """Make ``bytes`` of bytes alone: of a number it would make as many zeros."""
    return b"".join(given)


_PLAIN: dict[str, Callable[..., object]] = {
    "builtins.bytes": _bytes,
    "builtins.frozenset": frozenset,
    "builtins.range": range,
    "builtins.slice": slice,
}
"""Plain data of Python's own whose making runs nothing, and which torch's own list leaves out."""

_torch_list = threading.Lock()
"""Held while ``_PLAIN`` is on torch's list, which is one for the whole process."""


def prove_safe(data: memoryview, fqn: str) -> io.BytesIO:
    """Load a value with ``weights_only=True`` and serialise it again.

    DCP's planner calls ``torch.load(weights_only=False)`` on what it is given. What it is given here was
    made by this process from the value that was proven, so that no difference between two parsers can be
    used.

    Raises:
        UnsafeCheckpointError: it can't be loaded without running code.
        IntegrityError: it is damaged.
    """
    value = _load(data, fqn)
    proven = io.BytesIO()
    try:
        torch.save(value, proven)
    except Exception as error:  # what no writer could have serialised, such as a value nested too deeply
        raise _damaged(fqn, error) from error
    proven.seek(0)
    return proven


def load_tensor(data: memoryview, fqn: str, *, trust: bool) -> torch.Tensor:
    """Load a tensor that was serialised whole.

    Raises:
        UnsafeCheckpointError: it can't be loaded without running code.
        IntegrityError: it is damaged, or not a tensor.
    """
    tensor = _load(data, fqn, trust=trust)
    if not isinstance(tensor, torch.Tensor):
        raise IntegrityError(f"what is stored for {fqn!r} is a {type(tensor).__name__}, not a tensor")
    if tensor.is_meta:
        raise IntegrityError(f"the tensor stored for {fqn!r} has no data")
    return tensor.cpu()


def checked_archive(stream: IO[bytes], size: int) -> Any:
    """Open an archive of ``size`` bytes that holds no more, and a pickle that takes no undue time to load.

    It is read as ``torch.load`` reads it. ``torch.save`` compresses nothing, and what is compressed could be
    a thousand times as large.

    Raises:
        Exception: it is damaged, or claims too much.
    """
    archive = torch._C.PyTorchFileReader(stream)  # noqa: SLF001 - the only reader that sees what torch sees
    if _claimed(archive, stream) > size:
        raise ValueError("its archive claims to hold more than there is")
    if weighs_too_much(archive.get_record("data.pkl")):
        raise ValueError("its pickle claims more than it can need")
    stream.seek(0)
    return archive


def _claimed(archive: Any, stream: IO[bytes]) -> int:
    """Bytes that an archive says it holds."""
    if hasattr(archive, "get_record_size"):
        return sum(archive.get_record_size(name) for name in archive.get_all_records())
    with zipfile.ZipFile(stream) as told:  # torch before 2.13 can't be asked
        return sum(entry.file_size for entry in told.infolist())


def _load(data: memoryview, fqn: str, *, trust: bool = False) -> object:
    stream = io.BytesIO(data)
    try:
        if not trust:
            checked_archive(stream, len(data))
        return torch.load(stream, weights_only=not trust)
    except pickle.UnpicklingError as refused:
        needed = _needed(stream)
        if needed and needed <= _PLAIN.keys():
            return _load_plain(stream, fqn)
        what = f"needs {', '.join(sorted(needed))}" if needed else "holds more than tensors and plain data"
        raise UnsafeCheckpointError(
            f"the value at {fqn!r} {what}, which could run code",
            hint="Allow its classes with torch.serialization.add_safe_globals, or pass trust=True if you "
            "trust whoever wrote the checkpoint",
        ) from refused
    except Exception as error:  # damaged bytes can raise nearly anything
        raise _damaged(fqn, error) from error


@contextlib.contextmanager
def plain_data_allowed() -> Iterator[None]:
    """Let ``weights_only`` make what is plain data and not on torch's own list, one thread at a time."""
    allowed: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
        (make, name) for name, make in _PLAIN.items()
    ]
    with _torch_list, torch.serialization.safe_globals(allowed):
        yield


def _load_plain(stream: io.BytesIO, fqn: str) -> object:
    stream.seek(0)
    try:
        with plain_data_allowed():
            return torch.load(stream, weights_only=True)
    except Exception as error:  # damaged bytes can raise nearly anything
        raise _damaged(fqn, error) from error


def _needed(stream: io.BytesIO) -> set[str]:
    """Name the globals that torch refused; nothing where they can't be told."""
    stream.seek(0)
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(stream))
    except Exception:  # noqa: BLE001 - damaged bytes can raise nearly anything, and the names are a courtesy
        return set()


def _damaged(fqn: str, error: Exception) -> IntegrityError:
    return IntegrityError(
        f"what is stored for {fqn!r} cannot be read: {type(error).__name__}: {error}",
        hint="The checkpoint is damaged; load another step",
    )
