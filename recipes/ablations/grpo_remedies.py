"""Ablation: what temperature, each stabilization technique and the reward's scale do to GRPO.

    python -m recipes.ablations.grpo_remedies quickstarts=[runs/quickstart] output=runs/ablation-grpo-remedies

Each seed of the finished quickstarts gives its DPO model and its prompts. Every arm trains with conf/grpo/tiny.yaml
but for its own settings, and is evaluated on the same held-out problems with the same sampling seeds: arms are
compared question by question. Finished steps are not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from phimr_nemo.config.ablations import GRPORemediesConfig
from phimr_nemo.errors import UserError
from phimr_nemo.jobs.steps.schedule import run_steps
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.store.atomic import atomic_write_text
from recipes.ablations.common import (
    TABLE_MARKDOWN,
    ablation_command,
    differences_markdown,
    evaluation_step,
    measures_markdown,
    paired,
    plot_differences,
    seed_directories,
)
from recipes.ablations.grpo_runs import (
    DIGITS,
    Rows,
    agreement,
    figures_by_seed,
    finished_rows,
    grpo_step,
    plot_curves,
)

TINY: Final = "conf/ablations/grpo_remedies.yaml"
NEEDED: Final = ("dpo", "preferences")
CURVES_FILE: Final = "ablation-grpo-remedies.png"
DIFFERENCES_FILE: Final = "ablation-grpo-remedies-pass1.png"


def plan(config: GRPORemediesConfig) -> list[Step]:
    """Every command of the ablation, seed by seed and arm by arm.

    Raises:
        UserError: see :func:`recipes.ablations.common.seed_directories`; `equal` is not an arm.
    """
    if config.equal not in config.arms:
        raise UserError(
            f"equal={config.equal}, and the arms are {list(config.arms)}",
            rule="`equal` is one of the arms",
            remedy="name one of them",
        )
    roots = seed_directories(config.quickstarts, needed=NEEDED)
    return [
        step
        for seed, root in roots.items()
        for arm, overrides in config.arms.items()
        for step in _arm_steps(config, seed, root, arm, overrides)
    ]


def _arm_steps(config: GRPORemediesConfig, seed: int, root: Path, arm: str, overrides: Sequence[str]) -> list[Step]:
    out = config.output / f"seed-{seed}"
    sizes = {"problems": config.heldout_problems, "samples": config.evaluation_samples}
    return [
        grpo_step(out, seed, root, arm, config.steps, *overrides),
        evaluation_step(out, seed, arm, out / arm / "hf", **sizes),
    ]


def report(config: GRPORemediesConfig) -> str:
    """Write tables and pictures; returns the tables in markdown.

    Raises:
        UserError: an arm or its evaluation has not finished.
    """
    from phimr_nemo.evaluate.evaluate import RESULTS_FILE, read_result
    from phimr_nemo.report.scores import entry, table_markdown, write_table

    seeds = list(seed_directories(config.quickstarts, needed=NEEDED))
    outs = {seed: config.output / f"seed-{seed}" for seed in seeds}
    results = {
        (arm, seed): read_result(outs[seed] / f"evaluate-{arm}" / RESULTS_FILE)
        for arm in config.arms
        for seed in seeds
    }
    runs: dict[str, list[Rows]] = {arm: [finished_rows(outs[seed] / arm) for seed in seeds] for arm in config.arms}
    rows = write_table(config.output, [entry(arm, seed, results[arm, seed]) for arm in config.arms for seed in seeds])
    first, *others = config.arms
    differences = {
        f"{arm} minus {first}": [
            paired(results[first, seed].per_question, results[arm, seed].per_question) for seed in seeds
        ]
        for arm in others
    }
    measures = {arm: figures_by_seed(each) for arm, each in runs.items()}
    text = "\n".join(
        (
            table_markdown(rows),
            differences_markdown(differences, seeds),
            measures_markdown("configuration", measures, DIGITS, seeds),
            _agreement_text(config, seeds, runs),
        )
    )
    atomic_write_text(config.output / TABLE_MARKDOWN, text)
    plot_curves(runs, config.output / CURVES_FILE)
    plot_differences(differences, seeds, config.output / DIFFERENCES_FILE)
    return text


def _agreement_text(config: GRPORemediesConfig, seeds: Sequence[int], runs: dict[str, list[Rows]]) -> str:
    first = next(iter(config.arms))
    lines = []
    for number, seed in enumerate(seeds):
        same, largest = agreement(runs[first][number], runs[config.equal][number])
        lines.append(
            f"Seed {seed}: {config.equal} and {first} have the same pass rate in their first {same} of "
            f"{config.steps} steps; their gradient norms there differ by at most {largest:.1e} of themselves.\n"
        )
    return "\n".join(lines)


def main(config: GRPORemediesConfig) -> None:
    """What temperature, each stabilization technique and the reward's scale do to GRPO."""
    run_steps(plan(config))
    print(report(config))


if __name__ == "__main__":
    ablation_command(GRPORemediesConfig, TINY, main)()
