"""Feeds hostile input to what reads checkpoints, in a process of its own that watches what it does.

Run as ``fuzz.py KIND SEED COUNT FOLDER``. Input number i is made from the seed and i alone. It lies in
``FOLDER/current`` while it is tried, so that it is still there when the process hangs or crashes. Prints a
report as JSON.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import faulthandler
import gc
import hashlib
import io
import json
import logging
import os
import pickle
import random
import resource
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from fsspec.implementations.memory import MemoryFileSystem
from torch._weights_only_unpickler import _get_allowed_globals
from torch.distributed.checkpoint.api import CheckpointException

import cloudckpt
from cloudckpt.backends.checksums import CRC64NVME
from cloudckpt.backends.errors import CheckpointError, IntegrityError
from cloudckpt.backends.format import metadata, metadata_unpickler, stock_archive
from cloudckpt.backends.load import read_plan
from cloudckpt.backends.state import values
from cloudckpt.backends.state.codec import build, builtin_types
from support import hostile, plain_values, structures, value_classes
from support.value_digest import digest

SECONDS = 10
"""That one input may take, on a machine that does other things too,"""
SECONDS_A_MIB = 10
"""and that each MiB of it may take besides."""
_MIB = 1 << 20
_MEMORY = 48 * _MIB
"""Bytes that one input may cost beyond what was there, and 64 for each of its own."""
_ADDRESS_SPACE = 1024 * _MIB
"""Bytes of address space that one input may take beyond what was there, and 64 for each of its own."""
_FINDINGS = 20

_CLASSES = [*metadata_unpickler._CLASSES.values(), torch.Size, collections.OrderedDict, torch.Tensor]
_TABLES: tuple[dict[Any, Any], ...] = (
    *(metadata_unpickler._CLASSES, metadata_unpickler._FUNCTIONS, values._PLAIN),
    *(build._BUILDERS, builtin_types.FACTORIES, builtin_types.CONSTANTS),
)

_HARMLESS = frozenset(
    {"object.__getattr__", "object.__setattr__", "object.__delattr__", "sys._getframe", "builtins.id"}
    | {"_thread.start_new_thread", "sys._current_frames", "code.__new__", "array.__new__"}
)
"""Events of the interpreter that reading a checkpoint may raise; every other one is a finding."""


class Watch:
    """Hears everything that Python reports to audit hooks: files, processes, sockets, code, imports."""

    def __init__(self) -> None:
        self.armed = False
        self.heard: list[str] = []
        # What a bare torch.FloatStorage is read as: a name and a dtype, which is pickled as its class.
        self._globals = {*_get_allowed_globals(), *values._PLAIN, "builtins.set"}
        self._globals.add("torch.serialization.StorageType")
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or event in _HARMLESS:
            return
        if (
            event == "pickle.find_class"
            and ".".join(arguments).replace("__builtin__", "builtins") in self._globals
        ):
            return  # DCP's planner loads what was proven
        if (
            event == "open"
            and arguments[1] in {"r", "rb"}
            and str(arguments[0]).endswith((".py", "<unknown>"))
        ):
            return  # the lines of a traceback,
        if event == "compile" and arguments[1] == "<unknown>":
            return  # and where in a line it broke
        self.heard.append(f"{event} {arguments!r}"[:300])


@dataclass
class Report:
    """What became of the inputs."""

    kind: str
    seed: int
    count: int = 0
    outcomes: collections.Counter[str] = field(default_factory=collections.Counter[str])
    findings: dict[str, str] = field(default_factory=dict[str, str])
    """The file with the input, by what is wrong."""


class Sandbox:
    """Tries one input after the other, and writes down each that breaks a promise."""

    def __init__(self, report: Report, folder: Path) -> None:
        self._report, self._folder = report, folder
        self._current = folder / "current"
        self._watch = Watch()
        self._before = _fingerprint()
        self._threads = threading.active_count()

    def try_out(self, data: bytes, case: Callable[[bytes], object]) -> None:
        """Try an input."""
        self._current.write_bytes(data)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _status("VmRSS")
        failure: BaseException | None = None
        bound = _status("VmSize") + _ADDRESS_SPACE + 64 * len(data)
        resource.setrlimit(resource.RLIMIT_AS, (bound, resource.RLIM_INFINITY))
        faulthandler.dump_traceback_later(SECONDS + SECONDS_A_MIB * (len(data) >> 20), exit=True)
        self._watch.armed = True
        try:
            case(data)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is what this looks for
            failure = error
        finally:
            self._watch.armed = False
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            faulthandler.cancel_dump_traceback_later()
        self._judge(data, failure, _status("VmHWM") - before)

    def _judge(self, data: bytes, failure: BaseException | None, grown: int) -> None:
        self._report.count += 1
        self._report.outcomes[type(failure).__name__ if failure else "accepted"] += 1
        heard, self._watch.heard = self._watch.heard, []
        for event in heard:
            self._find(data, event)
        for error in _causes(failure):
            if isinstance(error, MemoryError) or "allocate memory" in str(error):
                self._find(data, f"asked for memory: {type(error).__name__}: {str(error)[:80]}")
        if grown > _MEMORY + 64 * len(data):
            self._find(data, f"grew by {grown // _MIB // 16 * 16} MiB")
        for error in _raised(failure):
            if not (isinstance(error, CheckpointError) or _is_of_dcp(error)):
                self._find(data, f"raised {type(error).__name__}: {error}"[:200])
        if _fingerprint() != self._before:
            self._find(data, "changed a class")
            self._before = _fingerprint()
        if threading.active_count() > self._threads:
            self._find(data, "left a thread")

    def _find(self, data: bytes, what: str) -> None:
        found = self._report.findings
        if what not in found and len(found) < _FINDINGS:
            file = self._folder / f"{self._report.kind}-{hashlib.sha256(data).hexdigest()[:16]}"
            file.write_bytes(data)
            found[what] = str(file)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def _fingerprint() -> list[Any]:
    classes = [[(key, id(value)) for key, value in vars(cls).items()] for cls in _CLASSES]
    return [
        classes,
        [list(table) for table in _TABLES],
        len(os.environ),
        sys.path[:],
        sys.getrecursionlimit(),
    ]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for raised in _raised(error):
        one: BaseException | None = raised
        for _ in range(20):
            if one is None:
                break
            yield one
            one = one.__cause__ or one.__context__


def _raised(error: BaseException | None) -> list[BaseException]:
    """What a load raised; of DCP's exception, what it holds."""
    if isinstance(error, CheckpointException) and error.failures:
        return [failure for failure, _ in error.failures.values()]
    return [] if error is None else [error]


