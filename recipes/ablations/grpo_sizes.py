"""Ablation: the same reinforcement learning at several model sizes. Is instability a matter of capacity?

    python -m recipes.ablations.grpo_sizes quickstarts=[runs/quickstart] output=runs/ablation-grpo-sizes

Every size begins with random weights and the tokenizer of the seed, is trained on the quickstart's mid-training and
SFT sets for the same epochs, samples its own prompts, and goes from SFT into GRPO directly, with all remedies and
with none. What differs besides capacity is where each size stands when GRPO begins; the table says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from phimr_nemo.config.ablations import GRPOSizesConfig
from phimr_nemo.jobs.quickstart import OWN_PROBLEMS_SEED_OFFSET
from phimr_nemo.jobs.steps.schedule import run_steps
from phimr_nemo.jobs.steps.step import Step
from phimr_nemo.store.atomic import atomic_write_text
from recipes.ablations.common import (
    TABLE_MARKDOWN,
    ablation_command,
    evaluation_step,
    measures_markdown,
    seed_directories,
    stage_step,
)
from recipes.ablations.grpo_runs import DIGITS, Rows, figures_by_seed, finished_rows, plot_curves

TINY: Final = "conf/ablations/grpo_sizes.yaml"
NEEDED: Final = ("rows", "curated")
START: Final = "sft"
PLOT_FILE: Final = "ablation-grpo-sizes.png"


def plan(config: GRPOSizesConfig) -> list[Step]:
    """Every command of the ablation, seed by seed and size by size.

    Raises:
        UserError: see :func:`recipes.ablations.common.seed_directories`.
    """
    roots = seed_directories(config.quickstarts, needed=NEEDED)
    return [
        step
        for seed, root in roots.items()
        for size, overrides in config.sizes.items()
        for step in _size_steps(config, seed, root, size, overrides)
    ]


def _size_steps(config: GRPOSizesConfig, seed: int, root: Path, size: str, overrides: Sequence[str]) -> list[Step]:
    out = config.output / f"seed-{seed}" / size
    sft = out / START / "hf"
    trained = (f"base={out / 'midtrain' / 'hf'}", f"data={root / 'curated' / 'sft'}", f"epochs={config.sft_epochs}")
    asked = (f"problems.count={config.rl_problems}", f"teacher.path={sft}")
    prompts = f"prompts={out / 'preferences' / 'prompts'}"
    sizes = {"problems": config.heldout_problems, "samples": config.evaluation_samples}
    return [
        stage_step(out, seed, "base", "base", *overrides),
        stage_step(
            *(out, seed, "midtrain", "midtrain", f"base={out / 'base' / 'hf'}", f"data={root / 'rows'}"),
            f"epochs={config.midtrain_epochs}",
        ),
        stage_step(out, seed, START, "sft", *trained),
        stage_step(
            *(out, seed + OWN_PROBLEMS_SEED_OFFSET, "own-rollouts", "generate", *asked), preset="tiny-rollouts"
        ),
        stage_step(out, seed, "own-verdicts", "verify", f"rollouts={out / 'own-rollouts'}"),
        stage_step(*(out, seed, "preferences", "curate", f"verdicts={out / 'own-verdicts'}"), preset="tiny-rollouts"),
        *(
            stage_step(out, seed, arm, "grpo", f"base={sft}", prompts, f"steps={config.steps}", *settings)
            for arm, settings in config.arms.items()
        ),
        *(evaluation_step(out, seed, model, out / model / "hf", **sizes) for model in (START, *config.arms)),
    ]


def report(config: GRPOSizesConfig) -> str:
    """Write tables and picture; returns the tables in markdown.

    Raises:
        UserError: an arm or its evaluation has not finished.
    """
    from phimr_nemo.evaluate.evaluate import RESULTS_FILE, read_result
    from phimr_nemo.report.scores import entry, table_markdown, write_table

    seeds = list(seed_directories(config.quickstarts, needed=NEEDED))
    entries = [
        entry(
            f"{size}, {model}",
            seed,
            read_result(config.output / f"seed-{seed}" / size / f"evaluate-{model}" / RESULTS_FILE),
        )
        for size in config.sizes
        for model in (START, *config.arms)
        for seed in seeds
    ]
    runs: dict[str, list[Rows]] = {
        f"{size}, {arm}": [finished_rows(config.output / f"seed-{seed}" / size / arm) for seed in seeds]
        for size in config.sizes
        for arm in config.arms
    }
    measures = {name: figures_by_seed(each) for name, each in runs.items()}
    text = "\n".join(
        (table_markdown(write_table(config.output, entries)), measures_markdown("run", measures, DIGITS, seeds))
    )
    atomic_write_text(config.output / TABLE_MARKDOWN, text)
    plot_curves(runs, config.output / PLOT_FILE)
    return text


def main(config: GRPOSizesConfig) -> None:
    """The same reinforcement learning at several model sizes."""
    run_steps(plan(config))
    print(report(config))


if __name__ == "__main__":
    ablation_command(GRPOSizesConfig, TINY, main)()
