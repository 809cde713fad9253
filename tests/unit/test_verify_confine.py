"""A grading worker reads and computes; network, processes and files are closed to it, by the kernel and by Python."""

from __future__ import annotations

import os
import platform
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from phimr_nemo.verify import Grader
from phimr_nemo.verify.workers.confine import _REFUSED, _REFUSED_X86_64, filter_program
from phimr_nemo.verify.workers.pool import worker_environment

ATTEMPTS = r"""
import ctypes, json, os, socket, subprocess, sys
from phimr_nemo.verify.workers import confine
pair = socket.socketpair()
port, place, other = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # opened before: sending needs no connection
if sys.argv[4] == "audit":
    confine._install = lambda _: False
kind = confine.confine() if sys.argv[4] != "none" else "none"

def native(call, *arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, call)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), call)

tries = {
    "connect": lambda: socket.create_connection(("127.0.0.1", port)),
    "connect in C": lambda: native("socket", 2, 1, 0),
    "listen": lambda: socket.create_server(("127.0.0.1", 0)),
    "program": lambda: subprocess.run(["true"], check=True),
    "fork": lambda: os.fork() or os._exit(0),
    "exec": lambda: os.execv("/bin/false", ["false"]) if kind != "none" else None,
    "signal": lambda: os.kill(other, 0),
    "write": lambda: open(place + "/new", "w"),
    "append": lambda: open(place + "/old", "a"),
    "truncate": lambda: os.truncate(place + "/old", 0),
    "open to truncate": lambda: os.open(place + "/old", os.O_RDONLY | os.O_TRUNC),
    "remove": lambda: os.remove(place + "/old"),
    "directory": lambda: os.mkdir(place + "/directory"),
    "link": lambda: os.symlink("x", place + "/link"),
    "mode": lambda: os.chmod(place + "/old2", 0o777),
    "rename": lambda: os.rename(place + "/old2", place + "/older"),
}
refused = []
for name, attempt in tries.items():
    try:
        attempt()
    except PermissionError:
        refused.append(name)
    except OSError:
        pass
# What it does need: its socket, files to read, threads' locks, memory.
pair[0].sendall(b"x")
assert pair[1].recv(1) == b"x" and open(place + "/kept").read() == "kept" and len(bytearray(1 << 20)) == 1 << 20
sys.stdout.write(json.dumps([kind, refused]))
"""
NATIVE_ONLY = {"connect in C", "open to truncate"}


def attempts(tmp_path: Path, kind: str) -> tuple[str, set[str]]:
    import json

    (tmp_path / "old").write_text("kept")
    (tmp_path / "old2").write_text("kept")
    (tmp_path / "kept").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                ATTEMPTS,
                str(server.getsockname()[1]),
                str(tmp_path),
                str(os.getpid()),
                kind,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found, refused = json.loads(done.stdout)
    return found, set(refused)


EVERYTHING = {
    "connect", "connect in C", "listen", "program", "fork", "exec", "signal", "write", "append", "truncate",
    "open to truncate", "remove", "rename", "directory", "link", "mode",
}  # fmt: skip


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="seccomp is Linux's"
)
def test_the_kernel_refuses_all_of_it(tmp_path: Path) -> None:
    assert attempts(tmp_path, "seccomp") == ("seccomp", EVERYTHING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "old", "old2"]
    assert (tmp_path / "old").read_text() == "kept"


def test_without_seccomp_python_refuses_it(tmp_path: Path) -> None:
    kind, refused = attempts(tmp_path, "audit")
    assert kind == "audit"
    assert refused >= EVERYTHING - NATIVE_ONLY
    assert (tmp_path / "old2").read_text() == "kept"


def test_the_attempts_succeed_where_nothing_refuses_them(tmp_path: Path) -> None:
    assert attempts(tmp_path, "none") == ("none", set())
    assert not (tmp_path / "old").exists()


def run_filter(program: bytes, architecture: int, number: int, arguments: tuple[int, ...] = (0, 0, 0)) -> int:
    """An interpreter of the filter's five instructions: what it returns for a call."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *arguments, *([0] * (6 - len(arguments))))
    code = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    at, accumulator = 0, 0
    while True:
        operation, if_true, if_false, value = code[at]
        at += 1
        if operation == 0x06:
            return value
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
            continue
        holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[operation]
        at += if_true if holds else if_false


@pytest.mark.parametrize(("machine", "architecture"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_the_filter_refuses_exactly_the_listed_calls(machine: str, architecture: int) -> None:
    program = filter_program(machine)  # type: ignore[arg-type]
    column = 0 if machine == "x86_64" else 1
    listed = {pair[column] for pair in _REFUSED.values()}
    listed |= set(_REFUSED_X86_64.values()) if machine == "x86_64" else set()
    refuse, allow, kill = 0x00050001, 0x7FFF0000, 0x80000000
    assert {n for n in range(512) if run_filter(program, architecture, n) == refuse} == listed
    assert {run_filter(program, architecture, n) for n in range(512)} == {refuse, allow}
    opening = ((2, 1), (257, 2)) if machine == "x86_64" else ((56, 2),)
    for number, argument in opening:
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND, os.O_RDWR | os.O_CLOEXEC):
            given = tuple(flags if i == argument else 0 for i in range(3))
            assert run_filter(program, architecture, number, given) == refuse
        given = tuple(os.O_CLOEXEC if i == argument else 0xFFFF for i in range(3))
        assert run_filter(program, architecture, number, given) == allow
    assert run_filter(program, architecture, 0x40000000 + 41) == refuse
    assert run_filter(program, architecture ^ 1, 0) == kill


def test_a_worker_of_the_grader_is_confined_and_knows_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted")
    with Grader(workers=1) as grader:
        assert grader.grade(r"\boxed{1+x}", "x+1").verdict == "correct"
        for pid in grader._pool.pids():
            assert b"planted" not in Path(f"/proc/{pid}/environ").read_bytes()
        status = Path(f"/proc/{grader._pool.pids()[1]}/status").read_text()
        limits = Path(f"/proc/{grader._pool.pids()[1]}/limits").read_text()
    facts = dict(line.split(":", 1) for line in status.splitlines())
    assert (facts["Seccomp"].strip(), facts["NoNewPrivs"].strip()) == ("2", "1")
    assert {line[:18].strip(): line[26:46].strip() for line in limits.splitlines()}["Max file size"] == "0"


def test_the_environment_of_workers() -> None:
    parent = {
        "PATH": "p",
        "LC_ALL": "C",
        "PYTHONPATH": "q",
        "HF_TOKEN": "t",
        "AWS_SECRET_ACCESS_KEY": "s",
        "SSH_AUTH_SOCK": "a",
    }
    made = worker_environment(parent)
    assert {name: made[name] for name in parent.keys() & made.keys()} == {
        "PATH": "p",
        "LC_ALL": "C",
        "PYTHONPATH": "q",
    }
    assert made["SYMPY_GROUND_TYPES"] == "python"
