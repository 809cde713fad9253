"""A pool of sandboxed grading workers, driven from one thread of the parent at a time."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from phimr_nemo.errors import UserError
from phimr_nemo.process.children import unheard_by_children
from phimr_nemo.verify.plug import REMEDY, RULE
from phimr_nemo.verify.verdict import MATH_VERIFY_VERSION, Verdict
from phimr_nemo.verify.workers import worker as protocol
from phimr_nemo.verify.workers.confine import UNCONFINED

START_SECONDS: Final = 120.0
MAX_ATTEMPTS: Final = 2
"""An answer whose worker dies is tried once more on a fresh one: the worker may have died of something else."""
MAX_DEATHS_IN_A_ROW: Final = 16
CLOSE_SECONDS: Final = 5.0
_LOGGER: Final = logging.getLogger(__name__)
_ROOT: Final = str(Path(__file__).resolve().parents[2])
_BOOT: Final = (
    "import sys; sys.path[:1] = [sys.argv[1]]; from phimr_nemo.verify.workers.worker import spawner_main;"
    "spawner_main(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5])"
)
_ENVIRONMENT: Final = {"SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1", "OMP_NUM_THREADS": "1"}
"""gmpy2 computes huge powers in one uninterruptible call; plain Python integers can be stopped."""

_INHERITED: Final = re.compile(
    r"(?i)(PATH|HOME|USER|LANG|LC_.*|TZ|TMPDIR|TEMP|PYTHON.*|LD_LIBRARY_PATH|DYLD_.*|VIRTUAL_ENV|CONDA_PREFIX|SYSTEMROOT"
    r"|COVERAGE_.*|GLIBC_TUNABLES|MALLOC_.*)"
)
"""What Python needs to start. Tokens and keys of the parent's environment do not reach a worker."""


def worker_environment(parent: Mapping[str, str]) -> dict[str, str]:
    """The environment of the grader's processes."""
    return {name: value for name, value in parent.items() if _INHERITED.fullmatch(name)} | _ENVIRONMENT


@dataclass(frozen=True)
class Job:
    """One undecided answer: what a worker needs to grade it."""

    gold: str
    text: str
    parts: tuple[str, ...]
    boxes: tuple[str, ...]


@dataclass
class _Worker:
    pid: int
    connection: socket.socket
    job: int = -1
    started: float = 0.0