def _is_of_dcp(error: BaseException) -> bool:
    """Whether DCP's planner says that state and checkpoint don't match, before the reader is asked."""
    return (type(error) is RuntimeError and str(error).startswith("Missing key")) or (
        type(error) is ValueError and str(error).startswith("Invalid checkpoint metadata for")
    )


# --- honest checkpoints


def state(rng: random.Random | None = None) -> dict[str, Any]:
    """A small state; with ``rng`` one to load into, in one of several forms."""
    torch.manual_seed(0)
    full: dict[str, Any] = {
        "w": torch.randn(16, 24),
        "t": torch.randn(12, 10).t(),
        "h": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "big": torch.arange(20_000, dtype=torch.int16),
        "n": {"step": 3, "name": "run", "list": [1, torch.ones(2), {"x": (1, 2)}]},
    }
    if rng is None:
        return full
    for key, value in full.items():
        if isinstance(value, torch.Tensor):
            form = rng.randrange(4)
            like = torch.zeros_like(value)
            if form == 0:
                like = like.double()
            elif form == 1:
                like = torch.zeros(*value.shape, 2, dtype=value.dtype)[..., 0]
            full[key] = like
    return {key: full[key] for key in full if rng.random() < 0.8}


Objects = dict[str, bytes]


def _objects_of(uri: str) -> Objects:
    root = "/" + uri.removeprefix("memory://") + "/"
    files = MemoryFileSystem.store
    return {key[len(root) :]: file.getvalue() for key, file in files.items() if key.startswith(root)}


