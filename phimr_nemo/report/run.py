"""`phimr report`: scores, the paper's numbers beside ours, training, data, configurations; a page and markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from phimr_nemo.evaluate.evaluate import evaluated_model
from phimr_nemo.report import data_figures as figures
from phimr_nemo.report.collect import (
    Evaluated,
    Ran,
    by_benchmark,
    data_roots,
    find_evaluations,
    find_runs,
)
from phimr_nemo.report.data import find_steps, funnel
from phimr_nemo.report.page import embedded_png, render
from phimr_nemo.report.plots import Curve, draw_curves, draw_scores
from phimr_nemo.report.run_page import TEMPLATE
from phimr_nemo.report.scores import Entry, as_in_the_paper, paper_table, reference_table
from phimr_nemo.report.tables import (
    ABSENT,
    Seeds,
    Table,
    difference_table,
    length_table,
    markdown,
    markdown_text,
    measured,
    score_table,
)
from phimr_nemo.store.atomic import atomic_write_text
from phimr_nemo.store.provenance import content_of
from phimr_nemo.store.responses import kept_steps, read_responses
from phimr_nemo.store.runs import NEWEST_SHARE, RESULTS_FILE, newest_mean
from phimr_nemo.text.printable import printable

PAGE: Final = "report.html"
MARKDOWN: Final = "report.md"
PICTURES: Final = "report-pictures"
TITLE: Final = "Report"
SHOWN_DIGITS: Final = 12
SHOWN_RESPONSES: Final = 8
SHOWN_CHARS: Final = 200
# Stage -> metrics of its run that are drawn, with their names for people.
DRAWN: Final[Mapping[str, Mapping[str, str]]] = {
    "midtrain": {"loss": "loss"},
    "sft": {"loss": "loss"},
    "dpo": {"loss": "loss", "accuracy": "reward accuracy"},
    "grpo": {"reward": "mean reward", "response_length": "mean response length (tokens)"},
    "distill": {"reverse_kl": "reverse KL from the teacher (nats per token)"},
}
STAGE_NAMES: Final[Mapping[str, str]] = {
    "midtrain": "mid-training",
    "sft": "SFT",
    "dpo": "DPO",
    "grpo": "GRPO",
    "distill": "distillation",
}


@dataclass(frozen=True)
class Picture:
    """A PNG with its title."""

    title: str
    path: Path


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    title: str
    tables: Sequence[Table]
    pictures: Sequence[Picture] = ()


def write_run_report(roots: Sequence[Path], out: Path) -> Path:
    """Write `report.html`, `report.md` and the pictures in the page.

    Args:
        roots: outputs of `phimr quickstart` or `phimr evaluate`, or directories above them.
        out: where the files go.

    Returns:
        The page.

    Raises:
        UserError: there is no finished evaluation, one is damaged, or a model was evaluated twice with one seed.
    """
    evaluations = find_evaluations(roots)
    benchmarks = by_benchmark(evaluations)
    runs = find_runs(roots)
    pictures = out / PICTURES
    papers = as_in_the_paper(benchmarks)
    sections = [
        _scores(benchmarks, pictures),
        *_training(runs, pictures),
        *_responses(runs),
        *_data(roots, pictures),
        # Without a benchmark of the paper there is nothing to set beside it.
        *([Section("Beside the paper", [reference_table(papers)])] if papers else []),
        Section("What made the scores", [_provenance(evaluations)]),
    ]
    page = render(
        TEMPLATE,
        title=TITLE,
        roots=[root.name or str(root) for root in roots],
        tiles=_tiles(benchmarks),
        sections=[
            {
                "title": section.title,
                "tables": section.tables,
                "pictures": [{"title": one.title, "data": embedded_png(one.path)} for one in section.pictures],
            }
            for section in sections
        ],
        configs=[{"name": run.name, "stage": run.stage, "text": run.config} for run in runs],
        versions=f"Made by {', '.join(_versions(runs))}." if runs else "",
    )
    atomic_write_text(out / MARKDOWN, "\n".join(_in_markdown(section) for section in sections))
    atomic_write_text(out / PAGE, page)
    return out / PAGE


def _in_markdown(section: Section) -> str:
    tables = [
        f"### {markdown_text(table.title)}\n\n{markdown(table)}\n{markdown_text(table.note)}\n"
        for table in section.tables
    ]
    return "\n".join([f"## {markdown_text(section.title)}\n", *tables])


def _scores(benchmarks: Mapping[str, Mapping[str, Seeds]], out: Path) -> Section:
    tables, pictures = [], []
    for number, (benchmark, models) in enumerate(benchmarks.items()):
        path = out / f"scores-{number}.png"
        draw_scores(paper_table(_entries(models)), path)
        pictures.append(Picture(f"{benchmark}: pass@1", path))
        lengths = {
            row: np.sum([one.lengths.bins for one in seeds.values() if one.lengths is not None], axis=0)
            for row, seeds in models.items()
            if any(one.lengths is not None for one in seeds.values())
        }
        if lengths:
            path = out / f"lengths-{number}.png"
            figures.draw_lengths(lengths, path, stacked=False)
            pictures.append(Picture(f"{benchmark}: length of responses", path))
        optional = (difference_table(benchmark, models), length_table(benchmark, models))
        tables += [score_table(benchmark, models), *(table for table in optional if table is not None)]
    return Section("Scores", tables, pictures)


def _entries(models: Mapping[str, Seeds]) -> list[Entry]:
    return [
        Entry(row, seed, result.questions, result.pass1, result.stderr)
        for row, seeds in models.items()
        for seed, result in seeds.items()
    ]


def _tiles(benchmarks: Mapping[str, Mapping[str, Seeds]]) -> list[dict[str, str]]:
    """The best model of each benchmark, and how much was measured."""
    tiles = []
    for benchmark, models in benchmarks.items():
        row, seeds = max(models.items(), key=lambda item: np.mean([one.pass1 for one in item[1].values()]))
        tiles.append({"name": f"{benchmark}: pass@1 (%) of {row}", "value": measured(seeds).partition(" (")[0]})
    results = [one for models in benchmarks.values() for seeds in models.values() for one in seeds.values()]
    tiles.append({"name": "evaluations", "value": f"{len(results):,}"})
    tiles.append({"name": "responses graded", "value": f"{sum(one.questions * one.samples for one in results):,}"})
    return tiles


def _training(runs: Sequence[Ran], out: Path) -> list[Section]:
    """One line and one picture a stage; the runs of a stage share a picture."""
    trained = [run for run in runs if run.stage in DRAWN and run.metrics]
    if not trained:
        return []
    pictures = []
    for stage, metrics in DRAWN.items():
        for metric, title in metrics.items():
            curves = {run.name: _curve(run, metric) for run in trained if run.stage == stage}
            shown = {name: curve for name, curve in curves.items() if curve.steps}
            if shown:
                path = out / f"{stage}-{metric}.png"
                draw_curves(shown, title, path)
                pictures.append(Picture(f"{STAGE_NAMES[stage]}: {title}", path))
    rows = tuple(
        (
            run.name,
            run.stage,
            str(run.made.get("seed", "")),
            f"{run.metrics[-1]['step']:,}",
            _newest(run, "loss"),
            _newest(run, "reward"),
            str(len(run.made.get("starts", []))),
            "yes" if run.facts is not None else "no",
            str(run.made.get("versions", {}).get("git", ""))[:SHOWN_DIGITS],
        )
        for run in trained
    )
    header = ("run", "stage", "seed", "steps", "loss", "reward", "starts", "finished", "code")
    note = f"Loss and reward: mean over the newest {NEWEST_SHARE:.0%} of the logged steps."
    return [Section("Training", [Table("Runs", header, rows, note)], pictures)]


def _curve(run: Ran, metric: str) -> Curve:
    points = [(int(line["step"]), float(line[metric])) for line in run.metrics if metric in line]
    return Curve([step for step, _ in points], [value for _, value in points])


def _newest(run: Ran, metric: str) -> str:
    mean = newest_mean(run.metrics, metric)
    return ABSENT if mean is None else f"{mean:.4g}"


def _responses(runs: Sequence[Ran]) -> list[Section]:
    """The newest sample of responses that each run has kept: the first of them, and how each ends."""
    tables = []
    for run in runs:
        steps = kept_steps(run.path)
        if not steps:
            continue
        kept = read_responses(run.path, steps[-1])
        rows = tuple(
            (
                row["verdict"],
                f"{row['reward']:g}",
                f"{row['tokens']:,}",
                _in_a_cell(row["question"]),
                _in_a_cell(row["answer"]),
                _in_a_cell(row["response"]),
            )
            for row in kept[:SHOWN_RESPONSES]
        )
        header = ("verdict", "reward", "tokens", "question", "answer", "response (its end)")
        note = f"{len(rows)} of {len(kept)}; `phimr show {run.path}` shows them all."
        tables.append(Table(f"{run.name}: step {steps[-1]}", header, rows, note))
    return [Section("Responses", tables)] if tables else []


def _in_a_cell(text: str) -> str:
    """The end of a text in one line, without what a terminal or a page would obey."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= SHOWN_CHARS else f"...{line[-SHOWN_CHARS:]}"


