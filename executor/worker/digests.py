"""Digests by which ranks compare tensors and values. Equal ones have equal digests."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import marshal
import math
from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType
from typing import Any, Final, cast

import torch

from cloudckpt.backends.checksums import CRC32C
from cloudckpt.backends.system import background_log
from cloudckpt.backends.torch_private import coordinates, is_traceable_wrapper_subclass

_log = background_log.logger(__name__)

_WHOLE: Final = 64 << 10
"""Bytes up to which a tensor is read whole in every save."""
_SAMPLE: Final = 4 << 10
_SAMPLES: Final = 4
"""Samples of this size that are read of a larger one."""
SHARD: Final = b"\xfe"
VALUE: Final = b"\xff"
"""Kinds: of what is no tensor, and of shards. A tensor's is the number of its dimensions."""
_PLAIN: Final = frozenset({torch.Tensor, torch.nn.Parameter})
_ATOMS: Final = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray})
_CONTAINERS: Final = frozenset({list, tuple, set, frozenset})


def digest(leaf: object, sampled: int | None) -> bytes:
    """Return a byte for the kind of a leaf, and a digest. ``sampled`` numbers a save that samples."""
    try:
        if isinstance(leaf, torch.Tensor):
            return bytes([leaf.ndim]) + _tensor_digest(leaf, sampled)
        return VALUE + value_digest(leaf)
    except Exception as error:  # noqa: BLE001 - a class of the caller's own may fail in any way
        _log.debug("a %s is not compared between ranks: %s", type(leaf).__name__, error)
        return VALUE


def _tensor_digest(tensor: torch.Tensor, sampled: int | None) -> bytes:
    described = _described(tensor.dtype, tensor.shape)
    if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(cast("object", tensor)):
        names, context = cast("Any", tensor).__tensor_flatten__()
        parts = [_tensor_digest(getattr(tensor, name), sampled) for name in names]
        return b"".join([described, repr((names, context)).encode(), *parts])
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return described if tensor.is_meta else described + value_digest(_parts(tensor))
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if not tensor.is_contiguous() or not tensor.is_cpu:
        tensor, sampled = tensor.detach().cpu().contiguous(), None
    address, nbytes, value = tensor.data_ptr(), tensor.nbytes, 0
    if nbytes and not address:
        raise ValueError(f"a {type(tensor).__name__} has no memory of its own")
    if nbytes > _WHOLE and sampled is not None:
        for start in _places(nbytes, sampled):
            value = CRC32C.of(_memory(address + start, _SAMPLE), value)
    elif nbytes:
        value = CRC32C.of(_memory(address, nbytes))
    return described + value.to_bytes(4)


@functools.lru_cache(4096)
def _described(dtype: torch.dtype, shape: torch.Size) -> bytes:
    return repr((dtype, tuple(shape))).encode()


def _places(nbytes: int, sampled: int) -> Iterator[int]:
    """Yield the offsets of samples: the first, the last, and others that move from save to save."""
    yield 0
    yield nbytes - _SAMPLE
    for one in range(_SAMPLES - 2):
        # Multiples of the golden ratio are spread evenly, however many have come before.
        turn = math.modf((sampled * (_SAMPLES - 2) + one) * 0.6180339887498949)[0]
        yield int(turn * (nbytes - _SAMPLE))


def _memory(address: int, nbytes: int) -> Any:
    """Memory of a tensor, which a view by way of numpy would take three times as long to make."""
    return (ctypes.c_char * nbytes).from_address(address)


def _parts(tensor: torch.Tensor) -> object:
    """Return a sparse or quantized tensor as plain ones."""
    if tensor.is_quantized:
        return [tensor.int_repr(), str(tensor.qscheme()), repr(tensor)]
    if tensor.layout is torch.sparse_coo:
        return [*coordinates(tensor)]
    rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    if rows:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


def value_digest(value: object) -> bytes:
    """Return a digest of a value: the same for equal values, whichever objects they share.

    Pickles differ where one has two references to an object and the other has two equal objects.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _told_of(value, []):
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.digest()


def _told_of(value: Any, above: list[object]) -> Iterator[bytes]:
    """Yield a value's structure and content, part by part."""
    if any(value is one for one in above):
        yield b"itself"  # a cycle
        return
    if isinstance(value, torch.Tensor):
        yield _tensor_digest(value, None)
        return
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        yield f"{value.__module__}.{value.__qualname__}".encode()
        return
    if (known := _marshalled(value)) is not None:
        yield known
        return
    above.append(value)
    if type(value) in (list, tuple, set, frozenset, dict):
        yield type(value).__name__.encode()
        items = list(value.items()) if isinstance(value, dict) else value
        parts = [b"\0".join(_told_of(one, above)) for one in items]
        yield from sorted(parts) if isinstance(value, set | frozenset) else parts
    else:
        made = value.__reduce_ex__(4)
        listed = (
            [list(one) if isinstance(one, Iterator) else one for one in made]
            if isinstance(made, tuple)
            else made
        )
        yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
        yield from _told_of(listed, above)
    above.pop()


def _marshalled(value: Any) -> bytes | None:
    """Plain values of Python's own as bytes; None where one of another class is among them."""
    if not _is_plain(value):  # marshal would take an array for its bytes, which may be pointers
        return None
    try:
        return marshal.dumps(value, 2)  # the newest version that has no references
    except ValueError:  # nested too deeply
        return None


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in _CONTAINERS:
        return all(map(_is_plain, value))
    return kind in _ATOMS or (
        kind is dict and all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    )
