"""The quickstart's figures in README.md and docs/results.md and the picture of the recipe, made of one stored file.

    python docs/site/quickstart_results.py --record runs/quickstart
    python docs/site/quickstart_results.py [--check]

`--record` reads finished quickstarts (one directory with all seeds, or several), writes
`bench/results/<date>-quickstart.json` and records the terminal again. Every call writes the tables between their
marks, the picture, and docs/paper.md, which reads the tables, from the newest such file; `--check` only tells whether
they are there. So no figure is typed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

REPOSITORY: Final = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "bench")]

from common import between
from recipe_picture import Bar, picture

from phimr_nemo.evaluate.statistics import mean_and_error
from phimr_nemo.report.scores import Entry, Row, paper_table
from phimr_nemo.report.tables import percent, points
from phimr_nemo.store.progress import duration
from phimr_nemo.store.runs import TIME

RESULTS: Final = REPOSITORY / "bench" / "results"
README: Final = REPOSITORY / "README.md"
PAGE: Final = REPOSITORY / "docs" / "results.md"
PICTURE: Final = REPOSITORY / "docs" / "recipe.svg"
NAME: Final = "docs/site/quickstart_results.py"
BEGIN: Final = f"<!-- quickstart: begin, by {NAME} -->"
END: Final = "<!-- quickstart: end -->"
DIFFERENCES: Final = (
    ("base", "mid-training"),
    ("mid-training", "SFT"),
    ("SFT", "DPO"),
    ("DPO", "GRPO"),
    ("SFT without mid-training", "SFT"),
)
"""Rows whose second is compared with their first; the first four are the stages of the recipe."""
STAGES: Final = 4
DIGITS: Final = 12
"""Of a commit."""
NUMBERS: Final = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Difference(NamedTuple):
    """pass@1 of one row minus that of another, paired by question; shares, not per cent.

    Attributes:
        before, after: the rows.
        each: per seed, in the order of the seeds.
        stderr: over the questions of all seeds, by bootstrap.
    """

    before: str
    after: str
    each: Sequence[float]
    stderr: float

    @property
    def name(self) -> str:
        """As tables have it."""
        return f"{self.after} minus {self.before}"

    @property
    def cell(self) -> str:
        """In points: the mean, its standard error across seeds, in brackets the one over questions."""
        mean, error = mean_and_error(self.each)
        across = "" if math.isnan(error) else f" ± {percent(error)}"
        return f"{points(mean)}{across} ({percent(self.stderr)})"


class Quickstarts(NamedTuple):
    """What was measured.

    Attributes:
        date: of the last evaluation.
        code: commits of the models.
        machine: what it was measured on.
        samples: per question.
        temperature: of the samples.
        seconds: per seed, from its first step's start to its last evaluation's end.
        entries: a row and a seed each.
        differences: paired by question.
    """

    date: str
    code: Sequence[str]
    machine: Mapping[str, Any]
    samples: int
    temperature: float
    seconds: Sequence[float]
    entries: Sequence[Entry]
    differences: Sequence[Difference]


def newest() -> Path:
    """The stored file of the last date.

    Raises:
        LookupError: nothing has been recorded.
    """
    found = max(RESULTS.glob("*-quickstart.json"), default=None)
    if found is None:
        raise LookupError(f"no {RESULTS}/*-quickstart.json: run {NAME} --record")
    return found


def read(path: Path) -> Quickstarts:
    """A stored file."""
    told = json.loads(path.read_text("utf-8"))
    told["entries"] = [Entry(**one) for one in told["entries"]]
    told["differences"] = [Difference(**one) for one in told["differences"]]
    return Quickstarts(**told)


def record(roots: Sequence[Path]) -> Quickstarts:
    """The figures of finished quickstarts.

    Args:
        roots: their output directories, with a directory `seed-N` each for their seeds.

    Raises:
        UserError: an evaluation is damaged, or a seed is there twice.
        LookupError: an evaluation is not there.
    """
    from common import machine

    from phimr_nemo.evaluate.evaluate import Result, read_result, read_settings
    from phimr_nemo.jobs.quickstart import ROWS
    from phimr_nemo.report.scores import entry
    from phimr_nemo.report.tables import paired_difference
    from phimr_nemo.store.runs import RESULTS_FILE, RunDirectory

    seeds = sorted(
        ((int(path.name.removeprefix("seed-")), path) for root in roots for path in root.glob("seed-*/")),
        key=lambda item: item[0],
    )
    if not seeds:
        raise LookupError(f"no seed-* below {[str(root) for root in roots]}")
    results: dict[str, dict[int, Result]] = {row: {} for _, row in ROWS}
    entries, code, settings = [], set(), {}
    for step, row in ROWS:
        for seed, root in seeds:
            evaluation = root / f"evaluate-{step}"
            if not (evaluation / RESULTS_FILE).is_file():
                raise LookupError(f"{evaluation} has not finished")
            results[row][seed] = read_result(evaluation / RESULTS_FILE)
            settings = read_settings(evaluation / RESULTS_FILE)
            stage = RunDirectory(root / step)
            code.add(str((stage.description() or {})["versions"]["git"])[:DIGITS])
            entries.append(entry(row, seed, results[row][seed], stage.closing_facts().get("seconds")))
    starts = [(RunDirectory(root / ROWS[0][0]).description() or {})["starts"][0] for _, root in seeds]
    ends = [max(RunDirectory(root / f"evaluate-{step}").finished_at() for step, _ in ROWS) for _, root in seeds]
    differences = []
    for before, after in DIFFERENCES:
        pairs = [(results[before][seed].per_question, results[after][seed].per_question) for seed, _ in seeds]
        each = [results[after][seed].pass1 - results[before][seed].pass1 for seed, _ in seeds]
        differences.append(Difference(before, after, each, paired_difference(pairs).stderr))
    return Quickstarts(
        date=max(ends)[: len("2026-01-01")],
        code=sorted(code),
        machine=machine(),
        samples=results["base"][seeds[0][0]].samples,
        temperature=float(settings["params"]["temperature"]),
        seconds=[_apart(start, end) for start, end in zip(starts, ends, strict=True)],
        entries=entries,
        differences=differences,
    )


def _apart(start: str, end: str) -> float:
    """Seconds between two times of runs."""
    first, last = (datetime.datetime.strptime(moment, TIME) for moment in (start, end))
    return (last - first).total_seconds()


def store(found: Quickstarts) -> Path:
    """Write the figures; returns the file."""
    told = found._asdict() | {
        "entries": [asdict(one) for one in found.entries],
        "differences": [one._asdict() for one in found.differences],
    }
    path = RESULTS / f"{found.date}-quickstart.json"
    path.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    return path


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ruler, *rows))


def _seeds(rows: Sequence[Row]) -> str:
    seeds = rows[0].seeds
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _measured(found: Quickstarts, rows: Sequence[Row]) -> str:
    samples = "one sample" if found.samples == 1 else f"{found.samples} samples"
    return (
        f"pass@1 in per cent on {rows[0].n:,} held-out problems per seed, {samples} each at T={found.temperature:g}, "
        f"{found.date}"
    )


def _number(count: int) -> str:
    return NUMBERS[count] if count < len(NUMBERS) else str(count)


def gains(differences: Sequence[Difference]) -> str:
    """In how many seeds the stages add to the ones before them, as a sentence."""
    fewer = [one for one in differences if min(one.each) <= 0]
    count = len(differences[0].each)
    seeds = f"{_number(count)} seed{'s' if count > 1 else ''}"
    if not fewer:
        return f"Every stage adds to the one before it in {'each of the ' if count > 1 else 'the '}{seeds}."
    told = "; ".join(f"{one.name} is above 0 in {sum(gain > 0 for gain in one.each)}" for one in fewer)
    return f"Not every stage adds to the one before it in all {seeds}: {told}."


def front(found: Quickstarts) -> str:
    """The lines of the README."""
    rows = paper_table(found.entries)
    added = {one.after: one for one in found.differences[:STAGES]}
    header = ("stage", "pass@1 (%)", "SE (across seeds)", _seeds(rows), "gain on the row before (paired)")
    cells = [
        (
            row.row,
            percent(row.pass1),
            percent(row.seed_stderr),
            ", ".join(map(percent, row.each)),
            added[row.row].cell if row.row in added else "-",
        )
        for row in rows
    ]
    return (
        f"{_table(header, cells)}\n\n{_measured(found, rows)}. Gains in points: mean ± SE (across seeds), in "
        f"brackets SE (clustered by question, of all seeds together). {gains(found.differences[:STAGES])} "
        f"The fastest seed took {duration(min(found.seconds))}."
    )


def _times(row: Row, found: Quickstarts) -> str:
    took = [one.seconds for one in found.entries if one.row == row.row and one.seconds is not None]
    if not took:
        return "-"
    ends = dict.fromkeys((duration(min(took)), duration(max(took))))
    return " to ".join(ends)


def page(found: Quickstarts) -> str:
    """The lines of docs/results.md."""
    rows = paper_table(found.entries)
    header = ("stage", "pass@1 (%)", "SE (clustered by question)", "SE (across seeds)", "per seed", "training")
    cells = [
        (
            row.row,
            percent(row.pass1),
            percent(row.question_stderr),
            percent(row.seed_stderr),
            ", ".join(map(percent, row.each)),
            _times(row, found),
        )
        for row in rows
    ]
    changes = [(one.name, one.cell, ", ".join(map(points, one.each))) for one in found.differences]
    commits = ", ".join(f"`{one}`" for one in found.code)
    measured = (
        f"{_measured(found, rows)}, {_seeds(rows)} (data, weights, sampling), code {commits}, "
        f"{found.machine['cores']} cores of {found.machine['processor']}. Training by the clock, from the fastest "
        f"seed to the slowest, beside other work; the fastest seed took {duration(min(found.seconds))} in all."
    )
    explained = (
        "Paired by question, in points: mean ± SE (across seeds), in brackets SE (clustered by question, of all "
        "seeds together):"
    )
    compared = _table(("difference", "points", "per seed"), changes)
    return "\n\n".join((_table(header, cells), measured, explained, compared, gains(found.differences[:STAGES])))


def drawn(found: Quickstarts) -> str:
    """The picture of the recipe with its result."""
    rows = [
        row
        for row in paper_table(found.entries)
        if row.row in {name for pair in DIFFERENCES[:STAGES] for name in pair}
    ]
    bars = [Bar(row.row, row.pass1, row.seed_stderr, row.each) for row in rows]
    seeds = len(rows[0].seeds)
    error = f"mean of {_number(seeds)} seeds ± SE, a dot per seed" if seeds > 1 else "one seed"
    return picture(
        bars, (f"pass@1 (%) on {rows[0].n:,} held-out problems: {error}", f"tiny model, CPU, {found.date}")
    )


def made() -> dict[Path, str]:
    """Every file that has figures of the newest stored file, as it should be."""
    found = read(newest())
    return {
        README: between(README.read_text("utf-8"), BEGIN, END, front(found)),
        PAGE: between(PAGE.read_text("utf-8"), BEGIN, END, page(found)),
        PICTURE: drawn(found),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--record", nargs="+", type=Path, metavar="RUN", help="finished quickstarts")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a file differs")
    options = parser.parse_args()
    if options.record:
        from recording import record_quickstart

        print(store(record(options.record)))
        print(record_quickstart(options.record))
    files = made()
    if options.check:
        differ = [path.name for path, text in files.items() if not path.is_file() or path.read_text("utf-8") != text]
        sys.exit(f"not the figures of {newest().name}: {', '.join(differ)}; run python {NAME}" if differ else 0)
    for path, text in files.items():
        path.write_text(text, "utf-8")
    import paper

    paper.PAGE.write_text(paper.page(), "utf-8")


if __name__ == "__main__":
    main()
