"""How far a stage is: a bar on a terminal, a line every half minute in a log. Every stage shows it through this."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from types import TracebackType
from typing import Any, Final, TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
REDRAW_SECONDS: Final = 0.5
USUAL_COLUMNS: Final = 80
USUAL_ROWS: Final = 24
LOG_SECONDS: Final = 30.0
"""Between two lines where nobody watches."""
SECONDS_A_MINUTE: Final = 60
MINUTES_AN_HOUR: Final = 60
# What matters stands to the left: a narrow terminal cuts the right end, the bar first.
LAYOUT: Final = (
    "{desc} {percentage:3.0f}% {n_fmt}/{total_fmt}{shown} [{elapsed}<{remaining}, {rate_fmt}{postfix}] {bar}"
)


class Progress:
    """Counts what is done and shows it. Use as a context manager, or close it.

    Args:
        total: what there is to do; None when that is not known.
        title: name of the stage or of the part that is counted.
        unit: what is counted, in the singular.
        done: what an interrupted run has left done.
        hidden: show nothing: of several processes one speaks.
        stream: where to; standard error by default.
    """

    def __init__(
        self,
        total: int | None,
        *,
        title: str,
        unit: str,
        done: int = 0,
        hidden: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.total, self.title, self.unit, self.done = total, title, unit, done
        self._first = done
        self._said: int | None = None
        self._stream = sys.stderr if stream is None else stream
        self._started = self._spoken = time.monotonic()
        self._figures: dict[str, str] = {}
        self._bar: _Bar | None = None
        self._speaks = not hidden
        if not hidden and self._stream.isatty():
            self._bar = _Bar(
                total=total,
                initial=done,
                desc=title,
                unit=unit,
                bar_format=LAYOUT,
                mininterval=REDRAW_SECONDS,
                nrows=USUAL_ROWS,
                file=self._stream,
            )
            if self._bar.disable:  # TQDM_DISABLE
                self._bar, self._speaks = None, False

    def update(self, count: int = 1) -> None:
        """Count `count` more as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._speaks and time.monotonic() - self._spoken >= LOG_SECONDS:
            self._say()

    def found_done(self, count: int) -> None:
        """Count `count` as done by an earlier run: it says nothing of the pace."""
        self._first += count
        self.done += count
        if self._bar is not None:
            self._bar.initial += count
            self._bar.update(count)

    def show(self, figures: Mapping[str, str | int]) -> None:
        """Show figures beside the count, the most important first: a narrow terminal cuts the others."""
        self._figures = {name: str(value) for name, value in figures.items()}
        if self._bar is not None:
            self._bar.show(self._figures)

    def _say(self) -> None:
        self._spoken = now = time.monotonic()
        self._said = self.done
        seconds, made = now - self._started, self.done - self._first
        whole = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.title}: {self.unit} {self.done:,}{whole}"]
        parts += [f"{name} {value}" for name, value in self._figures.items()]
        parts.append(duration(seconds))
        if self.total is not None and made > 0 and self.done < self.total:
            parts.append(f"{duration(seconds / made * (self.total - self.done))} to go")
        print(", ".join(parts), file=self._stream, flush=True)

    def close(self) -> None:
        """End the bar, or the lines with one on the whole where there were any."""
        if self._bar is not None:
            self._bar.close()
        elif self._speaks and self._said not in (None, self.done):
            self._say()
        self._speaks, self._bar = False, None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Bar(tqdm):
    """tqdm with one figure before its clock and the others behind it."""

    _shown = ""

    def show(self, figures: Mapping[str, str]) -> None:
        """Set the figures."""
        texts = [f"{name}={value}" for name, value in figures.items()]
        self._shown = f" {texts[0]}" if texts else ""
        self.set_postfix_str(", ".join(texts[1:]), refresh=False)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What :data:`LAYOUT` is filled with."""
        return {**super().format_dict, "ncols": columns(self.fp), "shown": self._shown}


def columns(terminal: Any) -> int:
    """Width of a terminal now; of one that does not know its own, which happens in containers, the usual one."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns or USUAL_COLUMNS
    except (OSError, ValueError):
        return USUAL_COLUMNS


def track(
    items: Iterable[Item], *, title: str, unit: str, total: int | None = None, hidden: bool = False
) -> Iterator[Item]:
    """The items, shown as :class:`Progress` while they are worked on; `total` where they have no length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(total, title=title, unit=unit, hidden=hidden) as progress:
        for item in items:
            yield item
            progress.update()


def say(line: str) -> None:
    """A line on standard error, above the bars that are shown there."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """A time for people: "45 s", "6 min 05 s", "2 h 13 min"."""
    whole = round(seconds)
    if whole < SECONDS_A_MINUTE:
        return f"{whole} s"
    minutes, left = divmod(whole, SECONDS_A_MINUTE)
    if minutes < MINUTES_AN_HOUR:
        return f"{minutes} min {left:02} s"
    return f"{minutes // MINUTES_AN_HOUR} h {minutes % MINUTES_AN_HOUR:02} min"