def sealed(data: bytes) -> bytes:
    """What follows the pickle of ``.metadata``, made for other bytes, so that these are read."""
    return data + metadata._SEAL + f"{CRC64NVME.of(data):016x}".encode()


def unsealed(data: bytes) -> bytes:
    """The pickle alone."""
    return data.partition(metadata._SEAL)[0]


def honest(folder: Path) -> list[Objects]:
    """Our own checkpoint, the same with a tensor in two chunks and no checksums, and stock DCP's."""
    dcp.save(state(), storage_writer=cloudckpt.StorageWriter("memory://seed"), no_dist=True)
    ours = _objects_of("memory://seed")
    described = metadata.load(ours[metadata.METADATA_NAME], uri="memory://seed")
    hostile.split(described, "w", 5)
    for noted in described.__dict__[metadata._EXTRAS]["objects"].values():
        noted["checksum"] = None
    in_two = {**ours, metadata.METADATA_NAME: metadata.dump(described)}
    dcp.save(state(), checkpoint_id=folder / "stock", no_dist=True)
    stocks = {path.name: path.read_bytes() for path in (folder / "stock").iterdir()}
    return [ours, in_two, stocks]


def _items(objects: Objects) -> list[bytes]:
    """Each item of a checkpoint."""
    described = metadata.load(objects[metadata.METADATA_NAME], uri="memory://seed")
    return [
        objects[info.relative_path][info.offset : info.offset + info.length]
        for info in described.storage_data.values()
    ]


# --- what is tried, by kind


class Kind:
    """One surface: makes inputs, and tries one."""

    def __init__(self, seeds: list[Objects]) -> None:
        self.seeds = seeds
        self.pickles = [unsealed(seed[metadata.METADATA_NAME]) for seed in seeds]
        self.pickles += [pickle.dumps(self.honest(data), protocol=3) for data in self.pickles]
        self.cut = [hostile.instructions(data) for data in self.pickles]
        self.by_hand = list(hostile.pickles().values())
        self.items = [item for seed in seeds for item in _items(seed)]

    def honest(self, data: bytes) -> Any:
        return metadata.load(sealed(unsealed(data)), uri="memory://seed")

    def by_hand_count(self) -> int:
        """Inputs written by hand, which are tried before the random ones."""
        return 0

    def hand(self, number: int) -> bytes:
        """One of those."""
        raise NotImplementedError

    def make(self, rng: random.Random) -> bytes:
        """A random input."""
        raise NotImplementedError

    def run(self, data: bytes) -> object:
        """Read it."""
        raise NotImplementedError

    def a_pickle(self, rng: random.Random) -> bytes:
        match rng.randrange(4):
            case 0:
                return hostile.garbled(rng.choice(self.pickles), self.pickles, rng)
            case 1:
                return hostile.reordered(rng.choice(self.cut), rng)
            case _:
                protocol = rng.choice((2, 3, 4, 5, rng.randrange(6)))
                return hostile.tampered(rng.choice(self.pickles), rng, protocol)

    def an_item(self, rng: random.Random) -> bytes:
        item = rng.choice(self.items)
        if rng.random() < 0.5:
            return hostile.garbled(item, self.items, rng)
        return hostile.rearchived(item, rng)


class MetadataKind(Kind):
    """The bytes of ``.metadata``."""

    def by_hand_count(self) -> int:
        return len(self.by_hand)

    def hand(self, number: int) -> bytes:
        return sealed(self.by_hand[number])

    def make(self, rng: random.Random) -> bytes:
        data = self.a_pickle(rng)
        return sealed(data) if rng.random() < 0.95 else data

    def run(self, data: bytes) -> object:
        read = metadata.load(data, uri="memory://x")
        infos = read.storage_data.values()
        return [
            *(metadata.notes_of(read), metadata.sizes_of(read), metadata.version_of(read)),
            *(metadata.objects_of(read), metadata.least_sizes(read), metadata.save_id_of(read)),
            *(
                (metadata.payload_of(info), metadata.checks_of(info, metadata.algorithms_of(read)))
                for info in infos
            ),
        ]


