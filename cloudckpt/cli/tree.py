"""``cloudckpt show``: what a checkpoint holds, as a tree of its keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from rich.text import Text
from rich.tree import Tree

from cloudckpt.backends.manage.contents import Contents, StoredTensor, StoredValue
from cloudckpt.backends.system.printable import one_line
from cloudckpt.cli import output

_DEEPEST: Final = 10
"""Levels of the tree: in 80 columns there is no room for more."""


@dataclass(slots=True)
class Branch:
    """A part of the keys' names, what is stored under it, and what goes on from it."""

    name: str
    detail: str = ""
    branches: dict[str, Branch] = field(default_factory=dict)


def show(contents: Contents, *, as_json: bool) -> None:
    """Print a checkpoint's contents."""
    if as_json:
        output.say_json(as_dict(contents))
        return
    console = output.answers()
    for line in heading(contents):
        output.say(line, "bold" if line == contents.uri else "", console=console)
    keys = Tree(_label("keys", ""), guide_style="dim")
    _grow(keys, branches(contents).branches.values())
    console.print(keys)
    objects = Tree(_label("objects", ""), guide_style="dim")
    for one in contents.objects:
        objects.add(_label(one.name, output.size(one.size)))
    console.print(objects)


def heading(contents: Contents) -> Iterator[str]:
    """Return its URI, its size and its writer."""
    yield contents.uri
    tensors, values, objects = contents.tensors, contents.values, contents.objects
    yield (
        f"{output.count(len(tensors), 'tensor')} of {output.size(sum(one.size for one in tensors))}, "
        f"{output.count(len(values), 'value')}, {output.count(len(objects), 'object')}"
    )
    when = "" if contents.committed_at is None else f" {contents.committed_at:%Y-%m-%d %H:%M:%S %Z}"
    if contents.version is None:
        yield f"committed{when} by another writer than cloudckpt"
    else:
        yield f"committed{when} by cloudckpt {contents.version}"
        yield f"save {contents.save_id}"


def branches(contents: Contents) -> Branch:
    """Return the keys as a tree, parted at their dots; what has one branch alone is joined with it."""
    root = Branch("")
    for key, one in sorted(contents.stored.items(), key=lambda item: _natural(item[0])):
        at = root
        for part in key.split(".", _DEEPEST - 1):
            at = at.branches.setdefault(part, Branch(part))
        at.detail = detail(one)
    return _joined(root)


def detail(stored: StoredTensor | StoredValue) -> str:
    """Describe the entry of a key."""
    if isinstance(stored, StoredValue):
        return f"value, {output.size(stored.size)}"
    shards = "" if len(stored.shards) == 1 else f", {output.count(len(stored.shards), 'shard')}"
    return f"{stored.dtype} {list(stored.shape)}, {output.size(stored.size)}{shards}"


def as_dict(contents: Contents) -> dict[str, Any]:
    """Return a checkpoint's contents for machines."""
    return {
        "uri": contents.uri,
        "version": contents.version,
        "save_id": contents.save_id,
        "committed_at": contents.committed_at,
        "tensors": [
            {
                "key": one.key,
                "dtype": one.dtype,
                "shape": one.shape,
                "size": one.size,
                "shards": [{"offsets": shard.offsets, "sizes": shard.sizes} for shard in one.shards],
            }
            for one in contents.tensors
        ],
        "values": [{"key": one.key, "size": one.size} for one in contents.values],
        "objects": [{"name": one.name, "size": one.size} for one in contents.objects],
    }


def _natural(key: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 10 after layer 9."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() and len(part) < _DEEPEST else 0, part)
        for part in key.split(".")
    ]


def _joined(branch: Branch) -> Branch:
    branch.branches = {name: _joined(below) for name, below in branch.branches.items()}
    if branch.name and not branch.detail and len(branch.branches) == 1:
        (below,) = branch.branches.values()
        return Branch(f"{branch.name}.{below.name}", below.detail, below.branches)
    return branch


def _grow(tree: Tree, below: Iterable[Branch]) -> None:
    for branch in below:
        _grow(tree.add(_label(branch.name, branch.detail)), branch.branches.values())


def _label(name: str, what: str) -> Text:
    return Text.assemble((one_line(name), "cyan"), f"  {what}" if what else "")
