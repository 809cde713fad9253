"""Processes that this one starts: they are told what it is told, and end when it does, by SIGKILL too."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import psutil

PR_SET_PDEATHSIG: Final = 1
"""prctl(2): the signal that a process gets when its parent dies."""
STOP: Final = signal.SIGTERM
"""What a child is sent for any stop signal: it saves and ends."""
STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C, a scheduler's two, and a terminal that is closed."""


def dying_with_parent(number: signal.Signals = STOP) -> Callable[[], None] | None:
    """For a child, before its program begins: the signal when its parent dies, by SIGKILL too. None where unknown.

    The parent is the thread that starts the child; a thread that ends earlier takes the child with it.
    """
    if sys.platform != "linux":
        return None
    # Looked up here: between fork and exec as little as possible is done.
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(number))
        if os.getppid() != parent:
            os.kill(os.getpid(), number)

    return ask


def follow_parent(number: signal.Signals = STOP) -> None:
    """Ask in this process, which is running already, for the signal when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(number))


@contextlib.contextmanager
def unheard_by_children(numbers: Collection[signal.Signals] = STOP_SIGNALS) -> Iterator[None]:
    """Start a child inside: from its first instruction on it does not hear these signals, for this process does.

    A terminal's Ctrl-C and a scheduler's signals reach every process of a job, and one that is still starting has no
    handlers: it would die of what its parent answers in order. This process is told as ever.

    Args:
        numbers: signals that the children block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Mark:
    """What a hook of multiprocessing hangs on: it is gone when this is."""


@contextlib.contextmanager
def ended_with_us() -> Iterator[None]:
    """What multiprocessing forks inside, and what that forks, is killed when its parent dies, by SIGKILL too.

    A forked child holds what its parent held, such as the lock of a run, and may wait for that parent for ever. The
    parent is the thread that forks.
    """
    mark = _Mark()
    multiprocessing.util.register_after_fork(mark, _end_with_parent)
    try:
        yield
    finally:
        del mark


def _end_with_parent(_: _Mark) -> None:
    follow_parent(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os.kill(os.getpid(), signal.SIGKILL)


def start_pool_worker() -> None:
    """In a worker of a process pool: Ctrl-C is its parent's affair, and it ends with that parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent(signal.SIGKILL)


def end_descendants() -> None:
    """SIGKILL to every process that this one has started, and to theirs."""
    import psutil

    _kill(psutil.Process().children(recursive=True))


def _kill(processes: Sequence[psutil.Process]) -> None:
    import psutil

    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


class Relay:
    """Passes stop signals on to the children, and lets them stand still while this process does (Ctrl-Z).

    Use as a context manager; without effect outside the main thread. The children are those that start inside, in
    sessions of their own: what this process had started before is left in peace.

    Attributes:
        signals: those that came.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._told: set[int] = set()
        self._previous: dict[signal.Signals, Any] = {}
        self._others: set[int] = set()

    def __enter__(self) -> Relay:
        import psutil

        self._others = {child.pid for child in psutil.Process().children()}
        if threading.current_thread() is threading.main_thread():
            handlers: dict[signal.Signals, Any] = dict.fromkeys(STOP_SIGNALS, self._stop)
            for number, handler in {**handlers, signal.SIGTSTP: self._pause}.items():
                previous = signal.getsignal(number)
                # `nohup` asks for this one to be ignored.
                if number != signal.SIGHUP or previous != signal.SIG_IGN:
                    self._previous[number] = previous
                    signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def tell(self) -> None:
        """Tell those that were not told yet: children may start after the signal."""
        if self.signals:
            self.stop()

    def stop(self) -> None:
        """Tell all children that were not told yet to save and end."""
        import psutil

        for child in self._children():
            if child.pid not in self._told:
                self._told.add(child.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(STOP)

    def ended(self, code: int) -> bool:
        """Whether a child's exit code says that it died of what was passed on."""
        at_once = len(self.signals) > 1
        return bool(self.signals) and (-code in STOP_SIGNALS or (at_once and -code == signal.SIGKILL))

    def _children(self) -> list[psutil.Process]:
        import psutil

        return [child for child in psutil.Process().children() if child.pid not in self._others]

    def _descendants(self) -> list[psutil.Process]:
        import psutil

        found = []
        for child in self._children():
            found.append(child)
            with contextlib.suppress(psutil.NoSuchProcess):
                found.extend(child.children(recursive=True))
        return found

    def _stop(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if number == signal.SIGINT and self.signals:
            _kill(self._descendants())
        self.signals.append(number)
        self.tell()

    def _pause(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        import psutil

        below = self._descendants()
        for act in (psutil.Process.suspend, psutil.Process.resume):
            for child in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    act(child)
            if act is psutil.Process.suspend:
                os.kill(os.getpid(), signal.SIGSTOP)
