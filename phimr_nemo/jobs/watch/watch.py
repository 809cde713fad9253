"""A pipeline in the terminal, drawn again until it ends, and as a page that loads itself again."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final

from phimr_nemo.jobs.quickstart import TRAINED
from phimr_nemo.jobs.status import NO_RUNS, progress_of, slurm_queue
from phimr_nemo.jobs.watch.page import write_live_page
from phimr_nemo.jobs.watch.pipeline import NOT_BEGUN, Pipeline, Said, Step, read_pipeline
from phimr_nemo.store.progress import duration
from phimr_nemo.text.printable import printable

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

SHOWN_CHARS: Final = 240
"""Of a response's end: what a reader of a running pipeline looks at."""
COLORS: Final = {"done": "green", "running": "bold blue", "stopped": "red", "unreadable": "red"}
FEWEST: Final = 6
OTHER_LINES: Final = 4
LINES_A_RESPONSE: Final = 4
"""What is left of a terminal belongs to the steps, but `FEWEST` of them are shown in any."""
LEFT: Final = ("step", "state", "score")


def watch(
    root: Path,
    console: Console,
    *,
    every: float,
    page: Path | None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Pipeline | None:
    """Show a pipeline until it ends, or until this process is told to stop.

    Args:
        root: a directory with runs in it.
        console: where to; what is no terminal gets the last state alone.
        every: seconds between two looks.
        page: a page to write at every look; None = none.
        clock, sleep: time, which a test makes pass.

    Returns:
        Its last state; None when it was stopped before the first look.

    Raises:
        UserError: there is no such directory, or the page cannot be written.
    """
    from rich.live import Live

    found = None
    with Live(console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            found = read_pipeline(root, now=clock(), queue=slurm_queue())
            live.update(drawn(found, console.height if console.is_terminal else None), refresh=True)
            if page is not None:
                write_live_page(found, root, page, every=every)
            if found.is_over:
                break
            sleep(every)
    if not console.is_terminal:
        console.print()
    return found


def drawn(found: Pipeline, height: int | None = None) -> Group:
    """A pipeline as the terminal shows it.

    Args:
        found: where it stands.
        height: lines of the terminal; None = any number.
    """
    from rich.console import Group
    from rich.text import Text

    most = None if height is None else max(FEWEST, height - OTHER_LINES - LINES_A_RESPONSE * len(found.said))
    return Group(
        _steps(shortened(found.steps, most)), Text(summary(found), style="bold"), *map(_response, found.said)
    )


def summary(found: Pipeline) -> str:
    """How much is done, and how long the rest takes, as far as that is known."""
    if not found.steps:
        return NO_RUNS
    parts = [f"{found.done} of {len(found.steps)} steps done", f"{duration(found.taken)} so far"]
    if found.done < len(found.steps):
        count = found.unknown
        steps = "step" if count == 1 else "steps"
        if not count:
            parts.append(f"{duration(found.left)} to go")
        elif found.left:
            parts.append(f"{duration(found.left)} and {count} {steps} that nothing tells the time of to go")
        else:
            parts.append(f"nothing tells the time of {count} {steps}")
    return ", ".join(parts)


def shortened(steps: Sequence[Step], most: int | None) -> list[Step]:
    """Steps in as many lines as a terminal has: finished seeds as one each, then what is done, then what is to come.

    Args:
        steps: of a pipeline.
        most: lines, three at least; None = any number.
    """
    if most is None or len(steps) <= most:
        return list(steps)
    lines: list[list[Step]] = []
    for _, group in groupby(steps, _seed_of):
        of_seed = list(group)
        is_done = bool(_seed_of(of_seed[0])) and all(step.state == "done" for step in of_seed)
        lines += [of_seed] if is_done else [[step] for step in of_seed]
    done = next((place for place, line in enumerate(lines) if line[0].state != "done"), len(lines))
    first = min(done, len(lines) - most + 1)
    if first > 1:
        lines = [[step for line in lines[:first] for step in line], *lines[first:]]
    if len(lines) > most:
        lines = [*lines[: most - 1], [step for line in lines[most - 1 :] for step in line]]
    return [line[0] if len(line) == 1 else _as_one(line) for line in lines]


def _seed_of(step: Step) -> str:
    """The directory that a step lies in; empty for none."""
    return step.name.rpartition("/")[0]


def _as_one(steps: Sequence[Step]) -> Step:
    """Several steps in one line."""
    states, seeds = {step.state for step in steps}, {_seed_of(step) for step in steps}
    state = states.pop() if len(states) == 1 else NOT_BEGUN
    seed = seeds.pop() if len(seeds) == 1 and state == "done" else ""
    left = [step.left for step in steps]
    return Step(
        name=f"{seed}{': ' if seed else ''}{len(steps)} steps",
        state=state,
        status=None,
        seconds=math.fsum(step.seconds or 0.0 for step in steps) if state == "done" else None,
        expected=None if None in left else math.fsum(one or 0.0 for one in left),
        score=next((step.score for step in steps if seed and step.name == f"{seed}/evaluate-{TRAINED[-1]}"), ""),
    )


def _steps(steps: Sequence[Step]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("step", "state", "done", "time", "to go", "score"):
        table.add_column(
            title, justify="left" if title in LEFT else "right", no_wrap=title != "step", overflow="ellipsis"
        )
    for step in steps:
        cells = [
            # In a narrow terminal its name is cut, and nothing else.
            Text(printable(step.name), no_wrap=True),
            Text(step.state, style=COLORS.get(step.state, "dim")),
            Text("" if step.status is None else progress_of(step.status)),
            Text("" if step.seconds is None else duration(step.seconds)),
            Text("" if step.state == "done" or step.left is None else duration(step.left)),
            Text(printable(step.score)),
        ]
        table.add_row(*cells)
    return table


def _response(said: Said) -> Text:
    from rich.text import Text

    text = Text(printable(f"{said.run}: {' '.join(said.question.split())[:SHOWN_CHARS]}"), style="dim")
    whole = " ".join(said.response.text.split())
    ending = whole if len(whole) <= SHOWN_CHARS else f"...{whole[-SHOWN_CHARS:]}"
    verdict = said.response.verdict or "not graded"
    text.append(printable(f"\n  {ending or '(nothing)'}"), style="not dim")
    text.append(printable(f"  [{verdict}; the answer is {said.answer}]"))
    return text
