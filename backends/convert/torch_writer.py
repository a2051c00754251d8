"""Writing a ``torch.save`` file in a stream.

Under ``torch.serialization.skip_data`` torch writes the archive of a state whose tensors are fake ones, which
have no memory, and seeks over what would be their bytes. Those are fetched into the gaps as the file goes
out. What torch leaves zero is filled in, too: the checksums of the tensors' records, which torch itself never
looks at, and any other reader of zip files does.
"""

from __future__ import annotations

import functools
import itertools
import pickle
import threading
import types
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final, cast

import torch
from awscrt import checksums as crt

from cloudckpt.backends.convert.publish import Planned
from cloudckpt.backends.convert.state_source import Entry, Source
from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.format.stock_archive import EndsOnly
from cloudckpt.backends.format.tensor_archive import FramingSink
from cloudckpt.backends.save.uploader import NotSentError
from cloudckpt.backends.torch_private import FakeTensorMode, storage_identity
from cloudckpt.backends.transfer.segments import Late, Segment, View, bytes_of

_DESCRIPTOR: Final = b"PK\x07\x08"
"""What follows a record's bytes begins with; then comes their checksum."""
_CRC: Final = 4
"""Bytes of a checksum."""
_ENTRY: Final = b"PK\x01\x02"
"""What an entry of the directory begins with."""
_CRC_AT: Final = 16
"""Where in an entry the checksum is."""
_BEFORE_NAME: Final = 46
"""Bytes of an entry before the record's name."""
_PATIENCE: Final = 0.1
"""Seconds between two looks at whether what is waited for will ever come."""


def stand_ins(entries: Mapping[str, Entry]) -> dict[str, torch.Tensor]:
    """Tensors like these, with no memory."""
    with FakeTensorMode():
        return {
            key: torch.empty_strided(entry.shape, entry.stride, dtype=entry.dtype, device="cpu")
            for key, entry in entries.items()
        }


def planned(state: Any, fetched: Mapping[int, Entry], source: Source, failed: threading.Event) -> Planned:
    """Return a file of this state as an object to put.

    Args:
        state: what ``torch.load`` shall return, with stand-ins.
        fetched: what each stand-in stands for, by its ``id``.
        source: where that is.
        failed: set when a part could not be sent, so that what others wait for never comes.

    Raises:
        ConfigurationError: a value can't be saved.
    """
    order = _Order()
    sink = FramingSink()
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(state, cast(IO[bytes], sink), pickle_module=order.module)
    except Exception as error:  # what does not pickle can raise nearly anything
        raise ConfigurationError(f"the state can't be saved: {type(error).__name__}: {error}") from error
    gaps = [stop - start for start, stop in sink.gaps]
    if gaps != [one.untyped_storage().nbytes() for one in order.tensors]:
        raise ConfigurationError(
            "a value holds storages of tensors, which can't be distinguished here",
            hint="Select keys without it",
        )
    sums = [_Sum(gap, failed) for gap in gaps]
    payloads = [
        source.segment(fetched[id(one)], seen=total.add) if id(one) in fetched else _in_memory(one, total)
        for one, total in zip(order.tensors, sums, strict=True)
    ]
    return Planned(sink.tell(), _Laid(sink, sums).segments(payloads))


class _Order:
    """The tensors whose bytes go into the gaps, in the order in which torch meets their storages."""

    def __init__(self) -> None:
        met: dict[int, torch.Tensor] = {}

        class Pickler(pickle.Pickler):
            def reducer_override(self, obj: Any) -> Any:
                if isinstance(obj, torch.Tensor) and obj.layout is torch.strided:
                    met.setdefault(storage_identity(obj.untyped_storage()), obj)
                return NotImplemented

        self._met = met
        self.module = types.SimpleNamespace(__name__=pickle.__name__, Pickler=Pickler)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """One of each storage that is not empty."""
        return [one for one in self._met.values() if one.untyped_storage().nbytes()]