class Pool:
    """Workers that grade jobs, each within its limits, whatever the answers are.

    Args:
        workers: processes, at least 1. They start with the first job.
        soft_seconds: processor time per answer inside the worker.
        deadline_seconds: wall time per answer, after which the worker is killed.
        memory_bytes: address space of a worker.
        function: a grader of the user's own (see :mod:`phimr_nemo.verify.plug`); empty for mathematics.
    """

    def __init__(
        self,
        workers: int,
        *,
        soft_seconds: float,
        deadline_seconds: float,
        memory_bytes: int,
        function: str = "",
    ) -> None:
        self._function = function
        self._size = workers
        self._soft_seconds, self._deadline, self._memory = soft_seconds, deadline_seconds, memory_bytes
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._spawner: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._workers: list[_Worker] = []
        self._deaths = 0

    def start(self) -> None:
        """Start the first worker now.

        Raises:
            UserError: what grades cannot be imported.
        """
        with self._lock:
            if not self._workers:
                self._workers.append(self._spawn())

    def run(self, jobs: Sequence[Job]) -> list[Verdict]:
        """Grade every job; the verdicts are in the order of the jobs. Callable from any thread.

        Raises:
            UserError: math-verify cannot be imported, or is not the pinned version.
            RuntimeError: workers die one after the other, or the pool belongs to another process.
        """
        if not jobs:
            return []
        if os.getpid() != self._owner:
            raise RuntimeError("a Grader cannot be used in a forked child; make a new one there")
        with self._lock:
            try:
                return self._run(jobs)
            except BaseException:
                self._shut_down()
                raise

    def _run(self, jobs: Sequence[Job]) -> list[Verdict]:
        results: list[Verdict | None] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        attempts = [0] * len(jobs)
        while len(self._workers) < min(self._size, len(jobs)):
            self._workers.append(self._spawn())
        open_jobs = len(jobs)
        while open_jobs:
            for worker in self._workers:
                if worker.job < 0 and waiting:
                    self._give(worker, waiting.popleft(), jobs, attempts)
            for worker, message in self._wait():
                index = worker.job
                if message is None:
                    verdict = self._after_death(jobs[index], attempts[index])
                    if verdict is None:
                        waiting.appendleft(index)
                elif message == "late":
                    verdict = Verdict("timeout", jobs[index].text, f"more than {self._deadline:g} s")
                else:
                    self._deaths = 0
                    verdict = Verdict(message["verdict"], message["extracted"], message["reason"])
                if verdict is not None:
                    results[index] = verdict
                    open_jobs -= 1
                worker.job = -1
                if not isinstance(message, dict) or message["last"]:
                    self._replace(worker, needed=bool(waiting))
        return [result for result in results if result is not None]

    def _give(self, worker: _Worker, index: int, jobs: Sequence[Job], attempts: list[int]) -> None:
        job = jobs[index]
        worker.job, worker.started = index, time.monotonic()
        attempts[index] += 1
        # A worker that died while idle refuses the job; waiting for its answer then reports the death.
        with contextlib.suppress(OSError):
            protocol.send(
                worker.connection,
                {"gold": job.gold, "text": job.text, "parts": job.parts, "boxes": job.boxes},
            )

    def _wait(self) -> list[tuple[_Worker, Any]]:
        """The busy workers that have answered (a dict), died (None) or run out of time ("late")."""
        busy = [worker for worker in self._workers if worker.job >= 0]
        now = time.monotonic()
        remaining = max(0.0, min(worker.started for worker in busy) + self._deadline - now)
        answered: list[tuple[_Worker, Any]] = []
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.connection, selectors.EVENT_READ, worker)
            for entry, _ in selector.select(remaining):
                answered.append((entry.data, self._receive(entry.data)))
        heard = {id(worker) for worker, _ in answered}
        now = time.monotonic()
        late = [w for w in busy if id(w) not in heard and now - w.started >= self._deadline]
        return answered + [(worker, "late") for worker in late]

    @staticmethod
    def _receive(worker: _Worker) -> Any:
        try:
            return protocol.receive(worker.connection)
        except (EOFError, OSError, ValueError):
            return None

    def _after_death(self, job: Job, attempts: int) -> Verdict | None:
        """The verdict on a job whose worker died, or None when it is to be tried again."""
        self._deaths += 1
        if self._deaths > MAX_DEATHS_IN_A_ROW:
            raise RuntimeError(
                f"{self._deaths} grading workers died in a row; their memory limit is {self._memory >> 20} MiB: "
                "is the machine out of memory?"
            )
        if attempts < MAX_ATTEMPTS:
            return None
        return Verdict("error", job.text, "the worker died")

    # Processes --------------------------------------------------------------------------------------

    def _start_spawner(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        try:
            with unheard_by_children():
                self._spawner = subprocess.Popen(
                    [
                        sys.executable,
                        "-c",
                        _BOOT,
                        _ROOT,
                        str(theirs.fileno()),
                        str(self._memory),
                        str(self._soft_seconds),
                        self._function,
                    ],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=worker_environment(os.environ),
                )
        finally:
            theirs.close()
        ours.settimeout(START_SECONDS)
        try:
            hello = protocol.receive(ours)
        except (EOFError, OSError) as error:
            ours.close()
            raise RuntimeError("the process that starts grading workers did not start") from error
        if not hello["ready"]:
            ours.close()
            if self._function:
                raise UserError(
                    f"the grader {self._function!r} cannot start: {hello['problem']}", rule=RULE, remedy=REMEDY
                )
            raise UserError(
                f"the grader cannot start: {hello['problem']}",
                rule=f"answers are graded by math-verify {MATH_VERIFY_VERSION}, and by no other version",
                remedy=f"pip install math-verify=={MATH_VERIFY_VERSION}",
            )
        if hello["confinement"] != "seccomp":
            _LOGGER.warning("%s", UNCONFINED)
        return ours

    def _spawn(self) -> _Worker:
        for attempt in range(MAX_ATTEMPTS):
            if self._control is None:
                self._control = self._start_spawner()
            ours, theirs = socket.socketpair()
            try:
                socket.send_fds(self._control, [b"s"], [theirs.fileno()])
                return _Worker(protocol.receive(self._control)["pid"], ours)
            except (EOFError, OSError):
                ours.close()
                self._shut_down()
                if attempt + 1 == MAX_ATTEMPTS:
                    raise
            finally:
                theirs.close()
        raise AssertionError("unreachable")

    def _replace(self, worker: _Worker, *, needed: bool) -> None:
        """Kill and reap a worker, and start another where there is work left."""
        self._workers.remove(worker)
        worker.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
        if self._control is not None:
            try:
                self._control.sendall(b"r")
                protocol.send(self._control, {"pid": worker.pid})
                protocol.receive(self._control)
            except (EOFError, OSError):
                self._forget_spawner()
        if needed:
            self._workers.append(self._spawn())

    def _forget_spawner(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._spawner is not None:
            try:
                self._spawner.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._spawner.kill()
                self._spawner.wait()
            self._spawner = None

    def _shut_down(self) -> None:
        for worker in self._workers:
            worker.connection.close()
        self._workers = []
        self._forget_spawner()

    def close(self) -> None:
        """End all processes. The pool can be used again: it would start new ones."""
        if os.getpid() != self._owner:
            return
        with self._lock:
            self._shut_down()

    def pids(self) -> list[int]:
        """The processes of the pool: the spawner first, then the workers."""
        spawner = [self._spawner.pid] if self._spawner is not None else []
        return spawner + [worker.pid for worker in self._workers]
