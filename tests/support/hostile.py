"""Hostile checkpoints: pickles written by hand to do harm, and honest bytes that were tampered with."""

from __future__ import annotations

import copy
import io
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

_PROTO = b"\x80\x04"


def text(value: str) -> bytes:
    """Push a string."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def known_as(module: str, name: str) -> bytes:
    """Push what a module calls ``name``."""
    return text(module) + text(name) + pickle.STACK_GLOBAL


def called(module: str, name: str, *arguments: bytes) -> bytes:
    """Push what a call returns; the arguments are instructions that push one object each."""
    return known_as(module, name) + b"(" + b"".join(arguments) + b"tR"


_METADATA = "torch.distributed.checkpoint.metadata"
_SHELL = text("true")
_BARRIER = known_as(_METADATA, "MetadataIndex")

PUSHES: dict[str, bytes] = {
    # Calls.
    "os.system": called("os", "system", _SHELL),
    "posix.system": called("posix", "system", _SHELL),
    "os.execvp": called("os", "execvp", text("true"), text("true") + b"\x85"),
    "os.posix_spawn": called("os", "posix_spawn", text("/bin/true"), text("true") + b"\x85", b"}"),
    "os.fork": called("os", "fork"),
    "subprocess.Popen": called("subprocess", "Popen", _SHELL),
    "builtins.eval": called("builtins", "eval", text("__import__('os').getpid()")),
    "builtins.exec": called("builtins", "exec", text("import os")),
    "builtins.__import__": called("builtins", "__import__", text("antigravity")),
    "builtins.open": called("builtins", "open", text("/dev/null"), text("w")),
    "builtins.getattr": called(
        "builtins", "getattr", called("builtins", "getattr", text("x"), text("__class__")), text("mro")
    ),
    "builtins.bytearray": called("builtins", "bytearray", b"J\xff\xff\xff\x7f"),
    "builtins.bytes": called("builtins", "bytes", b"J\xff\xff\xff\x7f"),
    "codecs.encode": called("_codecs", "encode", text("x" * 10), text("zlib")),
    "operator.attrgetter": called("operator", "attrgetter", text("__class__.__base__")),
    "functools.partial": called("functools", "partial", known_as("os", "system"), _SHELL),
    "socket.socket": called("socket", "create_connection", text("127.0.0.1") + b"K\x01\x86"),
    "ctypes.CDLL": called("ctypes", "CDLL", text("libc.so.6")),
    "importlib": called("importlib", "import_module", text("antigravity")),
    "pickle.loads": called("pickle", "loads", b"B\x02\0\0\0N."),
    "torch.load": called("torch", "load", text("/etc/passwd")),
    "torch.hub.load": called("torch.hub", "load", text("a/b"), text("c")),
    "torch.jit": called("torch.jit", "load", text("/etc/passwd")),
    "torch.storage": called("torch.storage", "_load_from_bytes", b"B\x02\0\0\0N."),
    "torch.empty": called("torch", "empty", b"J\xff\xff\xff\x7f"),
    "torch.Size of much": called("torch", "Size", b"(" + b"J\xff\xff\xff\x7f" * 64 + b"t"),
    "torch.Size of a huge int": called("torch", "Size", b"\x8b\x00\x10\x00\x00" + b"\x7f" * 4096 + b"\x85"),
    "a dotted name": known_as(_METADATA, "Metadata.__init__.__globals__"),
    "a module of a module": known_as("torch.distributed.checkpoint", "metadata.os"),
    "not a module": known_as("..", "\ud800"),
    "os.system by INST": b"(S'true'\nios\nsystem\n",
    "os.system by GLOBAL": b"cos\nsystem\n(S'true'\ntR",
    "os.system by OBJ": b"(cos\nsystem\nS'true'\no",
    "os.system by NEWOBJ": known_as("os", "system") + b"(" + _SHELL + b"t\x81",
    "os.system by NEWOBJ_EX": known_as("os", "system") + b")}\x92",
    # Changes to what a pickle is given.
    "BUILD on a class": _BARRIER + b"N}(" + text("__eq__") + b"K\x05" + text("fqn") + b"Nu\x86b",
    "BUILD of slots on a class": _BARRIER + b"}(" + text("__hash__") + b"Nu}\x86b",
    "BUILD on a function": known_as("torch", "Size") + b"N}(" + text("__call__") + b"K\x05u\x86b",
    "BUILD on a dtype": known_as("torch", "float32") + b"}(" + text("itemsize") + b"K\x05ub",
    "BUILD on the table": known_as(_METADATA, "_MEM_FORMAT_ENCODING") + b"N}(" + text("a") + b"Nu\x86b",
    "BUILD of __class__": _BARRIER
    + b")\x81"
    + b"N}("
    + text("__class__")
    + known_as(_METADATA, "Metadata")
    + b"u\x86b",
    "BUILD of __dict__": _BARRIER + b")\x81" + b"N}(" + text("__dict__") + b"Nu\x86b",
    "BUILD of __setstate__": _BARRIER
    + b")\x81}("
    + text("__setstate__")
    + known_as("torch", "Size")
    + b"ub}b",
    "APPEND to a class": _BARRIER + b"K\x05a",
    "SETITEM of a class": _BARRIER + b"K\x05K\x05s",
    "a class as a method": _BARRIER + b")\x81}(" + text("append") + known_as("torch", "Size") + b"ubNa",
    "a class made of a class": called(_METADATA, "Metadata", b"}", b"}"),
    # Extensions and references beyond the pickle.
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x01",
    "EXT4": b"\x84\x01\x01\x01\x01",
    "a persistent id": b"Pabc\n",
    "a persistent id of a tuple": b"(" + text("storage") + b"t" + b"Q",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"N\x98",
    # Memory and time.
    "LONG_BINPUT": b"Nr\xff\xff\xff\x7f",
    "PUT": b"Np2147483647\n",
    "PUT of a negative": b"Np-1\n",
    "LONG_BINGET": b"j\xff\xff\xff\xff",
    "BINBYTES": b"B\xff\xff\xff\x7fabc",
    "BINBYTES8": b"\x8e" + struct.pack("<Q", 1 << 40) + b"abc",
    "BINBYTES8 beyond memory": b"\x8e" + struct.pack("<Q", (1 << 63) - 1) + b"abc",
    "BINUNICODE8": b"\x8d" + struct.pack("<Q", 1 << 40) + b"abc",
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", 1 << 34) + b"abc",
    "FRAME": b"\x95" + struct.pack("<Q", 1 << 34) + b"N",
    "FRAME beyond memory": b"\x95" + struct.pack("<Q", (1 << 63) - 1) + b"N",
    "LONG4": b"\x8b\xff\xff\xff\x7fabc",
    "LONG4 of a negative length": b"\x8b\xff\xff\xff\xffabc",
    "a giant int": b"\x8b" + struct.pack("<i", 1 << 16) + b"\x7f" * (1 << 16),
    "a giant decimal": b"I" + b"9" * 100_000 + b"\n",
    "a giant long": b"L" + b"9" * 4000 + b"L\n",
    "deep tuples": b"N" + b"\x85" * 5000,
    "deep lists": b"N" + b"".join((b"]" * 5000, b"a" * 5000))[1:] if False else b"]" * 5000 + b"a" * 4999,
    "deep dicts": b"}" * 2000 + b"Nq\x00" + b"N" + b"0" + b"".join([b""]),
    "marks": b"(" * 10_000 + b"t" * 10_000,
    "billion laughs of lists": b"]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(40)),
    "billion laughs of tuples": b"N" + b"2\x86" * 60,
    "billion laughs as a key": b"}N" + b"2\x86" * 60 + b"Ns",
    "billion laughs by memo": b"}N" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(60)) + b"Ns",
    "deep tuples as a key": b"}N" + b"\x85" * 200_000 + b"Ns",
    "an index of laughs": _BARRIER + b")\x81}" + text("fqn") + b"N" + b"2\x86" * 60 + b"sb",
    "a list in itself": b"]q\x00h\x00a",
    "a dict in itself": b"}q\x00" + text("x") + b"h\x00s",
    "a tuple in itself": b"]q\x00h\x00\x85a",
    # Odd values.
    "surrogates": text("\ud800\udfff"),
    "a string that is no UTF-8": b"X\x02\0\0\0\xff\xff",
    "NaN": b"G\x7f\xf8\0\0\0\0\0\0",
    "POP of nothing": b"0",
    "POP_MARK of nothing": b"1",
    "DUP of nothing": b"2",
    "protocol 255": b"\x80\xff",
    "protocol in the middle": b"\x80\x00N",
    "a key that is a list": b"}]Ns",
}
"""Instructions that push one object, or try to."""


def pickles() -> dict[str, bytes]:
    """Each of ``PUSHES`` as the whole, as a part of a Metadata, and as a key."""
    whole = {f"{name}, whole": _PROTO + push + b"." for name, push in PUSHES.items()}
    state = known_as(_METADATA, "Metadata") + b")\x81}"
    for field in ("state_dict_metadata", "storage_data", "planner_data", "storage_meta", "cloudckpt"):
        whole |= {
            f"{name}, as {field}": _PROTO + state + text(field) + push + b"sb."
            for name, push in PUSHES.items()
        }
    whole |= {f"{name}, as a key": _PROTO + b"}" + push + b"Ns." for name, push in PUSHES.items()}
    return whole


NUMBERS: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 7, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40, 1 << 62),
    *((1 << 63) - 1, 1 << 63, -(1 << 63), 1 << 70, 10**400),
    *(True, 0.5, float("nan"), float("inf"), None, "5", b"5", (), [], {}),
)
NAMES: tuple[Any, ...] = (
    *("", ".", "..", "../x", "a/../../b", "/etc/passwd", "//etc/passwd", "a//b", "a/", "./a", "a/./b"),
    *("..\\x", "C:\\x", "\\\\host\\x", "a\0b", "a\nb", "a\rb", " ", "~/x", "$HOME", "%2e%2e/x", "x" * 5000),
    *("s3://other/x", "file:///etc/passwd", "memory://other/x", ".metadata", "__0.metadata", "__0_0.distcp"),
    *("\ud800", "é" * 300, "-rf", "a?b=c", "a#b", "..%2f", ".. /x", "a/..", "....//x", b"x", 5, None, ("a",)),
)
_DTYPES: tuple[Any, ...] = (
    *(torch.float32, torch.int8, torch.bfloat16, torch.complex128, torch.bool, torch.uint64, torch.quint8),
    *(torch.float8_e4m3fn, torch.bits8, torch.qint32, "float32", None, 5, torch.strided),
)
_OBJECTS: tuple[Any, ...] = (
    *(None, 5, "x", b"x", [], {}, (), [None], {"x": None}, {5: 6}, torch.float32, torch.Size([2])),
    *(BytesStorageMetadata(), MetadataIndex("x"), _StorageInfo("x", 0, 0), Metadata({}, storage_data={})),
    *([[]] * 50, "x" * 10_000, float("nan"), {"x": {"y": [1, (2,)]}}, {"cloudckpt": 5}, ["zstd"], [5]),
)


def _shape(rng: random.Random) -> Any:
    rank = rng.choice((0, 1, 1, 2, 2, 2, 3, 64, 200))
    numbers = [n for n in NUMBERS if type(n) is int and -(1 << 63) <= n < 1 << 63]
    sizes = [rng.choice((rng.randrange(32), rng.choice(numbers))) for _ in range(rank)]
    if rng.random() < 0.6:
        return torch.Size(sizes)
    mixed = [rng.choice((size, rng.choice(NUMBERS))) for size in sizes]
    return rng.choice((mixed, tuple(mixed)))


def split(metadata: Metadata, fqn: str, rows: int) -> None:
    """Describe a tensor's one row-major item as two chunks within it, as two ranks would have written it."""
    entry = metadata.state_dict_metadata[fqn]
    assert isinstance(entry, TensorStorageMetadata)
    (index,) = (index for index in metadata.storage_data if index.fqn == fqn)
    info = metadata.storage_data.pop(index)
    whole, width = tuple(entry.size), entry.size[1:]
    entry.chunks = []
    for number, (first, last) in enumerate(((0, rows), (rows, whole[0]))):
        offsets = torch.Size([first, *[0] * len(width)])
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size([last - first, *width])))
        own = copy.copy(info)
        own.__dict__["payload_offset"] += first * width.numel() * entry.properties.dtype.itemsize
        metadata.storage_data[MetadataIndex(fqn, offsets, number)] = own


