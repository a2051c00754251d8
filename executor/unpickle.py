"""Unpickling in the checkpoint process, which runs the user's main script only if a pickle names it."""

from __future__ import annotations

import io
import os
import pickle
import sys
from multiprocessing import process, spawn
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
        # As multiprocessing.spawn.get_preparation_data does, which fails where the working directory is gone.
        described: dict[str, Any] = {"sys_argv": sys.argv}
        main = sys.modules["__main__"]
        name = getattr(main.__spec__, "name", None)
        if name is not None:
            return described | {"init_main_from_name": name}
        path = getattr(main, "__file__", None)
        if path is None:
            return described
        began: str | None = getattr(process, "ORIGINAL_DIR", None)
        if not os.path.isabs(path) and began is not None:  # noqa: PTH117 - a path as it was typed
            path = os.path.join(began, path)  # noqa: PTH118
        return described | {"init_main_from_path": os.path.normpath(path)}

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
    """Return where the trainer finds its modules, so that the checkpoint process finds the same.

    What lies below a working directory that was deleted is left out: nothing can be imported from there, and
    Python fails on such an entry.
    """
    here = working_directory()
    found: list[str] = []
    for path in sys.path:
        one = path or sys.path[0] or "."
        if os.path.isabs(one):  # noqa: PTH117 - entries are strings, which may name archives
            found.append(one)
        elif here is not None:
            found.append(os.path.join(here, one))  # noqa: PTH118
    return found


def working_directory() -> str | None:
    """Return the working directory, None where it was deleted or can't be reached."""
    try:
        return os.getcwd()  # noqa: PTH109 - a string, for entries of sys.path
    except OSError:
        return None