class StructuresKind(MetadataKind):
    """Metadata that is deep, wide, shared or refers to itself, of up to 100 kB."""

    def by_hand_count(self) -> int:
        return 0

    def make(self, rng: random.Random) -> bytes:
        return sealed(structures.structure(rng, int(10 ** rng.uniform(1, 5))))


class LargeKind(StructuresKind):
    """The same of 4 to 64 MiB, most of it at the lower end."""

    def make(self, rng: random.Random) -> bytes:
        gc.collect()  # what refers to itself stays until then
        return sealed(structures.structure(rng, int(4 * _MIB * 16 ** (rng.random() ** 3))))


class FramingKind(Kind):
    """The archive around a tensor, of which only the ends are read."""

    def make(self, rng: random.Random) -> bytes:
        return self.an_item(rng)

    def run(self, data: bytes) -> object:
        found = stock_archive.locate(0, len(data), lambda offset, size: data[offset : offset + size])
        if found is None:
            raise IntegrityError("to be read as a whole")
        return found


class ValueKind(Kind):
    """A value or a tensor, read whole."""

    def by_hand_count(self) -> int:
        return len(hostile.PUSHES)

    def hand(self, number: int) -> bytes:
        push = list(hostile.PUSHES.values())[number]
        return hostile.archive(
            hostile.records(self.items[0]) | {"archive/data.pkl": b"\x80\x02" + push + b"."}
        )

    def make(self, rng: random.Random) -> bytes:
        return self.an_item(rng) if rng.random() < 0.9 else self.a_pickle(rng)

    def run(self, data: bytes) -> object:
        failures: list[CheckpointError] = []
        for read in (
            lambda: values.prove_safe(memoryview(data), "x"),
            lambda: values.load_tensor(memoryview(data), "x", trust=False),
        ):
            try:
                proven = read()
            except CheckpointError as error:
                failures.append(error)
            else:
                if isinstance(proven, io.BytesIO):
                    torch.load(proven, weights_only=False)
        if failures:
            raise failures[0]
        return None


class StructuredValueKind(ValueKind):
    """A value that is deep, wide, shared or refers to itself."""

    def by_hand_count(self) -> int:
        return 0

    def make(self, rng: random.Random) -> bytes:
        size = 4 * _MIB if rng.random() < 0.002 else int(10 ** rng.uniform(1, 5))
        pickled = structures.structure(rng, size)
        return hostile.archive(hostile.records(self.items[0]) | {"archive/data.pkl": pickled})


class PlainKind(ValueKind):
    """A value of classes that are known here, read by the loader alone."""

    def __init__(self, seeds: list[Objects]) -> None:
        super().__init__(seeds)
        expected = plain_values.table()
        value_classes.RAN.clear()
        self.items = [values.dumps(value).getvalue() for value in expected.values() if _is_short(value)]
        for protocol in (2, 4, 5):
            stream = io.BytesIO()
            torch.save(expected, stream, pickle_protocol=protocol)
            self.items.append(stream.getvalue())
        for item in self.items:  # imports what the honest ones import
            values.loads(item, "x")
        parts = [hostile.instructions(hostile.records(item)["archive/data.pkl"]) for item in self.items]
        self.pickled = [part for part in parts if len(part) > 2]

    def make(self, rng: random.Random) -> bytes:
        if rng.random() < 0.3:
            return self.an_item(rng)
        pieces = hostile.reordered(rng.choice(self.pickled), rng)
        if rng.random() < 0.5:
            pieces = hostile.garbled(pieces, [pieces], rng)
        return hostile.archive(hostile.records(self.items[0]) | {"archive/data.pkl": pieces})

    def run(self, data: bytes) -> object:
        try:
            value = values.loads(data, "x")
            if values.refusal(value) is None:
                digest(value)
        finally:
            if value_classes.RAN:
                value_classes.RAN.clear()
                raise AssertionError("a method of a user's class ran")
        return None


def _is_short(value: object) -> bool:
    return len(values.dumps(value).getbuffer()) < 4_000