def tampered(honest: bytes, rng: random.Random, protocol: int) -> bytes:
    """Change a few fields of a pickled Metadata to what no writer writes."""
    while True:
        changed = _changed(pickle.loads(honest), rng)
        try:
            return pickle.dumps(changed, protocol)
        except (RuntimeError, TypeError, ValueError, UnicodeError):
            continue  # DCP's own classes refuse to pickle some of it


def _changed(metadata: Metadata, rng: random.Random) -> Metadata:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        try:
            rng.choice(_CHANGES)(metadata, rng)
        except (AttributeError, TypeError, LookupError, ValueError):
            continue  # an earlier change took away what this one would have changed
    return metadata


def _entry(metadata: Metadata, rng: random.Random) -> TensorStorageMetadata:
    entries = [e for e in metadata.state_dict_metadata.values() if isinstance(e, TensorStorageMetadata)]
    return rng.choice(entries)


def _change_size(metadata: Metadata, rng: random.Random) -> None:
    entry: Any = _entry(metadata, rng)
    entry.size = rng.choice((_shape(rng), _shape(rng), rng.choice(_OBJECTS)))


def _change_size_and_chunk(metadata: Metadata, rng: random.Random) -> None:
    entry: Any = _entry(metadata, rng)
    entry.size = _shape(rng)
    entry.chunks = [ChunkStorageMetadata(torch.Size([0] * len(entry.size)), torch.Size(entry.size))]


