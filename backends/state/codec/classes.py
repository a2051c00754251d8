"""Classes of the user's: Enums, namedtuples and dataclasses, found by name and built without their code.

A class is looked up in the modules that the process has imported. No module is imported for the sake of a
checkpoint, and no attribute is asked of a module or class in a way that runs code of theirs.
"""

from __future__ import annotations

import _compat_pickle
import abc
import dataclasses
import enum
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeGuard

from cloudckpt.backends.state.codec.malformed import MalformedError

Kind = Literal["Enum", "namedtuple", "dataclass"]

_SCRIPTS = frozenset({"__main__", "__mp_main__"})
_HOOKS = frozenset(
    [
        "__new__",
        "__reduce__",
        "__reduce_ex__",
        "__getnewargs__",
        "__getnewargs_ex__",
        "__getstate__",
        "__setstate__",
        "__getattribute__",
        "__del__",
    ]
)
"""Methods that a class defines to be made, pickled or deleted in a way of its own."""
_METACLASSES: tuple[type, ...] = (type, abc.ABCMeta, type(typing.Protocol))
_NEUTRAL: tuple[type, ...] = (
    object,
    typing.cast("type", typing.Generic),
    typing.cast("type", typing.Protocol),
)
_PLAIN: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None))
_BUILTIN_HASHES: frozenset[type] = frozenset(
    {object, int, float, complex, str, bytes, tuple, enum.Enum, enum.Flag, enum.IntEnum, enum.IntFlag}
)


class ChangedClassError(Exception):
    """A class is there, and not as the checkpoint needs it."""

    def __init__(self, cls: type, message: str) -> None:
        super().__init__(message)
        self.class_name = f"{cls.__module__}.{cls.__qualname__}"


def find(module: str, name: str) -> object:
    """Return what an imported module calls ``name``, or None.

    The name of a class within a class has dots. Neither a module's nor a class's ``__getattr__`` is asked.
    """
    found: Any = sys.modules.get(module)
    if not isinstance(found, types.ModuleType) or module in _SCRIPTS:
        return None
    namespace: Mapping[str, Any] = types.ModuleType.__getattribute__(found, "__dict__")
    for part in name.split("."):
        found = namespace.get(part)
        if not isinstance(found, type):
            return None
        namespace = type.__getattribute__(found, "__dict__")
    return found


def kind_of(cls: object) -> Kind | None:
    """Return what a class is of those whose instances can be built here, or None."""
    if type(cls) is enum.EnumMeta:
        return "Enum"
    if not isinstance(cls, type) or type(cls) not in _METACLASSES:
        return None
    if _is_namedtuple(cls):
        return "namedtuple"
    return "dataclass" if _is_dataclass(cls) else None


def unreachable(cls: type) -> str | None:
    """Return why a fresh process would not find a class by its name, or None where it would."""
    module, name = cls.__module__, cls.__qualname__
    if module in _SCRIPTS:
        return "its class is defined in the script that is run"
    if "<locals>" in name:
        return "its class is defined in a function"
    if not (module.isascii() and name.isascii()):
        return "the name of its class is not ASCII, which torch.save can't write"
    if module in _compat_pickle.IMPORT_MAPPING or (module, name) in _compat_pickle.NAME_MAPPING:
        return f"pickle takes {module}.{name} for a name of Python 2, and reads it as another one"
    if find(module, name) is not cls:
        return f"{module}.{name} is not its class: the name stands for something else, or for nothing"
    if getattr(sys.modules[module], "__spec__", None) is None:
        return f"its module {module} was not imported from a file"
    return None


def may_be_key(value: object) -> bool:
    """Return whether hashing and comparing an instance of a user's class runs nothing of theirs."""
    return all(_definer(type(value), name) in _BUILTIN_HASHES for name in ("__hash__", "__eq__"))


def _definer(cls: type, name: str) -> type:
    return next(one for one in cls.__mro__ if name in vars(one))


# --- Enums


def member_named(cls: Any, name: str) -> enum.Enum | None:
    """Return an Enum's member by its name."""
    found: enum.Enum | None = cls.__members__.get(name)
    return found


def member_of(cls: Any, value: object) -> enum.Enum:
    """Return an Enum's member by its value, or a combination of a Flag's members.

    Raises:
        ChangedClassError: it has none.
    """
    if not is_plain(value):
        raise MalformedError(f"{cls.__qualname__} is given what is no plain value")
    for member in cls.__members__.values():
        own = vars(member).get("_value_")
        if is_plain(own) and same(own, value):
            found: enum.Enum = member
            return found
    if issubclass(cls, enum.Flag) and type(value) is int and _combines(cls, value):
        combined: enum.Enum = cls(value)
        return combined
    raise ChangedClassError(cls, f"the Enum {cls.__qualname__} has no member of the value {value!r}"[:200])


