"""What a grading worker may do: talk to its parent, compute, and end. Nothing else.

Answers are hostile, and the libraries that read them are large. By the time a worker starts, everything that it
needs is imported and its socket is open. So on Linux the kernel lets it make the calls of a short list and no other
(seccomp: a filter that a process can never take off again and that needs no privilege): it opens no file, so the
environment of its parent under /proc and every key on the disk are out of reach as well. Elsewhere, and where a
kernel or a container takes no filter, Python's audit hooks refuse what they see; they hold for Python code only.
"""

from __future__ import annotations

import codecs
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
Confinement = Literal["seccomp", "audit"]
UNCONFINED: Final = (
    "the kernel takes no seccomp filter here: grading workers are held by Python's audit hooks alone, "
    "which a fault in a library written in C can get around"
)

_MACHINES: Final[Mapping[str, Machine]] = {"x86_64": "x86_64", "aarch64": "aarch64"}
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_SET_SECCOMP: Final = 22
_SECCOMP_MODE_FILTER: Final = 2
_KILL_PROCESS: Final = 0x8000_0000
_ERRNO: Final = 0x0005_0000
_ALLOW: Final = 0x7FFF_0000
# Instructions of the classic packet filter, and where `struct seccomp_data` holds what they look at.
_LOAD, _RETURN, _JUMP_EQUAL, _JUMP_AT_LEAST = 0x20, 0x06, 0x15, 0x35
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE, _OFFSET_ARGUMENTS, _ARGUMENT_BYTES, _HALF_BYTES = 0, 4, 16, 8, 4
_OTHER_INTERFACE: Final = 0x4000_0000
"""Numbers from here on are calls of the x32 interface: the same calls by other numbers."""
_NEWER: Final = 424
"""Calls from here on came after Linux 5.0 and have one number on every machine. A C library tries the newer call
first and the older one after ENOSYS, so that is what they get; any other answer would stop it there."""

_AUDIT_ARCHITECTURE: Final = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
# Kernel numbers of calls: (x86_64, aarch64); None where the machine has no such call.
ALLOWED: Final[Mapping[str, tuple[int | None, int | None]]] = {
    # its socket
    "read": (0, 63),
    "readv": (19, 65),
    "write": (1, 64),
    "writev": (20, 66),
    "recvfrom": (45, 207),
    "close": (3, 57),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    # memory
    "brk": (12, 214),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    # its own signals, clock and end
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "exit": (60, 93),
    "exit_group": (231, 94),
    # locks within the process
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "sched_yield": (24, 124),
    # facts about itself and the machine
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getcwd": (79, 17),
    "getcpu": (309, 168),
    "sched_getaffinity": (204, 123),
    "getrlimit": (97, 163),
    "getrusage": (98, 165),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrandom": (318, 278),
    # what a path is called and how large it is: libraries ask before they open, and opening is refused
    "stat": (4, None),
    "lstat": (6, None),
    "fstat": (5, 80),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "lseek": (8, 62),
}
# The calls that are allowed with some arguments only, see `_conditions`.
CONDITIONAL: Final[Mapping[str, tuple[int, int]]] = {
    "sendto": (44, 206),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "setrlimit": (160, 164),
    "prlimit64": (302, 261),
}
_AUDIT_REFUSED: Final = (
    "open",
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
    "os.chflags",
    "os.listdir",
    "os.scandir",
    "os.utime",
    "os.setxattr",
    "os.removexattr",
    "pty.spawn",
    "signal.pthread_kill",
    "ctypes.dlopen",
)

_IMPORTLIB: Final = "_frozen_importlib"
"""Of the finders of built-in and frozen modules."""

_CODECS: Final = ("ascii", "latin-1", "utf-8-sig", "utf-16", "utf-32", "cp1252", "idna", "unicode_escape")
"""Python imports a codec when it is first named."""

_Instruction = tuple[int, int, int, int]
_Argument = tuple[int, int]


def _conditions(name: str, pid: int) -> tuple[tuple[_Argument, ...], ...]:
    """When a conditional call is allowed: any of these alternatives, all (argument, value) pairs of which hold."""
    if name == "sendto":  # along its own connection, to no address
        return (((4, 0),),)
    if name in ("tkill", "tgkill"):  # abort(): the process itself, whose first thread has its number
        return (((0, pid),),)
    if name == "setrlimit":
        return (((0, resource.RLIMIT_CPU),),)
    # Of itself, and either the processor time, or reading a limit without setting one.
    return (((0, 0), (1, resource.RLIMIT_CPU)), ((0, 0), (2, 0)))


def _conditional(number: int, alternatives: tuple[tuple[_Argument, ...], ...]) -> list[_Instruction]:
    """Instructions that allow a call under its conditions and refuse it otherwise; another call passes them by."""
    body: list[_Instruction] = []
    for wanted in alternatives:
        comparisons = [
            (_OFFSET_ARGUMENTS + _ARGUMENT_BYTES * argument + half * _HALF_BYTES, value if half == 0 else 0)
            for argument, value in wanted
            for half in (0, 1)
        ]
        for index, (offset, value) in enumerate(comparisons):
            # A comparison that fails leads behind this alternative's own "allow".
            left = 2 * (len(comparisons) - index - 1) + 1
            body += [(_LOAD, 0, 0, offset), (_JUMP_EQUAL, 0, left, value)]
        body.append((_RETURN, 0, 0, _ALLOW))
    body.append((_RETURN, 0, 0, _ERRNO | errno.EPERM))
    return [(_JUMP_EQUAL, 0, len(body), number), *body]


def filter_program(machine: Machine, pid: int) -> bytes:
    """The seccomp filter of a machine: instructions of 8 bytes (code, jump if true, jump if false, value).

    Args:
        machine: whose numbers of calls.
        pid: the process that it is for.
    """
    column = 0 if machine == "x86_64" else 1
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _OFFSET_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCHITECTURE[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _OFFSET_NUMBER),
        (_JUMP_AT_LEAST, 0, 1, _OTHER_INTERFACE),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    for numbers in ALLOWED.values():
        number = numbers[column]
        if number is not None:
            program += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for name, known in CONDITIONAL.items():
        program += _conditional(known[column], _conditions(name, pid))
    program += [
        (_JUMP_AT_LEAST, 0, 1, _NEWER),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def confine() -> Confinement:
    """Take from this process, for good, what a worker does not need. What it has not imported it can import no more.

    Returns:
        What refuses it: the kernel, or Python's audit hooks where there is no seccomp.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for name in _CODECS:
        codecs.lookup(name)
    # No finder that looks at the disk is left: a late import is an ImportError, which libraries expect, and not a
    # PermissionError, which they do not.
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__module__", "") == _IMPORTLIB]
    sys.path_hooks.clear()
    sys.path_importer_cache.clear()
    machine: Machine | None = _MACHINES.get(platform.machine()) if sys.platform == "linux" else None
    if machine is not None and _install(filter_program(machine, os.getpid())):
        return "seccomp"
    sys.addaudithook(_refuse_event)
    return "audit"


def confinement() -> Confinement:
    """What `confine` can do on this machine: tried in a child process, which ends with it."""
    pid = os.fork()
    if pid == 0:
        kind = "audit"
        try:
            kind = confine()
        finally:
            os._exit(0 if kind == "seccomp" else 1)
    return "seccomp" if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 else "audit"


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


def _refuse_event(event: str, _arguments: tuple[Any, ...]) -> None:
    if event.startswith(_AUDIT_REFUSED):
        raise PermissionError(errno.EPERM, f"{event} in a grading worker")