def _change_chunk(metadata: Metadata, rng: random.Random) -> None:
    chunk: Any = rng.choice(_entry(metadata, rng).chunks)
    value = rng.choice((_shape(rng), _shape(rng), _shape(rng), rng.choice(_OBJECTS)))
    setattr(chunk, rng.choice(("offsets", "sizes")), value)


def _nudge_chunk(metadata: Metadata, rng: random.Random) -> None:
    chunk: Any = rng.choice(_entry(metadata, rng).chunks)
    field = rng.choice(("offsets", "sizes"))
    sizes = list(getattr(chunk, field))
    sizes[rng.randrange(len(sizes))] += rng.choice((-8, -1, 1, 8, 1 << 40))
    setattr(chunk, field, torch.Size(sizes))


def _change_chunks(metadata: Metadata, rng: random.Random) -> None:
    entry: Any = _entry(metadata, rng)
    one = rng.choice(entry.chunks)
    entry.chunks = rng.choice(
        (
            [],
            [*entry.chunks, one],
            [copy.deepcopy(one) for _ in range(50)],
            [*entry.chunks, ChunkStorageMetadata(_shape(rng), _shape(rng))],
            tuple(entry.chunks),
            rng.choice(_OBJECTS),
        )
    )


def _change_dtype(metadata: Metadata, rng: random.Random) -> None:
    properties: Any = _entry(metadata, rng).properties
    field = rng.choice(("dtype", "dtype", "dtype", "layout", "requires_grad", "memory_format", "pin_memory"))
    setattr(properties, field, rng.choice((rng.choice(_DTYPES), rng.choice(_OBJECTS))))


