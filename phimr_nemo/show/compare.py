"""Two runs beside each other: what was set otherwise, how they learned, what they scored, which questions flipped."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from phimr_nemo.config.load import flat, read_preset
from phimr_nemo.errors import UserError
from phimr_nemo.report.collect import Evaluated, Ran, find_runs, read_evaluation
from phimr_nemo.report.page import embedded_png, render
from phimr_nemo.report.plots import Curve, draw_curves
from phimr_nemo.report.run import DRAWN, STAGE_NAMES
from phimr_nemo.report.run_page import TEMPLATE
from phimr_nemo.report.tables import ABSENT, CONFIDENCE, RESAMPLES, Table, paired_difference, percent, points
from phimr_nemo.show.graded import Source, graded_view
from phimr_nemo.show.items import View
from phimr_nemo.show.records import Records
from phimr_nemo.store.atomic import atomic_write_text
from phimr_nemo.store.runs import CONFIG_FILE, RESULTS_FILE

OUTPUT: Final = "run.output"
HERE: Final = "."
PAGE: Final = "compare.html"
RESPONSES: Final = "responses.html"
MOST_FLIPPED: Final = 10
"""Questions in the table; the page of responses has them all."""
SHOWN_CHARS: Final = 100


@dataclass(frozen=True)
class Compared:
    """Two runs, and what is below them, in pairs.

    Attributes:
        names: of the two.
        settings: what was set otherwise.
        curves: title -> run -> curve.
        scores: of both, with the paired difference; None where nothing was evaluated in both.
        flipped: questions that the second answers better or worse, the largest changes first; None as `scores`.
        views: the responses of both, an evaluation each.
        alone: runs that only one of the two has.
    """

    names: tuple[str, str]
    settings: Table
    curves: Mapping[str, Mapping[str, Curve]]
    scores: Table | None
    flipped: Table | None
    views: Sequence[View]
    alone: Sequence[str]


def compare(first: Path, second: Path) -> Compared:
    """Compare two run directories, or two directories of runs, whose runs are paired by their names.

    Args:
        first, second: a run directory each (of any stage), or directories above several, as a quickstart's seeds.

    Raises:
        UserError: nothing in them can be paired, or something is damaged.
    """
    names = _names(first, second)
    runs = [{_below(run, root): run for run in find_runs([root])} for root in (first, second)]
    if all(len(one) == 1 for one in runs):
        # Two runs of one stage, or of two: their names do not matter.
        runs = [dict(zip([HERE], one.values(), strict=True)) for one in runs]
    common = [name for name in runs[0] if name in runs[1]]
    if not common:
        raise UserError(
            f"{first} and {second} have no run in common",
            rule="two run directories are compared, or two directories whose runs have the same names",
            remedy="for example phimr compare runs/quickstart/seed-0/dpo runs/quickstart/seed-1/dpo",
        )
    pairs = {name: (runs[0][name], runs[1][name]) for name in common}
    evaluated = {
        name: (read_evaluation(one.path), read_evaluation(other.path))
        for name, (one, other) in pairs.items()
        if all((run.path / RESULTS_FILE).is_file() for run in (one, other))
    }
    views = [_view(name, names, both) for name, both in evaluated.items()]
    return Compared(
        names=names,
        settings=_settings(names, pairs),
        curves=_curves(names, pairs),
        scores=_scores(names, evaluated) if evaluated else None,
        flipped=_flipped(names, views) if evaluated else None,
        views=views,
        alone=[
            f"{name}: only in {names[place]}"
            for place in (0, 1)
            for name in runs[place]
            if name not in runs[1 - place]
        ],
    )


def _names(first: Path, second: Path) -> tuple[str, str]:
    """The shortest ends of two paths that differ."""
    one, other = first.resolve().parts, second.resolve().parts
    if one == other:
        raise UserError(
            f"{first} is compared with itself", rule="two runs are compared", remedy="give another run as the second"
        )
    count = 1
    while one[-count:] == other[-count:] and count < min(len(one), len(other)):
        count += 1
    return "/".join(one[-count:]), "/".join(other[-count:])


def _below(run: Ran, root: Path) -> str:
    return str(run.path.relative_to(root))


def _settings(names: tuple[str, str], pairs: Mapping[str, tuple[Ran, Ran]]) -> Table:
    rows = []
    for name, both in pairs.items():
        one, other = (_values(run, name) for run in both)
        for key in sorted(one.keys() | other.keys()):
            told = [ABSENT if key not in values else str(values[key]) for values in (one, other)]
            if key != OUTPUT and told[0] != told[1]:
                rows.append((both[0].stage if name == HERE else name, key, *told))
    note = "Paths below the directories themselves count from there." if rows else "There are none."
    return Table("Differences of configuration", ("run", "key", *names), tuple(rows), note)


def _values(run: Ran, name: str) -> dict[str, Any]:
    """The settings of a run; paths beside it are told from the directory that both runs lie in."""
    values = flat(read_preset(run.path / CONFIG_FILE))
    output = str(values.get(OUTPUT, ""))
    root = output.removesuffix(name) if name != HERE and output.endswith(f"/{name}") else None
    return {
        key: value.removeprefix(root) if root and isinstance(value, str) else value for key, value in values.items()
    }


def _curves(names: tuple[str, str], pairs: Mapping[str, tuple[Ran, Ran]]) -> dict[str, dict[str, Curve]]:
    found = {}
    for name, both in pairs.items():
        for metric, title in DRAWN.get(both[0].stage, {}).items():
            curves = {
                own: Curve(
                    [int(line["step"]) for line in run.metrics if metric in line],
                    [float(line[metric]) for line in run.metrics if metric in line],
                )
                for own, run in zip(names, both, strict=True)
            }
            if all(curve.steps for curve in curves.values()):
                place = STAGE_NAMES[both[0].stage] if name == HERE else name
                found[f"{place}: {title}"] = curves
    return found


def _scores(names: tuple[str, str], evaluated: Mapping[str, tuple[Evaluated, Evaluated]]) -> Table:
    rows = []
    for name, (one, other) in evaluated.items():
        before, after = one.result.per_question, other.result.per_question
        common = sorted(before.keys() & after.keys())
        cells = (ABSENT, ABSENT, ABSENT, ABSENT)
        if common:
            found = paired_difference([({q: before[q] for q in common}, {q: after[q] for q in common})])
            changes = [after[question] - before[question] for question in common]
            cells = (
                points(found.mean),
                f"{points(found.low)} to {points(found.high)}",
                f"{sum(change > 0 for change in changes):,}",
                f"{sum(change < 0 for change in changes):,}",
            )
        score = [f"{percent(side.result.pass1)} ± {percent(side.result.stderr)}" for side in (one, other)]
        rows.append((one.benchmark if name == HERE else name, *score, *cells, _shared(common, before, after)))
    header = ("evaluation", *names, "points", f"{CONFIDENCE:.0%} interval", "better", "worse", "questions in both")
    note = (
        f"pass@1 in per cent ± its standard error, clustered by question. The difference is paired by question and "
        f"bootstrapped over questions ({RESAMPLES:,} resamples). Better, worse: questions of which the second run "
        "answers a larger, a smaller share correctly."
    )
    if any(one.result.per_question.keys() != other.result.per_question.keys() for one, other in evaluated.values()):
        note += (
            " The runs were asked different questions: a score is of all of its own, a difference of those in both."
        )
    return Table("Scores", header, tuple(rows), note)


def _shared(common: Collection[str], before: Collection[str], after: Collection[str]) -> str:
    """How many questions both were asked, and of how many each, where that is more."""
    asked = dict.fromkeys((len(before), len(after)))
    of = "" if list(asked) == [len(common)] else " of " + " and ".join(f"{count:,}" for count in asked)
    return f"{len(common):,}{of}"


def _view(name: str, names: tuple[str, str], both: tuple[Evaluated, Evaluated]) -> View:
    sources = {own: Source(Records(one.path / "verdicts")) for own, one in zip(names, both, strict=True)}
    return graded_view(both[0].benchmark if name == HERE else name, "questions", sources)


def _flipped(names: tuple[str, str], views: Sequence[View]) -> Table:
    """The questions whose share of correct responses changed most."""
    rows, changed = [], 0
    for view in views:
        total = view.index.total
        share = view.index.right / np.maximum(total, 1)
        change = np.where((total > 0).all(axis=1), share[:, 1] - share[:, 0], 0.0)
        order = np.lexsort((np.arange(len(change)), -np.abs(change)))
        order = order[change[order] != 0]
        changed += len(order)
        chosen = order[:MOST_FLIPPED].tolist()
        for number, item in zip(chosen, view.fetch(chosen), strict=True):
            shares = (f"{view.index.right[number, side]} of {total[number, side]}" for side in (0, 1))
            rows.append((view.name, item.id, _shortened(item.question), item.answer, *shares))
    header = ("evaluation", "id", "question", "gold", *names)
    note = f"{len(rows):,} of {changed:,}, the largest changes first." if rows else "There are none."
    return Table("Questions that flipped", header, tuple(rows), note)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARS else f"{line[:SHOWN_CHARS]}..."


def write_comparison(found: Compared, out: Path) -> Path:
    """Write a page with tables and pictures, and one with the responses of both runs side by side.

    Args:
        found: what was compared.
        out: where `compare.html`, `responses.html` and the pictures (PNG) go.

    Returns:
        The page with the tables.
    """
    from phimr_nemo.show.page import write_page

    pictures = []
    for number, (title, curves) in enumerate(found.curves.items()):
        path = out / f"curve-{number}.png"
        draw_curves(curves, title.partition(": ")[2], path)
        pictures.append({"title": title, "data": embedded_png(path)})
    title = f"{found.names[0]} and {found.names[1]}"
    if found.views:
        write_page(found.views, out / RESPONSES, title=title)
    sections = [
        ("Scores", [table for table in (found.scores, found.flipped) if table is not None], []),
        ("Learning curves", [], pictures),
        ("Configuration", [found.settings], []),
    ]
    notes = [*found.alone, *([f"The responses of both, side by side: {RESPONSES}."] if found.views else [])]
    page = render(
        TEMPLATE,
        title=title,
        roots=found.names,
        tiles=[],
        sections=[
            {"title": name, "tables": tables, "pictures": drawn}
            for name, tables, drawn in sections
            if tables or drawn
        ],
        configs=[],
        versions=" ".join(notes),
    )
    atomic_write_text(out / PAGE, page)
    return out / PAGE
