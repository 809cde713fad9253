"""Ablation: the teacher's style and error rate, after verification; and what two teachers' agreement is worth.

    python -m recipes.ablations.teachers quickstarts=[runs/quickstart] output=runs/ablation-teachers

Programmatic teachers of two styles and two error rates answer the same problems once. The cross-teacher check asks
how good the answers are on which two teachers agree, without looking at the gold answer: what verification could do
where there is none. Then each teacher's verified solutions mid-train the quickstart's random model, for as many
epochs. A teacher that errs more leaves fewer solutions, and a careful one longer ones: the table has both numbers,
because the arms differ in them too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from phimr_nemo.config.ablations import TeachersConfig
from phimr_nemo.jobs.steps.schedule import run_steps
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.store.atomic import atomic_write_text
from phimr_nemo.store.shards import read_manifest, read_table
from recipes.ablations.common import (
    ablation_command,
    evaluation_step,
    measures_markdown,
    paired,
    publish,
    require_finished,
    seed_directories,
    stage_step,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from phimr_nemo.evaluate.evaluate import Result

TINY: Final = "conf/ablations/teachers.yaml"
NEEDED: Final = ("base",)
COLUMNS: Final = ("problem_id", "extracted", "verdict")
CROSS_MARKDOWN: Final = "cross-teacher.md"
TABLE_JSON: Final = "teachers.json"
PLOT_FILE: Final = "ablation-teachers.png"
FINISH: Final = "run this ablation's steps"
SOLUTIONS: Final = "verified solutions"
TOKENS: Final = "tokens packed"
PASS1: Final = "pass@1 (%)"
DIGITS: Final = {SOLUTIONS: 0, TOKENS: 0, PASS1: 1}
ALONE: Final = "first right (%)"
AGREED: Final = "agree (%)"
PRECISION: Final = "right where they agree (%)"
RECALL: Final = "of the first's right ones, kept (%)"
CROSS_DIGITS: Final = {ALONE: 1, AGREED: 1, PRECISION: 1, RECALL: 1}


@dataclass(frozen=True)
class CrossCheck:
    """Two teachers' answers to the same problems, one each.

    Attributes:
        problems: that both were asked.
        right: of the first teacher's answers.
        agreed: problems on which both gave the same answer.
        agreed_right: of these, the right ones.
    """

    problems: int
    right: int
    agreed: int
    agreed_right: int

    def measures(self) -> dict[str, float]:
        """The table's columns, in per cent; a share of nothing is NaN."""
        return {
            ALONE: _percent(self.right, self.problems),
            AGREED: _percent(self.agreed, self.problems),
            PRECISION: _percent(self.agreed_right, self.agreed),
            RECALL: _percent(self.agreed_right, self.right),
        }


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else float("nan")


def cross_check(first: pa.Table, second: pa.Table) -> CrossCheck:
    """Compare two teachers' answers as texts; the verdicts tell afterwards how good the agreed ones are.

    Args:
        first, second: the `COLUMNS` of kind "verdicts", one row a problem. No answer agrees with none.
    """
    others = {row["problem_id"]: row["extracted"] for row in second.to_pylist()}
    both = [row for row in first.to_pylist() if row["problem_id"] in others]
    agreed = [row for row in both if row["extracted"] and row["extracted"] == others[row["problem_id"]]]
    return CrossCheck(
        problems=len(both),
        right=sum(row["verdict"] == "correct" for row in both),
        agreed=len(agreed),
        agreed_right=sum(row["verdict"] == "correct" for row in agreed),
    )


def data_steps(config: TeachersConfig) -> list[Step]:
    """Every teacher's rollouts and their verdicts.

    Raises:
        UserError: a quickstart is not finished.
    """
    steps = []
    for seed in seed_directories(config.quickstarts, needed=NEEDED):
        out = config.output / f"seed-{seed}"
        for name, settings in config.teachers.items():
            asked = (f"problems.count={config.problems}", "rollouts_per_problem=1", *settings)
            graded = f"rollouts={out / f'rollouts-{name}'}"
            steps += [
                stage_step(out, seed, f"rollouts-{name}", "generate", *asked),
                stage_step(out, seed, f"verdicts-{name}", "verify", graded),
            ]
    return steps


