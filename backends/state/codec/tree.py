"""Parse a pickle into a tree of what it would call, and call none of it.

Parsing looks up nothing: a class or function is its name. What the names stand for is decided by the
builders, when the whole tree is known.
"""

from __future__ import annotations

import _compat_pickle
import pickletools
from collections.abc import Callable, Iterator
from typing import Any

from cloudckpt.backends.state.codec.malformed import MalformedError

_OLD_NAMES = 3
"""The first protocol whose pickles name modules as Python 3 does."""
_NEWEST = 5
NOTHING: Any = object()
"""Instead of a state, where there is none."""


class Node:
    """A part of a pickle that is made of other parts. All else is itself: numbers, text, bytes, None."""

    __slots__ = ()

    def parts(self) -> Iterator[object]:
        """Iterate over what it is made of."""
        return iter(())


class Global(Node):
    """The name of a class, a function or a constant."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    @property
    def full_name(self) -> str:
        """The name with its module."""
        return f"{self.module}.{self.name}"


class Group(Node):
    """A list, tuple, set or frozenset."""

    __slots__ = ("items", "kind")

    def __init__(self, kind: type[Any], items: list[object]) -> None:
        self.kind = kind
        self.items = items

    def parts(self) -> Iterator[object]:
        return iter(self.items)


class Table(Node):
    """A dict: keys and values, alternating."""

    __slots__ = ("items",)

    def __init__(self, items: list[object]) -> None:
        self.items = items

    def parts(self) -> Iterator[object]:
        return iter(self.items)


class Call(Node):
    """An object: a call, and what is done to its result."""

    __slots__ = ("arguments", "function", "items", "new", "pairs", "state")

    def __init__(self, function: Global, arguments: list[object], *, new: bool) -> None:
        self.function = function
        self.arguments = arguments
        self.new = new
        """True for `__new__` of a class, false for a call."""
        self.state: object = NOTHING
        self.items: list[object] = []
        """Appended to it."""
        self.pairs: list[object] = []
        """Set in it: keys and values, alternating."""

    def parts(self) -> Iterator[object]:
        yield self.function
        yield from self.arguments
        if self.state is not NOTHING:
            yield self.state
        yield from self.items
        yield from self.pairs


class Stored(Node):
    """A record beside the pickle, by its persistent id."""

    __slots__ = ("described",)

    def __init__(self, described: object) -> None:
        self.described = described

    def parts(self) -> Iterator[object]:
        yield self.described


def parse(data: bytes) -> object:
    """Return the tree of a pickle of protocol 2 to 5.

    The pickle must have been weighed: parsing takes time and memory in proportion to its length.

    Raises:
        MalformedError: it is no pickle, or uses an instruction that no pickler of Python 3 writes.
    """
    machine = _Machine()
    try:
        for op, argument, _ in pickletools.genops(data):
            if op.name == "STOP":
                return machine.take()
            if op.name in _ATOMS:
                machine.push(argument)
            else:
                _STEPS[op.name](machine, argument)
    except MalformedError:
        raise
    except KeyError as error:
        raise MalformedError(f"its pickle uses {error}") from error
    except Exception as error:  # genops raises nearly anything on damaged bytes
        raise MalformedError(f"its pickle can't be followed: {type(error).__name__}: {error}") from error
    raise MalformedError("its pickle has no end")


class _Machine:
    """A pickle machine that holds nodes instead of objects."""

    def __init__(self) -> None:
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}
        self._protocol = 0

    def push(self, part: object) -> None:
        self._stack.append(part)

    def take(self) -> object:
        return self._stack.pop()

    def _take_marked(self) -> list[object]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def protocol(self, number: int) -> None:
        if number > _NEWEST:
            raise MalformedError(f"its pickle is of protocol {number}")
        self._protocol = number

    def nothing(self, _: object) -> None:
        pass

    def mark(self, _: object) -> None:
        self._marks.append(len(self._stack))

    def pop(self, _: object) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def pop_marked(self, _: object) -> None:
        self._take_marked()

    def duplicate(self, _: object) -> None:
        self.push(self._stack[-1])

    def note(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def note_next(self, _: object) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, index: int) -> None:
        if index not in self._memo:
            raise MalformedError("its pickle refers to something that it does not have")
        self.push(self._memo[index])

    def name(self, both: str) -> None:
        self._push_name(*both.split(" ", 1))

    def name_on_stack(self, _: object) -> None:
        name, module = self.take(), self.take()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise MalformedError("its pickle names something by what is no text")
        self._push_name(module, name)

    def _push_name(self, module: str, name: str) -> None:
        if self._protocol < _OLD_NAMES:
            if (module, name) in _compat_pickle.NAME_MAPPING:
                module, name = _compat_pickle.NAME_MAPPING[module, name]
            else:
                module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        self.push(Global(module, name))

    def stored(self, _: object) -> None:
        self.push(Stored(self.take()))

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise MalformedError("its pickle takes more than there is")
        items = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        self.push(Group(tuple, items))

    def tuple_marked(self, _: object) -> None:
        self.push(Group(tuple, self._take_marked()))

    def list_marked(self, _: object) -> None:
        self.push(Group(list, self._take_marked()))

    def frozenset_marked(self, _: object) -> None:
        self.push(Group(frozenset, self._take_marked()))

    def dict_marked(self, _: object) -> None:
        self.push(Table(self._take_marked()))

    def append(self, _: object) -> None:
        self._extend([self.take()], list)

    def append_marked(self, _: object) -> None:
        self._extend(self._take_marked(), list)

    def add_marked(self, _: object) -> None:
        self._extend(self._take_marked(), set)

    def _extend(self, items: list[object], kind: type[Any]) -> None:
        target = self._stack[-1]
        if (isinstance(target, Group) and target.kind is kind) or isinstance(target, Call):
            target.items += items
        else:
            raise MalformedError("its pickle appends to something that can't be appended to")

    def set_one(self, _: object) -> None:
        value, key = self.take(), self.take()
        self._set([key, value])

    def set_marked(self, _: object) -> None:
        self._set(self._take_marked())

    def _set(self, items: list[object]) -> None:
        target = self._stack[-1]
        if len(items) % 2:
            raise MalformedError("its pickle has a key without a value")
        if isinstance(target, Table):
            target.items += items
        elif isinstance(target, Call):
            target.pairs += items
        else:
            raise MalformedError("its pickle sets items of something that has none")

    def call(self, _: object) -> None:
        self._call(new=False)

    def new(self, _: object) -> None:
        self._call(new=True)

    def new_with_keywords(self, _: object) -> None:
        keywords = self.take()
        if not (isinstance(keywords, Table) and not keywords.items):
            raise MalformedError("its pickle makes an object with keywords")
        self._call(new=True)

    def _call(self, *, new: bool) -> None:
        arguments, function = self.take(), self.take()
        if not isinstance(function, Global):
            raise MalformedError("its pickle calls something that is no name")
        if not (isinstance(arguments, Group) and arguments.kind is tuple):
            raise MalformedError("its pickle calls with what is no tuple")
        if function.full_name == "builtins.getattr" and not new:
            self.push(_attribute(arguments.items))
        else:
            self.push(Call(function, arguments.items, new=new))

    def build(self, _: object) -> None:
        state, target = self.take(), self._stack[-1]
        if not (isinstance(target, Call) and target.state is NOTHING):
            raise MalformedError("its pickle gives a state to what takes none")
        target.state = state


def _attribute(arguments: list[object]) -> Global:
    """Name a class within a class, or an Enum's member: protocols before 4 have no names with dots."""
    match arguments:
        case [Global() as of, str(name)]:
            return Global(of.module, f"{of.name}.{name}")
        case _:
            raise MalformedError("its pickle asks for an attribute of what is no name")


