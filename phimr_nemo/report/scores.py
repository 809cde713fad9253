"""The paper-style table: a row a stage, over seeds, with its uncertainty; and the paper's own numbers beside ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from phimr_nemo.errors import UserError
from phimr_nemo.evaluate.evaluate import Result
from phimr_nemo.evaluate.statistics import mean_and_error
from phimr_nemo.report.tables import ABSENT, Seeds, Table, markdown, measured, percent
from phimr_nemo.store.atomic import atomic_write_text, write_json
from phimr_nemo.store.progress import duration

TABLE_JSON: Final = "table.json"
TABLE_MARKDOWN: Final = "table.md"
NOT_RUN: Final = "not run"

PaperBenchmark = Literal["AIME24", "MATH-500", "GPQA-Diamond"]
PAPER_BENCHMARKS: Final[tuple[PaperBenchmark, ...]] = get_args(PaperBenchmark)


@dataclass(frozen=True)
class Entry:
    """One evaluated model; a line of `table.json`.

    Attributes:
        row: the stage.
        seed: of the run.
        n: questions.
        pass1: accuracy of a single response, 0 to 1.
        stderr: its standard error, clustered by question; NaN where it is not defined.
        seconds: that training it took; None where it was not trained or that is not known.
    """

    row: str
    seed: int
    n: int
    pass1: float
    stderr: float
    seconds: float | None = None


@dataclass(frozen=True)
class Row:
    """A stage over its seeds.

    Attributes:
        row: the stage.
        seeds: the seeds it was run with, ascending.
        n: questions of each run.
        each: pass@1 of each seed, in the order of `seeds`.
        pass1: their mean.
        question_stderr: standard error of one run, clustered by question (root mean square over the seeds).
        seed_stderr: standard error of `pass1` across seeds; NaN for one seed.
        seconds: that training took in the mean; None where no seed's is known.
    """

    row: str
    seeds: tuple[int, ...]
    n: int
    each: tuple[float, ...]
    pass1: float
    question_stderr: float
    seed_stderr: float
    seconds: float | None = None


def entry(row: str, seed: int, result: Result, seconds: float | None = None) -> Entry:
    """The table line of an evaluation; `seconds` that the training took."""
    return Entry(row, seed, result.questions, result.pass1, result.stderr, seconds)


def paper_table(entries: Sequence[Entry]) -> list[Row]:
    """One row a stage, in the order in which stages first occur.

    Raises:
        UserError: a stage has a seed twice, or its seeds were scored on different numbers of questions.
    """
    stages: dict[str, list[Entry]] = {}
    for item in entries:
        stages.setdefault(item.row, []).append(item)
    return [_row(name, sorted(group, key=lambda item: item.seed)) for name, group in stages.items()]


def _row(name: str, group: Sequence[Entry]) -> Row:
    seeds = tuple(item.seed for item in group)
    counts = {item.n for item in group}
    if len(set(seeds)) < len(seeds) or len(counts) > 1:
        raise UserError(
            f"row {name!r} has seeds {list(seeds)} with {sorted(counts)} questions",
            rule="a row has each seed once, all on the same number of questions",
            remedy="evaluate every seed on the same problems, and give each result once",
        )
    each = tuple(item.pass1 for item in group)
    mean, seed_stderr = mean_and_error(each)
    question_stderr = math.sqrt(sum(item.stderr**2 for item in group) / len(group))
    took = [item.seconds for item in group if item.seconds is not None]
    seconds = sum(took) / len(took) if took else None
    return Row(name, seeds, counts.pop(), each, mean, question_stderr, seed_stderr, seconds)


def table_markdown(rows: Sequence[Row]) -> str:
    """The table in markdown, in per cent."""
    header = (
        "stage",
        "pass@1 (%)",
        "SE (clustered by question)",
        "SE (across seeds)",
        "questions",
        "seeds",
        "per seed",
    )
    # Whoever was not trained here has no time.
    has_time = any(row.seconds is not None for row in rows)
    cells = (
        (
            row.row,
            percent(row.pass1),
            percent(row.question_stderr),
            percent(row.seed_stderr),
            str(row.n),
            ", ".join(map(str, row.seeds)),
            ", ".join(map(percent, row.each)),
            *((ABSENT if row.seconds is None else duration(row.seconds),) if has_time else ()),
        )
        for row in rows
    )
    return markdown(Table("pass@1", (*header, "training") if has_time else header, tuple(cells)))


def write_table(directory: Path, entries: Sequence[Entry]) -> list[Row]:
    """Write `table.json` (one line an entry) and `table.md`; returns the rows.

    Raises:
        UserError: as :func:`paper_table`.
    """
    rows = paper_table(entries)
    lines = [asdict(item) for item in entries]
    for line in lines:
        if math.isnan(line["stderr"]):
            line["stderr"] = None
        if line["seconds"] is None:
            del line["seconds"]
    write_json(directory / TABLE_JSON, lines)
    atomic_write_text(directory / TABLE_MARKDOWN, table_markdown(rows))
    return rows


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's results; pass@1 in per cent, None where it gives no number.

    Attributes:
        model: the paper's name for it.
        scores: benchmark -> pass@1.
        note: what sets the row apart.
    """

    model: str
    scores: Mapping[PaperBenchmark, float | None]
    note: str = ""