class CheckpointKind(Kind):
    """A whole checkpoint, through DCP."""

    def make(self, rng: random.Random) -> bytes:
        objects = dict(rng.choice(self.seeds))
        name = rng.choice([*objects, metadata.METADATA_NAME])
        if name == metadata.METADATA_NAME or rng.random() < 0.2:
            if rng.random() < 0.9:
                plain = unsealed(objects[metadata.METADATA_NAME])
                objects[metadata.METADATA_NAME] = sealed(hostile.tampered(plain, rng, 4))
            else:
                objects[metadata.METADATA_NAME] = sealed(self.a_pickle(rng))
        if name != metadata.METADATA_NAME:
            objects[name] = self._with_one_item_changed(objects, name, rng)
        return pickle.dumps((rng.randrange(1 << 30), objects))

    def _with_one_item_changed(self, objects: Objects, name: str, rng: random.Random) -> bytes:
        if rng.random() < 0.2:
            return hostile.garbled(objects[name], self.items, rng)
        item = rng.choice(self.items)
        at = objects[name].find(item)
        if at < 0:
            return hostile.garbled(objects[name], self.items, rng)
        changed = (hostile.rearchived(item, rng) + bytes(len(item)))[: len(item)]
        return objects[name][:at] + changed + objects[name][at + len(item) :]

    def run(self, data: bytes) -> object:
        form, objects = pickle.loads(data)
        MemoryFileSystem.store.clear()
        fs = MemoryFileSystem()
        for name, content in objects.items():
            fs.pipe_file(f"/case/{name}", content)
        reader = cloudckpt.StorageReader("memory://case", concurrency=2)
        dcp.load(state(random.Random(form)), storage_reader=reader, no_dist=True)
        return None


class UnguardedKind(Kind):
    """What a plain unpickler does with some of it: shows that the sandbox hears that."""

    _NAMES = ("posix.system", "builtins.open", "socket.socket", "builtins.eval", "importlib")

    def by_hand_count(self) -> int:
        return len(self._NAMES)

    def hand(self, number: int) -> bytes:
        return b"\x80\x04" + hostile.PUSHES[self._NAMES[number]] + b"."

    def run(self, data: bytes) -> object:
        return pickle.loads(data)


KINDS: dict[str, type[Kind]] = {
    "metadata": MetadataKind,
    "structures": StructuresKind,
    "large": LargeKind,
    "structured values": StructuredValueKind,
    "framing": FramingKind,
    "values": ValueKind,
    "plain": PlainKind,
    "checkpoint": CheckpointKind,
    "unguarded": UnguardedKind,
}


def fuzz(name: str, seed: int, count: int, folder: Path) -> Report:
    """Try ``count`` inputs of a kind, those written by hand first."""
    read_plan._WHOLE = 256  # small items are looked into like large ones,
    stock_archive.PROBE = 4096  # and of most no more than the ends is read
    kind = KINDS[name](honest(folder))
    report = Report(name, seed)
    _warm_up(KINDS["checkpoint"](kind.seeds))
    sandbox = Sandbox(report, folder)
    for number in range(kind.by_hand_count()):
        sandbox.try_out(kind.hand(number), kind.run)
    for number in range(count - kind.by_hand_count()):
        sandbox.try_out(kind.make(random.Random(f"{seed}-{number}")), kind.run)
    return report


def _warm_up(kind: Kind) -> None:
    """Import what a load and a failure import when they first happen."""
    codecs.lookup("cp437")  # the names in an old archive
    repr(torch.zeros(()))  # in what torch says of a tensor where it expects none
    for objects in kind.seeds:
        kind.run(pickle.dumps((0, objects)))
        for name in objects:
            for damaged in ({**objects, name: b""}, {**objects, name: objects[name][:-700] + bytes(700)}):
                with contextlib.suppress(CheckpointException):
                    kind.run(pickle.dumps((0, damaged)))


def main(name: str, seed: str, count: str, folder: str) -> None:
    """Fuzz, and print the report."""
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(vars(fuzz(name, int(seed), int(count), Path(folder)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
