"""Ablation: a second domain through the same commands, with its own verifier and no change to the package.

    python -m recipes.ablations.second_domain quickstarts=[runs/quickstart] output=runs/ablation-second-domain

Programs of a rewriting system (recipes/ablations/rewriting.py) are problems from a file, solutions are recorded ones,
and `grader=` names reasoning-gym's verifier for `verify` and `evaluate`. Asked are: what the model that mathematics
has trained can do there at once; whether it learns the new domain faster than the untrained model does, from the same
examples in as many steps; and what is left of its mathematics afterwards.

Needs reasoning-gym: pip install --no-deps --target DIR -r requirements/domains.txt, and DIR in PYTHONPATH.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from phimr_nemo.config.ablations import SecondDomainConfig
from phimr_nemo.jobs.steps.schedule import run_steps
from phimr_nemo.jobs.steps.step import Step
from recipes.ablations.common import (
    ablation_command,
    paired,
    publish,
    require_finished,
    seed_directories,
    stage_step,
)
from recipes.ablations.rewriting import draw_problems, write_problems, write_solutions

if TYPE_CHECKING:
    from phimr_nemo.evaluate.evaluate import Result

TINY: Final = "conf/ablations/second_domain.yaml"
NEEDED: Final = ("base", "grpo", "evaluate-grpo")
GRADER: Final = "recipes.ablations.rewriting_grader:grade"
PLOT_FILE: Final = "ablation-second-domain.png"
TABLE_JSON: Final = "second-domain.json"
KEPT: Final = "evaluate-maths-kept"
FINISH: Final = "run this ablation's steps"
LEARNERS: Final = {"maths": "grpo", "random": "base"}
"""What the new domain is taught to -> the quickstart's step that made it."""
REWRITING: Final = "rewriting (%)"
MATHS: Final = "mathematics (%)"
PARSED: Final = "rewriting, boxed an answer (%)"
DIGITS: Final = {REWRITING: 1, PARSED: 1, MATHS: 1}
ROWS: Final = {
    "zero-shot": "mathematics, not taught",
    "maths": "mathematics, then taught",
    "random": "random weights, taught",
}


def write_data(config: SecondDomainConfig) -> None:
    """The problems and recorded solutions of every seed, unless they are there.

    Raises:
        UserError: reasoning-gym is not installed, or too many problems were asked for.
    """
    for seed in seed_directories(config.quickstarts, needed=NEEDED):
        out = config.output / f"seed-{seed}"
        if (out / "solutions.jsonl").is_file():
            continue
        write_problems(out / "heldout.jsonl", draw_problems(config.heldout_problems, seed=seed, heldout=True))
        problems = draw_problems(config.train_problems, seed=seed, heldout=False)
        write_solutions(
            out / "solutions.jsonl",
            problems,
            each=config.solutions_per_problem,
            seed=seed,
            mistake_rate=config.mistake_rate,
        )


def plan(config: SecondDomainConfig) -> list[Step]:
    """Every command of the ablation, in order.

    Raises:
        UserError: a quickstart is not finished.
    """
    roots = seed_directories(config.quickstarts, needed=NEEDED)
    return [step for seed, root in roots.items() for step in _seed_steps(config, seed, root)]


def _seed_steps(config: SecondDomainConfig, seed: int, root: Path) -> list[Step]:
    out = config.output / f"seed-{seed}"
    tokens = f"max_new_tokens={config.max_new_tokens}"

    def asked(name: str, model: Path) -> Step:
        problems = ("problems.kind=file", f"problems.path={out / 'heldout.jsonl'}")
        sampling = (f"samples={config.evaluation_samples}", tokens, f"grader={GRADER}")
        return stage_step(out, seed, f"evaluate-{name}", "evaluate", f"model={model}", *problems, *sampling)

    recorded = ("problems=null", "teacher.kind=recorded", f"teacher.path={out / 'solutions.jsonl'}")
    steps = [
        asked("zero-shot", root / "grpo" / "hf"),
        stage_step(out, seed, "rollouts", "generate", *recorded),
        stage_step(out, seed, "verdicts", "verify", f"rollouts={out / 'rollouts'}", f"grader={GRADER}"),
        stage_step(
            out, seed, "curated", "curate", f"verdicts={out / 'verdicts'}", "sft.difficulties=[middle,high_school]"
        ),
    ]
    for learner, stage in LEARNERS.items():
        data = (f"data={out / 'curated' / 'sft'}", f"epochs={config.epochs}", "validation_rows=0")
        batch = (f"micro_batch={config.batch}", f"global_batch={config.batch}")
        trained = out / f"sft-{learner}" / "hf"
        maths = (f"problems.count={config.maths_problems}", f"samples={config.maths_samples}")
        steps += [
            stage_step(out, seed, f"sft-{learner}", "sft", f"base={root / stage / 'hf'}", *data, *batch),
            asked(learner, trained),
        ]
        if stage == "grpo":
            steps.append(stage_step(out, seed, KEPT, "evaluate", f"model={trained}", *maths))
    return steps


def report(config: SecondDomainConfig) -> str:
    """Write the tables (markdown, JSON) and the picture; returns the tables in markdown.

    Raises:
        UserError: a step is not finished.
    """
    from phimr_nemo.evaluate.evaluate import RESULTS_FILE, read_result

    roots = seed_directories(config.quickstarts, needed=NEEDED)
    table: dict[str, dict[str, list[float]]] = {title: {} for title in ROWS.values()}
    differences: dict[str, list[tuple[float, float]]] = {}
    for seed, root in roots.items():
        out = config.output / f"seed-{seed}"
        require_finished(out, [*(f"evaluate-{name}" for name in ROWS), KEPT], remedy=FINISH)
        found: dict[str, Result] = {name: read_result(out / f"evaluate-{name}" / RESULTS_FILE) for name in ROWS}
        before, after = read_result(root / "evaluate-grpo" / RESULTS_FILE), read_result(out / KEPT / RESULTS_FILE)
        for name, title in ROWS.items():
            row = table[title]
            row.setdefault(REWRITING, []).append(100 * found[name].pass1)
            row.setdefault(PARSED, []).append(100 * (1 - found[name].unparsable))
        for name, result in (("zero-shot", before), ("maths", after)):
            table[ROWS[name]].setdefault(MATHS, []).append(100 * result.pass1)
        for title, first, second in (
            ("rewriting: taught minus zero-shot", found["zero-shot"], found["maths"]),
            ("rewriting: after mathematics minus from random weights", found["random"], found["maths"]),
            ("mathematics: afterwards minus before", before, after),
        ):
            differences.setdefault(title, []).append(paired(first.per_question, second.per_question))
    seeds = list(roots)
    return publish(config.output, "model", table, DIGITS, differences, seeds, json_file=TABLE_JSON, picture=PLOT_FILE)


def main(config: SecondDomainConfig) -> None:
    """A second domain with a verifier of its own: zero-shot, taught, and what is forgotten."""
    write_data(config)
    run_steps(plan(config))
    print(report(config))


if __name__ == "__main__":
    ablation_command(SecondDomainConfig, TINY, main)()