def _paper_row(
    model: str, aime24: float | None, math500: float | None, gpqa: float | None, note: str = ""
) -> PaperRow:
    return PaperRow(model, {"AIME24": aime24, "MATH-500": math500, "GPQA-Diamond": gpqa}, note)


PAPER_STAGES: Final[Mapping[str, str]] = {
    "base": "Phi-4-Mini",
    "mid-training": "+ mid-training",
    "SFT": "+ SFT",
    "DPO": "+ rollout DPO",
    "GRPO": "+ RL = Phi-4-Mini-Reasoning",
}
"""Our row -> the paper's row of the same stage."""


def paper_reference() -> tuple[PaperRow, ...]:
    """The results of arXiv 2504.21233, and of a later re-evaluation by the same company."""
    starred = "marked * in the paper"
    no_midtraining = "direct SFT of Phi-4-Mini, no mid-training"
    return (
        _paper_row("Phi-4-Mini", 10.0, 71.8, 36.9),
        _paper_row("+ mid-training", 30.0, 82.9, 42.6),
        _paper_row("+ SFT", 43.3, 89.3, 48.3),
        _paper_row("+ rollout DPO", 50.0, 93.6, 49.0),
        _paper_row("+ RL = Phi-4-Mini-Reasoning", 57.5, 94.6, 52.0),
        _paper_row("Phi-4-Mini-Reasoning, re-evaluated", 48.1, 91.2, 44.5, "64 / 8 / 8 samples per question"),
        _paper_row("DeepSeek-R1-Distill-Qwen-7B", 53.3, 91.4, 49.5),
        _paper_row("DeepSeek-R1-Distill-Llama-8B", 43.3, 86.9, 47.3),
        _paper_row("Bespoke-Stratos-7B", 20.0, 82.0, 37.8, starred),
        _paper_row("OpenThinker-7B", 31.3, 83.0, 42.4, starred),
        _paper_row("Llama-3.2-3B-Instruct", 6.7, 44.4, 25.3),
        _paper_row("o1-mini", 63.6, 90.0, 60.0, starred),
        _paper_row("Phi-4-Mini + LIMO", None, 57.8, None, no_midtraining),
        _paper_row("Phi-4-Mini + S1K", None, 47.0, None, no_midtraining),
    )


def reference_table(ours: Mapping[tuple[str, str], Seeds]) -> Table:
    """The paper's table with our measurements beside it.

    Args:
        ours: (row as in `PAPER_STAGES`, benchmark) -> results; what is absent reads "not run", other rows and
            benchmarks are not the paper's and are left out.
    """
    stage_of = {paper: stage for stage, paper in PAPER_STAGES.items()}
    titles = [title for name in PAPER_BENCHMARKS for title in (f"{name}, paper", f"{name}, ours")]
    rows = []
    for row in paper_reference():
        cells = [row.model]
        for benchmark in PAPER_BENCHMARKS:
            published = row.scores[benchmark]
            cells.append(ABSENT if published is None else f"{published:.1f}")
            seeds = ours.get((stage_of.get(row.model, ""), benchmark))
            cells.append(NOT_RUN if seeds is None else measured(seeds))
        rows.append((*cells, row.note))
    return Table(
        "The paper's models",
        ("model", *titles, "note"),
        tuple(rows),
        "pass@1 in per cent. Ours: with its standard error (questions x samples).",
    )


def as_in_the_paper(benchmarks: Mapping[str, Mapping[str, Seeds]]) -> dict[tuple[str, str], Seeds]:
    """Of benchmark -> row -> results, those that :func:`reference_table` has a place for."""
    return {
        (row, benchmark): seeds
        for benchmark, models in benchmarks.items()
        for row, seeds in models.items()
        if row in PAPER_STAGES and benchmark in PAPER_BENCHMARKS
    }