def _combines(cls: type[enum.Flag], value: int) -> bool:
    """Return True for a value of defined bits whose making runs nothing but the standard library."""
    mask: int = vars(cls)["_flag_mask_"]
    return value >= 0 and not value & ~mask and _definer(cls, "_missing_") is enum.Flag


def is_plain(value: object) -> bool:
    """Return whether a value is a number, text, bytes or None, or a tuple of such."""
    if type(value) is tuple:
        return all(type(one) in _PLAIN for one in value)
    return type(value) in _PLAIN


def same(one: object, other: object) -> bool:
    """Compare two plain values, and their classes."""
    if type(one) is tuple and type(other) is tuple:
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


# --- namedtuples


def _is_namedtuple(cls: type) -> TypeGuard[type[tuple[Any, ...]]]:
    own = vars(cls)
    fields = own.get("_fields")
    return (
        cls.__bases__ in ((tuple,), (tuple, typing.Generic))
        and own.get("__slots__") == ()
        and type(fields) is tuple
        and all(type(one) is str for one in fields)
        and {"_make", "_replace", "_asdict", "__getnewargs__"} <= own.keys()
        and not (_HOOKS - {"__new__", "__getnewargs__"}) & own.keys()
    )


def new_namedtuple(cls: Any, values: Sequence[object]) -> object:
    """Return a namedtuple of these values.

    Raises:
        ChangedClassError: it has other fields.
    """
    if len(values) != len(vars(cls)["_fields"]):
        count = len(vars(cls)["_fields"])
        raise ChangedClassError(
            cls, f"the namedtuple {cls.__qualname__} has {count} fields, and {len(values)} are stored"
        )
    return tuple.__new__(cls, values)


# --- dataclasses


def _is_dataclass(cls: type) -> bool:
    if "__dataclass_fields__" not in vars(cls):
        return False
    return all(
        base in _NEUTRAL or (type(base) in _METACLASSES and not _own_hooks(base)) for base in cls.__mro__
    )


def _own_hooks(cls: type) -> frozenset[str]:
    own = vars(cls)
    hooks = _HOOKS & own.keys()
    parameters = own.get("__dataclass_params__")
    if parameters is not None and parameters.frozen and "__slots__" in own:
        # Written by dataclasses itself, which is distinguished from a user's by the place of its code.
        hooks -= {
            name
            for name in ("__getstate__", "__setstate__")
            if getattr(own.get(name), "__module__", None) == "dataclasses"
        }
    if not isinstance(own.get("__dict__"), types.GetSetDescriptorType | None):
        hooks |= {"__dict__"}
    return frozenset(hooks)


def fields_in(cls: Any, state: object) -> dict[str, object]:
    """Return the fields of a dataclass from the state that pickle has of an instance.

    Raises:
        MalformedError: the state is not one that pickle has of a dataclass.
        ChangedClassError: it has more or fewer fields than the class.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    found: dict[str, object] = {}
    match state:
        case None:
            pass
        case dict():
            found.update(state)
        case (None | dict() as first, dict() as second):
            found.update(first or {})
            found.update(second)
        case list() if len(state) == len(names):  # frozen, and with slots
            found.update(zip(names, state, strict=True))
        case _:
            raise MalformedError(f"the state of {cls.__qualname__} is not that of a dataclass")
    if found.keys() != set(names):
        odd = sorted(map(str, found.keys() ^ set(names)))
        where = (
            "the class and not in the instance" if odd[0] in names else "the instance and not in the class"
        )
        raise ChangedClassError(cls, f"the dataclass {cls.__qualname__} has {odd[0]!r} in {where}")
    return found


def new_dataclass(cls: Any, state: object) -> object:
    """Return an instance of a dataclass, made without any method of its own.

    Raises:
        MalformedError: the state is not one that pickle has of a dataclass.
        ChangedClassError: it has more or fewer fields than the class.
    """
    fields = fields_in(cls, state)
    instance = object.__new__(cls)
    for name, value in fields.items():
        slot = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
        if isinstance(slot, types.MemberDescriptorType):
            slot.__set__(instance, value)
        else:
            object.__getattribute__(instance, "__dict__")[name] = value
    return instance
