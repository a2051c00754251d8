"""Make a Python on Linux look like one on macOS to a program: Python imports this at its start.

torch, psutil and sysconfig choose files by the platform, so they are imported before. What only Linux has is
then deleted or refused. Children get the same from PYTHONPATH.
"""

# ruff: noqa: B010
from __future__ import annotations

import io
import os
import signal
import socket
import sys
import sysconfig
from typing import Any

import psutil
import torch.distributed.checkpoint

_ = psutil, torch.distributed.checkpoint
sysconfig.get_config_vars()  # reads a file that is named for the platform

_LINUX = {
    os: (
        "memfd_create",
        "pidfd_open",
        "copy_file_range",
        "posix_fallocate",
        "posix_fadvise",
        "eventfd",
        "splice",
    ),
    signal: ("sigwaitinfo", "sigtimedwait", "pidfd_send_signal"),
    socket: ("SO_PEERCRED", "SO_BINDTODEVICE", "SOCK_CLOEXEC", "SOCK_NONBLOCK"),
}
for module, names in _LINUX.items():
    for name in [*names, *(one for one in vars(module) if one.startswith(("sched_", "MFD_", "EFD_")))]:
        if hasattr(module, name):
            delattr(module, name)
del os.O_DIRECT


def _hidden(path: Any) -> bool:
    return isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith("/proc")


def _refuse(call: Any) -> Any:
    def checked(path: Any, *arguments: Any, **keywords: Any) -> Any:
        if _hidden(path):
            raise FileNotFoundError(2, "No such file or directory", os.fsdecode(path))
        return call(path, *arguments, **keywords)

    return checked


os.open, io.open = _refuse(os.open), _refuse(io.open)
os.readlink, os.listdir, os.scandir = map(_refuse, (os.readlink, os.listdir, os.scandir))
os.stat, os.lstat = map(_refuse, (os.stat, os.lstat))
__builtins__["open"] = io.open
setattr(sys, "platform", "darwin")
