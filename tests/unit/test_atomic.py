"""A signal may come between any two lines: nothing half-written stays, and what was there or what comes is whole.

The interruption is raised at every line of the module in turn, by the interpreter's trace hook.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from phimr_nemo.store import atomic


class Interruption(BaseException):
    """What a signal handler raises."""


def interrupted_at(line: int, write: Callable[[], None]) -> bool:
    """Whether the work was interrupted, at the line of the module that is reached as so many-th."""
    lines = itertools.count()

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename != atomic.__file__:
            return None
        if event == "line" and next(lines) == line:
            raise Interruption
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        write()
    except Interruption:
        return True
    finally:
        sys.settrace(before)
    return False


def a_file(place: Path) -> None:
    atomic.atomic_write_text(place, "new")


def a_directory(place: Path) -> None:
    with atomic.atomic_directory(place) as directory:
        (directory / "content").write_text("new")


def a_scratch_file(place: Path) -> None:
    with atomic.scratch_file(place.parent, "weights") as file:
        file.write(b"new")


def content(place: Path) -> str | None:
    if place.is_file():
        return place.read_text()
    return (place / "content").read_text() if place.is_dir() and any(place.iterdir()) else None


@pytest.mark.parametrize(
    ("write", "before", "after"),
    [(a_file, "old", "new"), (a_directory, None, "new"), (a_scratch_file, None, None)],
)
def test_an_interruption_at_any_line_leaves_the_old_or_the_new_and_nothing_else(
    write: Callable[[Path], None], before: str | None, after: str | None, tmp_path: Path
) -> None:
    seen = set()
    for line in itertools.count():
        place = tmp_path / str(line) / "output"
        place.parent.mkdir()
        if before is not None:
            place.write_text(before)
        is_interrupted = interrupted_at(line, lambda place=place: write(place))  # type: ignore[misc]
        assert [path.name for path in place.parent.iterdir() if path != place] == [], f"line {line}"
        assert content(place) in (before, after)
        seen.add(content(place))
        if not is_interrupted:
            break
    assert content(place) == after
    assert seen == {before, after}
    assert line > 10


def test_a_name_that_is_no_utf8_is_read_back_from_json(tmp_path: Path) -> None:
    value = {os.fsdecode(b"r\xf6ws"): [os.fsdecode(b"\xff"), "größe 😀", "\\ud800 as text"]}
    atomic.write_json(tmp_path / "told.json", value)
    assert json.loads((tmp_path / "told.json").read_text("utf-8")) == value
    assert "größe 😀" in (tmp_path / "told.json").read_text("utf-8")