def training_steps(config: TeachersConfig) -> list[Step]:
    """Mid-training on every teacher's verified solutions, and its evaluation.

    Raises:
        UserError: a quickstart is not finished.
    """
    steps = []
    for seed, root in seed_directories(config.quickstarts, needed=NEEDED).items():
        out, base = config.output / f"seed-{seed}", root / "base" / "hf"
        sizes = {"problems": config.heldout_problems, "samples": config.evaluation_samples}
        for name in config.teachers:
            curated, rows, trained = (out / f"{part}-{name}" for part in ("curated", "rows", "midtrain"))
            packed = (f"conversations={curated / 'midtrain'}", f"tokenizer={base}")
            training = (f"base={base}", f"data={rows}", f"epochs={config.epochs}", "validation_rows=0")
            steps += [
                stage_step(out, seed, curated.name, "curate", f"verdicts={out / f'verdicts-{name}'}"),
                stage_step(out, seed, rows.name, "pack", *packed),
                stage_step(out, seed, trained.name, "midtrain", *training),
                evaluation_step(out, seed, name, trained / "hf", **sizes),
            ]
    return steps


def cross_report(config: TeachersConfig) -> str:
    """Write and return the table of what two teachers' agreement is worth, every pair in both directions.

    Raises:
        UserError: a teacher's verdicts are not finished.
    """
    seeds = list(seed_directories(config.quickstarts, needed=NEEDED))
    table: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        out = config.output / f"seed-{seed}"
        require_finished(out, [f"verdicts-{name}" for name in config.teachers], remedy=FINISH)
        verdicts = {name: read_table(out / f"verdicts-{name}", "verdicts", COLUMNS) for name in config.teachers}
        for first, second in itertools.permutations(config.teachers, 2):
            row = table.setdefault(f"{first}, checked by {second}", {})
            for measure, value in cross_check(verdicts[first], verdicts[second]).measures().items():
                row.setdefault(measure, []).append(value)
    text = measures_markdown("teacher", table, CROSS_DIGITS, seeds)
    atomic_write_text(config.output / CROSS_MARKDOWN, text)
    return text


def report(config: TeachersConfig) -> str:
    """Write the training arms' table (markdown, JSON) and the picture; returns the table in markdown.

    Raises:
        UserError: an arm is not finished.
    """
    from phimr_nemo.evaluate.evaluate import RESULTS_FILE, read_result

    names = list(config.teachers)
    seeds = list(seed_directories(config.quickstarts, needed=NEEDED))
    table: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    differences: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        out = config.output / f"seed-{seed}"
        require_finished(out, [f"evaluate-{name}" for name in names], remedy=FINISH)
        found: dict[str, Result] = {name: read_result(out / f"evaluate-{name}" / RESULTS_FILE) for name in names}
        for name in names:
            for measure, value in _measures(out, name, found).items():
                table[name].setdefault(measure, []).append(value)
        for other in names[1:]:
            difference = paired(found[names[0]].per_question, found[other].per_question)
            differences.setdefault(f"{other} minus {names[0]}", []).append(difference)
    return publish(
        config.output, "teacher", table, DIGITS, differences, seeds, json_file=TABLE_JSON, picture=PLOT_FILE
    )


def _measures(out: Path, name: str, found: Mapping[str, Result]) -> dict[str, float]:
    return {
        SOLUTIONS: read_manifest(out / f"curated-{name}" / "midtrain", "conversations").rows,
        TOKENS: read_manifest(out / f"rows-{name}", "rows").counts["tokens"],
        PASS1: 100 * found[name].pass1,
    }


def main(config: TeachersConfig) -> None:
    """Teachers of two styles and error rates: what their agreement is worth, and what a model learns from each."""
    run_steps(data_steps(config))
    print(cross_report(config))
    run_steps(training_steps(config))
    print(report(config))


if __name__ == "__main__":
    ablation_command(TeachersConfig, TINY, main)()
