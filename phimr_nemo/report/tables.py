"""Tables of scores: the same cells in markdown, in the HTML report and in a model card.

Every score stands with its standard error and with the numbers of questions, samples and seeds.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from phimr_nemo.evaluate.evaluate import Result
from phimr_nemo.evaluate.statistics import Difference, mean_and_error, paired_bootstrap
from phimr_nemo.text.printable import printable

ABSENT: Final = "-"
RESAMPLES: Final = 10_000
CONFIDENCE: Final = 0.95
MEDIAN, NINE_OF_TEN, ALMOST_ALL, LONGEST = 0.5, 0.9, 0.99, 1.0

Seeds = Mapping[int, Result]
"""The results of one model on one benchmark by the seed of the run."""


@dataclass(frozen=True)
class Table:
    """Text cells under a header.

    Attributes:
        title: what it shows.
        header: names of the columns.
        rows: as many cells each as the header.
        note: what one must know to read it; empty for none.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def markdown(table: Table) -> str:
    """The table in markdown; columns of numbers to the right."""
    align = [
        "---:" if all(_is_number(row[column]) for row in table.rows) else "---" for column in range(len(table.header))
    ]
    lines = [list(table.header), align, *(list(row) for row in table.rows)]
    return "".join(f"| {' | '.join(map(markdown_text, line))} |\n" for line in lines)


def markdown_text(text: str) -> str:
    """A name or a cell in markdown: no tags, no control characters, and no bar, which would end its cell."""
    plain = printable(text.replace("\n", " ").replace("|", "/"))
    # Markdown passes HTML on; a link or a picture needs its brackets.
    return html.escape(plain, quote=False).replace("](", "]\\(")


def score_table(benchmark: str, models: Mapping[str, Seeds]) -> Table:
    """One line a model: pass@1 with its errors, maj@k, pass@k, what was cut or unreadable, and the counts."""
    rows = []
    for name, seeds in models.items():
        results = list(seeds.values())
        samples = min(result.samples for result in results)
        pass1, seed_error = mean_and_error([result.pass1 for result in results])
        rows.append(
            (
                name,
                percent(pass1),
                percent(_root_mean_square([result.stderr for result in results])),
                percent(seed_error),
                percent(_mean([result.majority for result in results])),
                percent(_mean([result.pass_at_k[samples] for result in results])),
                percent(_mean([result.truncated for result in results])),
                percent(_mean([result.unparsable for result in results])),
                whole(_mean([result.mean_tokens for result in results])),
                _range([result.questions for result in results]),
                str(samples),
                ", ".join(map(str, sorted(seeds))),
            )
        )
    return Table(
        benchmark,
        (
            "model",
            "pass@1 (%)",
            "SE (clustered by question)",
            "SE (across seeds)",
            "maj@k (%)",
            "pass@k (%)",
            "truncated (%)",
            "unparsable (%)",
            "mean tokens",
            "questions",
            "samples",
            "seeds",
        ),
        tuple(rows),
        "pass@1 is the mean over all samples. Its standard errors: of one run, clustered by question; of the mean, "
        "over seeds. k is the number of samples; a tie in maj@k counts by its share.",
    )


def length_table(benchmark: str, models: Mapping[str, Seeds]) -> Table | None:
    """Quantiles of the responses' lengths in tokens, over all seeds; None where none are known."""
    rows = []
    for name, seeds in models.items():
        lengths = [result.lengths for result in seeds.values() if result.lengths is not None]
        if not lengths:
            continue
        rows.append(
            (
                name,
                *(
                    whole(_mean([one.quantiles[share] for one in lengths]))
                    for share in (MEDIAN, NINE_OF_TEN, ALMOST_ALL)
                ),
                whole(max(one.quantiles[LONGEST] for one in lengths)),
                whole(_mean([one.correct for one in lengths])),
                whole(_mean([one.wrong for one in lengths])),
                f"{sum(one.known for one in lengths):,}",
            )
        )
    if not rows:
        return None
    header = ("model", "median", "90 %", "99 %", "longest", "mean, correct", "mean, other", "responses")
    return Table(f"{benchmark}: tokens per response", header, tuple(rows), "Quantiles are means over the seeds.")


def difference_table(benchmark: str, models: Mapping[str, Seeds]) -> Table | None:
    """Each model against the one before it, paired by question; None where no two answered the same questions."""
    names = list(models)
    rows = []
    for first, second in itertools.pairwise(names):
        common = sorted(
            seed
            for seed in models[first].keys() & models[second].keys()
            if models[first][seed].per_question
            and models[first][seed].per_question.keys() == models[second][seed].per_question.keys()
        )
        if not common:
            continue
        pairs = [(models[first][seed].per_question, models[second][seed].per_question) for seed in common]
        found = paired_difference(pairs)
        each = [_mean([after[question] - before[question] for question in before]) for before, after in pairs]
        rows.append(
            (
                f"{second} - {first}",
                points(found.mean),
                f"{points(found.low)} to {points(found.high)}",
                percent(found.stderr),
                percent(mean_and_error(each)[1]),
                f"{sum(len(before) for before, _ in pairs):,}",
                ", ".join(map(str, common)),
            )
        )
    if not rows:
        return None
    return Table(
        f"{benchmark}: differences of pass@1",
        (
            "models",
            "points",
            f"{CONFIDENCE:.0%} interval",
            "SE (clustered by question)",
            "SE (across seeds)",
            "questions",
            "seeds",
        ),
        tuple(rows),
        f"Paired by question, bootstrapped over questions ({RESAMPLES:,} resamples): the interval says what other "
        "questions would change, not what other training seeds would.",
    )


def paired_difference(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> Difference:
    """The second's accuracy minus the first's over the questions of all seeds, with a bootstrap interval.

    Args:
        pairs: (question -> accuracy, question -> accuracy) for each seed, over the same questions.
    """
    before = [first[question] for first, _ in pairs for question in sorted(first)]
    after = [second[question] for first, second in pairs for question in sorted(first)]
    return paired_bootstrap(before, after, resamples=RESAMPLES, confidence=CONFIDENCE, seed=0)


def measured(seeds: Seeds) -> str:
    """A score in one cell: "45.7 ± 1.2 (30x64)"; over seeds the error is that of their mean."""
    results = list(seeds.values())
    mean, error = mean_and_error([result.pass1 for result in results])
    if len(results) == 1:
        error = results[0].stderr
    counts = f"{_range([result.questions for result in results])}x{min(result.samples for result in results)}"
    return f"{percent(mean)} ± {percent(error)} ({counts}{f', {len(results)} seeds' if len(results) > 1 else ''})"


def percent(value: float) -> str:
    """A share in per cent."""
    return ABSENT if math.isnan(value) else f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * value:+.1f}"


def whole(value: float) -> str:
    """A number of tokens."""
    return ABSENT if math.isnan(value) else f"{value:,.0f}"


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(_mean([value * value for value in values]))


def _range(values: Sequence[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,}-{max(values):,}"


def _is_number(cell: str) -> bool:
    return cell == ABSENT or cell[:1].isdigit() or cell[:2].lstrip("+-")[:1].isdigit()
