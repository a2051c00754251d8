"""Unpickling in the checkpoint process, which runs the user's main script only if a pickle names it."""

from __future__ import annotations

import io
import pickle
import sys
from multiprocessing import spawn
from typing import Any


class MainScript:
    """The trainer's ``__main__``, imported in the checkpoint process when a pickle first needs it.

    A training script without an ``if __name__ == "__main__"`` guard would start training again when it is
    imported. Most pickles name nothing in it, so most checkpoint processes never do.
    """

    _preparation: dict[str, Any] | None = None
    loading = False

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """What the checkpoint process needs to import it: made in the trainer."""
        prepared = spawn.get_preparation_data("cloudckpt")
        needed = ("init_main_from_name", "init_main_from_path", "sys_argv")
        return {key: prepared[key] for key in needed if key in prepared}

    @classmethod
    def expect(cls, description: dict[str, Any]) -> None:
        """Remember where it is, without running it."""
        cls._preparation = dict(description)

    @classmethod
    def load(cls) -> None:
        """Import it under the name ``__mp_main__``, as multiprocessing does, at most once."""
        if cls._preparation:
            preparation, cls._preparation = cls._preparation, None
            cls.loading = True
            try:
                spawn.prepare(preparation)
            finally:
                cls.loading = False


class Unpickler(pickle.Unpickler):
    """An unpickler that finds what the trainer's main script defines."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name in {"__main__", "__mp_main__"}:
            MainScript.load()
            module_name = "__main__"
        return super().find_class(module_name, global_name)


def loads(data: bytes) -> Any:
    """Unpickle what the trainer of this very process sent."""
    return Unpickler(io.BytesIO(data)).load()


def search_path() -> list[str]:
    """Where the trainer finds its modules, so that the checkpoint process finds the same."""
    return [path or sys.path[0] or "." for path in sys.path]
