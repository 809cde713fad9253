"""A grading worker reads and computes; network, processes and files are closed to it, by the kernel and by Python."""

from __future__ import annotations

import os
import platform
import re
import resource
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from phimr_nemo.verify import Grader
from phimr_nemo.verify.verdict import Verdict
from phimr_nemo.verify.workers import pool as pools
from phimr_nemo.verify.workers.confine import ALLOWED, CONDITIONAL, UNCONFINED, confinement, filter_program
from phimr_nemo.verify.workers.pool import worker_environment

ATTEMPTS = r"""
import ctypes, fcntl, json, os, resource, signal, socket, subprocess, sys, time
from phimr_nemo.verify.workers import confine
pair = socket.socketpair()
port, place, other = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # opened before: sending needs no connection
libc = ctypes.CDLL(None, use_errno=True)
kept = open(place + "/kept", "rb")
if sys.argv[4] == "audit":
    confine._install = lambda _: False
kind = confine.confine() if sys.argv[4] != "none" else "none"

def native(call, *arguments):
    if getattr(libc, call)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), call)

def system(number, *arguments):
    # By its number on x86_64; elsewhere it counts as refused, as the filter's own test says.
    if os.uname().machine != "x86_64":
        raise PermissionError
    native("syscall", ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments])

signals = (ctypes.c_int * 32)(0, 0, -1)  # SI_QUEUE, as sigqueue() sends it
limits = (ctypes.c_ulong * 2)(*(limit & (2**64 - 1) for limit in resource.getrlimit(resource.RLIMIT_NOFILE)))
tries = {
    "connect": lambda: socket.create_connection(("127.0.0.1", port)),
    "connect in C": lambda: native("socket", 2, 1, 0),
    "listen": lambda: socket.create_server(("127.0.0.1", 0)),
    "program": lambda: subprocess.run(["true"], check=True),
    "fork": lambda: os.fork() or os._exit(0),
    "exec": lambda: os.execv("/bin/false", ["false"]) if kind != "none" else None,
    "signal": lambda: os.kill(other, 0),
    "signal by tkill": lambda: system(200, other, 0),
    "signal by tgkill": lambda: system(234, other, other, 0),
    "signal by sigqueueinfo": lambda: system(129, other, 0, signals),
    "signal by tgsigqueueinfo": lambda: system(297, other, other, 0, signals),
    "limit of another": lambda: system(302, other, resource.RLIMIT_NOFILE, None, limits),
    "limit of its own": lambda: system(302, 0, resource.RLIMIT_NOFILE, limits, None),
    "affinity of another": lambda: os.sched_setaffinity(other, os.sched_getaffinity(0)),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, 19),
    "mode of an open file": lambda: os.fchmod(kept.fileno(), 0o600),
    "owner of an open file": lambda: os.fchown(kept.fileno(), -1, -1),
    "times": lambda: os.utime(place + "/old2"),
    "attribute": lambda: os.setxattr(place + "/old2", "user.a", b"b"),
    "memory file": lambda: os.memfd_create("x"),
    "pipe": lambda: os.pipe(),
    "device control": lambda: fcntl.ioctl(0, 0x5401, b" " * 64),
    "environment of the parent": lambda: open(f"/proc/{os.getppid()}/environ", "rb").read(1),
    "its own memory": lambda: os.open("/proc/self/mem", os.O_RDWR),
    "a key on the disk": lambda: open(place + "/kept").read(),
    "a directory": lambda: os.listdir(place),
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
# What it does need: its socket, memory, clocks, its timer, its own limit of processor time, randomness.
pair[0].sendall(b"x")
assert pair[1].recv(1) == b"x" and len(bytearray(1 << 24)) == 1 << 24
resource.setrlimit(resource.RLIMIT_CPU, (1000, resource.RLIM_INFINITY))
assert resource.getrlimit(resource.RLIMIT_CPU)[0] == 1000 and resource.getrusage(resource.RUSAGE_SELF).ru_utime > 0
fired = []
signal.signal(signal.SIGALRM, lambda *_: fired.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.001)
while not fired:
    time.sleep(0.001)
assert len(os.urandom(8)) == 8 and time.time() > 0 and os.getpid() > 0
sys.stdout.write(json.dumps([kind, refused]))
"""
UNSEEN_BY_PYTHON = {
    "connect in C", "limit of another", "limit of its own", "affinity of another", "priority", "memory file", "pipe",
    "device control", "mode of an open file", "owner of an open file",
    *(f"signal by {call}" for call in ("tkill", "tgkill", "sigqueueinfo", "tgsigqueueinfo")),
}  # fmt: skip


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
    "limit of another", "limit of its own", "affinity of another", "priority", "memory file", "pipe",
    "device control", "mode of an open file", "owner of an open file", "times", "attribute",
    "environment of the parent", "its own memory", "a key on the disk", "a directory",
    *(f"signal by {call}" for call in ("tkill", "tgkill", "sigqueueinfo", "tgsigqueueinfo")),
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
    assert refused >= EVERYTHING - UNSEEN_BY_PYTHON
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


REFUSE, UNKNOWN, ALLOW, KILL = 0x00050001, 0x00050026, 0x7FFF0000, 0x80000000
MACHINES = [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)]
PID = 4321


@pytest.mark.parametrize(("machine", "architecture"), MACHINES)
def test_the_filter_allows_exactly_the_listed_calls(machine: str, architecture: int) -> None:
    program = filter_program(machine, PID)  # type: ignore[arg-type]
    column = 0 if machine == "x86_64" else 1
    listed = {pair[column] for pair in ALLOWED.values()} - {None}
    nothing_fits = (9, 9, 9, 9, 9, 9)
    found = {number: run_filter(program, architecture, number, nothing_fits) for number in range(600)}
    assert {number for number, answer in found.items() if answer == ALLOW} == listed
    assert {answer for number, answer in found.items() if number < 424 and number not in listed} == {REFUSE}
    # A C library falls back to the older call after ENOSYS only.
    assert {answer for number, answer in found.items() if number >= 424} == {UNKNOWN}
    assert run_filter(program, architecture, 0x40000000 + 41) == REFUSE
    assert run_filter(program, architecture ^ 1, 0) == KILL


