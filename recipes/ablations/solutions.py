"""Ablation: is verification worth it, and are more solutions of fewer questions, at equal tokens?

    python -m recipes.ablations.solutions quickstarts=[runs/quickstart] output=runs/ablation-solutions

For each seed the programmatic teacher, which errs at a set rate, is asked for 1, 2, 4 or 8 solutions of as many
fresh questions as make one total of solutions. Each of these sets is used twice: verified, with its wrong solutions
left out, and as it is, with a grader that accepts everything. All arms go on mid-training the quickstart's
mid-trained model for equally many steps of full rows, hence on the same number of tokens; smaller sets are seen more
often. (The random model learns too little from what 24 arms can be given: 8 % of the questions after 0.4 M tokens.)

It tells little about real models: a right solution of the tiny teacher has two wordings, one for each of its styles,
and equal texts of a question are kept once. So with 8 solutions a question a verified set is much smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from phimr_nemo.config.ablations import SolutionsConfig
from phimr_nemo.jobs.steps.schedule import run_steps
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.store.shards import read_manifest
from recipes.ablations.common import (
    ablation_command,
    evaluation_step,
    paired,
    publish,
    require_finished,
    seed_directories,
    stage_step,
)

if TYPE_CHECKING:
    from pathlib import Path

    from phimr_nemo.evaluate.evaluate import Result

TINY: Final = "conf/ablations/solutions.yaml"
BEGIN: Final = "midtrain"
NEEDED: Final = (BEGIN,)
ACCEPTS_EVERYTHING: Final = "recipes.ablations.erring_grader:anything"
VERIFIED, UNVERIFIED = "verified", "unverified"
GRADERS: Final[Mapping[str, tuple[str, ...]]] = {VERIFIED: (), UNVERIFIED: (f"grader={ACCEPTS_EVERYTHING}",)}
ENOUGH_EPOCHS: Final = 100_000
FRESH: Final = 2_000_000
"""Added to the seed of the questions: the quickstart's own are those of the seed and of a million more."""
ROWS_A_STEP: Final = 1
"""The quickstart's mid-training takes two: as many updates cost half as much here, in each of 24 arms."""
TABLE_JSON: Final = "solutions.json"
PLOT_FILE: Final = "ablation-solutions.png"
FINISH: Final = "run this ablation's steps"
QUESTIONS: Final = "questions asked"
TRAINED: Final = "different solutions trained on"
TOKENS: Final = "tokens of the set"
PASS1: Final = "pass@1 (%)"
DIGITS: Final = {QUESTIONS: 0, TRAINED: 0, TOKENS: 0, PASS1: 1}


def arms(config: SolutionsConfig) -> dict[str, tuple[int, str]]:
    """Name -> solutions a question, and whether they are verified."""
    return {f"{count}-{kind}": (count, kind) for count in config.solutions for kind in GRADERS}


def comparisons(config: SolutionsConfig) -> list[tuple[str, str]]:
    """Pairs of arms that differ in one thing: each without verification from the same with it, and the verified ones
    from the first of them."""
    first, *others = (f"{count}-{VERIFIED}" for count in config.solutions)
    unverified = [(f"{count}-{UNVERIFIED}", f"{count}-{VERIFIED}") for count in config.solutions]
    return [*unverified, *((other, first) for other in others)]


def ablation_steps(config: SolutionsConfig) -> list[Step]:
    """Every arm's data, training and evaluation.

    Raises:
        UserError: a quickstart is not finished.
    """
    steps: list[Step] = []
    sizes = {"problems": config.heldout_problems, "samples": config.evaluation_samples}
    for seed, root in seed_directories(config.quickstarts, needed=NEEDED).items():
        out, base = config.output / f"seed-{seed}", root / BEGIN / "hf"
        for count in config.solutions:
            asked = (f"problems.count={config.total // count}", f"rollouts_per_problem={count}")
            rate = f"teacher.mistake_rate={config.mistake_rate}"
            steps.append(stage_step(out, seed + FRESH, f"rollouts-{count}", "generate", *asked, rate))
        for name, (count, kind) in arms(config).items():
            graded = (f"rollouts={out / f'rollouts-{count}'}", *GRADERS[kind])
            verdicts, curated, rows, trained = (
                out / f"{part}-{name}" for part in ("verdicts", "curated", "rows", "midtrain")
            )
            every = (f"verdicts={verdicts}", f"midtrain.max_per_problem={count}", "sft=null", f"tokenizer={base}")
            packed = (f"conversations={curated / 'midtrain'}", f"tokenizer={base}")
            length = (f"max_steps={config.steps}", f"epochs={ENOUGH_EPOCHS}", f"global_batch={ROWS_A_STEP}")
            run = (f"base={base}", f"data={rows}", *length)
            steps += [
                stage_step(out, seed, verdicts.name, "verify", *graded),
                stage_step(out, seed, curated.name, "curate", *every),
                stage_step(out, seed, rows.name, "pack", *packed),
                stage_step(out, seed, trained.name, "midtrain", *run),
                evaluation_step(out, seed, name, trained / "hf", **sizes),
            ]
    return steps


def report(config: SolutionsConfig) -> str:
    """Write the table (markdown, JSON) and the picture; returns the table in markdown.

    Raises:
        UserError: an arm is not finished.
    """
    from phimr_nemo.evaluate.evaluate import RESULTS_FILE, read_result

    names = list(arms(config))
    seeds = list(seed_directories(config.quickstarts, needed=NEEDED))
    table: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    differences: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        out = config.output / f"seed-{seed}"
        require_finished(out, [f"evaluate-{name}" for name in names], remedy=FINISH)
        found: dict[str, Result] = {name: read_result(out / f"evaluate-{name}" / RESULTS_FILE) for name in names}
        for name in names:
            for measure, value in _measures(config, out, name, found[name]).items():
                table[name].setdefault(measure, []).append(value)
        for other, first in comparisons(config):
            difference = paired(found[first].per_question, found[other].per_question)
            differences.setdefault(f"{other} minus {first}", []).append(difference)
    title = "solutions a question"
    return publish(config.output, title, table, DIGITS, differences, seeds, json_file=TABLE_JSON, picture=PLOT_FILE)


def _measures(config: SolutionsConfig, out: Path, name: str, found: Result) -> dict[str, float]:
    return {
        QUESTIONS: config.total // arms(config)[name][0],
        TRAINED: read_manifest(out / f"curated-{name}" / "midtrain", "conversations").rows,
        TOKENS: read_manifest(out / f"rows-{name}", "rows").counts["tokens"],
        PASS1: 100 * found.pass1,
    }


def main(config: SolutionsConfig) -> None:
    """Verification on and off, and 1, 2, 4 and 8 solutions a question, at equal tokens."""
    run_steps(ablation_steps(config))
    print(report(config))


if __name__ == "__main__":
    ablation_command(SolutionsConfig, TINY, main)()
