"""Pickles of a shape that no pickler writes: deep, wide, shared and self-referring, of any size."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cloudckpt.backends import metadata as md
from cloudckpt.backends.torch_private import StorageInfo

_HEAD = b"\x80\x04"
_INDEX = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n\x94"
_SIZE = b"ctorch\nSize\n\x94"
_ALIKE = (1 << 61) - 1
"""The numbers that are multiples of this have the hash 0."""


def structure(rng: random.Random, size: int) -> bytes:
    """Return a pickle of about so many bytes."""
    return rng.choice(list(SHAPES.values()))(rng, size)


def deep(rng: random.Random, size: int) -> bytes:
    """Objects within one another, as a value or as a key."""
    nest = rng.choice([b"\x85", b"\x85\x94", b"]\x94\x8c\x01x", b"}\x94N", b"(", b"N\x86", b"\x85\x94R"])
    inside = nest * max(1, size // len(nest))
    return _HEAD + rng.choice(
        [b"N" + inside + b".", b"}N" + inside + b"Ns.", b"N" + inside + _closed(nest, size)]
    )


def _closed(nest: bytes, size: int) -> bytes:
    return b"a" * (size // 2) + b"." if nest.startswith(b"]") else b"t" * (size // 2) + b"."


def wide(rng: random.Random, size: int) -> bytes:
    """Very many elements, keys or arguments at once."""
    element = rng.choice([b"N", b"K\x01", b"\x8c\x01a\x94", b"G" + bytes(8), b"h\x00"])
    elements = element * max(1, size // len(element))
    opened, closed = rng.choice(
        [(b"(", b"t."), (b"](", b"e."), (b"}(", b"u."), (b"\x8f(", b"\x90."), (b"(", b"\x91."), (b"(", b"d.")]
    )
    return _HEAD + b"N\x94" + opened + elements + closed


def shared(rng: random.Random, size: int) -> bytes:
    """The same object twice in each object, behind as many plain ones as it takes."""
    double = rng.choice([b"2\x86", b"\x94h%c" % 0 + b"\x86", b"2\x86\x94", b"2\x86\x85"])
    deep_enough = double * rng.choice([8, 30, 60, 1_000])
    use = rng.choice(
        [b"}" + b"N" + deep_enough + b"Ns.", b"N" + deep_enough + b".", _SIZE + b"N" + deep_enough + b"R."]
    )
    return _HEAD + filler(rng, size) + use


def copied(rng: random.Random, size: int) -> bytes:
    """One long tuple or text that is copied by each of many calls."""
    long = b"(" + b"K\x01" * max(1, size // 8) + b"t\x94"
    call = rng.choice([b"h\x00h\x01\x85R0", b"h\x00h\x01\x85R\x94", b"h\x01h\x01\x86\x940"])
    return _HEAD + _SIZE + long + b"0" + call * max(1, size // 2 // len(call)) + b"N."


def referring_to_itself(rng: random.Random, size: int) -> bytes:
    """A list or dict that holds itself, or a key whose object is still being made."""
    forms = [b"]\x94h\x00a", b"}\x94Nh\x00s", b"]\x94(h\x00h\x00e", b"}\x94h\x00Ns", b"]\x94h\x00\x85a"]
    return (
        _HEAD + rng.choice(forms) + filler(rng, size) + b"0" + rng.choice([b".", b"\x85.", b"}\x94h\x00Ns."])
    )


def alike(rng: random.Random, size: int) -> bytes:
    """Keys that are different and have the same hash."""
    count = max(1, size // 14)
    start = rng.randrange(1 << 8)
    numbers = ((start + n) * _ALIKE for n in range(count))
    long1 = (b"\x8a" + bytes([len(n)]) + n for n in (_long(number) for number in numbers))
    if rng.random() < 0.3:
        return _HEAD + b"}(" + b"".join(one + b"N" for one in long1) + b"u."
    if rng.random() < 0.5:
        return _HEAD + b"}(" + b"".join(one + b"\x85N" for one in long1) + b"u."
    # Offsets of six places, of five numbers each that have the hash 0 and still count bytes.
    digits = [b"\x8a\x08" + struct.pack("<q", n * _ALIKE) for n in range(4)]
    items: list[bytes] = []
    state = b"}(\x8c\x03fqn\x8c\x01w\x8c\x06offset"
    for n in range(min(count, 4**9)):
        places = b"".join(digits[(n >> 2 * place) % 4] for place in range(9))
        items.append(b"h\x00)\x81" + state + b"h\x01(" + places + b"t\x85R\x8c\x05indexNubN")
        if len(items) * len(items[0]) > size:
            break
    return _HEAD + _INDEX + b"0" + _SIZE + b"0}(" + b"".join(items) + b"u."


def _long(number: int) -> bytes:
    return number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)


def odd_metadata(rng: random.Random, size: int) -> bytes:
    """Metadata of the right size and form, with something of the above among it."""
    whole = md.dump(honest(max(1, size // 700)))[: -md._SEALED]
    at = rng.randrange(len(whole))
    odd = rng.choice([deep, wide, shared, alike])(rng, max(16, size // 4))[2:-1]
    return whole[:at] + odd + whole[at:] if rng.random() < 0.5 else whole[:-1] + odd + b"0."


def filler(rng: random.Random, size: int) -> bytes:
    """Instructions that make and drop plain objects."""
    one = rng.choice([b"N0", b"K\x010", b"\x8c\x02ab\x940", b"(K\x01K\x02t\x940", b"]\x94(NNe0"])
    return one * (size // len(one))


SHAPES: dict[str, Callable[[random.Random, int], bytes]] = {
    shape.__name__: shape for shape in (deep, wide, shared, copied, referring_to_itself, alike, odd_metadata)
}


def honest(tensors: int) -> Metadata:
    """Return the metadata of a checkpoint of so many tensors, half of them in two chunks."""
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    items: dict[MetadataIndex, StorageInfo] = {}
    for number in range(tensors):
        name = f"model.layers.{number // 8}.block.{number % 8}.weight"
        rows = [0, 512] if number % 2 else [0]
        chunks = [ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([512, 64])) for row in rows]
        entries[name] = TensorStorageMetadata(
            TensorProperties(torch.float32), torch.Size([512 * len(rows), 64]), chunks
        )
        for chunk in chunks:
            info = md.storage_info(f"__{number % 64}_0.distcp", number << 20, 131_072, None)
            info.__dict__.update(spans=(131_072,), sums=bytes(8))
            items[MetadataIndex(name, chunk.offsets)] = info
    paths = {name: tuple(name.split(".")) for name in entries}
    described = Metadata(entries, planner_data=paths, storage_data=items)
    md.add_extras(described, "save", "1", {})
    return described
