"""Loading serialised values without running what they say."""

from __future__ import annotations

import io
import pickle

import torch

from cloudckpt.backends.errors import CheckpointError, IntegrityError, UnsafeCheckpointError


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
    torch.save(value, proven)
    proven.seek(0)
    return proven


def load_tensor(data: memoryview, fqn: str) -> torch.Tensor:
    """Load a tensor that was serialised whole.

    Raises:
        UnsafeCheckpointError: it can't be loaded without running code.
        IntegrityError: it is damaged, or not a tensor.
    """
    tensor = _load(data, fqn)
    if not isinstance(tensor, torch.Tensor):
        raise IntegrityError(f"what is stored for {fqn!r} is a {type(tensor).__name__}, not a tensor")
    return tensor.cpu()


def _load(data: memoryview, fqn: str) -> object:
    stream = io.BytesIO(data)
    try:
        return torch.load(stream, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(stream, fqn) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise IntegrityError(
            f"what is stored for {fqn!r} cannot be read: {type(error).__name__}: {error}",
            hint="The checkpoint is damaged; load another step",
        ) from error


def _refusal(stream: io.BytesIO, fqn: str) -> CheckpointError:
    stream.seek(0)
    try:
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
    except (RuntimeError, ValueError, KeyError, pickle.UnpicklingError):
        needed = []
    what = f"needs {', '.join(sorted(needed))}" if needed else "holds more than tensors and plain data"
    return UnsafeCheckpointError(
        f"the value at {fqn!r} {what}, which could run code",
        hint="Allow its classes with torch.serialization.add_safe_globals, or pass trust=True if you trust "
        "whoever wrote the checkpoint",
    )
