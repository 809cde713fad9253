"""Processes that tests start: they end when the test process does, by SIGKILL too, and may have a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import psutil

from phimr_nemo.process.children import dying_with_parent

POLL_SECONDS: Final = 0.02
PATIENCE_SECONDS: Final = 300.0
ROWS, COLUMNS = 24, 80
CTRL_C: Final = b"\x03"
MOST_CHARACTERS: Final = 2000


def start(command: Sequence[str | Path], *, ctrl_c: bool = False, **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen` of a process that is told to end (SIGTERM) when this one does, however that happens.

    Args:
        command: program and arguments.
        ctrl_c: it answers Ctrl-C, even if this process runs in a shell's background, where children ignore it.
        options: of `Popen`; `preexec_fn` is called as well.
    """
    follow, more = dying_with_parent(), options.pop("preexec_fn", None)

    def prepare() -> None:
        if follow is not None:
            follow()
        if ctrl_c:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if more is not None:
            more()

    return subprocess.Popen([str(word) for word in command], preexec_fn=prepare, **options)


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[Any], seconds: float = PATIENCE_SECONDS
) -> None:
    """Wait until the condition holds; fails when the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before it was told to"
        assert time.monotonic() < deadline, "not in time"
        time.sleep(POLL_SECONDS)


def tree(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    """The process and everything below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return []


def left_of(processes: Sequence[psutil.Process], seconds: float = PATIENCE_SECONDS) -> list[str]:
    """The command lines of those that are still there after a while."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [" ".join(process.cmdline()) for process in alive if process.status() != psutil.STATUS_ZOMBIE]


class Terminal:
    """A command in a terminal of its own (80 x 24), as its foreground job. Use as a context manager.

    Args:
        command: program and arguments.
        options: of `Popen`.
    """

    def __init__(self, command: Sequence[str | Path], **options: Any) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (ROWS, COLUMNS))
        os.set_blocking(self._ours, False)
        self.text = ""

        def take_terminal() -> None:
            # A session's first terminal becomes its own, and its first group the one that Ctrl-C goes to.
            os.close(os.open(os.ttyname(theirs), os.O_RDWR))
            os.tcsetpgrp(theirs, os.getpgrp())

        self.process = start(
            command,
            ctrl_c=True,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=take_terminal,
            **options,
        )
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in tree(self.process):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        os.close(self._ours)

    def read(self) -> str:
        """Everything that the command has written until now."""
        with contextlib.suppress(BlockingIOError, OSError):
            while part := os.read(self._ours, 1 << 16):
                self.text += part.decode("utf-8", "replace")
        return self.text

    def wait_for(self, condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
        """As :func:`wait_for`, while what the command writes is taken away."""
        try:
            wait_for(lambda: bool(self.read() is None or condition()), self.process, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.read()[-MOST_CHARACTERS:]}") from error

    def press_ctrl_c(self) -> None:
        """As on a keyboard."""
        os.write(self._ours, CTRL_C)

    def end(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait for the command's end; its exit code."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.read()[-2000:]
            self.read()
            time.sleep(POLL_SECONDS)
        self.read()
        return int(self.process.returncode)
