"""The containers of a checkpoint, rebuilt from the names and paths in its metadata."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from cloudckpt.backends.state.records import Container, Path, Records, is_path, name_of

Part = str | int


class SavedTree:
    """Leaves of a checkpoint and containers around them, by the names that DCP gave.

    Args:
        metadata: of the checkpoint.
    """

    def __init__(self, metadata: Metadata) -> None:
        self.entries: Mapping[str, TensorStorageMetadata | BytesStorageMetadata] = (
            metadata.state_dict_metadata
        )
        records = Records.of(metadata)
        self.is_complete = records is not None
        """True where empty containers and keys are recorded; stock DCP records neither."""
        self.records = records if records is not None else Records()
        self._paths = _paths_of(metadata)
        self._tops: defaultdict[str, list[tuple[Path, str]]] = defaultdict(list)
        # In the order of the paths, which is that of the state: that of the entries depends on the ranks that
        # write them.
        known = [name for name in self._paths if name in self.entries]
        for name in [*known, *(name for name in self.entries if name not in self._paths)]:
            path = self._paths.get(name) or tuple(name.split("."))
            self._tops[str(path[0])].append((path, name))
        for name, container in self.records.containers.items():
            self._tops[str(container.path[0])].append((container.path, name))
        self._children: dict[str, dict[Part, str]] = {}
        self._built: set[str] = set()

    def top(self, name: str) -> str:
        """Return the key at the top under which a leaf is."""
        path = self._paths.get(name)
        return str(path[0]) if path is not None else name.partition(".")[0]

    def has(self, name: str) -> bool:
        """Return whether there is a leaf or a container of this name."""
        return name in self.entries or name in self.records.containers or bool(self.children(name))

    def container(self, name: str) -> Container | None:
        """Return what is recorded of a container."""
        return self.records.containers.get(name)

    def children(self, name: str) -> Mapping[Part, str]:
        """Return the names of what a container holds, by its keys as text or its indices, in order."""
        self._build(name.partition(".")[0])
        if name not in self._children and name not in self.entries:
            # A key at the top may have dots itself.
            for one in self._tops:
                if name == one or name.startswith(f"{one}."):
                    self._build(one)
        return self._children.get(name, {})

    def holds_tensors(self, name: str) -> bool:
        """Return whether there is a tensor of this name, or in the container of it."""
        entry = self.entries.get(name)
        if entry is not None:
            return isinstance(entry, TensorStorageMetadata)
        return any(map(self.holds_tensors, self.children(name).values()))

    def leaves(self, name: str) -> Iterator[str]:
        """Yield the names of all leaves in the container of this name, or the leaf itself."""
        if name in self.entries:
            yield name
        for child in self.children(name).values():
            yield from self.leaves(child)

    def _build(self, top: str) -> None:
        if top in self._built:
            return
        self._built.add(top)
        for path, name in self._tops.get(top, ()):
            inner = name
            for at in range(len(path) - 1, 0, -1):
                outer = name_of(path[:at])
                held = self._children.get(outer)
                if held is not None and path[at] in held:
                    break
                self._children.setdefault(outer, {})[path[at]] = inner
                inner = outer


def _paths_of(metadata: Metadata) -> dict[str, Path]:
    data = metadata.planner_data
    if not isinstance(data, dict):
        return {}
    return {name: path for name, path in data.items() if is_path(path) and name_of(path) == name}
