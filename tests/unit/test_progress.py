"""Progress: on a narrow terminal the figure that matters is not cut, in a log there are whole lines, and few."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import termios

import pytest

from phimr_nemo.store import progress
from phimr_nemo.store.progress import LOG_SECONDS, Progress, duration, track

FIGURES = {"loss": "0.0990", "lr": "1.43e-03", "grad_norm": "0.68", "tok/s/gpu": "7427", "mfu": "41.2%", "GiB": "1.1"}


class Clock:
    """Time as the test sets it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("columns", [40, 80, 200, 0])
def test_the_first_figure_survives_every_width(columns: int) -> None:
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    with os.fdopen(writing, "w") as terminal:
        bar = Progress(1005, title="midtrain", unit="step", done=599, stream=terminal)
        bar.show(FIGURES)
        bar.update()
        bar.close()
        shown = b""
        while b"600/1005" not in shown or not shown.endswith(b"\n"):
            shown += os.read(reading, 65536)
    os.close(reading)
    lines = [line for line in re.split(r"[\r\n]+", shown.decode()) if line.strip()]
    # A terminal in a container may not know its size.
    assert all(len(line) <= (columns or 80) for line in lines)
    assert lines[-1].startswith("midtrain  60% 600/1005 loss=0.0990")
    assert ("GiB=1.1" in lines[-1]) is (columns == 200)


def test_a_log_gets_a_line_every_half_minute(clock: Clock) -> None:
    log = io.StringIO()
    with Progress(1000, title="sft", unit="step", done=100, stream=log) as shown:
        shown.show({"loss": "0.5"})
        for _ in range(90):
            clock.now += 1.0
            shown.update(10)
    text = log.getvalue()
    assert "\r" not in text
    lines = text.splitlines()
    # After 30, 60 and 90 s; the 900 steps of this run take 90 s, so a third of them takes another 60.
    assert len(lines) == 90 / LOG_SECONDS
    assert lines[0] == "sft: step 400 of 1,000, loss 0.5, 30 s, 1 min 00 s to go"
    assert lines[-1] == "sft: step 1,000 of 1,000, loss 0.5, 1 min 30 s"


def test_the_last_line_has_all(clock: Clock) -> None:
    log = io.StringIO()
    with Progress(3, title="sft", unit="step", stream=log) as shown:
        clock.now += LOG_SECONDS
        shown.update()
        shown.update(2)
    assert [line.split(",")[0] for line in log.getvalue().splitlines()] == ["sft: step 1 of 3", "sft: step 3 of 3"]


def test_a_short_job_writes_nothing_into_a_log(clock: Clock) -> None:
    log = io.StringIO()
    with Progress(10, title="verify", unit="answer", stream=log) as shown:
        for _ in range(10):
            clock.now += 2.9
            shown.update()
    assert log.getvalue() == ""


def test_what_an_earlier_run_has_done_says_nothing_of_the_pace(clock: Clock) -> None:
    log = io.StringIO()
    with Progress(1000, title="generate", unit="rollout", stream=log) as shown:
        shown.found_done(500)
        clock.now += 50
        shown.update(250)
        assert log.getvalue() == "generate: rollout 750 of 1,000, 50 s, 50 s to go\n"


def test_one_process_of_several_speaks(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    shown = Progress(2, title="dpo", unit="step", hidden=True)
    clock.now += 60
    shown.update()
    shown.close()
    assert capfd.readouterr() == ("", "")


def test_tracked_items_are_handed_on(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    given = []
    for item in track(iter(range(3)), title="rows", unit="row"):
        given.append(item)
        clock.now += LOG_SECONDS
    assert given == [0, 1, 2]
    assert [line.split(",")[0] for line in capfd.readouterr().err.splitlines()] == [
        "rows: row 1",
        "rows: row 2",
        "rows: row 3",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (365.1, "6 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7980, "2 h 13 min"),
    ],
)
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
