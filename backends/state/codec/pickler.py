"""The pickler of values, to be handed to ``torch.save`` as its ``pickle_module``."""

from __future__ import annotations

import copyreg
import datetime as dt
import pickle
from typing import IO, Any

_WITH_FOLD = 4
"""The first protocol whose pickles of times have ``fold``. Every protocol reads it."""


def _time(value: dt.time) -> Any:
    return value.__reduce_ex__(_WITH_FOLD)


class Pickler(pickle.Pickler):
    """Python's own, which loses nothing of a time that a clock shows twice."""

    def __init__(self, file: IO[bytes], protocol: int) -> None:
        super().__init__(file, protocol)
        self.dispatch_table = {**copyreg.dispatch_table, dt.datetime: _time, dt.time: _time}
