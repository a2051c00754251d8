"""Tracebacks cut to the frames that a reader can change: those of the caller's own code.

A job prints one traceback a rank. Frames of this project, of `torch.distributed` and of the standard library
lie between the caller's code and the error, and say nothing that the error does not. The whole traceback is
logged at DEBUG.
"""

from __future__ import annotations

import functools
import logging
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, ParamSpec, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from cloudckpt.backends.errors import CheckpointError
from cloudckpt.backends.system import background_log

_log = background_log.logger(__name__)

_HERE: Final = Path(__file__).parent.parent
_FRONT: Final = _HERE.parent if _HERE.parent.name == "cloudckpt" else _HERE.parent / "cloudckpt"
_FOLDERS: Final = (_FRONT, _HERE, _HERE.parent / "executor", Path(dist.__file__).parent)
_CLIENTS: Final = (
    "aiobotocore",
    "aiohttp",
    "boto3",
    "botocore",
    "fsspec",
    "gcsfs",
    "google",
    "s3fs",
    "tenacity",
    "urllib3",
)
"""Packages that send requests. Their errors carry the server's own words."""
_SITE: Final = (Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib")))
_INTERNAL: Final = tuple(
    f"{folder}/" for folder in (*_FOLDERS, *(at / one for at in _SITE for one in _CLIENTS))
)
_LIBRARY: Final = f"{sysconfig.get_path('stdlib')}/"
_PACKAGES: Final = f"{_LIBRARY}site-packages/"
_INNERMOST: Final = 3
"""Frames kept of an error that is not raised in the caller's code, and is none of ours either."""

E = TypeVar("E", bound=BaseException)
P = ParamSpec("P")
R = TypeVar("R")


def is_internal(filename: str) -> bool:
    """Return True for a file of this project, `torch.distributed`, a storage client or Python's library."""
    if filename.startswith(("<frozen", *_INTERNAL)):
        return True
    return filename.startswith(_LIBRARY) and not filename.startswith(_PACKAGES)


def shown(error: BaseException, frames: Iterable[traceback.FrameSummary] | None = None) -> str:
    """Return the frames of an error that are shown on another process, as text; empty where none helps.

    Args:
        error: the error.
        frames: its frames, outermost first; by default those of its traceback.
    """
    every = list(traceback.extract_tb(error.__traceback__) if frames is None else frames)
    callers = [frame for frame in every if not is_internal(frame.filename)]
    if not callers and not isinstance(error, CheckpointError):
        callers = every[-_INNERMOST:]  # of a library, or a fault of this project
    # Without columns, which print a line of carets each.
    plain = [traceback.FrameSummary(one.filename, one.lineno, one.name, line=one.line) for one in callers]
    return "".join(traceback.format_list(plain)).rstrip()


def trimmed(error: E) -> E:
    """Cut the traceback of an error, and of those that led to it, to the caller's frames, and return it.

    An error that is none of ours keeps all that its traceback has below the first frame of the caller, and
    its whole traceback where there is no such frame.
    """
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("the whole traceback of what is raised:\n%s", "".join(traceback.format_exception(error)))
    seen: set[int] = set()
    link: BaseException | None = error
    ours = isinstance(error, CheckpointError)
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        link.__traceback__ = _cut(link.__traceback__, everywhere=ours)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return error


def trimming(method: Callable[P, R]) -> Callable[P, R]:
    """Return the method with what it raises cut as `trimmed` does."""

    @functools.wraps(method)
    def run(*args: P.args, **keywords: P.kwargs) -> R:
        try:
            return method(*args, **keywords)
        except (Exception, CheckpointException) as error:  # noqa: BLE001 - raised again
            raise trimmed(error) from error.__cause__

    return run


def _cut(trace: TracebackType | None, *, everywhere: bool) -> TracebackType | None:
    """Return a traceback without internal frames, or, unless ``everywhere``, without the outermost ones."""
    links: list[TracebackType] = []
    link = trace
    while link is not None:
        links.append(link)
        link = link.tb_next
    first = next((at for at, one in enumerate(links) if not _in_library(one)), None)
    if first is None and not everywhere:
        return trace
    kept = [one for one in links if not _in_library(one)] if everywhere else links[first:]
    cut: TracebackType | None = None
    for one in reversed(kept):
        cut = TracebackType(cut, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return cut


def _in_library(link: TracebackType) -> bool:
    return is_internal(link.tb_frame.f_code.co_filename)