def _data(roots: Sequence[Path], out: Path) -> list[Section]:
    pictures = []
    for number, root in enumerate(data_roots(roots)):
        path = out / f"data-{number}.png"
        figures.draw_funnel(funnel(find_steps([root])), path)
        pictures.append(Picture(f"Records after each data step: {root.name}", path))
    return [Section("Data", [], pictures)] if pictures else []


def _provenance(evaluations: Sequence[Evaluated]) -> Table:
    rows = []
    for one in evaluations:
        params: Mapping[str, Any] = one.settings.get("params", {})
        rows.append(
            (
                one.row,
                one.benchmark,
                str(one.seed),
                str(one.settings.get("teacher", ""))[:SHOWN_DIGITS],
                str(one.settings.get("problems", ""))[:SHOWN_DIGITS],
                str(one.settings.get("edition", "-")),
                str(params.get("temperature", "")),
                str(params.get("top_p", "")),
                f"{params.get('max_new_tokens', 0):,}",
                str(one.settings.get("grader", "")),
            )
        )
    header = ("model", "benchmark", "seed", "weights", "questions", "edition", "T", "top_p", "new tokens", "grader")
    note = " ".join(["Weights and questions by the beginnings of their hashes.", *replaced_models(evaluations)])
    return Table("Evaluations", header, tuple(rows), note)


def replaced_models(evaluations: Sequence[Evaluated]) -> list[str]:
    """A sentence about each score whose model's directory holds something else by now."""
    contents: dict[Path, str] = {}
    found = []
    for one in evaluations:
        asked, directory = evaluated_model(one.path / RESULTS_FILE), Path(str(one.settings.get("model")))
        if asked is None or not directory.is_dir():
            continue
        if directory not in contents:
            contents[directory] = content_of(directory)
        if contents[directory] != asked:
            found.append(f"The score of {one.row} on {one.benchmark} is not of what {directory} holds now.")
    return found


def _versions(runs: Sequence[Ran]) -> list[str]:
    return sorted({f"phimr-nemo {run.made.get('versions', {}).get('phimr-nemo', 'unknown')}" for run in runs})
