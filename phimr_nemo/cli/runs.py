"""Commands about runs that are there: where they stand, what they scored and sampled, and how one goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from phimr_nemo.text.printable import printable, say

Verdict = Literal["correct", "wrong", "unparsable", "timeout", "error"]
SHOWN_CHARS: Final = 4_000
"""Of a response in the terminal, its beginning and its end: a reasoning model writes tens of thousands."""

STATUS_COLUMNS: Final = 120
"""Of the table of runs at least: in fewer a run's name would be folded to two letters; a terminal wraps the lines."""


def status(
    root: Annotated[Path, typer.Argument(help="Directory with runs in it.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of the table.")] = False,
    prometheus: Annotated[
        Path | None, typer.Option(help="Also write a text file for node_exporter's textfile collector.")
    ] = None,
) -> None:
    """Where every run below a directory stands: stage, step, ETA, speed, loss or reward, restarts, queue state."""
    from rich.console import Console

    from phimr_nemo.jobs import status as runs

    found = runs.status(root)
    if as_json:
        say(runs.status_json(found))
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


def responses(
    run: Annotated[Path, typer.Argument(help="A run directory of grpo or distill.")],
    step: Annotated[int | None, typer.Option(help="Of which step; default the newest that was kept.")] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Responses to print.")] = 4,
    verdict: Annotated[Verdict | None, typer.Option(help="Only those that were graded so.")] = None,
    whole: Annotated[bool, typer.Option(help="Print long responses in full.")] = False,
) -> None:
    """Responses that a GRPO run has kept, with rewards and verdicts: of every `monitor.responses_every`-th step."""
    from rich.console import Console

    from phimr_nemo.store.responses import kept_steps, read_responses

    rows = read_responses(run, step)
    wanted = [row for row in rows if verdict is None or row["verdict"] == verdict]
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not wanted:
        console.print(f"none of {len(rows)} responses is {verdict}")
    for row in wanted[:count]:
        _show(console, row, whole=whole)
    right = sum(row["verdict"] == "correct" for row in rows)
    shown = min(count, len(wanted))
    console.print(
        f"step {rows[0]['step']}: {shown} of {len(rows)} responses, {right} correct; "
        f"there are steps {', '.join(map(str, kept_steps(run)))}"
    )


def _show(console: Any, row: dict[str, Any], *, whole: bool) -> None:
    fate = ", ".join(word for word, said in (("truncated", row["truncated"]), ("trained on", row["trained"])) if said)
    head = printable(f"step {row['step']}, prompt {row['prompt_id']}, sample {row['sample']}: {row['verdict']}")
    numbers = f"reward {row['reward']:g}, {row['tokens']} tokens{', ' if fate else ''}{fate}"
    console.print(f"--- {head}, {numbers}", style="bold")
    console.print(f"question: {printable(row['question'])}")
    console.print(f"answer:   {printable(row['answer'])}")
    text = printable(row["response"])
    console.print(text if whole else _shortened(text))


def _shortened(text: str) -> str:
    if len(text) <= SHOWN_CHARS:
        return text
    half = SHOWN_CHARS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters, --whole prints them ...]\n{text[-half:]}"
