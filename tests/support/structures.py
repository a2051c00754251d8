"""Pickles of a shape that no pickler writes: deep, wide, shared and self-referring, of any size."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cloudckpt.backends.format import metadata as md
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


def crowded(rng: random.Random, size: int) -> bytes:
    """Containers that take far more memory than bytes."""
    one = rng.choice(
        [b"\x8f", b"]", b"}", b"(\x91", b"}NNs", b"]Na", b"\x8f\x94", b"}\x94", b"(d", b"]\x94h\x00a"]
    )
    return _HEAD + one * max(1, size // len(one)) + b"."


def states(rng: random.Random, size: int) -> bytes:
    """One dict that is the state of many objects, each of which would copy it."""
    names = b"".join(b"\x8c\x05%05dN" % n for n in range(max(1, min(size // 16, 100_000))))
    made = rng.choice(
        [b"(" + names + b"d", b"}(" + names + b"u", b"ccollections\nOrderedDict\n)R(" + names + b"u"]
    )
    state = rng.choice([made + b"\x94", b"N" + made + b"\x86\x94", made + b"N\x86\x94", made + b"NN\x87\x94"])
    one = rng.choice([b"h\x00)\x81h\x01b0", b"h\x00)\x81h\x01b\x94"])
    return _HEAD + _INDEX + b"0" + state + b"0" + one * max(1, size // 2 // len(one)) + b"N."


def doubled(rng: random.Random, size: int) -> bytes:
    """Lists of the same list twice, made by what adds to them."""
    add = rng.choice([b"](h\x00h\x00eq\x00", b"]h\x00ah\x00aq\x00", b"}(K\x01h\x00K\x02h\x00uq\x00"])
    use = rng.choice([b".", b"\x85.", b"}\x8c\x01xh\x00s.", b"h\x00R."])
    return _HEAD + filler(rng, size) + b"]q\x00" + add * rng.choice([8, 30, 60, 1_000]) + use


def nearly_alike(rng: random.Random, size: int) -> bytes:
    """Spans that repeat but for their last instructions."""
    same = rng.choice([b"K\x01K\x02\x86", b"\x8c\x02ab\x94", b")h\x00\x86", b"K\x010"]) * rng.choice(
        [2, 30, 90]
    )
    ends = [b"N", b"\x88", b"]", b"}", b")", b"\x85", b"\x86", b"\x94", b"0", b"h\x00", b"2", b"(t"]
    spans = [same + b"".join(rng.choices(ends, k=3)) for _ in range(rng.choice([4, 60, 90]))]
    out, left = [b"N\x94NNNNNN"], size
    while left > 0:
        out.append(rng.choice(spans))
        left -= len(out[-1])
    return _HEAD + b"".join(out) + b"."


def common(rng: random.Random, size: int, what: int | None = None) -> bytes:
    """Metadata of items that have something long in common, one of nine things."""
    half, count = max(1, size // 2), max(1, size // 1400)
    made = honest(count)
    infos, entries = list(made.storage_data.values()), list(made.state_dict_metadata.values())
    extras = made.__dict__["cloudckpt"]
    extras["objects"] = {info.relative_path: {"checksum": "crc64nvme:AA"} for info in infos}
    text, numbers = "a" * half, (0,) * (half // 2)
    match rng.randrange(9) if what is None else what:
        case 0:
            _set(infos, relative_path=text)
        case 1:
            _set(infos, relative_path=text[:4000])
        case 2:
            _set(infos, transform_descriptors=["a"] * (half // 2))
        case 3:
            _set(infos, length=0, spans=numbers, sums=b"", payload_offset=0, dtype=torch.float32)
        case 4:
            _set(infos, payload_offset=0, dtype=torch.float32, stride=numbers)
        case 5:
            chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([1, 1]))
            _set(entries, chunks=[chunk] * (half // 2))
        case 6:
            many = torch.Size(numbers)
            _set(entries, size=many, chunks=[ChunkStorageMetadata(many, many)] * 8)
        case 7:
            extras["objects"] = {f"{number}": {"checksum": text, "size": -1} for number in range(count)}
        case _:
            item = MetadataIndex(text, torch.Size([0]))
            extras["objects"] = {item: {"size": 1}}
            extras["notes"] = {item: 1, "huge": 10**400, text: 1.0}
    return md.dump(made)[: -md._SEALED]


def _set(objects: list[Any], **fields: object) -> None:
    for one in objects:
        one.__dict__.update(fields)


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
    shape.__name__: shape
    for shape in (
        *(deep, wide, shared, copied, referring_to_itself, alike, odd_metadata),
        *(crowded, states, doubled, nearly_alike, common),
    )
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
