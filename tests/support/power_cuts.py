"""Every folder that POSIX allows after a power cut, from the system calls that a save made.

The model is the weakest that POSIX allows, not what one file system does. `fsync` of a file makes its bytes
durable, and `fsync` of a folder its entries. What was not synced may be there or not: each entry of a folder
independently of every other, so that a rename may lose its old name, its new one, both or none. Bytes that
were not synced may be there, missing, cut in the middle, or zeros.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

_CALLS = (
    "open",
    "close",
    "write",
    "pwrite",
    "pwritev",
    "writev",
    "copy_file_range",
    "fsync",
    "fdatasync",
    "sync",
    "truncate",
    "ftruncate",
    "link",
    "rename",
    "replace",
    "unlink",
    "remove",
    "mkdir",
    "rmdir",
)
"""Calls of the system at which the folder is looked at: what has changed since the one before is an event."""
_WRITES = ("write", "pwrite", "pwritev", "copy_file_range")

Tree = dict[str, bytes | None]
"""Bytes of files, and None for folders, by their paths."""


@dataclass(frozen=True)
class Entry:
    """A name in a folder came to stand for a file or a folder, or for nothing."""

    folder: int
    name: str
    node: int | None


@dataclass(frozen=True)
class Bytes:
    """The bytes of a file changed."""

    node: int
    data: bytes


@dataclass(frozen=True)
class Synced:
    """A file or a folder was made durable; None: everything was."""

    node: int | None


Event = Entry | Bytes | Synced


class Recording:
    """The events in a folder while the body of `recorded` ran."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[Event] = []
        self.folders: set[int] = set()
        self._lock = threading.RLock()
        self._nodes: dict[int, int] = {}
        self._drawn = itertools.count(1)
        self._entries: dict[tuple[int, str], int] = {}
        self._data: dict[int, bytes] = {}
        self.top = self._node(os.lstat(root))
        self.look()
        self.events.append(Synced(None))

    @property
    def length(self) -> int:
        """How many events there were."""
        return len(self.events)

    def look(self) -> None:
        """Note what has changed in the folder."""
        entries: dict[tuple[int, str], int] = {}
        data: dict[int, bytes] = {}
        there: set[int] = set()
        self._walk(self.root, self.top, entries, data, there)
        for node, content in data.items():
            if self._data.get(node, b"") != content:
                self.events.append(Bytes(node, content))
        gone = [key for key in self._entries if key not in entries]
        # New names first: of a rename the old name is the one that a cut may leave as well.
        for key, node in entries.items():
            if self._entries.get(key) != node:
                self.events.append(Entry(*key, node))
        self.events += [Entry(*key, None) for key in gone]
        self._entries, self._data = entries, data
        self._nodes = {ino: node for ino, node in self._nodes.items() if ino in there or node == self.top}

    def _walk(self, folder: Path, node: int, entries: Any, data: Any, there: set[int]) -> None:
        self.folders.add(node)
        for one in os.scandir(folder):
            status = one.stat(follow_symlinks=False)
            there.add(status.st_ino)
            its = entries[node, one.name] = self._node(status)
            if one.is_dir(follow_symlinks=False):
                self._walk(Path(one.path), its, entries, data, there)
            else:
                data[its] = Path(one.path).read_bytes()

    def _node(self, status: os.stat_result) -> int:
        """Return a number for a file that no other file ever has; the system uses its own again."""
        if status.st_ino not in self._nodes:
            self._nodes[status.st_ino] = next(self._drawn)
        return self._nodes[status.st_ino]

    def sync(self, fd: int | None) -> None:
        if fd is None:
            self.events.append(Synced(None))
        else:
            node = self._nodes.get(os.fstat(fd).st_ino)
            if node is not None:
                self.events.append(Synced(node))