def _in_memory(tensor: torch.Tensor, total: _Sum) -> Segment:
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.cpu().untyped_storage())
    data = bytes_of(whole)
    total.add(0, data)
    return View(data, borrowed=False)


@dataclass(slots=True)
class _Sum:
    """The checksum of a record, whose pieces are brought by several threads."""

    size: int
    failed: threading.Event
    _pieces: dict[int, tuple[int, int]] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def add(self, start: int, data: memoryview) -> None:
        """Take in the bytes at ``start``."""
        piece = data.nbytes, crt.crc32(cast(bytes, data))  # any buffer will do
        with self._changed:
            self._pieces[start] = piece
            self._changed.notify_all()

    def packed(self) -> bytes:
        """As it stands in the archive, once all bytes have been brought.

        Raises:
            NotSentError: they never will be.
        """
        with self._changed:
            while sum(size for size, _ in self._pieces.values()) < self.size:
                if self.failed.is_set():
                    raise NotSentError
                self._changed.wait(_PATIENCE)
            value = 0
            for _, (size, crc) in sorted(self._pieces.items()):
                value = crt.combine_crc32(value, crc, size)
        return value.to_bytes(_CRC, "little")


class _Laid:
    """The bytes that torch wrote around the gaps, and the positions of missing checksums in them."""

    def __init__(self, sink: FramingSink, sums: Sequence[_Sum]) -> None:
        bounds = [0, *itertools.chain.from_iterable(sink.gaps), sink.tell()]
        pieces = deque(sink.pieces)
        self._runs: list[bytes] = []
        for stop in bounds[1::2]:
            run: list[bytes] = []
            while pieces and pieces[0][0] < stop:
                run.append(pieces.popleft()[1])
            self._runs.append(b"".join(run))
        self._sums = sums
        self._missing = list(self._in_directory(sink.tell())) if sums else []

    def segments(self, payloads: Sequence[Segment]) -> Iterator[Segment]:
        """Yield the whole file, with these in the gaps."""
        head, *rest = self._runs
        yield View(memoryview(head), borrowed=False)
        for payload, total, run in zip(payloads, self._sums, rest, strict=True):
            yield payload
            yield View(memoryview(_DESCRIPTOR), borrowed=False)
            yield Late(_CRC, total.packed)
            after = memoryview(run)[len(_DESCRIPTOR) + _CRC :]
            if run is not rest[-1]:
                yield View(after, borrowed=False)
            else:
                yield Late(after.nbytes, functools.partial(self._directory, len(run) - after.nbytes))

    def _directory(self, begin: int) -> bytes:
        """Return the last run from a byte on, complete."""
        run = bytearray(self._runs[-1])
        for at, total in self._missing:
            run[at : at + _CRC] = total.packed()
        return bytes(run[begin:])

    def _in_directory(self, size: int) -> Iterator[tuple[int, _Sum]]:
        """Yield the positions of checksums in the directory whose records were left out."""
        run = self._runs[-1]
        if not all(one.startswith(_DESCRIPTOR) for one in self._runs[1:]):
            raise RuntimeError("torch.save wrote no checksum after a record, where one was expected")
        with zipfile.ZipFile(EndsOnly(b"", run, size)) as archive:
            records = [one for one in archive.infolist() if "/data/" in one.filename and one.file_size]
            at = archive.start_dir - (size - len(run))
        of_record = {one.filename.encode(): total for one, total in zip(records, self._sums, strict=True)}
        while run[at : at + len(_ENTRY)] == _ENTRY:
            name, extra, comment = (
                int.from_bytes(run[at + of : at + of + 2], "little") for of in (28, 30, 32)
            )
            total = of_record.get(run[at + _BEFORE_NAME : at + _BEFORE_NAME + name])
            if total is not None:
                yield at + _CRC_AT, total
            at += _BEFORE_NAME + name + extra + comment
