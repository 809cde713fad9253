"""A process that has imported what its commands need: each starts as a copy of it, and is as a new one."""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from phimr_nemo.errors import EXIT_DONE, EXIT_INTERNAL
from phimr_nemo.process.children import STOP, STOP_SIGNALS, follow_parent
from phimr_nemo.process.gpus import promised_gpus

HEARD: Final = (*STOP_SIGNALS, signal.SIGTSTP)
"""What a process that starts others answers for them."""
THREADS: Final = "OMP_NUM_THREADS"


_copies: list[int] = []
"""This process's id, where it is a copy of a warm one."""


def is_copy() -> bool:
    """Whether this process is a copy of a warm one: it has what its command needs, and has run nothing before it."""
    return os.getpid() in _copies


def can_fork() -> bool:
    """Whether a copy of this process is sound: no thread of its own that might hold a lock, no driver of a GPU."""
    alone = threading.active_count() == 1 and threading.current_thread() is threading.main_thread()
    return sys.platform == "linux" and alone and not promised_gpus()


class Forked:
    """A copy of this process that runs a command.

    Attributes:
        pid: its id.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self._code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class WarmProcess:
    """Starts commands of Python modules without importing again what this process has imported.

    A command has the session, environment, arguments, streams, signals, random numbers, exit handlers and exit code
    that it would have in an interpreter of its own.

    Args:
        load: imports what the commands need; it starts no thread.
        environment: of the commands, which it is imported in as well.
    """

    def __init__(self, load: Callable[[], object], environment: Mapping[str, str]) -> None:
        own = dict(os.environ)
        _set_environment(environment)
        try:
            load()
            # With what the libraries have set, as in an interpreter of the command's own.
            self._environment = dict(os.environ)
        finally:
            _set_environment(own)

    def start(self, module: str, arguments: Sequence[str], output: int | None = None) -> Forked:
        """Run `python -m module arguments...` in a copy of this process, which is told to stop when this one dies.

        Args:
            module: its name.
            arguments: of its command line.
            output: descriptor for its standard output and error; None = this process's.
        """
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        parent = os.getpid()
        # Between fork and its own handlers the copy has this process's, who would answer and forget.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
        try:
            pid = os.fork()
            if pid == 0:
                self._become(module, arguments, output, parent, before)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return Forked(pid)

    def _become(
        self, module: str, arguments: Sequence[str], output: int | None, parent: int, mask: set[int | signal.Signals]
    ) -> NoReturn:
        code = EXIT_INTERNAL
        try:
            for number in HEARD:
                if signal.getsignal(number) != signal.SIG_IGN:
                    normal: Any = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                    signal.signal(number, normal)
            os.setsid()
            _copies.append(os.getpid())
            follow_parent(STOP)
            if os.getppid() != parent:
                os.kill(os.getpid(), STOP)
            if output is not None:
                for descriptor in (1, 2):
                    os.dup2(output, descriptor)
            sys.stdout, sys.stderr = sys.__stdout__ or sys.stdout, sys.__stderr__ or sys.stderr
            _set_environment(self._environment)
            _as_started(self._environment)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            sys.argv[:] = [module, *arguments]
            code = _exit_code(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))
        finally:
            os._exit(code)


def _set_environment(environment: Mapping[str, str]) -> None:
    """Make it this process's; what is alike is not touched."""
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _as_started(environment: Mapping[str, str]) -> None:
    """What libraries settle when they are loaded: the number of threads, and numbers from the system's entropy.

    Python's own generator takes new entropy after a fork by itself, and torch's begins with a constant.
    """
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        numpy.random.seed()
    if torch is not None and environment.get(THREADS, "").isdecimal():
        torch.set_num_threads(int(environment[THREADS]))


def _exit_code(run: Callable[[], object]) -> int:
    """Run a program to its end, as the interpreter does: its threads, its exit handlers, its last message."""
    code = EXIT_DONE
    try:
        run()
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        code = left.code if isinstance(left.code, int) else EXIT_DONE if left.code is None else EXIT_INTERNAL
    except BaseException:  # noqa: BLE001 - as the interpreter does
        sys.excepthook(*sys.exc_info())
        code = EXIT_INTERNAL
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


def command_of(module: str, arguments: Sequence[str]) -> list[str]:
    """The command line that :meth:`WarmProcess.start` stands for."""
    return [str(Path(sys.executable)), "-m", module, *arguments]