class _Full:
    """A disk that is full from its nth write on."""

    def __init__(self, at: int | None) -> None:
        self.at, self.writes = at, 0

    def taken(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of a write that there is room for: half of the last one, as a disk has it.

        Raises:
            OSError: there is none.
        """
        self.writes += 1
        if self.at is None or self.writes <= self.at:
            return args
        if name == "pwritev" and self.writes == self.at + 1 and len(args[1][0]) > 1:
            fd, buffers, offset = args
            return fd, [buffers[0][: len(buffers[0]) // 2]], offset
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def recorded(root: Path, full_at: int | None = None) -> Iterator[tuple[Recording, _Full]]:
    """Record what the body does below a folder, which is durable before.

    Args:
        root: the folder.
        full_at: the writes that a disk has room for; None for any number.
    """
    recording, full = Recording(root), _Full(full_at)
    own = threading.local()

    def hooked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **keywords: Any) -> Any:
            if getattr(own, "looking", False):
                return call(*args, **keywords)
            own.looking = True
            try:
                with recording._lock:
                    recording.look()
                    if name in _WRITES:
                        args = full.taken(name, args)
                    result = call(*args, **keywords)
                    recording.look()
                    if name in ("fsync", "fdatasync", "sync"):
                        recording.sync(args[0] if args else None)
                    return result
            finally:
                own.looking = False

        return act

    with contextlib.ExitStack() as stack:
        for name in _CALLS:
            call = getattr(os, name)
            stack.enter_context(mock.patch.object(os, name, hooked(name, call)))
        yield recording, full
        own.looking = True
        recording.look()


@dataclass
class _Disk:
    """What may be on the disk after some events: for each entry and file, what it may be."""

    entries: dict[tuple[int, str], list[int | None]] = field(default_factory=dict)
    data: dict[int, bytes] = field(default_factory=dict)
    durable: dict[int, bytes] = field(default_factory=dict)

    def take(self, event: Event, folders: set[int]) -> None:
        match event:
            case Entry(folder, name, node):
                options = self.entries.setdefault((folder, name), [None])
                options.append(node)
            case Bytes(node, data):
                self.data[node] = data
            case Synced(None):
                for options in self.entries.values():
                    del options[:-1]
                self.durable = dict(self.data)
            case Synced(node) if node in folders:
                for (folder, _), options in self.entries.items():
                    if folder == node:
                        del options[:-1]
            case Synced(node):
                assert node is not None
                self.durable[node] = self.data.get(node, b"")

    def options_of(self, node: int, pieces: int) -> list[bytes]:
        """Return bytes that a file may have; each of so many pieces of it may be there or be zeros."""
        now, then = self.data.get(node, b""), self.durable.get(node, b"")
        if now == then:
            return [now]
        found = [now, then, b""]
        cuts = [len(now) * one // pieces for one in range(pieces + 1)]
        parts = list(itertools.pairwise(cuts))
        for there in itertools.product((True, False), repeat=pieces):
            torn = b"".join(
                now[a:b] if one else bytes(b - a) for one, (a, b) in zip(there, parts, strict=True)
            )
            found += [torn, torn[: cuts[-2]]]
        return list(dict.fromkeys(found))

    def trees(
        self, top: int, folders: set[int], most: int, pieces: int, draw: random.Random
    ) -> Iterator[Tree]:
        """Yield what may be there; where that is more than ``most``, so many that are drawn."""
        open_entries = [(key, list(dict.fromkeys(options))) for key, options in self.entries.items()]
        nodes = {n for _, options in open_entries for n in options if n is not None and n not in folders}
        open_data = [(node, self.options_of(node, pieces)) for node in sorted(nodes)]
        choices: list[Sequence[Any]] = [options for _, options in open_entries]
        choices += [options for _, options in open_data]
        total = 1
        for one in choices:
            total *= len(one)
        if total <= most:
            drawn: Iterator[tuple[Any, ...]] = itertools.product(*choices)
        else:
            corners = [tuple(one[-1] for one in choices), tuple(one[0] for one in choices)]
            others = (tuple(draw.choice(one) for one in choices) for _ in range(most - len(corners)))
            drawn = itertools.chain(corners, others)
        for chosen in drawn:
            entries = dict(zip((key for key, _ in open_entries), chosen, strict=False))
            data = dict(zip((node for node, _ in open_data), chosen[len(open_entries) :], strict=True))
            yield _tree(top, entries, data, folders)


def _tree(
    top: int, entries: dict[tuple[int, str], int | None], data: dict[int, bytes], folders: set[int]
) -> Tree:
    within: dict[int, list[tuple[str, int]]] = {}
    for (folder, name), node in entries.items():
        if node is not None:
            within.setdefault(folder, []).append((name, node))
    tree: Tree = {}

    def add(folder: int, path: str) -> None:
        for name, node in within.get(folder, ()):
            if node in folders:
                tree[f"{path}{name}"] = None
                add(node, f"{path}{name}/")
            else:
                tree[f"{path}{name}"] = data[node]

    add(top, "")
    return tree


def after_cuts(recording: Recording, most: int, pieces: int = 2, seed: int = 0) -> Iterator[tuple[int, Tree]]:
    """Yield the folders after a cut, each once for the same number of events, and that number.

    Args:
        recording: what was done.
        most: folders after as many events; where there are more, so many are drawn.
        pieces: of bytes that were not synced, each of which may be there or not.
        seed: of what is drawn.
    """
    disk, draw = _Disk(), random.Random(seed)
    begun = recording.events.index(Synced(None)) + 1
    for event in recording.events[:begun]:
        disk.take(event, recording.folders)
    for count in range(begun, recording.length + 1):
        if count > begun:
            disk.take(recording.events[count - 1], recording.folders)
        seen: set[tuple[tuple[str, bytes | None], ...]] = set()
        for tree in disk.trees(recording.top, recording.folders, most, pieces, draw):
            key = tuple(sorted(tree.items()))
            if key not in seen:
                seen.add(key)
                yield count, tree


def build(tree: Tree, root: Path) -> None:
    """Put a folder on the disk, in place of what is there."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, data in sorted(tree.items()):
        if data is None:
            (root / path).mkdir(parents=True, exist_ok=True)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
