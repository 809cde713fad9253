"""What each stage forgets: every family of problems measured again after every stage of finished quickstarts.

    python -m recipes.ablations.forgetting quickstarts=[runs/quickstart] output=runs/ablation-forgetting

A family is a domain at a difficulty, such as word problems of the middle tier. The quickstart evaluates each stage on
the same held-out problems and keeps every verdict, so this trains and samples nothing. The SFT stage sees the
harder tiers alone (conf/curate/tiny.yaml): the easier ones are what it could forget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from phimr_nemo.config.ablations import ForgettingConfig
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.quickstart import ROWS
from phimr_nemo.report.picture import save_png, tidy
from phimr_nemo.store.atomic import atomic_write_text, write_json
from phimr_nemo.store.records import DIFFICULTIES
from phimr_nemo.store.shards import read_table
from recipes.ablations.common import TABLE_MARKDOWN, ablation_command, seed_directories

if TYPE_CHECKING:
    import pyarrow as pa

TINY: Final = "conf/ablations/forgetting.yaml"
STAGES: Final = ROWS[:5]
"""The chain of stages, each begun where the one before it ended."""
COLUMNS: Final = ("problem_id", "domain", "difficulty", "verdict")
NO_DOMAIN: Final = "unknown"
ALL: Final = "all"
PLOT_FILE: Final = "ablation-forgetting.png"
TABLE_JSON: Final = "forgetting.json"
PLOT_INCHES: Final = (9.0, 3.6)
DPI: Final = 110
CLEAR: Final = 2.0
"""A change of more than so many standard errors is called one."""

Accuracies = Mapping[str, Mapping[str, float]]
"""Family -> problem id -> accuracy of a single response."""


@dataclass(frozen=True)
class Cell:
    """A family after a stage.

    Attributes:
        questions: of each seed.
        each: pass@1 of each seed, 0 to 1.
        mean, stderr: over the seeds; `stderr` is NaN for one seed.
        change, change_stderr: against the stage before, paired by question within a seed, over the seeds; None for
            the first stage.
        question_stderr: of `change` in one seed, over its questions (root mean square over the seeds).
    """

    questions: tuple[int, ...]
    each: tuple[float, ...]
    mean: float
    stderr: float
    change: float | None
    change_stderr: float | None
    question_stderr: float | None


def accuracies(verdicts: pa.Table) -> dict[str, dict[str, float]]:
    """The accuracy of every question, by family; the family "all" holds every question.

    Args:
        verdicts: at least the `COLUMNS` of kind "verdicts".
    """
    correct: dict[str, dict[str, list[bool]]] = {ALL: {}}
    for row in verdicts.to_pylist():
        family = f"{row['domain'] or NO_DOMAIN}, {(row['difficulty'] or NO_DOMAIN).replace('_', ' ')}"
        for name in (family, ALL):
            correct.setdefault(name, {}).setdefault(row["problem_id"], []).append(row["verdict"] == "correct")
    return {
        family: {question: sum(values) / len(values) for question, values in questions.items()}
        for family, questions in sorted(correct.items(), key=lambda item: _order(item[0]))
    }


def _order(family: str) -> tuple[bool, str, int]:
    """By domain, then from easy to hard; "all" last."""
    domain, _, difficulty = family.partition(", ")
    tiers = [name.replace("_", " ") for name in DIFFICULTIES]
    return family == ALL, domain, tiers.index(difficulty) if difficulty in tiers else len(tiers)


def cells(seeds: Sequence[Sequence[Accuracies]]) -> dict[str, list[Cell]]:
    """The table: family -> one cell a stage.

    Args:
        seeds: for each seed, for each stage, the accuracies on the same questions.

    Raises:
        UserError: stages of one seed were evaluated on different questions, or a family is not in every seed.
    """
    families = list(seeds[0][0])
    for stages in seeds:
        asked = {family: sorted(questions) for family, questions in stages[0].items()}
        same = all({f: sorted(q) for f, q in stage.items()} == asked for stage in stages)
        if not same or sorted(asked) != sorted(families):
            raise UserError(
                f"families {sorted(asked)} in one seed, {sorted(families)} in another, or other questions in a stage",
                rule="every stage of a seed is evaluated on the same questions, every seed on the same families",
                remedy="evaluate all stages with the same problems.count and seed",
            )
    return {family: _family_cells(family, seeds) for family in families}


def _family_cells(family: str, seeds: Sequence[Sequence[Accuracies]]) -> list[Cell]:
    from phimr_nemo.evaluate.statistics import mean_and_error

    found = []
    for place in range(len(seeds[0])):
        each = tuple(mean_and_error(list(stages[place][family].values()))[0] for stages in seeds)
        mean, stderr = mean_and_error(each)
        change = change_stderr = question_stderr = None
        if place:
            pairs = [_difference(stages[place - 1][family], stages[place][family]) for stages in seeds]
            change, change_stderr = mean_and_error([value for value, _ in pairs])
            question_stderr = (sum(error**2 for _, error in pairs) / len(pairs)) ** 0.5
        questions = tuple(len(stages[place][family]) for stages in seeds)
        found.append(Cell(questions, each, mean, stderr, change, change_stderr, question_stderr))
    return found


def _difference(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, float]:
    from phimr_nemo.evaluate.statistics import mean_and_error

    return mean_and_error([after[question] - before[question] for question in sorted(before)])


def clear_change(cell: Cell) -> bool:
    """Whether a change is more than `CLEAR` standard errors, of the seeds' spread or of their questions if larger."""
    if cell.change is None or cell.change_stderr is None or cell.question_stderr is None:
        return False
    pooled = cell.question_stderr / len(cell.each) ** 0.5
    spread = cell.change_stderr if len(cell.each) > 1 else pooled
    known = not math.isnan(pooled)  # a family of one question says nothing about others
    return known and abs(cell.change) > CLEAR * max(spread, pooled)


