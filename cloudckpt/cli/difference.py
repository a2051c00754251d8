"""``cloudckpt diff``: what two checkpoints do not have in common, without reading their data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cloudckpt.backends.manage.contents import Contents, Shard, StoredTensor, StoredValue
from cloudckpt.backends.system.printable import one_line
from cloudckpt.cli import output


@dataclass(frozen=True, slots=True)
class Change:
    """A key whose entries are not of the same form."""

    key: str
    what: str
    """``kind`` (tensor or value), ``dtype`` or ``shape``."""
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Difference:
    """The differences between two checkpoints, by key."""

    first: str
    """URI."""
    second: str
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    changed: tuple[Change, ...]
    content: tuple[str, ...]
    """Same form, other bytes: their checksums differ."""
    unknown: tuple[str, ...]
    """Same form, and checksums that don't compare: sharded, laid out or checked in another way, or none."""
    same: int
    """Keys whose form and checksums are the same."""

    @property
    def found(self) -> bool:
        """True if the two are not shown to be the same."""
        return bool(self.only_first or self.only_second or self.changed or self.content or self.unknown)


def difference(first: Contents, second: Contents) -> Difference:
    """Compare two checkpoints by what their metadata says."""
    ours, theirs = first.stored, second.stored
    changed: list[Change] = []
    content: list[str] = []
    unknown: list[str] = []
    same = 0
    for key in sorted(ours.keys() & theirs.keys()):
        one, other = ours[key], theirs[key]
        if forms := list(_changes(one, other)):
            changed += forms
            continue
        match _is_same(one, other):
            case True:
                same += 1
            case False:
                content.append(key)
            case None:
                unknown.append(key)
    return Difference(
        first.uri,
        second.uri,
        tuple(sorted(ours.keys() - theirs.keys())),
        tuple(sorted(theirs.keys() - ours.keys())),
        tuple(changed),
        tuple(content),
        tuple(unknown),
        same,
    )


def diff(first: Contents, second: Contents, *, as_json: bool) -> bool:
    """Print what two checkpoints do not have in common, and tell whether that is nothing."""
    found = difference(first, second)
    if as_json:
        output.say_json({**dataclasses.asdict(found), "different": found.found})
    else:
        _say(found)
    return not found.found


def _say(found: Difference) -> None:
    output.say(f"first:  {found.first}")
    output.say(f"second: {found.second}")
    _section("only in the first", found.only_first)
    _section("only in the second", found.only_second)
    for what in ("kind", "dtype", "shape"):
        changes = [one for one in found.changed if one.what == what]
        _section(f"other {what}", [f"{one.key}: {one.first}, {one.second}" for one in changes])
    _section("other content, by the checksums", found.content)
    _section("can't tell without reading", found.unknown)
    output.say(f"the same: {output.count(found.same, 'key')}", "" if found.found else "green")


def _section(title: str, lines: Sequence[str]) -> None:
    if lines:
        output.say(f"{title}: {len(lines):,}", "yellow")
        for line in lines:
            output.say(f"  {one_line(line)}")


def _changes(one: StoredTensor | StoredValue, other: StoredTensor | StoredValue) -> Iterable[Change]:
    if isinstance(one, StoredTensor) and isinstance(other, StoredTensor):
        if one.dtype != other.dtype:
            yield Change(one.key, "dtype", one.dtype, other.dtype)
        if one.shape != other.shape:
            yield Change(one.key, "shape", str(list(one.shape)), str(list(other.shape)))
    elif type(one) is not type(other):
        yield Change(one.key, "kind", _kind(one), _kind(other))


def _kind(stored: StoredTensor | StoredValue) -> str:
    return "tensor" if isinstance(stored, StoredTensor) else "value"


def _is_same(one: StoredTensor | StoredValue, other: StoredTensor | StoredValue) -> bool | None:
    """Return True if the content is the same; None where the metadata can't tell."""
    if isinstance(one, StoredValue) and isinstance(other, StoredValue):
        return False if one.size != other.size else _same_shard(one.content, other.content)
    assert isinstance(one, StoredTensor)  # noqa: S101 - forms were compared
    assert isinstance(other, StoredTensor)  # noqa: S101
    if [_box(shard) for shard in one.shards] != [_box(shard) for shard in other.shards]:
        return None
    same = {_same_shard(ours, theirs) for ours, theirs in zip(one.shards, other.shards, strict=True)}
    return False if False in same else None if None in same else True


def _same_shard(one: Shard, other: Shard) -> bool | None:
    if one.sums is None or other.sums is None or one.sums.way != other.sums.way:
        return None
    return one.sums.packed == other.sums.packed


def _box(shard: Shard) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return shard.offsets, shard.sizes
