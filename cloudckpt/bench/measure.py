"""Measurements of a store from this machine, with the requests of a save and a load."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

from cloudckpt.backends.config.options import Options
from cloudckpt.backends.manage.probe_objects import ProbeObjects
from cloudckpt.backends.save.uploader import Observer, Uploader
from cloudckpt.backends.stores.base import ObjectStore, Overwrite
from cloudckpt.backends.transfer.byte_ranges import Extent, nothing
from cloudckpt.backends.transfer.downloader import LARGEST_READ, Downloader
from cloudckpt.backends.transfer.segments import View
from cloudckpt.bench.advice import Measured, Setting
from cloudckpt.bench.plan import ROUNDS

_SMALL: Final = 1024
_TIMES: Final = 11
_BLOCK: Final = 64 << 20
"""Bytes of random data, which go out again and again."""

_SLOTS: Final = 16


class Bench:
    """Measures one store.

    Args:
        store: which.
        options: of the job; concurrency and size of parts are what is tried.
        probe_objects: the objects to be deleted.
        size: bytes that are moved at a time.
        observer: called with bytes that have been moved.
    """

    def __init__(
        self, store: ObjectStore, options: Options, probe_objects: ProbeObjects, size: int, observer: Observer
    ) -> None:
        self._store = store
        self._options = options
        self._probe_objects = probe_objects
        self._size = size
        self._observer = observer
        self._data = memoryview(os.urandom(min(size, _BLOCK)))
        # Ranges land in these alternately: as many as are under way at once, in most cases.
        self._slots = [
            memoryview(bytearray(min(size, LARGEST_READ)))
            for _ in range(min(_SLOTS, -(-size // LARGEST_READ)))
        ]

    def latencies(self) -> dict[str, float]:
        """Seconds that a small put, stat, get and delete take, each in the median of several."""
        name, data = self._probe_objects.name(), bytes(self._data[:_SMALL])
        acts: dict[str, Callable[[], object]] = {
            "put": lambda: self._store.put(name, data, Overwrite()),
            "stat": lambda: self._store.stat(name),
            "get": lambda: self._store.get(name),
            "delete": lambda: self._store.delete([name]),
        }
        taken: dict[str, list[float]] = {what: [] for what in acts}
        for _ in range(1 + _TIMES):
            for what, act in acts.items():
                taken[what].append(_timed(act)[0])
        # The first of each opens connections.
        return {what: statistics.median(seconds[1:]) for what, seconds in taken.items()}

    def up(self, settings: Sequence[Setting], seconds: float) -> tuple[Measured, ...]:
        """Upload with each of the settings in turn, for so many seconds or until all rounds are done."""
        return self._measured(settings, seconds, self._upload, self._probe_objects.clear)

    def down(self, settings: Sequence[Setting], seconds: float) -> tuple[Measured, ...]:
        """Download likewise."""
        objects = self._upload(settings[0])
        found = self._measured(settings, seconds, lambda setting: self._download(objects, setting))
        self._store.delete(objects)
        return found

    def _measured(
        self,
        settings: Sequence[Setting],
        seconds: float,
        act: Callable[[Setting], object],
        after: Callable[[], object] = nothing,
    ) -> tuple[Measured, ...]:
        """Interleave the rounds of all settings, so that what changes meanwhile changes for all of them."""
        act(settings[0])  # warms up: connections, pages, and how many transfers side by side are worth it
        after()
        ends = time.monotonic() + seconds
        taken: dict[Setting, list[tuple[float, float]]] = {setting: [] for setting in settings}
        for _ in range(ROUNDS):
            for setting in settings:
                if time.monotonic() < ends or setting == settings[0]:
                    taken[setting].append(_timed(partial(act, setting)))
                    after()
        return tuple(
            Measured(setting, self._size, tuple(one[0] for one in rounds), tuple(one[1] for one in rounds))
            for setting, rounds in taken.items()
            if rounds
        )

    def _upload(self, setting: Setting) -> dict[str, int]:
        """Upload as a save does: parts side by side, checksums taken, completed at the end."""
        uploader = Uploader(self._store, setting.concurrency, self._options.memory_limit, self._observer)
        names = [self._probe_objects.name() for _ in range(self._objects(setting))]
        share = -(-self._size // len(names))
        sizes = [min(share, self._size - at * share) for at in range(len(names))]
        try:
            sent = uploader.send(
                {
                    name: (self._views(nbytes), setting.part_size)
                    for name, nbytes in zip(names, sizes, strict=True)
                }
            )
        finally:
            self._probe_objects.adopt(uploader.started, uploader.unconfirmed)
        for one in sent:
            self._store.complete_upload(one.staged.upload, one.staged.parts, confirm=False)
            self._probe_objects.ended(one.staged.upload)
        return dict(zip(names, sizes, strict=True))

    def _objects(self, setting: Setting) -> int:
        """As many as a save would make of so many bytes."""
        if not self._store.wants_several_objects:
            return 1
        return max(1, min(setting.concurrency, self._size // (2 * setting.part_size)))

    def _views(self, nbytes: int) -> Iterator[View]:
        while nbytes > 0:
            yield View(self._data[:nbytes])
            nbytes -= min(nbytes, self._data.nbytes)

    def _download(self, objects: Mapping[str, int], setting: Setting) -> None:
        """Read as a load does: ranges side by side, into memory that is there."""
        downloader = Downloader(self._store, setting.concurrency, self._options.memory_limit, objects)
        slots = itertools.cycle(self._slots)
        downloader.read(
            {
                name: [
                    Extent(at, piece, partial(self._observer, name, piece), next(slots)[:piece])
                    for at in range(0, nbytes, downloader.largest)
                    for piece in (min(downloader.largest, nbytes - at),)
                ]
                for name, nbytes in objects.items()
            }
        )


def _timed(act: Callable[[], object]) -> tuple[float, float]:
    began, cpu = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - began, time.process_time() - cpu
