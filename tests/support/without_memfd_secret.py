"""Runs a program on a kernel that seems to have no memfd_secret.

    python -m tests.support.without_memfd_secret PROGRAM ARGUMENT...

A seccomp filter, which every process started from here inherits, answers that call with ENOSYS,
as a kernel before Linux 5.14 does.
"""

import ctypes
import errno
import os
import struct
import sys

from kmsfs import libc

PREFIX = (sys.executable, "-m", "tests.support.without_memfd_secret")
"""Put before a command's own words."""

_SYS_MEMFD_SECRET = 447

# linux/filter.h, linux/seccomp.h, linux/prctl.h
_LOAD_WORD = 0x20
_JUMP_IF_EQUAL = 0x15
_RETURN = 0x06
_RET_ALLOW = 0x7FFF0000
_RET_ERRNO = 0x00050000
_PR_SET_SECCOMP = 22
_SECCOMP_MODE_FILTER = 2


def _instruction(code: int, if_true: int, if_false: int, operand: int) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, operand)


def forbid_memfd_secret() -> None:
    """Install the filter in this process."""
    program = b"".join(
        (
            _instruction(_LOAD_WORD, 0, 0, 0),
            _instruction(_JUMP_IF_EQUAL, 0, 1, _SYS_MEMFD_SECRET),
            _instruction(_RETURN, 0, 0, _RET_ERRNO | errno.ENOSYS),
            _instruction(_RETURN, 0, 0, _RET_ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(code)))
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    if ctypes.CDLL(None, use_errno=True).prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(header), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    forbid_memfd_secret()
    os.execvp(sys.argv[1], sys.argv[1:])