def _change_properties(metadata: Metadata, rng: random.Random) -> None:
    entry: Any = _entry(metadata, rng)
    entry.properties = rng.choice(_OBJECTS)


def _change_entry(metadata: Metadata, rng: random.Random) -> None:
    entries: dict[Any, Any] = metadata.state_dict_metadata
    fqn = rng.choice(list(entries))
    match rng.randrange(4):
        case 0:
            entries[fqn] = rng.choice(_OBJECTS)
        case 1:
            entries[fqn] = entries[rng.choice(list(entries))]
        case 2:
            del entries[fqn]
        case _:
            entries[rng.choice(("x", "", "a\0b", 5, ("a",), None, "\ud800"))] = entries.pop(fqn)


def _info(metadata: Metadata, rng: random.Random) -> Any:
    return rng.choice(list(metadata.storage_data.values()))


def _change_name(metadata: Metadata, rng: random.Random) -> None:
    name = rng.choice(NAMES)
    if rng.random() < 0.3:
        for info in metadata.storage_data.values():
            info.relative_path = name
    _info(metadata, rng).relative_path = name


def _change_range(metadata: Metadata, rng: random.Random) -> None:
    info, field = _info(metadata, rng), rng.choice(("offset", "length"))
    nudged = getattr(info, field) + rng.choice((-64, -1, 1, 64, 4096))
    setattr(info, field, rng.choice((rng.choice(NUMBERS), nudged)))


