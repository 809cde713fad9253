"""What a process forks ends with it, also when it is killed; without the care that is taken, it does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress

import processes
import psutil
import pytest

SECONDS = 60.0
CARE = "ended_with_us()"
PROGRAM = """
import contextlib, multiprocessing, os, time
from phimr_nemo.process.children import ended_with_us

context = multiprocessing.get_context("fork")

def child(report):
    grandchild = context.Process(target=time.sleep, args=({seconds},))
    grandchild.start()
    report.put((os.getpid(), grandchild.pid))
    time.sleep({seconds})

report = context.SimpleQueue()
with {care}:
    context.Process(target=child, args=(report,)).start()
after = context.Process(target=time.sleep, args=({seconds},))
after.start()
print(*report.get(), after.pid, flush=True)
time.sleep({seconds})
"""
Started = Callable[[str], tuple[psutil.Process, ...]]


@pytest.fixture
def started() -> Iterator[Started]:
    """Starts the program and kills it when its processes are there: child, grandchild, one that was forked later."""
    found: list[psutil.Process] = []

    def start(care: str) -> tuple[psutil.Process, ...]:
        program = textwrap.dedent(PROGRAM).format(care=care, seconds=10 * SECONDS)
        process = processes.start([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        found.extend(psutil.Process(int(number)) for number in process.stdout.readline().split())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        return tuple(found)

    yield start
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells a child of its parent's death on Linux only")
def test_what_is_forked_inside_ends_with_a_killed_parent_at_every_depth(started: Started) -> None:
    child, grandchild, later = started(CARE)
    _, alive = psutil.wait_procs([child, grandchild], timeout=SECONDS)
    assert not alive
    assert later.is_running()


def test_without_it_they_are_left_behind(started: Started) -> None:
    assert all(process.is_running() for process in started("contextlib.nullcontext()"))


RELAYING = """
import signal, subprocess, sys, time
from phimr_nemo.process.children import Relay

SLEEP = [sys.executable, "-c", "import time; time.sleep({seconds})"]
earlier = subprocess.Popen(SLEEP, start_new_session=True)
with Relay() as relay:
    own = subprocess.Popen(SLEEP, start_new_session=True)
    print(earlier.pid, own.pid, flush=True)
    {stop}
    own.wait()
    print(earlier.poll(), own.returncode, relay.ended(own.returncode), flush=True)
earlier.kill()
"""
CTRL_C = "signal.raise_signal(signal.SIGINT)"


@pytest.mark.parametrize(
    ("stop", "ended_with", "is_told"),
    [("relay.stop()", signal.SIGTERM, False), (CTRL_C, signal.SIGTERM, True), (f"{CTRL_C}; {CTRL_C}", None, True)],
)
def test_a_relay_stops_what_was_started_inside_and_nothing_else(
    stop: str, ended_with: signal.Signals | None, is_told: bool
) -> None:
    program = textwrap.dedent(RELAYING).format(seconds=10 * SECONDS, stop=stop)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=SECONDS
    )
    earlier, own, told = done.stdout.splitlines()[1].split()
    assert earlier == "None"
    # Of two at once either may come first.
    assert -int(own) in ({ended_with} if ended_with else {signal.SIGTERM, signal.SIGKILL})
    assert told == str(is_told)
