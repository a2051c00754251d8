"""Advice on what to save instead of an object that can't be restored."""

from __future__ import annotations

import functools
import io
import random
import re
import sys
import threading
import types
from typing import Any

import torch

_ELSE = (
    "Save a dict of its attributes and make the object from it after the load, allow its class with "
    "torch.serialization.add_safe_globals, or pass trust=True to every save and load"
)
_FUNCTION = "Save its name, and look the function up again after the load"
_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Event)
_HINTS: tuple[tuple[tuple[type, ...], str], ...] = (
    ((torch.Generator,), "Save generator.get_state(), which is a tensor"),
    ((random.Random,), "Save its getstate(), which is a tuple"),
    ((types.FunctionType, types.BuiltinFunctionType, types.MethodType), _FUNCTION),
    ((functools.partial,), "Save the arguments in a dict, and make the partial again after the load"),
    ((types.ModuleType,), "Save the module's name"),
    ((types.GeneratorType, types.CoroutineType), "Save a list, or the position that it has come to"),
    (_LOCKS, "Leave it out, and make a new one after the load"),
    ((io.BytesIO, io.StringIO), "Save its getvalue()"),
    ((io.IOBase,), "Save the file's name and position, and open it again after the load"),
    ((re.Pattern,), "Save its pattern, which is text"),
    ((memoryview,), "Save bytes(view)"),
    ((torch.memory_format, torch.qscheme), "Save its name"),
    ((type,), "Save the name of the class, and look the class up after the load"),
    ((torch.nn.Module, torch.optim.Optimizer), "Put it into a dict or a list, or save its state_dict()"),
    ((dict,), "Turn it into a dict"),
    ((list,), "Turn it into a list"),
    ((tuple,), "Turn it into a tuple"),
    ((set, frozenset), "Turn it into a set"),
    ((str,), "Turn it into text with str()"),
    ((bool, int), "Turn it into a number with int()"),
    ((float,), "Turn it into a number with float()"),
    ((bytes, bytearray), "Turn it into bytes"),
)
_OF_NUMPY: tuple[tuple[str, str], ...] = (
    ("random.Generator", "Save generator.bit_generator.state"),
    ("random.BitGenerator", "Save bit_generator.state"),
    ("random.RandomState", "Save random_state.get_state()"),
    ("ndarray", "Save numpy.array(value) of numbers, text or times, in this machine's byte order"),
    ("generic", "Save value.item(), or a number of another dtype"),
    ("dtype", "Save its str attribute"),
)


def hint_for(value: object) -> str:
    """Return what to do about an object that can't be restored."""
    for name, hint in _OF_NUMPY:
        cls: Any = sys.modules.get("numpy")
        for part in name.split("."):
            cls = getattr(cls, part, None)
        if isinstance(cls, type) and isinstance(value, cls):
            return hint
    return next((hint for kinds, hint in _HINTS if isinstance(value, kinds)), _ELSE)
