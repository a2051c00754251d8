"""Values of a state: checked, serialized, compared, and loaded without running what they say."""

from __future__ import annotations

import contextlib
import functools
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cloudckpt.backends.errors import (
    ConfigurationError,
    IntegrityError,
    UnsafeCheckpointError,
)
from cloudckpt.backends.format.pickle_limits import claims_too_much
from cloudckpt.backends.state.check import ATOMS, UNKNOWN, Check, Refusal
from cloudckpt.backends.state.codec import pickler
from cloudckpt.backends.state.codec.archive import checked_archive
from cloudckpt.backends.state.codec.build import MissingClassesError, build
from cloudckpt.backends.state.codec.classes import ChangedClassError
from cloudckpt.backends.state.codec.malformed import NotHereError
from cloudckpt.backends.state.codec.tensors import Storages
from cloudckpt.backends.state.codec.tree import parse

__all__ = [
    "Refusal",
    "dumps",
    "load_tensor",
    "loads",
    "needs",
    "plain_data_allowed",
    "prove_safe",
    "refusal",
]

_ALLOW = (
    "Allow its classes with torch.serialization.add_safe_globals, or pass trust=True if you trust the "
    "wrote the checkpoint"
)
_PROTOCOL = 2
"""Protocol that ``torch.save`` writes and torch's ``weights_only`` loader reads."""
_torch_list = threading.Lock()
"""Held while names are on torch's list, which is one for the whole process."""


def refusal(value: object, *, trust: bool = False) -> Refusal | None:
    """Return why a value would not be restored exactly by a fresh process, or None where it would.

    Args:
        value: what is to be saved.
        trust: also accept what pickles by reference and unpickles. The load then needs ``trust`` too.

    Returns:
        None, or the first part that is refused: where it is, its class, the reason and what to do instead.
    """
    if type(value) in ATOMS and type(value) not in (int, str, bytes):
        return None
    return Check(functools.partial(_tried_out, trust=trust), any_key=trust).run(value)


def _tried_out(value: object, *, trust: bool) -> str | None:
    """Serialize and load an object of an unknown class, where that is allowed; return what is wrong."""
    if not (trust or _is_allowed(type(value))):
        return UNKNOWN
    try:
        loads(dumps(value).getbuffer(), "value", trust=trust)
    except Exception as error:  # noqa: BLE001 - a value's own code raises what it likes
        return f"it can't be pickled and loaded again: {type(error).__name__}: {error}"[:300]
    return None


def _is_allowed(cls: type) -> bool:
    """Return True if a class is on torch's list of what ``weights_only`` may make."""
    allowed: list[Any] = torch.serialization.get_safe_globals()
    return any((one[0] if isinstance(one, tuple) else one) is cls for one in allowed)


def dumps(value: object) -> io.BytesIO:
    """Serialize a value as DCP stores it, with ``torch.save``.

    Stock DCP reads it, and so does every release of this library that knows its classes.

    Raises:
        Exception: the value can't be pickled. `refusal` says so beforehand.
    """
    stream = io.BytesIO()
    torch.save(value, stream, pickle_module=pickler)
    stream.seek(0)
    return stream


def loads(data: memoryview | bytes, fqn: str, *, trust: bool = False) -> Any:
    """Return a value that `dumps` or stock DCP serialized, and run nothing that it says.

    Args:
        data: the serialized value.
        fqn: its name, for errors.
        trust: load any value, and run its code.

    Raises:
        UnsafeCheckpointError: it needs classes that are not known to be harmless, all of which it names.
        ConfigurationError: it needs a device or a module that is not there.
        IntegrityError: it is damaged.
    """
    return _trusted(data, fqn) if trust else _load(data, fqn)


def prove_safe(data: memoryview | bytes, fqn: str) -> io.BytesIO:
    """Load a value without running what it says, and serialize it again.

    DCP's planner calls ``torch.load(weights_only=False)`` on what it is given. What it is given here was
    made by this process from the value that was proven, so that no difference between two parsers can be
    used.

    Raises:
        UnsafeCheckpointError: it can't be loaded without running code.
        IntegrityError: it is damaged.
    """
    value = loads(data, fqn)
    try:
        return dumps(value)
    except Exception as error:  # what no writer could have serialised, such as a value nested too deeply
        raise _damaged(fqn, error) from error


