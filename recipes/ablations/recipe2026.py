"""Ablation: every value of the recipe of 2026 by itself, and both recipes end to end.

    python -m recipes.ablations.recipe2026 quickstarts=[runs/quickstart] output=runs/ablation-recipe2026

Each seed of the finished quickstarts gives its SFT model with its pairs to the arms of DPO, and its DPO model with
its prompts to those of GRPO. End to end, the recipe of 2026 makes its own pairs, trains DPO on them and GRPO on that
model; the paper's is the quickstart's DPO with GRPO's first arm. All are evaluated on the same held-out problems with
the same sampling seeds: they are compared question by question. Finished steps are not run again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from phimr_nemo.config.ablations import Recipe2026Config
from phimr_nemo.jobs.steps.schedule import run_steps
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.store.atomic import atomic_write_text
from recipes.ablations.common import (
    TABLE_MARKDOWN,
    Differences,
    ablation_command,
    differences_markdown,
    evaluation_step,
    paired,
    plot_differences,
    seed_directories,
    stage_step,
)
from recipes.ablations.grpo_runs import grpo_step

TINY: Final = "conf/ablations/recipe2026.yaml"
NEEDED: Final = ("sft", "own-verdicts", "preferences", "dpo")
PICTURE: Final = "ablation-recipe2026.png"
END_TO_END: Final = "end-to-end"
TWO_UPDATES: Final = "two-updates"
PAIRS: Final = "end-to-end-pairs"
WHOLE_DPO: Final = "end-to-end-dpo"
SURE: Final = 2.0
"""Standard errors over seeds beyond which a difference is one."""


def plan(config: Recipe2026Config) -> list[Step]:
    """Every command of the ablation, seed by seed.

    Raises:
        UserError: see :func:`recipes.ablations.common.seed_directories`.
    """
    roots = seed_directories(config.quickstarts, needed=NEEDED)
    return [step for seed, root in roots.items() for step in _seed_steps(config, seed, root)]


def _seed_steps(config: Recipe2026Config, seed: int, root: Path) -> list[Step]:
    out = config.output / f"seed-{seed}"
    sizes = {"problems": config.heldout_problems, "samples": config.evaluation_samples}
    sft = f"base={root / 'sft' / 'hf'}"
    rollouts = (f"verdicts={root / 'own-verdicts'}", "prompts=null")
    recipe, whole_dpo = config.dpo[config.whole], f"base={out / WHOLE_DPO / 'hf'}"
    trained = [
        *(
            stage_step(out, seed, f"dpo-{arm}", "dpo", sft, f"pairs={root / 'preferences' / 'pairs'}", *settings)
            for arm, settings in config.dpo.items()
        ),
        *(
            grpo_step(out, seed, root, f"{group}-{arm}", config.steps, *settings)
            for group, arms in (("grpo", config.grpo), (TWO_UPDATES, config.two_updates))
            for arm, settings in arms.items()
        ),
        stage_step(out, seed, PAIRS, "curate", *rollouts, *config.pairs, preset="tiny-rollouts"),
        stage_step(out, seed, WHOLE_DPO, "dpo", sft, f"pairs={out / PAIRS / 'pairs'}", *recipe),
        # Of two settings of one key the later one counts.
        grpo_step(out, seed, root, END_TO_END, config.steps, whole_dpo, *config.grpo[config.whole]),
    ]
    return [*trained, *(evaluation_step(out, seed, name, out / name / "hf", **sizes) for name in _models(config))]


def _groups(config: Recipe2026Config) -> dict[str, list[str]]:
    """What is evaluated besides the whole recipe: arms by group, whose first is what the others are compared with."""
    groups = {"dpo": config.dpo, "grpo": config.grpo, TWO_UPDATES: config.two_updates}
    return {group: [f"{group}-{arm}" for arm in arms] for group, arms in groups.items()}


def _models(config: Recipe2026Config) -> list[str]:
    """What is evaluated."""
    return [*itertools.chain.from_iterable(_groups(config).values()), END_TO_END]


def report(config: Recipe2026Config) -> str:
    """Write the tables and the picture; returns the tables in markdown.

    Raises:
        UserError: an evaluation has not finished.
    """
    from phimr_nemo.evaluate.evaluate import RESULTS_FILE, read_result
    from phimr_nemo.report.scores import entry, table_markdown, write_table

    seeds = list(seed_directories(config.quickstarts, needed=NEEDED))
    results = {
        (name, seed): read_result(config.output / f"seed-{seed}" / f"evaluate-{name}" / RESULTS_FILE)
        for name in _models(config)
        for seed in seeds
    }
    pairs = [(first, other) for first, *others in _groups(config).values() for other in others]
    pairs.append((f"grpo-{next(iter(config.grpo))}", END_TO_END))
    differences = {
        f"{second} minus {first}": [
            paired(results[first, seed].per_question, results[second, seed].per_question) for seed in seeds
        ]
        for first, second in pairs
    }
    entries = [entry(name, seed, results[name, seed]) for name in _models(config) for seed in seeds]
    text = "\n".join(
        (
            table_markdown(write_table(config.output, entries)),
            differences_markdown(differences, seeds),
            verdicts_markdown(differences),
        )
    )
    atomic_write_text(config.output / TABLE_MARKDOWN, text)
    plot_differences(differences, seeds, config.output / PICTURE)
    return text


def verdict(each: Sequence[float]) -> str:
    """What several seeds say of a change.

    Args:
        each: a seed's difference, in points.

    Returns:
        "helps" or "hurts" where the mean is more than `SURE` standard errors over seeds away from 0; of one seed
        there is no such error.
    """
    from phimr_nemo.evaluate.statistics import mean_and_error

    mean, error = mean_and_error(each)
    if not abs(mean) > SURE * error:
        return "not visible at this size"
    return "helps" if mean > 0 else "hurts"


def verdicts_markdown(differences: Differences) -> str:
    """One line a comparison."""
    lines = ["| change | verdict |", "|---|---|"]
    lines += [f"| {name} | {verdict([value for value, _ in each])} |" for name, each in differences.items()]
    return "\n".join(lines) + "\n"


def main(config: Recipe2026Config) -> None:
    """Every value of the recipe of 2026 by itself, and both recipes end to end."""
    run_steps(plan(config))
    print(report(config))


if __name__ == "__main__":
    ablation_command(Recipe2026Config, TINY, main)()