def _change_payload(metadata: Metadata, rng: random.Random) -> None:
    noted = _info(metadata, rng).__dict__
    match rng.randrange(4):
        case 0:
            nudged = noted["payload_offset"] + rng.choice((-64, -3, -1, 1, 3, 64))
            noted["payload_offset"] = rng.choice((rng.choice(NUMBERS), nudged))
        case 1:
            noted["dtype"] = rng.choice(_DTYPES)
        case 2:
            rank = rng.choice((0, 1, 2, 2, 2, 3))
            strides = tuple(rng.choice((rng.choice(NUMBERS), rng.randrange(64))) for _ in range(rank))
            noted["stride"] = rng.choice((strides, strides, strides, rng.choice(_OBJECTS)))
        case _:
            del noted[rng.choice(("payload_offset", "dtype", "stride"))]


def _change_checks(metadata: Metadata, rng: random.Random) -> None:
    noted = _info(metadata, rng).__dict__
    if rng.random() < 0.5:
        spans = tuple(rng.choice((rng.choice(NUMBERS), rng.randrange(4096))) for _ in range(rng.randrange(4)))
        noted["spans"] = rng.choice((spans, spans, rng.choice(_OBJECTS)))
    else:
        sums = garbled(noted["sums"], [b"x" * 100], rng)
        noted["sums"] = rng.choice((sums, b"", noted["sums"] * 1000, rng.choice(_OBJECTS)))


def _change_extensions(metadata: Metadata, rng: random.Random) -> None:
    _info(metadata, rng).transform_descriptors = rng.choice((["zstd"], [5], "zstd", 5, ["x" * 5000], ("a",)))


def _change_index(metadata: Metadata, rng: random.Random) -> None:
    places: dict[Any, Any] = metadata.storage_data
    old = rng.choice(list(places))
    fqn: Any = rng.choice((old.fqn, old.fqn, rng.choice(list(places)).fqn, "x", 5, None, ("a",)))
    offset = rng.choice((old.offset, None, _shape(rng)))
    places[MetadataIndex(fqn, offset, rng.choice((old.index, rng.choice(NUMBERS[:12]))))] = places.pop(old)


def _change_places(metadata: Metadata, rng: random.Random) -> None:
    places: dict[Any, Any] = metadata.storage_data
    one, other = (rng.choice(list(places)) for _ in range(2))
    match rng.randrange(4):
        case 0:
            places[one], places[other] = places[other], places[one]
        case 1:
            del places[one]
        case 2:
            places[one] = rng.choice(_OBJECTS)
        case _:
            places[rng.choice(("x", 5, None, ("a", "b")))] = places.pop(one)


def _change_whole(metadata: Metadata, rng: random.Random) -> None:
    fields = ("state_dict_metadata", "storage_data", "planner_data", "storage_meta", "version", "cloudckpt")
    field = rng.choice((*fields, "x" * 100))
    if rng.random() < 0.2:
        metadata.__dict__.pop(field, None)
    else:
        metadata.__dict__[field] = rng.choice(_OBJECTS)


def _change_planner_data(metadata: Metadata, rng: random.Random) -> None:
    data: Any = metadata.planner_data
    fqn = rng.choice(list(data))
    path = rng.choice(((), (5,), ("a", "b", 5), "x", None, (1 << 40,), ("list", 10**9), ("__class__",)))
    data[rng.choice((fqn, "x", 5))] = path


def _change_extras(metadata: Metadata, rng: random.Random) -> None:
    extras = metadata.__dict__["cloudckpt"]
    extras[rng.choice(list(extras))] = rng.choice(_OBJECTS)


_CHANGES: Sequence[Callable[[Metadata, random.Random], None]] = (
    *(_change_size, _change_size_and_chunk, _change_chunk, _nudge_chunk, _change_chunks, _change_dtype),
    *(_change_properties, _change_entry, _change_name, _change_range, _change_range, _change_payload),
    *(_change_payload, _change_extensions, _change_index, _change_places, _change_whole),
    *(_change_planner_data, _change_extras, _change_checks, _change_checks),
)


