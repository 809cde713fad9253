"""A rank that stands still is told from one that works, and from a launcher that stood still itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from processes import start

from phimr_nemo.process import heartbeat
from phimr_nemo.process.heartbeat import DIRECTORY, LONGEST_LOOK_SECONDS, SECONDS, Watch

RANK = """
import time
from phimr_nemo.process.heartbeat import start_beating
start_beating()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    monkeypatch.setenv(SECONDS, "20")
    with Watch() as made:
        yield made


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, watch: Watch) -> None:
        self.now = watch._looked
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.now)

    def looks(self, watch: Watch, count: int, *, every: float) -> None:
        for _ in range(count):
            self.now += every
            watch.look()


def start_rank(rank: int) -> subprocess.Popen[str]:
    process = start(
        [sys.executable, "-c", RANK], env={**os.environ, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def beat_of(watch: Watch) -> int:
    (file,) = watch._directory.iterdir()
    return file.stat().st_mtime_ns


def test_a_rank_that_stands_still_is_ended_and_named(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = start_rank(3)
    while not list(watch._directory.iterdir()):
        pass
    try:
        before = beat_of(watch)
        while beat_of(watch) == before:
            pass
        rank.send_signal(signal.SIGSTOP)
        clock = Clock(monkeypatch, watch)
        clock.looks(watch, 20, every=1.0)
        assert (watch.still, rank.poll()) == ([], None)
        clock.looks(watch, 2, every=1.0)
        assert watch.still == [3]
        assert rank.wait() == -signal.SIGKILL
        clock.looks(watch, 60, every=1.0)
        assert watch.still == [3]
    finally:
        rank.kill()
        rank.wait()


def test_a_rank_that_beats_stays(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    file = watch._directory / f"0.{os.getpid()}"
    clock = Clock(monkeypatch, watch)
    for beat in range(1, 50):
        file.touch()
        os.utime(file, ns=(beat, beat))
        clock.looks(watch, 15, every=1.0)
    assert watch.still == []


def test_a_launcher_that_stood_still_blames_no_rank(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    (watch._directory / f"0.{os.getpid()}").touch()
    clock = Clock(monkeypatch, watch)
    clock.looks(watch, 1, every=1.0)
    clock.looks(watch, 3, every=86400.0)
    assert watch.seconds > LONGEST_LOOK_SECONDS * 3
    assert watch.still == []


def test_a_rank_that_has_ended_is_not_named(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = start([sys.executable, "-c", ""])
    ended.wait()
    (watch._directory / f"0.{ended.pid}").touch()
    Clock(monkeypatch, watch).looks(watch, 60, every=1.0)
    assert watch.still == []


def test_a_process_that_has_its_number_now_is_left_alone(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getppid()
    (watch._directory / f"0.{parent}").touch()
    Clock(monkeypatch, watch).looks(watch, 60, every=1.0)
    assert watch.still == []
    os.kill(parent, 0)


def test_nobody_beats_where_nobody_looks(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    place = watch._directory
    monkeypatch.delenv("RANK", raising=False)
    heartbeat.start_beating()
    monkeypatch.delenv(DIRECTORY)
    monkeypatch.setenv("RANK", "0")
    heartbeat.start_beating()
    assert list(place.iterdir()) == []
    watch.__exit__(None, None, None)
    assert not place.exists()