_ATOMS = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "FLOAT",
        "BINFLOAT",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "SHORT_BINBYTES",
        "BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    ]
)
"""Instructions whose argument is the value."""

_Step = Callable[[_Machine, Any], None]
_STEPS: dict[str, _Step] = {
    "PROTO": _Machine.protocol,
    "FRAME": _Machine.nothing,
    "READONLY_BUFFER": _Machine.nothing,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_TUPLE": lambda machine, _: machine.push(Group(tuple, [])),
    "EMPTY_LIST": lambda machine, _: machine.push(Group(list, [])),
    "EMPTY_SET": lambda machine, _: machine.push(Group(set, [])),
    "EMPTY_DICT": lambda machine, _: machine.push(Table([])),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": _Machine.tuple_marked,
    "LIST": _Machine.list_marked,
    "FROZENSET": _Machine.frozenset_marked,
    "DICT": _Machine.dict_marked,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_marked,
    "DUP": _Machine.duplicate,
    "MEMOIZE": _Machine.note_next,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.append_marked,
    "ADDITEMS": _Machine.add_marked,
    "SETITEM": _Machine.set_one,
    "SETITEMS": _Machine.set_marked,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_on_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.new,
    "NEWOBJ_EX": _Machine.new_with_keywords,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.stored,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.note),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
}
