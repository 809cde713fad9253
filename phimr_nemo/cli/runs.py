"""Commands about runs that are there: where they stand, and what they scored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from phimr_nemo.process.stopping import stoppable
from phimr_nemo.text.printable import say

STATUS_COLUMNS: Final = 120
"""Of the table of runs at least: in fewer a run's name would be folded to two letters; a terminal wraps the lines."""


def status(
    root: Annotated[Path, typer.Argument(help="Directory with runs in it.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of the table.")] = False,
    prometheus: Annotated[
        Path | None, typer.Option(help="Also write a text file for node_exporter's textfile collector.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="The pipeline in its order, until it ends: scores, time, last responses.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.5, help="With --watch: seconds between two looks.")] = 5.0,
    page: Annotated[
        Path | None, typer.Option(help="With --watch: also write a page that loads itself again.")
    ] = None,
) -> None:
    """Where every run below a directory stands: stage, step, ETA, speed, loss or reward, restarts, queue state."""
    from rich.console import Console

    from phimr_nemo.jobs import status as runs

    if watch:
        from phimr_nemo.jobs.watch.watch import watch as watch_runs

        with stoppable("watch"):
            watch_runs(root, Console(highlight=False), every=every, page=page)
        return
    found = runs.status(root)
    if as_json:
        say(runs.status_json(found))
    elif not found:
        say(runs.NO_RUNS)
    else:
        console = Console(highlight=False)
        console.width = max(console.width, STATUS_COLUMNS)
        console.print(runs.status_table(found, root))
    if prometheus is not None:
        runs.write_prometheus(prometheus, found)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Outputs of quickstart or evaluate, or directories above them.")],
    out: Annotated[Path, typer.Option(help="Where to write page, tables and plots.")] = Path("runs/report"),
) -> None:
    """Scores with their errors, models compared, the paper's numbers, training and data: report.html, report.md."""
    from phimr_nemo.jobs.quickstart import write_report

    write_report(runs, out)
