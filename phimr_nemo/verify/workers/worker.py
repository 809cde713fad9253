"""The grader's processes: a spawner that imports math-verify once, and the workers that it forks.

`multiprocessing`'s own fork server imports the caller's main module again in every worker: in a training
process that is torch and NeMo, seconds and gigabytes each time a worker is replaced. The spawner here is
started as a plain interpreter that imports this module alone. It speaks over a Unix socket:
``spawn`` (with the worker's own socket attached) -> the worker's pid; ``reap <pid>`` -> ``done``. When its
parent goes away, by any signal, it kills its workers and ends. Its parent starts it deaf to what stops a job: a
trainer that is told to stop finishes its step, and grades it.

Limits of a worker: no network, no other processes, no files (:mod:`.confine`), address space, a soft limit of
processor time per answer (an exception), and a processor-time limit that the kernel enforces should the exception not
get through. The parent adds a deadline of wall time with SIGKILL. Messages are JSON, never pickles.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.verify.verdict import MAX_ANSWER_CHARS

if TYPE_CHECKING:
    from phimr_nemo.verify.plug import GraderFunction

from phimr_nemo.verify.workers.confine import confine, confinement
from phimr_nemo.verify.workers.preload import preload_mathematics

RECURSION_LIMIT: Final = 3000
SOFT_LIMIT_REPEAT_SECONDS: Final = 0.2
KERNEL_LIMIT_EXTRA_SECONDS: Final = 3
PARENT_POLL_SECONDS: Final = 1.0
JOBS_PER_WORKER: Final = 5000
MAX_MESSAGE_BYTES: Final = 1 << 20
_HEADER: Final = struct.Struct("<I")


class SoftLimit(BaseException):
    """The processor time for one answer is used up; no `except Exception` on the way may swallow it."""


def send(connection: socket.socket, message: object) -> None:
    """Send one JSON message."""
    data = json.dumps(message).encode("utf-8")
    connection.sendall(_HEADER.pack(len(data)) + data)


def receive(connection: socket.socket) -> Any:
    """Receive one JSON message.

    Raises:
        EOFError: the other end is gone.
        ValueError: the message is longer than any that the other end sends.
    """
    (length,) = _HEADER.unpack(_read(connection, _HEADER.size))
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(_read(connection, length))


def _read(connection: socket.socket, length: int) -> bytes:
    chunks = []
    while length:
        chunk = connection.recv(length)
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        length -= len(chunk)
    return b"".join(chunks)


def _raise_soft_limit(_signal: int, _frame: FrameType | None) -> None:
    raise SoftLimit


def _within_limit(seconds: float, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run `work` for at most `seconds` of processor time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    kernel_limit = int(used.ru_utime + used.ru_stime + seconds) + KERNEL_LIMIT_EXTRA_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (kernel_limit, resource.RLIM_INFINITY))
    try:
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds, SOFT_LIMIT_REPEAT_SECONDS)
            return work()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except SoftLimit:
        return {"verdict": "timeout", "reason": f"more than {seconds:g} s of processor time"}
    except RecursionError:
        return {"verdict": "unparsable", "reason": "nested too deeply"}
    except MemoryError:
        return {"verdict": "error", "reason": "the memory limit was reached", "last": True}


def _grade(job: dict[str, Any]) -> dict[str, Any]:
    from phimr_nemo.verify.compare import judge
    from phimr_nemo.verify.extract import Extraction
    from phimr_nemo.verify.symbolic import Algebra

    extraction = Extraction(job["text"], tuple(job["parts"]), tuple(job["boxes"]))
    try:
        verdict = judge(job["gold"], extraction, Algebra())
    except Exception as error:  # noqa: BLE001 - sympy raises anything; an answer that breaks it is reported as such
        return {
            "verdict": "error",
            "extracted": job["text"],
            "reason": f"the comparison failed: {type(error).__name__}",
        }
    return {"verdict": verdict.verdict, "extracted": verdict.extracted, "reason": verdict.reason}


def _grade_by(function: GraderFunction, job: dict[str, Any]) -> dict[str, Any]:
    from phimr_nemo.verify.plug import ask_grader

    return ask_grader(function, job["text"], job["gold"])


def _work(
    connection: socket.socket,
    memory_bytes: int,
    soft_seconds: float,
    grade: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """A worker's life: one job after the other until its parent closes the socket."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    confine()
    signal.signal(signal.SIGPROF, _raise_soft_limit)
    sys.setrecursionlimit(RECURSION_LIMIT)
    for count in range(1, JOBS_PER_WORKER + 1):
        try:
            job = receive(connection)
        except (EOFError, OSError):
            return
        result = _within_limit(soft_seconds, lambda job=job: grade(job))  # type: ignore[misc]
        result.setdefault("extracted", job["text"][:MAX_ANSWER_CHARS])
        result["last"] = bool(result.get("last")) or count == JOBS_PER_WORKER
        try:
            send(connection, result)
        except OSError:
            return
        if result["last"]:
            return


def _import_grader() -> str:
    """Import what the workers need; an explanation when that fails, else nothing."""
    from importlib import metadata

    from phimr_nemo.verify.verdict import MATH_VERIFY_VERSION

    try:
        installed = metadata.version("math-verify")
        preload_mathematics()
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent has to tell the user
        return f"{type(error).__name__}: {error}"
    return "" if installed == MATH_VERIFY_VERSION else f"math-verify {installed} is installed"


def _choose_grader(function: str) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], str]:
    """What grades a job: mathematics, or the function that is named; and an explanation when it cannot be had."""
    if not function:
        return _grade, _import_grader()
    from phimr_nemo.verify.plug import import_grader

    try:
        return partial(_grade_by, import_grader(function)), ""
    except Exception as error:  # noqa: BLE001 - it is the user's module; the parent has to tell the user
        return _grade, f"{type(error).__name__}: {error}"


def spawner_main(control_fd: int, memory_bytes: int, soft_seconds: float, function: str = "") -> None:
    """Fork workers on request until the parent goes away, then kill them.

    Args:
        control_fd: this end of the socket to the parent.
        memory_bytes: address-space limit of a worker.
        soft_seconds: processor time per answer.
        function: a grader of the user's own, as MODULE:FUNCTION; empty for mathematics.
    """
    control = socket.socket(fileno=control_fd)
    parent = os.getppid()
    grade, problem = _choose_grader(function)
    send(control, {"ready": not problem, "problem": problem, "confinement": confinement()})
    if problem:
        return
    gc.collect()
    gc.freeze()
    children: set[int] = set()
    try:
        while os.getppid() == parent:
            if not select.select([control], [], [], PARENT_POLL_SECONDS)[0]:
                continue
            data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
            if not data:
                return
            if data == b"s":
                pid = os.fork()
                if pid == 0:
                    control.close()
                    try:
                        _work(socket.socket(fileno=descriptors[0]), memory_bytes, soft_seconds, grade)
                    finally:
                        os._exit(0)
                os.close(descriptors[0])
                children.add(pid)
                send(control, {"pid": pid})
            else:
                pid = receive(control)["pid"]
                os.waitpid(pid, 0)
                children.discard(pid)
                send(control, {"done": pid})
    except (EOFError, OSError):
        return
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
