"""A run: checkpoints of one training job, each in a folder named for its step.

A step exists when its ``.metadata`` does; nothing else decides. Names have ten digits, so that they sort as
the steps do.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass

from cloudckpt.backends import metadata as md
from cloudckpt.backends.errors import ConfigurationError, ObjectNotFoundError
from cloudckpt.backends.store import ObjectStore, Overwrite
from cloudckpt.backends.stores import open_store
from cloudckpt.backends.target import Target

_PREFIX = "step-"
_DIGITS = 10
_FOLDER = re.compile(rf"{_PREFIX}(\d{{{_DIGITS}}})/?")
_LAST = 10**_DIGITS - 1


@dataclass(frozen=True, slots=True)
class Run:
    """The checkpoints below one URI. Every question is answered by the store, now."""

    target: Target

    def at(self, step: int) -> Target:
        """Where a step's checkpoint is, or would be.

        Raises:
            ConfigurationError: no step has this number.
        """
        return self.target.child(self.folder(step))

    def folder(self, step: int) -> str:
        """The name of a step's folder.

        Raises:
            ConfigurationError: no step has this number.
        """
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= _LAST:
            raise ConfigurationError(
                f"a step is a whole number from 0 to {_LAST:,}, and not {step!r}", uri=self.target.uri
            )
        return f"{_PREFIX}{step:0{_DIGITS}}"

    def newest(self, before: int | None = None) -> int | None:
        """The highest committed step, below ``before`` where that is given; None where there is none.

        It takes a request for a thousand steps, and one for each step that it finds begun and not committed.

        Raises:
            StorageError: the store could not be read.
        """
        with open_store(self.target) as store:
            begun = (_step_of(name) for name in store.list(_PREFIX, delimiter=True).prefixes)
            candidates = (step for step in begun if step is not None and (before is None or step < before))
            for step in sorted(candidates, reverse=True):
                if self._is_committed(store, step):
                    return step
        return None

    def steps(self) -> list[int]:
        """Every committed step, in order; it takes a request for a thousand objects.

        Raises:
            StorageError: the store could not be read.
        """
        with open_store(self.target) as store:
            names = [info.name.partition("/") for info in store.list(_PREFIX).objects]
        found = {_step_of(folder) for folder, _, name in names if name == md.METADATA_NAME}
        return sorted(step for step in found if step is not None)

    def prove(self) -> None:
        """Put, read and delete a small object: what a save will need.

        Raises:
            StorageError: one of them is not possible.
        """
        name, data = f".cloudckpt-probe.{uuid.uuid4().hex}", b"can this run be saved here?"
        with open_store(self.target) as store:
            store.put(name, data, Overwrite())
            try:
                store.get(name)
            finally:
                store.delete([name])

    def _is_committed(self, store: ObjectStore, step: int) -> bool:
        try:
            store.stat(f"{self.folder(step)}/{md.METADATA_NAME}")
        except ObjectNotFoundError:
            return False
        return True


def _step_of(folder: str) -> int | None:
    match = _FOLDER.fullmatch(folder)
    return None if match is None else int(match[1])
