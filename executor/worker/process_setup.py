"""A checkpoint process that keeps out of the way: its priority, processors, threads, signals and log."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from pathlib import Path

import torch

from cloudckpt.backends.errors import ConfigurationError, ExecutorError
from cloudckpt.backends.system import background_log

_NICENESS = 10
_PR_SET_PDEATHSIG = 1


def check() -> None:
    """Look at the settings in the trainer, where an error is seen.

    Raises:
        ConfigurationError: ``CLOUDCKPT_CPUS`` or ``CLOUDCKPT_THREADS`` can't be used.
    """
    processors()
    threads()


def processors() -> frozenset[int] | None:
    """Return the processors of ``CLOUDCKPT_CPUS``, such as ``"0-3,8"``; None where it is not set.

    Raises:
        ConfigurationError: it is no such list, or names none that this process may use.
    """
    text = os.environ.get("CLOUDCKPT_CPUS")
    if not text:
        return None
    try:
        chosen = frozenset(cpu for item in text.split(",") for cpu in _span(item))
    except ValueError:
        raise ConfigurationError(
            f"CLOUDCKPT_CPUS is {text!r}", hint="Give processors as in '0-3,8', as taskset takes them"
        ) from None
    if not hasattr(os, "sched_getaffinity"):
        raise ConfigurationError("CLOUDCKPT_CPUS can't be kept on this system", hint="Unset it")
    usable = os.sched_getaffinity(0)
    if not chosen & usable:
        raise ConfigurationError(
            f"CLOUDCKPT_CPUS is {text!r}, and this process may use none of these",
            hint=f"Give some of {', '.join(map(str, sorted(usable)))}",
        )
    return chosen & usable


def threads() -> int:
    """Return the threads that computing in the process may take: ``CLOUDCKPT_THREADS``, or one.

    Raises:
        ConfigurationError: it is no such number.
    """
    text = os.environ.get("CLOUDCKPT_THREADS", "1")
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ConfigurationError(f"CLOUDCKPT_THREADS is {text!r}", hint="Give a whole number of at least 1")
    return int(text)


def settle(rank: int, generation: int, parent_pid: int, log_level: int) -> None:
    """Become a quiet process that dies with its trainer.

    Raises:
        ExecutorError: the trainer is gone already.
    """
    _die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer to act on
    torch.set_num_threads(threads())
    cpus = processors()
    # On Linux both are of a thread, and torch has started some.
    for task in _tasks():
        with contextlib.suppress(ProcessLookupError):  # one that has ended meanwhile
            if cpus is not None:
                os.sched_setaffinity(task, cpus)
            with contextlib.suppress(AttributeError, OSError):  # a sandbox may refuse it
                os.setpriority(os.PRIO_PROCESS, task, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, task)))
    # Standard error may have no reader, and a save does not wait for one: a queue and a thread are between.
    stream = logging.StreamHandler()
    stream.setFormatter(
        logging.Formatter(
            f"%(asctime)s [checkpoint process, rank {rank}, generation {generation}] "
            "%(levelname)s %(name)s: %(message)s"
        )
    )
    # Others' loggers stay at warnings: what the store's client logs for debugging holds signed headers.
    handler = background_log.BackgroundHandler(stream)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)  # they would go to standard error by themselves
    logging.getLogger("cloudckpt").setLevel(log_level)
    # A mesh's process groups are the trainer's; planning a save asks for its shape alone.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)


def _die_with_parent(parent_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it went before that took effect
        raise ExecutorError("the trainer ended while its checkpoint process started")


def _tasks() -> list[int]:
    tasks = Path("/proc/self/task")
    return [int(task.name) for task in tasks.iterdir()] if tasks.exists() else [0]


def _span(item: str) -> range:
    first, dash, last = item.strip().partition("-")
    span = range(int(first), int(last if dash else first) + 1)
    if not span or span[0] < 0:
        raise ValueError(item)
    return span
