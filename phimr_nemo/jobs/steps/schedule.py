"""Steps of `phimr` that feed one another: each when what it reads is made, side by side where there is room.

A step that has finished and is what its command would make now is not run again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Final, Protocol

from phimr_nemo.config import STAGES
from phimr_nemo.errors import EXIT_DONE, EXIT_PREEMPTED, Preempted
from phimr_nemo.jobs.closing import PART_OF
from phimr_nemo.jobs.launch import import_stages
from phimr_nemo.jobs.steps.order import Order
from phimr_nemo.jobs.steps.step import Step, changed_since, failure, interrupted, refuse_changed
from phimr_nemo.process.children import Relay, dying_with_parent
from phimr_nemo.process.gpus import promised_gpus
from phimr_nemo.process.stopping import CONTINUE
from phimr_nemo.process.warm import THREADS, WarmProcess, can_fork, command_of
from phimr_nemo.store.claims import claimed
from phimr_nemo.store.progress import duration
from phimr_nemo.store.runs import RunDirectory
from phimr_nemo.text.printable import say

POLL_SECONDS: Final = 0.05
START_OF_LINE: Final = "\r\x1b[K"
"""Takes the place of a progress bar that stands on the terminal's line."""
TELLING_SECONDS: Final = 15.0
"""Steps that are expected to be shorter, all together, say nothing of the machine's pace."""


class Child(Protocol):
    """A step that was started."""

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""