def garbled(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Change a few bytes, as damage or a fuzzer would."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(result) + 1)
        size = rng.choice((1, 2, 4, 8, 100))
        match rng.randrange(8):
            case 0 if result:
                result[min(at, len(result) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                result[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                del result[at : at + size]
            case 3:
                result[at:at] = result[at : at + size]
            case 4:
                number = rng.choice([n for n in NUMBERS if type(n) is int and 0 <= n < 1 << 64])
                width = rng.choice((2, 4, 8))
                result[at : at + width] = struct.pack("<Q", number)[:width]
            case 5:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                result[at : at + rng.choice((0, size))] = other[start : start + size]
            case 6:
                result[at:at] = rng.choice(list(PUSHES.values()))[:4096]
            case _:
                del result[at if rng.random() < 0.1 else len(result) :]
    return bytes(result)


def instructions(data: bytes) -> list[bytes]:
    """A pickle, cut between its instructions; frames are left out, for they would no longer fit."""
    places = [(op.name, at) for op, _, at in pickletools.genops(data)]
    ends = [at for _, at in places[1:]] + [len(data)]
    return [
        data[cast(int, at) : end] for (name, at), end in zip(places, ends, strict=True) if name != "FRAME"
    ]


_SIMPLE = [op.code.encode("latin-1") for op in pickletools.opcodes if op.arg is None]


def reordered(pieces: Sequence[bytes], rng: random.Random) -> bytes:
    """Drop, repeat, swap and add instructions of a pickle, so that what remains is still one."""
    result = list(pieces)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(1, max(2, len(result) - 1))
        match rng.randrange(6):
            case 0:
                del result[at : at + 1]
            case 1:
                result[at:at] = [result[rng.randrange(len(result))]]
            case 2:
                other = rng.randrange(len(result))
                result[min(at, len(result) - 1)], result[other] = (
                    result[other],
                    result[min(at, len(result) - 1)],
                )
            case 3:
                result[at:at] = [rng.choice(_SIMPLE)]
            case 4:
                result[at:at] = [rng.choice(list(PUSHES.values()))]
            case _:
                result[at : at + 1] = [
                    rng.choice(
                        (
                            b"N",
                            b"K\x00",
                            b"J\xff\xff\xff\xff",
                            b"h\x00",
                            b"h%c" % rng.randrange(256),
                            b"G\x7f\xf8\0\0\0\0\0\0",
                        )
                    )
                ]
    return b"".join(result)


def archive(parts: dict[str, bytes], *, deflated: bool = False) -> bytes:
    """A zip archive as ``torch.save`` writes one; it never compresses."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED) as out:
        for name, data in parts.items():
            out.writestr(name, data)
    return stream.getvalue()


def records(data: bytes) -> dict[str, bytes]:
    """The records of an archive whose payload has no checksum."""
    found: dict[str, bytes] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as given:
        for info in given.infolist():
            start = info.header_offset
            name, extra = struct.unpack_from("<HH", data, start + 26)
            first = start + 30 + name + extra
            found[info.filename] = data[first : first + info.file_size]
    return found


def rearchived(data: bytes, rng: random.Random) -> bytes:
    """Change the records of an archive: their names, what they hold, their number."""
    parts = records(data)
    prefix = next(iter(parts)).partition("/")[0]
    pickled = f"{prefix}/data.pkl"
    match rng.randrange(6):
        case 0:
            push = rng.choice(list(PUSHES.values()))
            parts[pickled] = b"\x80\x02" + push + b"."
        case 1:
            parts[pickled] = reordered(instructions(parts[pickled]), rng)
        case 2:
            parts[pickled] = garbled(parts[pickled], [parts[pickled]], rng)
        case 3:
            name = rng.choice(list(parts))
            parts[rng.choice((f"{prefix}/data/0", f"{prefix}/data/1", "../x", "/x", "x"))] = parts.pop(name)
        case 4:
            name = rng.choice(list(parts))
            parts[name] = rng.choice((b"", b"x", parts[name] * 3, b"\0" * 100_000, b"9" * 30))
        case _:
            extra = rng.choice(
                (".format_version", "byteorder", "version", ".storage_alignment", "constants.pkl")
            )
            parts[f"{prefix}/{extra}"] = rng.choice(
                (b"", b"big", b"little", b"99999999999999999999", b"x", b"-1")
            )
    return archive(parts, deflated=rng.random() < 0.3)
