"""Converting: a checkpoint, a ``torch.save`` file or safetensors into another of these, in bounded memory.

Nothing is held whole but values: each part of what is written fetches its own bytes from where they lie, in
the thread that sends it. What is written appears whole or not at all.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import pydantic
import torch
from pydantic import ByteSize

from cloudckpt.backends.config.target import Target
from cloudckpt.backends.convert import convert_lease, dcp, safetensors, torch_reader, torch_writer
from cloudckpt.backends.convert.key_selection import Selected, nested, selected
from cloudckpt.backends.convert.publish import Planned, Putting
from cloudckpt.backends.convert.state_source import Entry, Source
from cloudckpt.backends.errors import ConfigurationError
from cloudckpt.backends.format import metadata as md
from cloudckpt.backends.save.uploader import Observer
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.stores.base import ObjectStore

Kind = Literal["checkpoint", "torch", "safetensors"]
"""A checkpoint, a ``torch.save`` file, or one or more safetensors files."""
KINDS: Final[tuple[Kind, ...]] = ("checkpoint", "torch", "safetensors")
SHARD_SIZE: Final = "5GB"
_NAMED: Final = 10
"""Keys that an error names."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """The result of ``convert``."""

    source: str
    """URI."""
    uri: str
    kind: Kind
    files: tuple[str, ...]
    """URIs; of a checkpoint its own."""
    tensors: int
    values: int
    size: int
    """Bytes that were stored."""
    left_out: tuple[str, ...]
    """Keys of values, of which a safetensors file holds none."""


def kind_at(source: Target) -> Kind:
    """Return the kind of source at a URI, by its name and its objects.

    Raises:
        StorageError: the store could not be read.
    """
    named = named_kind(source)
    if named is not None:
        folder, name = source.parted()
        with open_store(folder) as store:
            if store.holds(name):  # a checkpoint's folder may be called so
                return named
    with open_store(source) as store:
        names = {info.name for info in store.list("", delimiter=True).objects}
        whole = names & {safetensors.INDEX, safetensors.WHOLE} and md.METADATA_NAME not in names
    return "safetensors" if whole else "checkpoint"


def named_kind(target: Target) -> Kind | None:
    """Return the kind of a file of this name; None where the name does not tell."""
    name = target.uri.rpartition("/")[2].lower()
    if name.endswith(safetensors.SUFFIX):
        return "safetensors"
    return "torch" if name.endswith(torch_reader.SUFFIXES) else None


def convert(
    source: str | os.PathLike[str] | Target,
    destination: str | os.PathLike[str] | Target,
    *,
    to: Kind | str | None = None,
    key: str = "",
    strip: str = "",
    shard_size: int | str = SHARD_SIZE,
    overwrite: bool = False,
    trust: bool = False,
    observer: Observer | None = None,
    begun: Callable[[int], None] | None = None,
) -> Conversion:
    """Convert between checkpoints, ``torch.save`` files and safetensors, from any store to any other.

    Holds at most ``memory_limit`` bytes beside what is no tensor. The destination appears whole or not at
    all, and what is read of a checkpoint is compared with its checksums. A file's kind follows from its name:
    ``.pt``, ``.pth``, ``.bin`` and ``.ckpt`` are of ``torch.save``.

    Args:
        source: a checkpoint, a file, or a folder of safetensors.
        destination: where to; options of either stand in the URI's query, or in a parsed target.
        to: what to make, where the name does not say it; safetensors then is a folder.
        key: take only what has a key that begins so.
        strip: leave this out where a key begins with it.
        shard_size: bytes of one file in a folder of safetensors, or a size such as ``5GB``.
        overwrite: replace what is there.
        trust: let the source run code of its writer.
        observer: called with an object's name and how many more of its bytes are stored, from several
            threads.
        begun: called with the number of bytes of tensors to be converted.

    Raises:
        CheckpointNotFoundError: there is nothing to convert.
        CheckpointExistsError: the destination is there already.
        ConfigurationError: something in the state can't be in a file of that kind, or an argument is wrong.
        UnsafeCheckpointError: reading the source would run code.
        IntegrityError: the source is damaged.
        StorageError: a store could not be read or written to.
    """
    origin, target = Target.parse(source), Target.parse(destination)
    memory_limit = min(origin.options.memory_limit, target.options.memory_limit)
    kind = _kind_to_make(to, target)
    most = _bytes(shard_size)
    # One half is for what is being sent, the other for what is read around it.
    opened = _open(origin, memory_limit // 2, trust=trust)
    with opened.store:
        job = _Job(
            origin,
            target,
            opened,
            selected(opened, key, strip),
            memory_limit=memory_limit // 2,
            overwrite=overwrite,
            observer=observer,
        )
        if begun is not None:
            begun(sum(entry.nbytes for entry in job.entries.values()))
        if kind == "checkpoint":
            return job.to_checkpoint()
        if kind == "torch":
            return job.to_torch()
        return job.to_safetensors(None if named_kind(target) == kind else most)


def _kind_to_make(to: str | None, target: Target) -> Kind:
    if to is None:
        return named_kind(target) or "checkpoint"
    for kind in KINDS:
        if to == kind:
            return kind
    raise ConfigurationError(f"{to!r} is nothing to convert to", hint=f"It is one of {', '.join(KINDS)}")


def _open(target: Target, memory_limit: int, *, trust: bool) -> Source:
    kind = kind_at(target)
    file = kind != "checkpoint" and named_kind(target) == kind
    folder, name = target.parted() if file else (target, "")
    store = open_store(folder)
    try:
        if kind == "torch":
            return torch_reader.open_file(store, name, target, memory_limit, trust=trust)
        if kind == "checkpoint":
            return dcp.open_checkpoint(store, target, memory_limit, trust=trust)
        if file:
            return safetensors.open_file(store, name, target, memory_limit)
        return safetensors.open_folder(store, target, memory_limit)
    except BaseException:
        store.close()
        raise


class _Job:
    """One conversion: what is selected, and where it goes."""

    def __init__(
        self,
        origin: Target,
        target: Target,
        source: Source,
        places: Sequence[Selected],
        *,
        memory_limit: int,
        overwrite: bool,
        observer: Observer | None,
    ) -> None:
        self._origin = origin
        self._target = target
        self._source = source
        self._places = places
        self._memory_limit = memory_limit
        self._overwrite = overwrite
        self._observer = observer
        self._lock = threading.Lock()
        self._stored = 0
        self._keys = [one.key for one in places]
        self.entries = source.entries(self._keys)

    def to_checkpoint(self) -> Conversion:
        state, fetched = self._state(dcp.stand_ins(self.entries))
        dcp.write_checkpoint(
            self._target,
            state,
            fetched,
            self._source,
            memory_limit=self._memory_limit,
            overwrite=self._overwrite,
            observer=self._note,
        )
        return self._done("checkpoint", [self._target.uri])

    def to_torch(self) -> Conversion:
        folder, name = self._target.parted()
        with open_store(folder) as store:
            convert_lease.remove_dead(store)
            putting = self._putting(folder, store)
            there = _there(store, name)
            putting.ensure_free(there)
            state, fetched = self._state(torch_writer.stand_ins(self.entries))
            failed = threading.Event()
            planned = torch_writer.planned(state, fetched, self._source, failed)
            putting.put({name: planned}, replaced=there, failed=failed)
        return self._done("torch", [self._target.uri])

    def to_safetensors(self, shard_size: int | None) -> Conversion:
        """Into a folder of files of at most so many bytes, or into one file."""
        tensors = {
            one.name: self.entries[one.key].row_major for one in self._places if one.key in self.entries
        }
        self._check_for_safetensors(tensors)
        index: bytes | None = None
        folder, name = (self._target, "") if shard_size is not None else self._target.parted()
        if shard_size is None:
            shards = [safetensors.Shard.of(name, tensors)]
        else:
            shards, index = safetensors.sharded(tensors, shard_size)
        with open_store(folder) as store:
            convert_lease.remove_dead(store)
            there = _there(store, name) if name else safetensors.written_before(store)
            putting = self._putting(folder, store)
            putting.ensure_free(there)
            files: dict[str, Planned] = {shard.name: shard.planned(self._source) for shard in shards}
            putting.put(files, index=None if index is None else (safetensors.INDEX, index), replaced=there)
        names = [*files, *([] if index is None else [safetensors.INDEX])]
        return self._done("safetensors", [folder.child(name).uri for name in names])

    def _putting(self, folder: Target, store: ObjectStore) -> Putting:
        return Putting(
            store,
            folder.options,
            self._memory_limit,
            self._overwrite,
            self._note,
            self._source.ensure_unchanged,
        )

    def _state(self, stand_ins: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[int, Entry]]:
        """Return the nested state with stand-ins, and what each of those stands for."""
        leaves = {**self._source.values(self._keys), **stand_ins}
        fetched = {id(stand_in): self.entries[key] for key, stand_in in stand_ins.items()}
        return nested(self._places, leaves), fetched

    def _check_for_safetensors(self, tensors: Mapping[str, Entry]) -> None:
        obstacles = [
            f"{key} ({why})" for key, entry in tensors.items() if (why := safetensors.obstacle(entry))
        ]
        obstacles += [f"{key} (conjugated or negated)" for key in self._source.tensors_held(self._keys)]
        if obstacles:
            raise ConfigurationError(
                f"safetensors have no such tensors: {_enumerated(obstacles)}",
                uri=self._origin.uri,
                hint="Select keys without them, or convert to a .pt file",
            )
        if not tensors:
            raise ConfigurationError(
                "there is no tensor to convert, and safetensors hold nothing else", uri=self._origin.uri
            )
        chosen = {*self._keys}
        shared = [
            ", ".join(both)
            for keys in self._source.shared
            if len(both := [k for k in keys if k in chosen]) > 1
        ]
        if shared:
            raise ConfigurationError(
                f"tensors have memory in common, which safetensors can't say: {_enumerated(shared)}",
                uri=self._origin.uri,
                hint="Select one of them, or convert to a checkpoint first, where each has its own",
            )

    def _note(self, name: str, size: int) -> None:
        with self._lock:
            self._stored += size
        if self._observer is not None:
            self._observer(name, size)

    def _done(self, kind: Kind, files: Sequence[str]) -> Conversion:
        others = [key for key in self._keys if key not in self.entries]
        return Conversion(
            self._origin.uri,
            self._target.uri,
            kind,
            tuple(files),
            len(self.entries),
            0 if kind == "safetensors" else len(others),
            self._stored,
            tuple(others) if kind == "safetensors" else (),
        )


def _there(store: ObjectStore, name: str) -> list[str]:
    """Return the file of this name, where there is one."""
    return [name] if store.holds(name) else []


def _enumerated(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return "; ".join(names[:_NAMED]) + more


def _bytes(size: int | str) -> int:
    try:
        found = pydantic.TypeAdapter(ByteSize).validate_python(size)
    except pydantic.ValidationError:
        found = ByteSize(0)
    if found < 1:
        raise ConfigurationError(f"{size!r} is not a size of a shard", hint="Write it like 5GB or 512MiB")
    return int(found)