def markdown(table: Mapping[str, Sequence[Cell]], seeds: Sequence[int]) -> str:
    """pass@1 after each stage, and the change that each stage made, in per cent and points."""
    names = [name for _, name in STAGES]
    lines = [
        f"pass@1 (%) ± standard error over seeds {', '.join(map(str, seeds))}",
        "",
        f"| family | n a seed | {' | '.join(names)} |",
        "|---|---:|" + "---:|" * len(names),
    ]
    for family, row in table.items():
        counts = "/".join(map(str, row[0].questions))
        lines.append(
            f"| {family} | {counts} | "
            + " | ".join(f"{100 * cell.mean:.1f} ± {100 * cell.stderr:.1f}" for cell in row)
            + " |"
        )
    lines += [
        "",
        "Change by a stage (points), paired by question: mean over seeds ± standard error over seeds (over questions "
        f"of one). Bold: over {CLEAR:g} standard errors, the larger of both kinds; where nothing changes, one "
        "cell in twenty would be bold by chance.",
        "",
        f"| family | {' | '.join(names[1:])} |",
        "|---|" + "---:|" * len(names[1:]),
    ]
    lines += [f"| {family} | {' | '.join(map(_change, row[1:]))} |" for family, row in table.items()]
    return "\n".join(lines) + "\n"


def _change(cell: Cell) -> str:
    if cell.change is None or cell.change_stderr is None or cell.question_stderr is None:
        raise ValueError("the first stage changes nothing")
    text = f"{100 * cell.change:+.1f} ± {100 * cell.change_stderr:.1f} ({100 * cell.question_stderr:.1f})"
    return f"**{text}**" if clear_change(cell) else text


def plot(table: Mapping[str, Sequence[Cell]], path: Path) -> None:
    """A line a family over the stages with its error over seeds; one panel a domain."""
    from matplotlib.figure import Figure

    domains: dict[str, list[str]] = {}
    for family in table:
        if family != ALL:
            domains.setdefault(family.partition(", ")[0], []).append(family)
    figure = Figure(figsize=PLOT_INCHES)
    panels = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
    names = [name for _, name in STAGES]
    for axes, (domain, families) in zip(panels, domains.items(), strict=True):
        for family in families:
            row = table[family]
            axes.errorbar(
                range(len(row)),
                [100 * cell.mean for cell in row],
                yerr=[100 * cell.stderr for cell in row],
                marker="o",
                markersize=3.5,
                capsize=3,
                label=family.partition(", ")[2],
            )
        axes.set_title(domain, fontsize=10)
        axes.set_xticks(range(len(names)), names, fontsize=8)
        tidy(axes)
    panels[0].set_ylabel("pass@1 (%), error over seeds", fontsize=8)
    panels[-1].legend(fontsize=8, frameon=False, loc="lower right")
    figure.tight_layout()
    save_png(figure, path, dpi=DPI)


def report(config: ForgettingConfig) -> str:
    """Write the table (markdown, JSON) and the picture; returns the markdown.

    Raises:
        UserError: no quickstart, an evaluation that is not finished, or stages evaluated on different questions.
    """
    roots = seed_directories(config.quickstarts, needed=tuple(f"evaluate-{name}" for name, _ in STAGES))
    seeds = [
        [accuracies(read_table(root / f"evaluate-{name}" / "verdicts", "verdicts", COLUMNS)) for name, _ in STAGES]
        for root in roots.values()
    ]
    table = cells(seeds)
    lines = [
        {"family": family, "stage": name, "seeds": list(roots), **_plain(cell)}
        for family, row in table.items()
        for (_, name), cell in zip(STAGES, row, strict=True)
    ]
    write_json(config.output / TABLE_JSON, lines)
    text = markdown(table, list(roots))
    atomic_write_text(config.output / TABLE_MARKDOWN, text)
    plot(table, config.output / PLOT_FILE)
    return text


def _plain(cell: Cell) -> dict[str, object]:
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in asdict(cell).items()
    }


def run_ablation(config: ForgettingConfig) -> None:
    """What each stage forgets, by family of problems."""
    print(report(config))


if __name__ == "__main__":
    ablation_command(ForgettingConfig, TINY, run_ablation)()
