"""Run a command for which some system calls fail, as the sandboxes of container runtimes have it.

``python seccomp.py ERRNO NUMBER,NUMBER COMMAND...``
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

CALLS = {
    "x86_64": {"memfd_create": 319, "pidfd_open": 434, "setpriority": 141},
    "aarch64": {"memfd_create": 279, "pidfd_open": 434, "setpriority": 140},
}.get(platform.machine(), {})
"""Numbers of system calls on this machine."""

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def refuse(error: int, calls: list[int]) -> None:
    """Have these calls fail with `error` in this process and those that it starts.

    Raises:
        OSError: the kernel has no filters of system calls.
    """
    steps = [(_LOAD, 0, 0, 0)]
    for call in calls:
        steps += [(_JUMP_IF_EQUAL, 0, 1, call), (_RETURN, 0, 0, _ERRNO | error)]
    steps.append((_RETURN, 0, 0, _ALLOW))
    code = b"".join(struct.pack("HBBI", *step) for step in steps)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(steps), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0),
    ):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    refuse(int(sys.argv[1]), [int(number) for number in sys.argv[2].split(",")])
    os.execvp(sys.argv[3], sys.argv[3:])  # noqa: S606 - the test's own command
