"""Ablation: what a grader's errors cost GRPO, and whether the policy finds a form that is always accepted.

    python -m recipes.ablations.grader_errors base=runs/quickstart/seed-0/dpo/hf \
        prompts=runs/quickstart/seed-0/preferences/prompts output=runs/ablation-grader-errors

Every arm trains the same model on the same prompts with conf/grpo/tiny.yaml but for `settings`, and another grader of
recipes/ablations/erring_grader.py, and is evaluated with the project's grader on the same held-out problems with the
same sampling seeds: arms are compared question by question. The seeds are GRPO's and the evaluation's. Finished steps
are not run again; `seeds=[0]` first and `seeds=[0,1,2]` later continues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from phimr_nemo.config.ablations import GraderErrorsConfig
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.steps.schedule import run_steps
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.store.shards import read_table
from phimr_nemo.verify.plug import import_grader
from recipes.ablations.common import (
    ablation_command,
    evaluation_step,
    paired,
    publish,
    require_finished,
    stage_step,
)
from recipes.ablations.grpo_runs import FINISH, Rows, finished_rows, plot_curves

if TYPE_CHECKING:
    from phimr_nemo.evaluate.evaluate import Result

TINY: Final = "conf/ablations/grader_errors.yaml"
GRADERS: Final = "recipes.ablations.erring_grader"
START: Final = "start"
"""The model that every arm begins with, in the tables."""
PASS: Final = "pass@1 (%)"
REJECTED: Final = "correct responses that the arm's grader rejects (%)"
ACCEPTED: Final = "wrong responses that the arm's grader accepts (%)"
BEFORE: Final = "the same of the model that training started from (%)"
HACKED: Final = "responses that are wrong and accepted (%)"
DIGITS: Final = {PASS: 1, REJECTED: 1, ACCEPTED: 2, BEFORE: 2, HACKED: 2}
DIFFERENCES_FILE: Final = "ablation-grader-errors.png"
CURVES_FILE: Final = "ablation-grader-errors-curves.png"
JSON_FILE: Final = "grader-errors.json"
COLUMNS: Final = ("answer", "response", "verdict")


def plan(config: GraderErrorsConfig) -> list[Step]:
    """Every command of the ablation, seed by seed and arm by arm.

    Raises:
        UserError: the start has not finished, or no arm, or one that is called as the start is.
    """
    for path in (config.base.parent, config.prompts.parent):
        require_finished(path.parent, [path.name], remedy="finish it, or name another model as base= and prompts=")
    if not config.arms or START in config.arms:
        raise UserError(
            f"the arms are {list(config.arms)}",
            rule=f"there is an arm at least, which the others are compared with, and none is called {START}",
            remedy="leave arms= out for those of conf/ablations/grader_errors.yaml",
        )
    return [step for seed in config.seeds for step in _seed_steps(config, seed)]


def _seed_steps(config: GraderErrorsConfig, seed: int) -> list[Step]:
    out = config.output / f"seed-{seed}"
    given = (f"base={config.base}", f"prompts={config.prompts}", f"steps={config.steps}", *config.settings)
    sizes = {"problems": config.heldout_problems, "samples": config.evaluation_samples}
    steps = [evaluation_step(out, seed, START, config.base, **sizes)]
    for arm, function in config.arms.items():
        steps += [
            stage_step(out, seed, arm, "grpo", *given, f"grader={GRADERS}:{function}"),
            evaluation_step(out, seed, arm, out / arm / "hf", **sizes),
        ]
    return steps


def errors(rows: Sequence[Mapping[str, Any]], function: str) -> dict[str, float]:
    """What a grader would have got wrong, in per cent; a share of nothing is 0.

    Args:
        rows: answer, response, and the project's verdict, which counts as the truth; at least one.
        function: of `GRADERS`.
    """
    grade = import_grader(f"{GRADERS}:{function}")
    truth = [row["verdict"] == "correct" for row in rows]
    accepted = [grade(row["response"], row["answer"]).verdict == "correct" for row in rows]
    right, wrong = sum(truth), len(truth) - sum(truth)
    rejected = sum(true and not taken for true, taken in zip(truth, accepted, strict=True))
    hacked = sum(taken and not true for true, taken in zip(truth, accepted, strict=True))
    return {
        REJECTED: 100 * rejected / max(right, 1),
        ACCEPTED: 100 * hacked / max(wrong, 1),
        HACKED: 100 * hacked / len(rows),
    }


def report(config: GraderErrorsConfig) -> str:
    """Write tables (markdown, JSON) and pictures; returns the tables in markdown.

    Raises:
        UserError: an arm or its evaluation has not finished.
    """
    from phimr_nemo.evaluate.evaluate import RESULTS_FILE, read_result

    outs = [config.output / f"seed-{seed}" for seed in config.seeds]
    for out in outs:
        require_finished(out, [f"evaluate-{name}" for name in (START, *config.arms)], remedy=FINISH)
    results: dict[str, list[Result]] = {
        name: [read_result(out / f"evaluate-{name}" / RESULTS_FILE) for out in outs] for name in (START, *config.arms)
    }
    table: dict[str, dict[str, list[float]]] = {START: {PASS: [100 * each.pass1 for each in results[START]]}}
    for arm, function in config.arms.items():
        row = table[arm] = {PASS: [100 * each.pass1 for each in results[arm]]}
        for out in outs:
            found = errors(_responses(out, arm), function)
            found[BEFORE] = errors(_responses(out, START), function)[ACCEPTED]
            for measure, value in found.items():
                row.setdefault(measure, []).append(value)
    first, *others = config.arms
    differences = {
        f"{name} minus {first}": [
            paired(one.per_question, other.per_question)
            for one, other in zip(results[first], results[name], strict=True)
        ]
        for name in (*others, START)
    }
    runs: dict[str, list[Rows]] = {arm: [finished_rows(out / arm) for out in outs] for arm in config.arms}
    plot_curves(runs, config.output / CURVES_FILE)
    files = {"json_file": JSON_FILE, "picture": DIFFERENCES_FILE}
    return publish(config.output, "configuration", table, DIGITS, differences, config.seeds, **files)


def _responses(out: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(out / f"evaluate-{name}" / "verdicts", "verdicts", COLUMNS).to_pylist()
    return rows


def main(config: GraderErrorsConfig) -> None:
    """What a grader's errors cost GRPO, and whether the policy finds a form that is always accepted."""
    run_steps(plan(config))
    print(report(config))


if __name__ == "__main__":
    ablation_command(GraderErrorsConfig, TINY, main)()