@pytest.mark.parametrize(("machine", "architecture"), MACHINES)
def test_some_calls_depend_on_their_arguments(machine: str, architecture: int) -> None:
    program = filter_program(machine, PID)  # type: ignore[arg-type]
    column, cpu, high = (0 if machine == "x86_64" else 1), resource.RLIMIT_CPU, 1 << 32

    def answer(name: str, *arguments: int) -> int:
        return run_filter(program, architecture, CONDITIONAL[name][column], arguments)

    allowed = [
        *(("sendto", 5, 6, 7, 8, 0, 0), ("tkill", PID, 6), ("tgkill", PID, 99, 6)),
        *(("setrlimit", cpu, 1), ("prlimit64", 0, cpu, 5, 5), ("prlimit64", 0, 9, 0, 5)),
    ]
    refused = [
        *(("sendto", 5, 6, 7, 8, 9, 16), ("sendto", 5, 6, 7, 8, high, 0)),
        *(("tkill", PID + 1, 9), ("tkill", PID + high, 9), ("tgkill", PID + 1, PID, 9), ("tgkill", 0, PID, 9)),
        *(("setrlimit", cpu + 1, 1), ("prlimit64", 0, 9, 5, 5), ("prlimit64", PID + 1, cpu, 5, 5)),
        *(("prlimit64", PID + 1, 9, 0, 5), ("prlimit64", 0, 9, high, 0), ("prlimit64", high, cpu, 5, 5)),
    ]
    assert {call: answer(*call) for call in allowed} == dict.fromkeys(allowed, ALLOW)  # type: ignore[arg-type]
    assert {call: answer(*call) for call in refused} == dict.fromkeys(refused, REFUSE)  # type: ignore[arg-type]


def headers(*places: str) -> dict[str, int]:
    """Name of a call -> its number, from the kernel's header files."""
    found = [Path(place) for place in places if Path(place).is_file()]
    if not found:
        pytest.skip("the kernel's header files are not installed")
    text = found[0].read_text("utf-8")
    return {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", text)}


def test_the_numbers_are_the_kernels() -> None:
    ours = {**ALLOWED, **CONDITIONAL}
    known = headers("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h")
    assert {name: pair[0] for name, pair in ours.items()} == {name: known[name] for name in ours}
    generic = headers("/usr/include/asm-generic/unistd.h")
    # The generic list says fstatat and calls for 32 and 64 bits by one name.
    named = {**generic, "newfstatat": generic["fstatat"]}
    assert {name: pair[1] for name, pair in ours.items()} == {name: named.get(name) for name in ours}


def test_a_process_is_confined_here_or_the_log_says_that_it_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Grader(workers=1) as grader:
        grader.grade(r"\boxed{1+x}", "x+1")
    assert [record.message for record in caplog.records] == ([] if confinement() == "seccomp" else [UNCONFINED])
    caplog.clear()
    said = pools.protocol.receive
    monkeypatch.setattr(pools.protocol, "receive", lambda connection: held_by_python(said(connection)))
    with Grader(workers=1) as grader:
        assert grader.grade(r"\boxed{1+x}", "x+1").verdict == "correct"
    assert [record.message for record in caplog.records] == [UNCONFINED]


def held_by_python(message: dict[str, object]) -> dict[str, object]:
    return message | {"confinement": "audit"} if "confinement" in message else message


LATE = [
    (r"\int_0^1 x^2 dx", "1/3", "correct"),
    (r"\int_0^1 x^{x^{x^x}} dx", "42", "timeout"),
    (r"\sum_{n=1}^\infty \frac{1}{2^n}", "1", "correct"),
    (r"\sum_{n=0}^\infty \frac{(-1)^n}{2n+1}", r"\frac{\pi}{4}", "correct"),
    (r"\lim_{x\to 0} \frac{\sin x}{x}", "1", "correct"),
    (r"\sum_{k=1}^{10} k", "55", "correct"),
    (r"\int_0^\infty e^{-x}dx", "1", "correct"),
]


def test_what_mathematics_imports_late_is_there() -> None:
    with Grader(workers=1) as grader:
        verdicts = grader.grade_many([(rf"\boxed{{{answer}}}", gold) for answer, gold, _ in LATE])
    assert [verdict.verdict for verdict in verdicts] == [expected for _, _, expected in LATE]


SNOOPER = """
from pathlib import Path
from phimr_nemo.verify import Verdict
KNOWN = Path(__file__).read_text("utf-8")  # at import time files are open to it

def grade(response, answer):
    if response == "read":
        Path(answer).read_bytes()
    if response == "import":
        import wave
    return Verdict("correct", "", str(len(KNOWN)))
"""


def test_a_users_grader_reads_and_imports_when_it_is_imported_and_not_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "snooper.py").write_text(SNOOPER, "utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path))
    with Grader(workers=1, function="snooper:grade") as grader:
        asked = [("x", "y"), ("read", f"/proc/{os.getpid()}/environ"), ("read", __file__), ("import", "x")]
        verdicts = grader.grade_many(asked)
    assert verdicts[0] == Verdict("correct", "", str(len(SNOOPER)))
    assert [verdict.verdict for verdict in verdicts[1:]] == ["error"] * 3
    assert "PermissionError" in verdicts[1].reason
    assert "ModuleNotFoundError" in verdicts[3].reason


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