class Starter:
    """Starts steps, each in a process of its own: Megatron's state is one per process.

    The first one imports what all of them need, if copies of this process are sound and more than one is to come.

    Args:
        steps: that are to come.
        at_once: how many of them may run side by side.
    """

    def __init__(self, steps: Sequence[Step], at_once: int = 1) -> None:
        self._stages = {step.arguments[0] for step in steps} & STAGES.keys()
        self._is_worth_it = len(steps) > 1
        self._warm: WarmProcess | None = None
        self._environment = {**os.environ, PART_OF: "quickstart"}
        if at_once > 1:
            self._environment.setdefault(THREADS, str(max(1, cores() // at_once)))

    def start(self, step: Step, output: IO[bytes] | None = None) -> Child:
        """Start a step.

        Args:
            step: what to run.
            output: for its standard output and error; None = this process's.
        """
        if self._warm is None and self._is_worth_it and can_fork():
            self._warm = WarmProcess(self._load, self._environment)
        # The libraries may have started a thread after all.
        if self._warm is not None and can_fork():
            return self._warm.start(*step.invocation, None if output is None else output.fileno())
        return subprocess.Popen(
            command_of(*step.invocation),
            env=self._environment,
            start_new_session=True,
            preexec_fn=dying_with_parent(),
            stdout=output,
            stderr=output,
        )

    def _load(self) -> None:
        import_stages(sorted(self._stages))


@dataclass(frozen=True)
class _Running:
    """A step at work.

    Attributes:
        step: what it is.
        child: its process.
        log: what it prints, when another has the terminal.
        started: time.monotonic().
    """

    step: Step
    child: Child
    log: IO[bytes] | None
    started: float


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_by_side(most: int) -> int:
    """How many steps run at once on this machine: each has a core of its own, and a GPU is one step's."""
    return 1 if promised_gpus() else max(1, min(most, cores()))


def run_steps(
    steps: Sequence[Step], *, redo: bool = False, at_once: int = 1, seconds: Mapping[str, float] | None = None
) -> None:
    """Run every step that has not finished yet, after those that it reads from.

    Args:
        steps: in their order; of those that can start the first does.
        redo: make steps again whose command, settings or inputs have changed, and what follows from them.
        at_once: how many may run side by side. What one prints beside another is shown when it has ended.
        seconds: step's name -> what it usually takes, for what is said of the time to go.

    Raises:
        UserError: a step refused its input, or has changed and is not to be made again, or another process is at work
            on one that is.
        Preempted: it was interrupted; the same steps continue it.
        RuntimeError: a step failed; its own message stands above.
    """
    _Schedule(steps, at_once=at_once, seconds=seconds or {}).run(redo=redo)


class _Schedule:
    """Steps that wait, run and have ended; see :func:`run_steps`."""

    def __init__(self, steps: Sequence[Step], *, at_once: int, seconds: Mapping[str, float]) -> None:
        self._steps = list(steps)
        self._order = Order(steps, at_once, seconds)
        self._at_once = at_once
        self._waiting = list(steps)
        self._running: list[_Running] = []
        self._ended: list[tuple[Step, float]] = []
        self._failure: Exception | None = None
        self._interrupted: list[Step] = []

    def run(self, *, redo: bool) -> None:
        """Run them all."""
        starter = Starter([step for step in self._steps if not RunDirectory(step.output).is_done], self._at_once)
        with Relay() as relay:
            try:
                while self._running or self._waiting:
                    if not (relay.signals or self._failure or self._interrupted):
                        self._start_ready(starter, redo=redo)
                        relay.tell()
                    if not self._running:
                        break
                    self._await_one(relay)
            finally:
                # Nothing is left at work by what went wrong here.
                if self._running:
                    relay.stop()
                    while self._running:
                        self._await_one(relay)
        if self._failure is not None:
            raise self._failure
        if self._interrupted:
            raise interrupted(sorted(self._interrupted, key=self._steps.index))
        if self._waiting:
            raise Preempted(f"stopped before {self._waiting[0].name}; {CONTINUE}")

    def _start_ready(self, starter: Starter, *, redo: bool) -> None:
        """Start what can start while there is room."""
        while (step := self._order.next(self._waiting, self._left(self._pace()))) is not None:
            self._waiting.remove(step)
            if not _is_to_run(step, redo=redo):
                self._ended.append((step, 0.0))
                continue
            # The terminal is for the longest way.
            way = self._order.way
            beside = any(way[other] > way[step] for other in self._waiting)
            beside |= any(item.log is None for item in self._running)
            self._announce(step, beside=beside)
            log = tempfile.TemporaryFile() if beside else None  # noqa: SIM115
            self._running.append(_Running(step, starter.start(step, log), log, time.monotonic()))

    def _await_one(self, relay: Relay) -> None:
        """Wait until a step has ended or a signal has come."""
        while True:
            for item in list(self._running):
                code = item.child.poll()
                if code is not None:
                    self._running.remove(item)
                    self._close(item, EXIT_PREEMPTED if relay.ended(code) else code, relay)
                    return
            if relay.signals:
                relay.tell()
            time.sleep(POLL_SECONDS)

    def _close(self, item: _Running, code: int, relay: Relay) -> None:
        if item.log is not None:
            with item.log as log:
                log.seek(0)
                text = log.read().decode(errors="replace")
            clear = START_OF_LINE if sys.stdout.isatty() else ""
            sys.stdout.write(f"{clear}{item.step.name}:\n{text}")
            sys.stdout.flush()
        if code == EXIT_DONE:
            self._ended.append((item.step, time.monotonic() - item.started))
        elif code == EXIT_PREEMPTED:
            self._interrupted.append(item.step)
        elif self._failure is None:
            self._failure = failure(item.step, code)
            # What runs beside it saves and ends: its command goes on later.
            relay.stop()

    def _announce(self, step: Step, *, beside: bool) -> None:
        number, place = self._steps.index(step) + 1, step.output.parent.name
        pace = self._pace()
        left = {**self._left(pace), step: self._order.usual(step)}
        to_go = self._order.makespan(self._waiting, left) * pace
        told = f", about {duration(to_go)} to go in all" if to_go else ""
        say(f"[{number}/{len(self._steps)}] {place}: {step.name}{' (beside it)' if beside else ''}{told}")

    def _left(self, pace: float) -> dict[Step, float]:
        """Steps at work -> seconds that each would go on for at its usual pace."""
        now = time.monotonic()
        return {
            item.step: max(0.0, self._order.usual(item.step) - (now - item.started) / pace) for item in self._running
        }

    def _pace(self) -> float:
        """What steps take here of what they usually take: those that have ended, and those at work for too long."""
        now = time.monotonic()
        told = [(self._order.usual(step), took) for step, took in self._ended if took]
        at_work = [(self._order.usual(item.step), now - item.started) for item in self._running]
        told += [(usual, took) for usual, took in at_work if took > usual]
        told = [(usual, took) for usual, took in told if usual]
        usually = sum(usual for usual, _ in told)
        return sum(took for _, took in told) / usually if usually >= TELLING_SECONDS else 1.0


def _is_to_run(step: Step, *, redo: bool) -> bool:
    """Whether a step has something to do; one that has changed is removed first."""
    # What was made again before it may have changed what it reads.
    changed = changed_since(step)
    if changed and redo:
        # Not under another process that is at work in it.
        with claimed(step.output):
            say(f"{step.output}: made again ({'; '.join(changed)})")
            shutil.rmtree(step.output)
    elif changed:
        refuse_changed([step])
    return not RunDirectory(step.output).is_done
