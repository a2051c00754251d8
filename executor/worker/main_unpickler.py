"""Pickles for the checkpoint process, which runs the user's main script only if one of them names it.

Classes and functions are pickled by their names. Those of a notebook, of ``python -c`` and of a script on
standard input are in a ``__main__`` that no other process can import: a pickle that needs one is refused.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from dataclasses import dataclass
from multiprocessing import process, spawn
from types import FunctionType
from typing import Any, Final

from cloudckpt.backends.errors import CheckpointError, ConfigurationError, ExecutorError

_MAINS: Final = frozenset({"__main__", "__mp_main__"})
"""Names of the main script, in the trainer and where another process has imported it."""
_CURE: Final = "Put the class or function into a module of its own, and import it from there"


class MainScript:
    """The trainer's ``__main__``, imported in the checkpoint process when a pickle first needs it.

    A training script without an ``if __name__ == "__main__"`` guard would start training again when it is
    imported. Most pickles name nothing in it, so most checkpoint processes never do.
    """

    _preparation: dict[str, Any] | None = None
    loading = False

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Describe the main script so that the checkpoint process can import it. Called in the trainer."""
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
    def kind_without_file(cls) -> str | None:
        """Return the kind of a ``__main__`` that no other process can import; None for one that can be."""
        described = cls.describe()
        name: str | None = described.get("init_main_from_name")
        if name is not None:
            is_main = name.rpartition(".")[2] == "__main__"  # multiprocessing doesn't import these, either
            return f"the module {name}, which runs as a program" if is_main else None
        path: str | None = described.get("init_main_from_path")
        if path is not None and os.path.exists(path):  # noqa: PTH110 - a path as it was typed
            return None
        return "a notebook, an interactive session, python -c or a script on standard input"

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
            except CheckpointError:
                raise
            except BaseException as error:
                raise ExecutorError(
                    "the training script could not be imported by its checkpoint process, for a class that "
                    f"it defines: {type(error).__name__}: {error}",
                    hint=_CURE,
                ) from error
            finally:
                cls.loading = False


class Unpickler(pickle.Unpickler):
    """An unpickler that finds what the trainer's main script defines."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if module_name in _MAINS:
            MainScript.load()
            try:
                return super().find_class("__main__", global_name)
            except AttributeError as error:
                raise ConfigurationError(
                    f"the state, writer or planner needs {global_name} of the training script, and importing "
                    "the script does not define it",
                    hint=f'{_CURE}, or define it outside of if __name__ == "__main__"',
                ) from error
        return super().find_class(module_name, global_name)


@dataclass(frozen=True, slots=True)
class Unimportable:
    """The reason why the checkpoint process could not import a class or function, and what to do."""

    reason: str
    hint: str


def unimportable(value: object) -> Unimportable | None:
    """Return why the checkpoint process can't import a value; None for one that it can, or need not."""
    if not isinstance(value, type | FunctionType) or value.__module__ not in _MAINS:
        return None
    kind = MainScript.kind_without_file()
    if kind is None:
        return None
    what = "class" if isinstance(value, type) else "function"
    return Unimportable(
        f"needs the {what} {value.__qualname__}, which is defined in {kind}: the checkpoint process can't "
        "import it from there",
        _CURE,
    )


class _Pickler(pickle.Pickler):
    """A pickler that refuses what could not be unpickled."""

    def reducer_override(self, obj: Any) -> Any:
        if (why := unimportable(obj)) is not None:
            raise ConfigurationError(f"the storage writer or planner {why.reason}", hint=why.hint)
        return NotImplemented


def dumps(value: object) -> bytes:
    """Pickle a storage writer or planner for the checkpoint process.

    Raises:
        ConfigurationError: it needs a class that can't be imported there.
        Exception: it does not pickle.
    """
    out = io.BytesIO()
    _Pickler(out, pickle.HIGHEST_PROTOCOL).dump(value)
    return out.getvalue()


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
