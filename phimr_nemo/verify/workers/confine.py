"""What a grading worker may not do: reach the network, start or signal processes, change files.

Answers are hostile, and the libraries that read them are large. A worker needs its socket to the parent and files to
read, so on Linux the kernel refuses it everything else (seccomp: a filter that a process can never take off again and
that needs no privilege). Elsewhere Python's audit hooks refuse the same calls; they hold for Python code only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from collections.abc import Mapping
from typing import Any, Final, Literal

Machine = Literal["x86_64", "aarch64"]
_MACHINES: Final[Mapping[str, Machine]] = {"x86_64": "x86_64", "aarch64": "aarch64"}
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_KILL_PROCESS: Final = 0x8000_0000
_ERRNO: Final = 0x0005_0000
_ALLOW: Final = 0x7FFF_0000
# Instructions of the classic packet filter, and where `struct seccomp_data` holds what they look at.
_LOAD, _RETURN, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT = 0x20, 0x06, 0x15, 0x35, 0x45
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENTS, _ARGUMENT_BYTES = 0, 4, 16, 8
_OTHER_INTERFACE: Final = 0x4000_0000
"""Numbers from here on are calls of the x32 interface: the same calls by other numbers."""

_AUDIT_ARCHITECTURE: Final = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Kernel numbers of calls: (x86_64, aarch64); None where the machine has no such call.
_REFUSED: Final[Mapping[str, tuple[int | None, int]]] = {
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "io_uring_setup": (425, 425),
    "clone": (56, 220),
    "clone3": (435, 435),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "openat2": (437, 437),
    "truncate": (76, 45),
    "mkdirat": (258, 34),
    "mknodat": (259, 33),
    "unlinkat": (263, 35),
    "symlinkat": (266, 36),
    "linkat": (265, 37),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "fchmodat": (268, 53),
    "fchownat": (260, 54),
}
# Calls that aarch64 does not have: fork, vfork, and files by name without a directory.
_REFUSED_X86_64: Final = {
    "fork": 57,
    "vfork": 58,
    "creat": 85,
    "rename": 82,
    "mkdir": 83,
    "rmdir": 84,
    "link": 86,
    "unlink": 87,
    "symlink": 88,
    "chmod": 90,
    "chown": 92,
    "lchown": 94,
    "mknod": 133,
}
# (number, which argument holds the flags) of the calls that open files.
_OPENING: Final = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}
_AUDIT_REFUSED: Final = (
    "socket.",
    "subprocess.",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.kill",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "pty.spawn",
)


def filter_program(machine: Machine) -> bytes:
    """The seccomp filter of a machine: instructions of 8 bytes (code, jump if true, jump if false, value)."""
    column = 0 if machine == "x86_64" else 1
    numbers = [pair[column] for pair in _REFUSED.values()]
    numbers += list(_REFUSED_X86_64.values()) if machine == "x86_64" else []
    refuse = _ERRNO | errno.EPERM
    program = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
        (_JUMP_AT_LEAST, 0, 1, _OTHER_INTERFACE),
        (_RETURN, 0, 0, refuse),
    ]
    for number in numbers:
        if number is not None:
            program += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, refuse)]
    for number, argument in _OPENING[machine]:
        program += [
            (_JUMP_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, _OFFSET_ARGUMENTS + _ARGUMENT_BYTES * argument),
            (_JUMP_ANY_BIT, 0, 1, _WRITING),
            (_RETURN, 0, 0, refuse),
            (_RETURN, 0, 0, _ALLOW),
        ]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def confine() -> Literal["seccomp", "audit"]:
    """Take from this process, for good, what a worker does not need.

    Returns:
        What refuses it: the kernel, or Python's audit hooks where there is no seccomp.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    machine: Machine | None = _MACHINES.get(platform.machine()) if sys.platform == "linux" else None
    if machine is not None and _install(filter_program(machine)):
        return "seccomp"
    sys.addaudithook(_refuse_event)
    return "audit"


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _install(program: bytes) -> bool:
    """Hand a filter to the kernel; whether it took it."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = _FilterProgram(len(program) // struct.calcsize("=HBBI"), program)
    zeros = (ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), *zeros) != 0:
        return False
    return bool(
        libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(header), *zeros[:2]) == 0
    )


def _refuse_event(event: str, arguments: tuple[Any, ...]) -> None:
    is_write = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & _WRITING)
    if is_write or event.startswith(_AUDIT_REFUSED):
        raise PermissionError(errno.EPERM, f"{event} in a grading worker")