def load_tensor(data: memoryview | bytes, fqn: str, *, trust: bool) -> torch.Tensor:
    """Load a tensor that was serialised whole.

    Raises:
        UnsafeCheckpointError: it can't be loaded without running code.
        IntegrityError: it is damaged, or not a tensor.
    """
    tensor = loads(data, fqn, trust=trust)
    if not isinstance(tensor, torch.Tensor):
        raise IntegrityError(f"what is stored for {fqn!r} is a {type(tensor).__name__}, not a tensor")
    if tensor.is_meta:
        raise IntegrityError(f"the tensor stored for {fqn!r} has no data")
    return tensor.cpu()


def needs(data: memoryview | bytes, fqn: str) -> frozenset[str]:
    """Prove that a value can be loaded, where the modules of the user's classes may not be imported.

    Tensors within it stay on the CPU.

    Returns:
        The classes whose modules have to be imported before a load.

    Raises:
        UnsafeCheckpointError: it can't be loaded without running code.
        IntegrityError: it is damaged.
    """
    absent: set[str] = set()
    _load(data, fqn, absent=absent)
    return frozenset(absent)


def _load(data: memoryview | bytes, fqn: str, *, absent: set[str] | None = None) -> Any:
    """Load by torch's careful loader, or where that knows too few classes by the one here.

    With ``absent`` the value is only proven: it takes the names of classes that are not imported.
    """
    stream = io.BytesIO(data)
    failed: str | None = None
    try:
        archive = checked_archive(stream, len(data), called=True)
        pickled: bytes = archive.get_record("data.pkl")
        if pickled[1:2] == bytes([_PROTOCOL]) and not claims_too_much(pickled):
            stream.seek(0)
            try:
                return torch.load(stream, weights_only=True, map_location=None if absent is None else "cpu")
            except pickle.UnpicklingError:  # it knows too few classes
                pass
            except RuntimeError as error:  # a device is missing, or the value is damaged
                failed = str(error)
        return build(parse(pickled), Storages(archive, on_cpu=absent is not None), absent=absent)
    except MissingClassesError as error:
        if failed is not None:  # torch knows the classes
            raise _damaged(fqn, RuntimeError(failed)) from None
        raise _unsafe(fqn, error) from error
    except ChangedClassError as error:
        raise _changed(fqn, error) from error
    except NotHereError as error:
        raise ConfigurationError(
            f"the value at {fqn!r} can't be loaded here: {error}", hint=error.hint
        ) from error
    except Exception as error:  # damaged bytes can raise nearly anything
        raise _damaged(fqn, error) from error


def _trusted(data: memoryview | bytes, fqn: str) -> Any:
    try:
        return torch.load(io.BytesIO(data), weights_only=False)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigurationError(
            f"the value at {fqn!r} needs a class or function that is not there: {error}",
            hint="Make it importable under the name that it had when it was saved",
        ) from error
    except Exception as error:  # damaged bytes can raise nearly anything
        raise _damaged(fqn, error) from error


def _unsafe(fqn: str, missing: MissingClassesError) -> UnsafeCheckpointError:
    hint = _ALLOW
    if missing.modules:
        hint = (
            f"Import {', '.join(missing.modules)} before the load: an Enum, a namedtuple or a dataclass then "
            f"loads safely. For another class: {hint[0].lower()}{hint[1:]}"
        )
    error = UnsafeCheckpointError(
        f"the value at {fqn!r} needs {', '.join(missing.names)}, which could run code", hint=hint
    )
    error.classes = tuple(missing.names)
    return error


def _changed(fqn: str, error: ChangedClassError) -> UnsafeCheckpointError:
    changed = UnsafeCheckpointError(
        f"the value at {fqn!r} can't be built as it was saved: {error}",
        hint="Load it with the class as it was, or pass trust=True if you trust its writer",
    )
    changed.classes = (error.class_name,)
    return changed


def _damaged(fqn: str, error: Exception) -> IntegrityError:
    return IntegrityError(
        f"what is stored for {fqn!r} cannot be read: {type(error).__name__}: {error}",
        hint="The checkpoint is damaged; load another step",
    )


# --- files of torch.save, whose memory is elsewhere


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


@contextlib.contextmanager
def plain_data_allowed() -> Iterator[None]:
    """Let ``weights_only`` make what is plain data and not on torch's own list, one thread at a time."""
    allowed: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
        (make, name) for name, make in _PLAIN.items()
    ]
    with _torch_list, torch.serialization.safe_globals(allowed):
        yield
