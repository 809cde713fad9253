"""Ablation: a dial for the mismatch of sampler and trainer, and which correction keeps the run alive.

    python -m recipes.ablations.mismatch quickstarts=[runs/quickstart] output=runs/ablation-mismatch

Each seed of the finished quickstarts gives its DPO model and its prompts. Every arm trains with conf/grpo/tiny.yaml,
one mismatch (`recipes.ablations.mismatched`) and one correction, and is evaluated on the same held-out problems with
the same sampling seeds: corrections are compared question by question, mismatch by mismatch. Finished steps are not
run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Final

from phimr_nemo.config.ablations import MismatchConfig
from phimr_nemo.jobs.steps.schedule import run_steps
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.report.picture import save_png, tidy
from phimr_nemo.store.atomic import atomic_write_text
from recipes.ablations.common import (
    TABLE_MARKDOWN,
    ablation_command,
    differences_markdown,
    evaluation_step,
    measures_markdown,
    paired,
    seed_directories,
)
from recipes.ablations.grpo_runs import DROP, ENTROPY, GRADIENT, Rows, figures_by_seed, finished_rows, grpo_step
from recipes.ablations.mismatched import Dial

TINY: Final = "conf/ablations/mismatch.yaml"
NEEDED: Final = ("dpo", "preferences")
PROGRAM: Final = "recipes.ablations.mismatched"
PICTURE: Final = "ablation-mismatch.png"
GAP: Final = "mismatch: |log-probability of sampler - trainer| (nats a token)"
LEFT_OUT: Final = "tokens that the correction leaves out (%)"
SHOWN: Final[Mapping[str, int]] = {GAP: 4, LEFT_OUT: 2, ENTROPY: 4, GRADIENT: 3, DROP: 2}
"""Columns of the table of runs -> digits."""
PICTURE_INCHES: Final = (9.0, 4.2)
DPI: Final = 110
OFFSET: Final = 0.12
"""Between two corrections at a mismatch, in mismatches."""


def arm_name(dial: str, correction: str) -> str:
    """The directory of an arm: it names everything that is its own."""
    return f"{dial.replace('=', '-')}-{correction}"


def plan(config: MismatchConfig) -> list[Step]:
    """Every command of the ablation, seed by seed, mismatch by mismatch.

    Raises:
        UserError: an unknown mismatch, or see :func:`recipes.ablations.common.seed_directories`.
    """
    for dial in config.dials:
        Dial.parse(dial)
    roots = seed_directories(config.quickstarts, needed=NEEDED)
    return [
        step
        for seed, root in roots.items()
        for dial in config.dials
        for correction in config.corrections
        for step in _arm_steps(config, seed, root, dial, correction)
    ]


def _arm_steps(config: MismatchConfig, seed: int, root: Path, dial: str, correction: str) -> list[Step]:
    out, name = config.output / f"seed-{seed}", arm_name(dial, correction)
    trained = grpo_step(out, seed, root, name, config.steps, *config.settings, *config.corrections[correction])
    sizes = {"problems": config.heldout_problems, "samples": config.evaluation_samples}
    return [
        replace(trained, program=(PROGRAM, dial)),
        evaluation_step(out, seed, name, out / name / "hf", **sizes),
    ]


def report(config: MismatchConfig) -> str:
    """Write the tables and the picture; returns the tables in markdown.

    Raises:
        UserError: an arm or its evaluation has not finished.
    """
    from phimr_nemo.evaluate.evaluate import RESULTS_FILE, read_result
    from phimr_nemo.report.scores import entry, table_markdown, write_table

    seeds = list(seed_directories(config.quickstarts, needed=NEEDED))
    outs = {seed: config.output / f"seed-{seed}" for seed in seeds}
    arms = {(dial, name): arm_name(dial, name) for dial in config.dials for name in config.corrections}
    results = {
        (arm, seed): read_result(outs[seed] / f"evaluate-{arm}" / RESULTS_FILE)
        for arm in arms.values()
        for seed in seeds
    }
    runs: dict[str, list[Rows]] = {arm: [finished_rows(outs[seed] / arm) for seed in seeds] for arm in arms.values()}
    rows = write_table(config.output, [entry(arm, seed, results[arm, seed]) for arm in runs for seed in seeds])
    first, *others = config.corrections
    differences = {
        f"{dial}: {other} minus {first}": [
            paired(
                results[arms[dial, first], seed].per_question,
                results[arms[dial, other], seed].per_question,
            )
            for seed in seeds
        ]
        for dial in config.dials
        for other in others
    }
    measures = {arm: figures_by_seed(each) | mismatch_figures(each) for arm, each in runs.items()}
    text = "\n".join(
        (
            table_markdown(rows),
            differences_markdown(differences, seeds),
            measures_markdown("configuration", measures, SHOWN, seeds),
        )
    )
    atomic_write_text(config.output / TABLE_MARKDOWN, text)
    points = {key: [100 * results[arm, seed].pass1 for seed in seeds] for key, arm in arms.items()}
    plot_points(config, points, config.output / PICTURE)
    return text


def mismatch_figures(runs: Sequence[Rows]) -> dict[str, list[float]]:
    """Of each seed's run, means over its steps: the mismatch, and the tokens that a masking correction leaves out."""
    found = {GAP: [fmean(row["logprob_gap"] for row in rows if "logprob_gap" in row) for rows in runs]}
    if all(any("sampler_masked" in row for row in rows) for rows in runs):
        found[LEFT_OUT] = [
            100 * fmean(row["sampler_masked"] for row in rows if "sampler_masked" in row) for rows in runs
        ]
    return found


def plot_points(config: MismatchConfig, points: Mapping[tuple[str, str], Sequence[float]], path: Path) -> None:
    """pass@1 over the mismatches, a colour a correction, with one standard error over seeds."""
    from matplotlib.figure import Figure

    from phimr_nemo.evaluate.statistics import mean_and_error

    figure = Figure(figsize=PICTURE_INCHES)
    axes = figure.subplots()
    middle = (len(config.corrections) - 1) / 2
    for number, correction in enumerate(config.corrections):
        each = [mean_and_error(points[dial, correction]) for dial in config.dials]
        axes.errorbar(
            [place + OFFSET * (number - middle) for place in range(len(each))],
            [mean for mean, _ in each],
            yerr=[error for _, error in each],
            fmt="o",
            markersize=4,
            capsize=3,
            label=correction,
        )
    axes.set_xticks(range(len(config.dials)), config.dials, fontsize=8)
    axes.set_xlabel("what differs between sampler and trainer", fontsize=9)
    axes.set_ylabel("pass@1 after the run (%)", fontsize=9)
    axes.set_title("Corrections of the sampler's mismatch (bars: one standard error over seeds)", fontsize=10)
    axes.legend(fontsize=8, frameon=False, ncols=len(config.corrections))
    tidy(axes)
    figure.tight_layout()
    save_png(figure, path, dpi=DPI)


def main(config: MismatchConfig) -> None:
    """Which correction keeps reinforcement learning alive under which mismatch of sampler and trainer."""
    run_steps(plan(config))
    print(report(config))


if __name__ == "__main__":
    ablation_command(MismatchConfig, TINY, main)()
