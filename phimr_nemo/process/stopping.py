"""How a process is told to stop: the first signal ends it in order, a second Ctrl-C at once.

SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (a scheduler) and SIGHUP (a terminal that is closed) mean the same. Where nothing
would be lost a signal raises an Interruption, a KeyboardInterrupt; inside :func:`deferred` it is remembered, and the
trainer asks :func:`told` after every step. A signal belongs to the whole process, hence the module's one state.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final

from phimr_nemo.errors import EXIT_PREEMPTED, Preempted
from phimr_nemo.process.children import STOP_SIGNALS, end_descendants

CONTINUE: Final = "run the same command to continue"
KEPT: Final = "\n  kept: "
"""Before what is on the disk, in a message."""


class Interruption(KeyboardInterrupt):
    """A stop signal. Not its base class itself: Python ends with SIGINT's code, whatever code it was given, once a
    plain KeyboardInterrupt has passed through `exec` of a text, as dataclasses and named tuples are made.
    """


@dataclass
class _State:
    """What this process was told.

    Attributes:
        process: id; a forked child has the state and the handlers, but is not the one that was told.
        told: whether a signal has come.
        interrupted: whether it was raised as an Interruption.
        deferrals: contexts of :func:`deferred` that are open.
        kept: says what is kept when the process ends at once.
        previous: handlers outside :func:`listening`.
    """

    process: int = 0
    told: bool = False
    interrupted: bool = False
    deferrals: int = 0
    kept: Callable[[], str] | None = None
    previous: dict[signal.Signals, Any] = field(default_factory=dict)


_state = _State()


def told() -> bool:
    """Whether this process was told to stop."""
    return _state.told


def install() -> None:
    """Take the signals over (again): a trainer may have put its own handlers in front."""
    for number in _state.previous:
        signal.signal(number, _handle)


@contextlib.contextmanager
def listening(kept: Callable[[], str] | None = None) -> Iterator[None]:
    """Answer the stop signals inside; without effect in a thread, or inside another of these.

    Args:
        kept: says what of the work is kept, for the last message of a process that ends at once.

    Raises:
        KeyboardInterrupt: a signal came outside :func:`deferred`.
    """
    global _state
    if _state.process == os.getpid() or threading.current_thread() is not threading.main_thread():
        yield
        return
    outer = _state
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    # `nohup` asks for this one to be ignored.
    heard = {n: h for n, h in handlers.items() if n != signal.SIGHUP or h != signal.SIG_IGN}
    _state = _State(process=os.getpid(), kept=kept, previous=heard)
    install()
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
        _state = outer


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Remember a signal instead of raising; who opens this asks :func:`told`.

    Raises:
        KeyboardInterrupt: a signal came before.
    """
    with listening():
        if _state.told:
            # A library may have swallowed the first one.
            raise Interruption
        _state.deferrals += 1
        try:
            yield
        finally:
            _state.deferrals -= 1


@contextlib.contextmanager
def stoppable(what: str, kept: Callable[[], str] | None = None) -> Iterator[None]:
    """Around a command: a stop signal ends it as a preemption does, with a message that says what is kept.

    Args:
        what: the command, for the message.
        kept: says what of its work is kept.

    Raises:
        Preempted: the command was told to stop.
    """
    message = f"{what} was interrupted; what is finished is kept, {CONTINUE}"
    with listening(kept):
        try:
            yield
        except KeyboardInterrupt:
            raise Preempted(message if kept is None else f"{message}{KEPT}{kept()}") from None
        except Exception as error:
            # What a library makes of the interruption.
            if not _state.interrupted or isinstance(error, Preempted):
                raise
            raise Preempted(message if kept is None else f"{message}{KEPT}{kept()}") from error


def _handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    if os.getpid() != _state.process:
        _in_a_forked_child(number)
        return
    first, _state.told = not _state.told, True
    if not first:
        if number == signal.SIGINT:
            _end_at_once()
        return
    if _state.deferrals:
        _say("\nstopping: this step is finished and saved; Ctrl-C again stops at once\n")
        return
    _state.interrupted = True
    raise Interruption


def _in_a_forked_child(number: int) -> None:
    """A terminal's Ctrl-C reaches the children too, who go on until their parent is done with them."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _end_at_once() -> None:
    end_descendants()
    kept = "" if _state.kept is None else f"{KEPT}{_state.kept()}"
    _say(f"\nstopped at once; {CONTINUE}{kept}\n")
    os._exit(EXIT_PREEMPTED)


def _say(text: str) -> None:
    """To the terminal, by the first of several ranks; straight, since the stream may be in the middle of a write."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())
